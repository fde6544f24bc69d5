"""Native solves that were before leave what the first of them does, with gradients and without."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import pysciml_node as psn
from pysciml_node.torch_engine.native import at_once, departure
from pysciml_node.torch_engine.native.compiler import available

pytestmark = [
    pytest.mark.skipif(not available()[0], reason=available()[1]),
    pytest.mark.skipif(
        not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="there is no lock"
    ),
]


class Decay(nn.Module):
    """`u' = -k u`."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor([0.5, 2.0], dtype=torch.float64))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The derivative at `u`, `(B, 2)`."""
        return -self.k * u


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The solves that were put together, which those without gradients are when something looks."""
    solves: list[Any] = []
    make = at_once.NativeSolve

    def noted(*how: Any) -> Any:
        solves.append(make(*how))
        return solves[-1]

    monkeypatch.setattr(at_once, "NativeSolve", noted)
    return solves


def start(rows: int = 3) -> Tensor:
    return torch.arange(1.0, 2 * rows + 1).double().reshape(rows, 2)


def solved(
    field: Any, u0: Tensor, algorithm: Any = None, recorded: bool = False, **how: Any
) -> psn.Solution:
    options = {"rtol": 1e-9, "atol": 1e-9, **how}
    with torch.set_grad_enabled(recorded):
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        return psn.solve(problem, algorithm, compile=True, engine="torch", **options)


def expect_decay(solution: psn.Solution, field: Decay, u0: Tensor) -> None:
    expected = u0 * torch.exp(-field.k.detach())
    torch.testing.assert_close(solution.u1.detach(), expected, rtol=1e-7, atol=1e-9)


WAYS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "saved times": {"saveat": [0.0, 0.25, 0.3, 1.0]},
    "steps of one size": {"controller": psn.FixedStep(), "dt0": 1 / 32},
    "more steps than there is room for": {"controller": psn.FixedStep(), "dt0": 1 / 300},
    "steps beyond all room": {"controller": psn.FixedStep(), "dt0": 1 / 4000},
    "Rosenbrock": {"algorithm": psn.Rodas5P()},
    "two methods": {"algorithm": psn.AutoTsit5()},
}


@pytest.mark.parametrize("way", WAYS)
def test_they_leave_what_those_with_gradients_do(way: str, made: list[Any]) -> None:
    field = Decay()
    for count in range(4):
        u0 = start() + count
        expected = solved(field, u0, recorded=True, **WAYS[way])
        before = len(made)
        found = solved(field, u0, **WAYS[way])
        if count > 1 and way not in ("steps beyond all room", "two methods"):
            assert len(made) == before
        expect_decay(found, field, u0)
        assert (found.retcode, found.stats) == (expected.retcode, expected.stats)
        assert found.event is None
        assert list(map(str, found.trajectory.errors)) == list(map(str, expected.trajectory.errors))
        for name in ("u1", "t", "u"):
            x = getattr(found, name)
            assert not x.requires_grad
            assert torch.equal(x, getattr(expected, name).detach())
        close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(found(0.3).detach(), expected(0.3).detach(), **close)
        for again in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
            assert again.stats == found.stats
            assert torch.equal(again.u, found.u)


def test_a_solve_may_take_more_steps_than_the_one_before() -> None:
    field, u0 = Decay(), start()
    for count in (4, 4, 30, 2, 2, 90, 90, 200, 3):
        how: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 1 / count}
        solution, (bar, _) = graded(field, u0, algorithm=psn.Euler(), **how)
        found = solved(field, u0, psn.Euler(), **how)
        factor = 1 - field.k.detach() / count
        expected = torch.stack([u0 * factor**n for n in range(count + 1)])
        torch.testing.assert_close(found.u, expected, rtol=1e-12, atol=0)
        assert torch.equal(found.u, solution.u.detach())
        ends = expected[-1].cos() * factor**count
        whole = sum(2 * u0 * factor ** (2 * n) for n in range(count + 1))
        torch.testing.assert_close(bar, whole + ends, rtol=1e-12, atol=0)


def test_a_solve_in_many_turns_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    u0 = start()
    expected = solved(Decay(), u0)
    monkeypatch.setattr(departure, "TURN", 0.0)
    field = Decay()
    for _ in range(3):
        found = solved(field, u0)
        assert torch.equal(found.u, expected.u)
        assert found.stats == expected.stats


def test_a_state_that_is_changed_afterwards_changes_no_other() -> None:
    field, u0 = Decay(), start()
    for _ in range(3):
        solution = solved(field, u0)
        expected = solution.u1.clone()
        solution.u1.zero_()
        assert torch.equal(solution.u[-1], expected)


def test_what_has_changed_since_is_named() -> None:
    field, u0 = Decay(), start()
    solutions = [solved(field, u0) for _ in range(3)]
    with torch.no_grad():
        field.k.mul_(2)
    for solution in solutions:
        with pytest.raises(RuntimeError, match="k"):
            solution(0.5)


def test_tensors_that_lie_otherwise_are_read() -> None:
    field = Decay()
    for count in range(6):
        u0 = start(4) + count
        if count == 2:
            u0 = u0.T.contiguous().T
        if count == 4:
            field.k.data = torch.tensor([[0.5, 1.0], [2.0, 3.0]]).double()[:, 0]
        expect_decay(solved(field, u0), field, u0)


def test_modes_are_seen_at_each_solve() -> None:
    field, u0 = Decay(), start()
    for count in range(6):
        with torch.inference_mode(count % 2 == 1):
            state = u0 + count
            solution = solved(field, state)
        assert not solution.u1.is_inference()
        expect_decay(solution, field, u0 + count)
        # One that was made there, solved outside.
        expect_decay(solved(field, state), field, u0 + count)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(psn.CompileError, match="autocast"):
        solved(field, u0)
    expect_decay(solved(field, u0), field, u0)


def test_failures_are_those_of_other_solves() -> None:
    field, u0 = Decay(), start()
    for _ in range(3):
        with pytest.raises(psn.SolverFailure, match="max_steps") as failed:
            solved(field, u0, max_steps=5)
        assert failed.value.solution.stats.naccept + failed.value.solution.stats.nreject == 5
        assert not solved(field, u0, max_steps=5, throw=False).success
        expect_decay(solved(field, u0), field, u0)
        with pytest.raises(psn.SolverFailure):
            solved(field, u0 * torch.nan)


def test_threads_have_memory_of_their_own() -> None:
    field = Decay()

    def run(count: int) -> bool:
        u0 = start(16) + count
        return all(
            torch.allclose(solved(field, u0).u1, u0 * torch.exp(-field.k.detach()), rtol=1e-7)
            for _ in range(20)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(8)))


def test_a_state_of_another_shape_is_not_read() -> None:
    """C wrote beyond its end."""
    field, u0 = Decay(), start()
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    for recorded in (False, False, False, True):
        with torch.set_grad_enabled(recorded):
            psn.solve(problem, compile=True, engine="torch", rtol=1e-9, atol=1e-9)
    u0.data = start(1)
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded), pytest.raises(ValueError, match="u0 must have the"):
            psn.solve(problem, compile=True, engine="torch", rtol=1e-9, atol=1e-9)


class Wrapped(Tensor):
    """One that has its numbers in another tensor, and none at its own address."""

    within: Tensor

    @staticmethod
    def __new__(cls, x: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)  # type: ignore[attr-defined]
        made.within = x
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = tree_map_only(cls, lambda x: x.within, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, function(*given[0], **given[1]))


@pytest.mark.parametrize("wrap", [Wrapped, lambda x: FakeTensorMode().from_tensor(x)])
@pytest.mark.parametrize("recorded", [False, True])
def test_tensors_without_memory_are_not_read(wrap: Any, recorded: bool) -> None:
    """C read at address 0, and the process ended: also where such a solve was before."""
    field, u0 = Decay(), start()
    for _ in range(3):
        expect_decay(solved(field, u0, recorded=recorded), field, u0)
    with pytest.raises(psn.CompileError, match="tensors of the class"):
        solved(field, wrap(u0), recorded=recorded)
    ensemble = psn.EnsembleProblem(
        psn.ODEProblem(field, start(), (0.0, 1.0)), u0=wrap(torch.stack([start(), start()]))
    )
    with pytest.raises(psn.CompileError, match="tensors of the class"):
        psn.solve(ensemble, compile=True, engine="torch")
    expect_decay(solved(field, u0, recorded=recorded), field, u0)


def graded(field: Decay, u0: Tensor, **how: Any) -> tuple[psn.Solution, list[Tensor]]:
    """A solve, and gradients of a sum over all of its states."""
    algorithm = how.pop("algorithm", None)
    u0 = u0.detach().requires_grad_()
    solution = solved(field, u0, algorithm, recorded=True, **how)
    loss = solution.u.square().sum() + solution.u1.sin().sum()
    return solution, list(torch.autograd.grad(loss, [u0, *field.parameters()]))


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[psn.Solution, list[Tensor]]]:
    """The same by a solve that none was before."""

    def run(*how: Any, **options: Any) -> tuple[psn.Solution, list[Tensor]]:
        with monkeypatch.context() as patched:
            patched.setattr(at_once, "prepared_again", lambda *_: None)
            return graded(*how, **options)

    return run


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_first_solve(way: str, first: Any) -> None:
    field = Decay()
    for count in range(4):
        u0 = start() + count
        solution, found = graded(field, u0, **WAYS[way])
        before, expected = first(field, u0, **WAYS[way])
        assert torch.equal(solution.u, before.u)
        # What is evaluated again depends on how many steps the solve before took.
        costs = [{**x.stats.asdict(), "nfe_backward": None} for x in (solution, before)]
        assert costs[0] == costs[1]
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)
            assert not x.requires_grad


class Apart(Decay):
    """The same for parts of a state: `u' = -k u`, `v' = -sum(u)`."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, t: Tensor, state: Any) -> Any:  # type: ignore[override]
        """The derivatives, in the structure of the state."""
        u, _ = state.values() if self.kind is dict else state
        return made_of(self.kind, -self.k * u, -u.sum().reshape(1))


