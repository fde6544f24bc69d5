"""What is prepared once for many solves is the same for none that differ."""

from __future__ import annotations

import gc
import math
import pickle
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import pysciml_node as psn
from pysciml_node.translation.snapshot import Snapshot
from pysciml_node.translation.watched import watches_on

pytestmark = pytest.mark.usefixtures("looks_in_both")

D = torch.float64


class Scaled(nn.Module):
    """`du/dt = -scale * rate * u`, with a number and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.scale = nn.Parameter(torch.ones(2, dtype=D)), 1.0

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.scale * self.rate * u


def solved(f: nn.Module, **options: object) -> psn.Solution:
    problem = psn.ODEProblem(f, torch.ones(2, dtype=D), (0.0, 1.0))
    return psn.solve(problem, psn.Tsit5(), rtol=1e-9, atol=1e-9, compile=True, **options)  # type: ignore[arg-type]


def decay(t: float, rate: float = 1.0) -> Tensor:
    return torch.full((2,), -rate * t, dtype=D).exp()


def test_dense_output_belongs_to_its_own_solve() -> None:
    f = Scaled()
    first, again = solved(f), solved(f)
    f.scale = 2.0
    later = solved(f)
    with torch.no_grad():
        f.rate = nn.Parameter(torch.full((2,), 3.0, dtype=D))
    last = solved(f)
    for solution, rate in ((first, 1.0), (again, 1.0), (later, 2.0), (last, 6.0)):
        torch.testing.assert_close(solution(0.37), decay(0.37, rate), rtol=1e-7, atol=1e-9)


def test_what_one_solution_settles_is_left_to_the_others() -> None:
    f = Scaled()
    solutions = [solved(f) for _ in range(3)]
    before = [x.error.detach() for x in solutions[2].step_estimates()]
    sum(x.error for x in solutions[1].step_estimates()).backward()
    f.scale = 2.0
    after = [x.error.detach() for x in solutions[2].step_estimates()]
    assert before
    assert all(map(torch.equal, before, after))


def test_a_module_is_not_kept_alive() -> None:
    f = Scaled()
    for _ in range(3):
        solved(f).u1.sum().backward()
    gone = weakref.ref(f)
    del f
    gc.collect()
    assert gone() is None


def test_a_list_of_times_may_change_between_solves() -> None:
    f, times = Scaled(), [0.25, 0.5]
    first = solved(f, saveat=times)
    times[0] = 0.125
    times.append(1.0)
    second = solved(f, saveat=times)
    assert first.t.tolist() == [0.25, 0.5]
    assert second.t.tolist() == [0.125, 0.5, 1.0]
    torch.testing.assert_close(second.u[0], decay(0.125), rtol=1e-8, atol=1e-9)


def test_an_empty_list_is_not_nothing() -> None:
    f = Scaled()
    solved(f)
    with pytest.raises(ValueError, match="saveat"):
        solved(f, saveat=[])
    solved(f, max_steps=1, throw=False)
    with pytest.raises(TypeError, match="max_steps"):
        solved(f, max_steps=True)


@pytest.mark.parametrize("grad", [False, True])
def test_fixed_steps_that_end_in_nan_are_cut_where_they_were_good(grad: bool) -> None:
    class Blowup(nn.Module):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return u * u * u * u

    problem = psn.ODEProblem(Blowup(), torch.full((2,), 5.0, dtype=D), (0.0, 4.0))
    both = []
    for compile in (False, True):
        with torch.set_grad_enabled(grad):
            both.append(
                psn.solve(
                    problem,
                    psn.Euler(),
                    controller=psn.FixedStep(),
                    dt0=0.5,
                    throw=False,
                    compile=compile,
                )
            )
    eager, native = both
    assert native.retcode is eager.retcode
    assert not native.success
    assert torch.equal(native.t, eager.t)
    assert torch.equal(native.u, eager.u)
    assert native.stats.naccept == eager.stats.naccept


@pytest.mark.parametrize("grad", [False, True])
def test_states_that_lie_apart_or_negated(grad: bool) -> None:
    f = nn.Linear(1, 1, bias=False, dtype=D)
    nn.init.constant_(f.weight, -1.0)
    apart = torch.arange(1.0, 5.0, dtype=D).reshape(4, 1)[::2]
    negated = torch.complex(torch.zeros(1, 1, dtype=D), apart[:1]).conj().imag
    assert negated.is_neg()
    for u0 in (apart, negated):
        problem = psn.ODEProblem(lambda t, u: f(u), u0, (0.0, 1.0))
        with torch.set_grad_enabled(grad):
            end = psn.solve(problem, rtol=1e-9, atol=1e-9, compile=True).u1
        torch.testing.assert_close(end.detach(), u0 * decay(1.0)[:1], rtol=1e-7, atol=1e-9)


class Chosen(nn.Module):
    """`du/dt = -rates[place] * u`, where the place is a number that the program holds."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([1.0, 2.0], dtype=D))
        self.place = torch.tensor([0])

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        place = self.place.tolist()[0]
        return -self.rates[place : place + 1] * u