class Named(NamedTuple):
    """A state in parts."""

    u: Tensor
    v: Tensor


def made_of(kind: Any, u: Tensor, v: Tensor) -> Any:
    return {"u": u, "v": v} if kind is dict else (u, v) if kind is tuple else Named(u, v)


@pytest.mark.parametrize("kind", [tuple, dict, Named])
@pytest.mark.parametrize("saveat", [None, [0.5, 1.0]])
def test_states_may_be_in_parts(kind: Any, saveat: Any, made: list[Any]) -> None:
    field = Apart(kind)
    k = field.k.detach()
    for count in range(4):
        u0, v0 = (start() + count).requires_grad_(), torch.ones(1).double()
        state = made_of(kind, u0, v0)
        before = len(made)
        plain = solved(field, state, saveat=saveat)
        solution = solved(field, state, recorded=True, saveat=saveat)
        assert count < 2 or len(made) == before
        parts = solution.u1.values() if kind is dict else solution.u1
        u, v = parts
        with torch.no_grad():
            expected = u0 * torch.exp(-k), v0 - (u0 * (1 - torch.exp(-k)) / k).sum()
        torch.testing.assert_close((u, v), expected, rtol=1e-7, atol=1e-9, check_device=False)
        (bar,) = torch.autograd.grad(v, u0, retain_graph=True)
        torch.testing.assert_close(bar, ((torch.exp(-k) - 1) / k).expand_as(bar), rtol=1e-7, atol=0)
        for x in (plain, solution):
            assert type(x.u1) is type(x.u) is type(state)
        saved, others = solution.u, plain.u
        pairs = zip(*(x.values() if kind is dict else x for x in (saved, others)), strict=True)
        for x, y in pairs:
            assert len(x) == (solution.stats.naccept + 1 if saveat is None else 2)
            assert torch.equal(x.detach(), y)
            assert not y.requires_grad