def test_numbers_that_are_part_of_the_program_are_looked_at() -> None:
    f = Chosen()
    for place in (0, 0, 1, 1, 0):
        f.place.fill_(place)
        end = solved(f).u1.detach()
        torch.testing.assert_close(end, decay(1.0, place + 1.0), rtol=1e-7, atol=1e-9)


def test_each_solve_is_of_its_own_state_and_parameters() -> None:
    f = Scaled()
    for start, rate in ((1.0, 1.0), (2.0, 0.5), (3.0, 2.0)):
        with torch.no_grad():
            f.rate.fill_(rate)
        u0 = torch.full((2,), start, dtype=D)
        end = psn.solve(psn.ODEProblem(f, u0, (0.0, 1.0)), rtol=1e-9, atol=1e-9, compile=True).u1
        torch.testing.assert_close(end.detach(), start * decay(1.0, rate), rtol=1e-7, atol=1e-9)
        end = psn.solve(psn.ODEProblem(f, u0, (0.0, 2.0)), rtol=1e-9, atol=1e-9, compile=True).u1
        torch.testing.assert_close(end.detach(), start * decay(2.0, rate), rtol=1e-7, atol=1e-9)


def test_what_depends_on_the_place_of_the_solve_is_looked_at_each_time() -> None:
    f = Scaled()
    with torch.no_grad():
        for _ in range(2):
            solved(f, adjoint=psn.BacksolveAdjoint())
    with pytest.raises(psn.CompileError, match="BacksolveAdjoint"):
        solved(f, adjoint=psn.BacksolveAdjoint())
    for _ in range(2):
        solved(f)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(psn.CompileError):
        solved(f)
    with pytest.raises(RuntimeError, match=r"torch\.vmap"):
        torch.vmap(
            lambda u0: psn.solve(psn.ODEProblem(f, u0, (0.0, 1.0)), compile=True).u1  # type: ignore[arg-type]
        )(torch.ones(2, 2, dtype=D))


def test_ends_that_come_to_move_receive_their_gradients() -> None:
    f = Scaled()
    for _ in range(2):
        solved(f)
    end = torch.tensor(1.0, dtype=D, requires_grad=True)
    problem = psn.ODEProblem(f, torch.ones(2, dtype=D), (0.0, end))
    u1 = psn.solve(problem, psn.Tsit5(), rtol=1e-9, atol=1e-9, compile=True).u1
    (gradient,) = torch.autograd.grad(u1.sum(), end)
    torch.testing.assert_close(gradient, -decay(1.0).sum(), rtol=1e-7, atol=1e-9)


def test_parts_that_are_made_later_belong_to_no_transform_or_mode() -> None:
    f = Scaled()
    with torch.no_grad():
        first, second, third = solved(f), solved(f), solved(f)
    torch.func.grad(lambda x: (x * first.t.sum() + first.penalty).sum())(torch.ones((), dtype=D))
    with torch.inference_mode():
        assert second.t.tolist() == first.t.tolist()
    for made in (first.t, first.penalty, second.t):
        assert not torch._C._functorch.is_functorch_wrapped_tensor(made)
        assert not made.is_inference()
    assert third.penalties == third.integrals == {}
    assert third.trajectory.times == first.t.tolist()
    with pytest.raises(AttributeError, match="nonsense"):
        third.nonsense  # noqa: B018
    assert torch.equal(pickle.loads(pickle.dumps(third)).t, first.t)