@pytest.mark.parametrize("asked", [False, True])
def test_sweeps_are_counted_whenever_costs_are_asked_for(asked: bool) -> None:
    field, u0 = Decay(), start().requires_grad_()
    for _ in range(3):
        solution = solved(field, u0, recorded=True)
        if asked:
            assert (solution.stats.nvjp, solution.stats.naccept_backward) == (0, 0)
        one = torch.autograd.grad(solution.u1.sum(), u0, retain_graph=True)
        once = copy.copy(solution.stats) if asked else None
        two = torch.autograd.grad(solution.u1.sum(), u0)
        assert torch.equal(one[0], two[0])
        assert solution.stats.naccept_backward == 2 * solution.stats.naccept
        assert once is None or solution.stats.nvjp == 2 * once.nvjp


def test_gradients_go_to_what_needs_them() -> None:
    field, u0 = Decay(), start()
    for _ in range(3):
        solution = solved(field, u0, recorded=True)
        (bar,) = torch.autograd.grad(solution.u1.sum(), [field.k])
        torch.testing.assert_close(bar, -(u0 * torch.exp(-field.k.detach())).sum(0))
    field.k.requires_grad_(False)
    assert not solved(field, u0, recorded=True).u1.requires_grad
    for _ in range(3):
        moved = u0.clone().requires_grad_()
        (bar,) = torch.autograd.grad(solved(field, moved, recorded=True).u1.sum(), [moved])
        torch.testing.assert_close(bar, torch.exp(-field.k).expand_as(bar))


def test_an_initial_state_that_is_learned_receives_its_gradient() -> None:
    field, u0 = Decay(), nn.Parameter(start())
    for _ in range(4):
        solution = solved(field, u0, recorded=True)
        assert type(solution.u1) is Tensor
        (bar,) = torch.autograd.grad(solution.u1.sum(), u0)
        assert type(bar) is Tensor
        torch.testing.assert_close(bar, torch.exp(-field.k.detach()).expand_as(bar))


@pytest.mark.parametrize(
    "lay",
    [
        lambda x: x.T.contiguous().T,
        lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
        lambda x: torch.stack((x, x), dim=-1)[..., 0],
    ],
)
def test_cotangents_may_lie_in_any_way(lay: Callable[[Tensor], Tensor]) -> None:
    field, bar = Decay(), torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.25, 4.0]]).double()
    for _ in range(3):
        solution = solved(field, start(), recorded=True)
        (expected,) = torch.autograd.grad(solution.u1, field.k, bar, retain_graph=True)
        (found,) = torch.autograd.grad(solution.u1, field.k, lay(bar))
        assert torch.equal(found, expected)


def test_batches_of_cotangents_and_second_derivatives_are_as_of_other_solves() -> None:
    field = Decay()
    for _ in range(3):
        solution = solved(field, start(), recorded=True)
        bars = torch.eye(6, dtype=torch.float64).reshape(6, 3, 2)
        (rows,) = torch.autograd.grad(
            solution.u1, field.k, bars, retain_graph=True, is_grads_batched=True
        )
        for bar, row in zip(bars, rows, strict=True):
            (expected,) = torch.autograd.grad(solution.u1, field.k, bar, retain_graph=True)
            torch.testing.assert_close(row, expected, rtol=1e-12, atol=0)
        (bar,) = torch.autograd.grad(solution.u1.sum(), field.k, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(bar.sum(), field.k)


def test_states_and_parameters_that_were_changed_since_are_refused() -> None:
    field, u0 = Decay(), start().requires_grad_()
    for changed in ("k", "states"):
        for _ in range(3):
            solution = solved(field, u0, recorded=True)
            with torch.no_grad():
                if changed == "k":
                    field.k.mul_(1.5)
                else:
                    solution.trajectory.flat_states[0].mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(solution.u1.sum(), u0)


def test_they_leave_nothing_to_the_collector() -> None:
    field = Decay()

    def run() -> None:
        solution, _ = graded(field, start())
        assert solution.stats.nvjp

    for _ in range(3):
        run()
    while gc.collect():
        pass  # what others have left goes in turns: a graph, then what it has held
    gc.disable()
    try:
        for _ in range(3):
            run()
        assert gc.collect() == 0
    finally:
        gc.enable()


class Many(nn.Module):
    """`u' = -(k_1 + ... + k_n) u`, of more tensors than C is given at once."""

    def __init__(self, count: int) -> None:
        super().__init__()
        one = torch.tensor(1.0 / count, dtype=torch.float64)
        self.ks = nn.ParameterList([nn.Parameter(one.clone()) for _ in range(count)])

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The derivative at `u`."""
        return -torch.stack([*self.ks]).sum() * u


@pytest.mark.parametrize("count", [110, 140])
def test_fields_may_have_many_tensors(count: int) -> None:
    field, u0 = Many(count), torch.ones(1, dtype=torch.float64)
    for _ in range(3):
        solution = solved(field, u0, recorded=True)
        bars = torch.autograd.grad(solution.u1.sum(), [*field.parameters()])
        for bar in bars:
            torch.testing.assert_close(bar, -torch.exp(-u0)[0], rtol=1e-7, atol=0)