def test_threads_solve_with_what_is_prepared() -> None:
    f = Scaled()
    expected = solved(f).u1.detach()
    with ThreadPoolExecutor(4) as threads:
        ends = list(threads.map(lambda _: solved(f).u1.detach(), range(64)))
    assert all(torch.equal(end, expected) for end in ends)


def test_functions_that_come_and_go_take_no_room() -> None:
    def solved(rate: float) -> psn.ODEProblem:
        problem = psn.ODEProblem(lambda t, u: -rate * u, torch.ones(2, dtype=D), (0, 1))
        end = psn.solve(problem, rtol=1e-9, atol=1e-9, compile=True).u1
        torch.testing.assert_close(end, decay(1.0, rate), rtol=1e-7, atol=1e-9)
        return problem

    with pytest.warns(psn.PsnWarning, match="for other numbers each time"):
        fields = deque((solved(1.0 + i / 20).f for i in range(20)), maxlen=1)
    assert len(watches_on(fields[0].__code__)) < 20  # type: ignore[attr-defined]


def test_implicit_steps_are_prepared_with_the_derivatives_that_they_need() -> None:
    f, u0 = Scaled(), torch.ones(2, dtype=D)
    problem = psn.ODEProblem(f, u0, (0.0, 1.0))

    def end(problem: psn.ODEProblem) -> Tensor:
        return psn.solve(problem, psn.Rodas5P(), rtol=1e-8, atol=1e-8, compile=True).u1  # type: ignore[no-any-return]

    for rate in (1.0, 1.0, 2.0):
        with torch.no_grad():
            f.rate.fill_(rate)
            torch.testing.assert_close(end(problem), decay(1.0, rate), rtol=1e-6, atol=1e-7)
        (gradient,) = torch.autograd.grad(end(problem).sum(), f.rate)
        torch.testing.assert_close(gradient, -decay(1.0, rate), rtol=1e-5, atol=1e-7)
    given = psn.ODEProblem(f, u0, (0.0, 1.0), jac=lambda t, u: -torch.diag(f.rate.expand(2)))
    torch.testing.assert_close(end(given), decay(1.0, 2.0), rtol=1e-6, atol=1e-7)
    other = psn.ODEProblem(f, u0, (0.0, 1.0), jac=lambda t, u: -torch.eye(2, dtype=D))
    with pytest.raises(ValueError, match="jac does not fit"):
        end(other)


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("p", [None, torch.ones(2, 1, dtype=D)])
def test_starts_that_change_in_place_after_a_solve_are_as_they_were(
    compile: bool, grad: bool, p: Tensor | None
) -> None:
    """`du/dt = -u` by one step; states and dense output are read off after the change."""

    def f(t: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        return -u if p is None else -p * u

    u0 = torch.tensor([2.0], dtype=D)
    one = psn.ODEProblem(f, u0, (0.0, 1.0), p=None if p is None else p[0])
    problem = one if p is None else psn.EnsembleProblem(one, p=p)
    with torch.set_grad_enabled(grad):
        solution = psn.solve(problem, rtol=1e-9, atol=1e-9, compile=compile)
    u0.zero_()
    for member in [solution] if p is None else solution:
        assert member.u[0].item() == 2.0
        assert member(1e-3).item() == pytest.approx(2 * math.exp(-1e-3), rel=1e-9)
        assert member.u1.item() == pytest.approx(2 * math.exp(-1), rel=1e-7)


@pytest.mark.parametrize("compile", [True, False])
def test_a_start_that_changes_in_place_leaves_its_gradient(compile: bool) -> None:
    k = torch.ones(1, dtype=D, requires_grad=True)
    u0 = 2 * k
    solution = psn.solve(
        psn.ODEProblem(lambda t, u: -u, u0, (0.0, 1.0)), rtol=1e-9, atol=1e-9, compile=compile
    )
    with torch.no_grad():
        u0.zero_()
    (gradient,) = torch.autograd.grad(solution.u[0].sum() + solution.u1.sum(), k)
    assert gradient.item() == pytest.approx(2 + 2 * math.exp(-1), rel=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("members", [0, 2])
def test_what_is_first_read_without_gradients_has_them_afterwards(
    mode: Callable[[], Any], compile: bool, members: int
) -> None:
    """`u1 = exp(-k)`, and states at three times, of which the first has no gradient."""
    k = torch.full((1,), 0.5, dtype=D, requires_grad=True)
    one = psn.ODEProblem(lambda t, u, k: -k * u, torch.ones(1, dtype=D), (0.0, 1.0), p=k)
    problem = psn.EnsembleProblem(one, p=k.expand(members, 1)) if members else one
    steps: Any = {"controller": psn.FixedStep(), "dt0": 0.5, "saveat": None}
    whole = psn.solve(problem, compile=compile, **steps)
    saved = psn.solve(problem, compile=compile, **{**steps, "saveat": [0.0, 0.5, 1.0]})
    with mode():
        for solution in (whole, saved):
            shown = [x.u[-1] for x in solution] if members else [solution.u[-1]]
            assert all(x.item() == pytest.approx(math.exp(-0.5), rel=1e-4) for x in shown)
            assert solution.u1.numel() == max(members, 1)
        assert saved.u.numel() == 3 * max(members, 1)
    expected = max(members, 1) * (-0.5 * math.exp(-0.25) - math.exp(-0.5))
    for solution in (whole, saved):
        every = [x.u for x in solution] if members else [solution.u]
        (gradient,) = torch.autograd.grad(sum(x.sum() for x in every), k, retain_graph=True)
        assert gradient.item() == pytest.approx(expected, rel=1e-3)
        (gradient,) = torch.autograd.grad(solution.u1.sum(), k, retain_graph=True)
        assert gradient.item() == pytest.approx(-max(members, 1) * math.exp(-0.5), rel=1e-3)
    (gradient,) = torch.autograd.grad(saved.u.sum(), k)
    assert gradient.item() == pytest.approx(expected, rel=1e-3)


def test_a_thread_that_adds_tensors_during_a_translation_does_not_exchange_them() -> None:
    held: list[Tensor] = []
    rates = [torch.ones(1, dtype=D)]  # behind the other list, so that its number changes

    def f(t: Tensor, u: Tensor) -> Tensor:
        return held[0] if len(held) > 9 else -rates[0] * u

    looks, look = [0], Snapshot.of

    def of(x: Any) -> Snapshot:
        looks[0] += 1
        if looks[0] == 4:  # when the field has been translated
            held.append(torch.full((1,), 7.0, dtype=D))
        return look(x)

    problem = psn.ODEProblem(f, torch.ones(1, dtype=D), (0.0, 1.0))
    with (
        mock.patch.object(Snapshot, "of", of),
        pytest.raises(psn.CompileError, match="other tensors than when"),
    ):
        psn.solve(problem, rtol=1e-9, atol=1e-9, compile=True)
    end = psn.solve(problem, rtol=1e-9, atol=1e-9, compile=True).u1
    assert end.item() == pytest.approx(math.exp(-1), rel=1e-7)


def test_memory_of_native_code_is_not_among_what_a_field_reaches() -> None:
    # Other threads take it and give it back while the field is looked at.
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def solved(length: float) -> psn.Solution:
        problem = psn.ODEProblem(
            lambda t, u: -u * weight, torch.ones(2, dtype=torch.float64), (0, length)
        )
        return psn.solve(problem, psn.Tsit5(), compile=True, engine="torch")

    reference = solved(1.0)

    def field(t: Tensor, u: Tensor) -> Tensor:
        return reference.u1 - u

    before = len(Snapshot.of(field).tensors)
    solved(30.0)
    assert len(Snapshot.of(field).tensors) == before


def test_a_parameter_that_has_a_tensor_for_an_attribute() -> None:
    f = Scaled()
    f.rate.mask = torch.full((2,), 7.0, dtype=D)  # type: ignore[attr-defined]
    for _ in range(3):
        torch.testing.assert_close(solved(f).u1.detach(), decay(1.0), rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        f.rate.fill_(2.0)
    torch.testing.assert_close(solved(f).u1.detach(), decay(1.0, 2.0), rtol=1e-7, atol=1e-9)


class _Doubled(Scaled):
    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return 2 * super().forward(t, u)


def test_an_object_that_becomes_one_of_another_class_is_another_field() -> None:
    f = Scaled()
    for _ in range(2):
        torch.testing.assert_close(solved(f).u1.detach(), decay(1.0), rtol=1e-7, atol=1e-9)
    f.__class__ = _Doubled
    torch.testing.assert_close(solved(f).u1.detach(), decay(1.0, 2.0), rtol=1e-7, atol=1e-9)


class _Ordered(nn.Module):
    """`du/dt` is what is left of 0, after `x + 1` and `2 x` or the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, tuple[float, float]] = {"shift": (1.0, 1.0), "scale": (2.0, 0.0)}

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        x = 0 * u
        for scale, shift in self.steps.values():
            x = scale * x + shift
        return x


def test_the_order_of_a_dict_matters() -> None:
    f = _Ordered()
    for _ in range(2):
        assert solved(f).u1.tolist() == pytest.approx([3.0, 3.0])
    f.steps["shift"] = f.steps.pop("shift")
    assert solved(f).u1.tolist() == pytest.approx([2.0, 2.0])


class _Rows(nn.Module):
    """`du/dt` is the number of rows of an array, as its sum over them tells."""

    def __init__(self) -> None:
        super().__init__()
        self.array = np.ones((1, 3))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return 0 * u + torch.from_numpy(self.array).sum(0)[0]


def test_an_array_that_gets_another_shape_in_place() -> None:
    f = _Rows()
    for _ in range(2):
        assert solved(f).u1.tolist() == pytest.approx([2.0, 2.0])
    f.array.shape = (3, 1)
    assert solved(f).u1.tolist() == pytest.approx([4.0, 4.0])


class _Negative(TorchFunctionMode):
    """`relu` comes out negative."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        return -out if getattr(func, "__name__", "") == "relu" else out


class _Growing(nn.Module):
    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.relu(u)


@pytest.mark.parametrize("known", [True, False])
def test_a_mode_that_changes_operations_is_refused(known: bool) -> None:
    f = _Growing()
    if known:
        solved(f)
    with _Negative():
        with pytest.raises(psn.CompileError, match="_Negative"):
            solved(f)
        problem = psn.ODEProblem(f, torch.ones(2, dtype=D), (0.0, 1.0))
        slow = psn.solve(problem, rtol=1e-9, atol=1e-9, engine="torch").u1
    torch.testing.assert_close(slow, decay(1.0), rtol=1e-7, atol=1e-9)
    # Nothing of it is left afterwards.
    torch.testing.assert_close(solved(f).u1, decay(1.0, -1.0), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("compiled", [True, False])
def test_times_are_those_of_the_solve_whatever_becomes_of_its_ends(compiled: bool) -> None:
    start, end = (torch.tensor(t, dtype=D) for t in (0.0, 1.0))
    asked = torch.tensor([0.25, 0.75], dtype=D, requires_grad=True)
    problem = psn.ODEProblem(Scaled(), torch.ones(2, dtype=D), (start, end))
    how: Any = {"rtol": 1e-9, "atol": 1e-9, "compile": compiled, "engine": "torch"}
    every, some = psn.solve(problem, **how), psn.solve(problem, saveat=asked, **how)
    with torch.no_grad():
        start.fill_(0.5)
        end.fill_(3.0)
        asked.fill_(0.125)
    assert every.t[[0, -1]].tolist() == [0.0, 1.0]
    assert some.t.tolist() == [0.25, 0.75]
    torch.testing.assert_close(every(0.25).detach(), decay(0.25), rtol=1e-7, atol=1e-9)


def test_parameters_that_were_exchanged_are_not_kept() -> None:
    f, gone = Scaled(), []
    for i in range(4):
        f.rate = nn.Parameter(torch.ones(2, dtype=D))
        gone.append(weakref.ref(f.rate))
        solved(f, dtmax=0.5 + 0.1 * i)
    gc.collect()
    # What has made the program keeps the first, and the last is there.
    assert gone[1]() is gone[2]() is None
