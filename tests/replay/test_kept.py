"""Graphs of steps that a forward solve keeps for its backward sweep."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pysciml_node as psn
from pysciml_node.compat.torchdiffeq import odeint_adjoint

D = torch.float64
ALGORITHMS = ("Euler", "Midpoint", "Heun", "BS3", "RK4", "Tsit5", "DP5", "DP8", "Vern7", "Vern9")
KEPT, REPLAYED = psn.DiscreteAdjoint(), psn.DiscreteAdjoint(memory=0)


class Field(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(3, 8, dtype=D), nn.Linear(8, 3, dtype=D)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(u) + torch.sin(5 * t)))
        return out


def start() -> Tensor:
    return torch.linspace(-1, 1, 6, dtype=D).reshape(2, 3).requires_grad_()


def solve(
    f: Callable[[Tensor, Tensor], Tensor], u0: Tensor, adjoint: Any, **options: Any
) -> psn.Solution:
    options = {"rtol": 1e-4, "atol": 1e-4, **options}
    algorithm = options.pop("algorithm", psn.Tsit5())
    return psn.solve(
        psn.ODEProblem(f, u0, options.pop("tspan", (0.0, 1.0))),
        algorithm,
        adjoint=adjoint,
        engine="torch",
        **options,
    )


def gradients(field: Field, adjoint: Any, **options: Any) -> tuple[list[Tensor], psn.Stats]:
    u0 = start()
    solution = solve(field, u0, adjoint, **options)
    weights = torch.sin(torch.arange(solution.u.numel(), dtype=D)).reshape(solution.u.shape)
    loss = (solution.u * weights).sum()
    return list(torch.autograd.grad(loss, [u0, *field.parameters()])), solution.stats


WAYS: dict[str, dict[str, Any]] = {
    "every step": {},
    "a grid": {"saveat": torch.linspace(0, 1, 30, dtype=D)},
    "a stop": {"tstops": [0.35], "saveat": [0.2, 0.35, 0.8]},
    "an early time": {"saveat": [0.3]},
    "backward": {"tspan": (1.0, -0.5), "saveat": [0.4, -0.2]},
    "fixed steps": {"controller": psn.FixedStep(), "dt0": 0.07, "saveat": [0.5, 1.0]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_are_those_of_a_replay(name: str, way: str) -> None:
    options = {"algorithm": getattr(psn, name)(), **WAYS[way]}
    if name in ("Euler", "Midpoint", "Heun"):
        options |= {"rtol": 1e-2, "atol": 1e-2}
    field = Field()
    kept, stats = gradients(field, KEPT, **options)
    replayed, again = gradients(field, REPLAYED, **options)
    assert stats.naccept == again.naccept
    assert stats.naccept_backward == again.naccept_backward
    assert stats.nfe_backward == 0 < again.nfe_backward
    assert stats.nvjp <= again.nvjp
    for one, other in zip(kept, replayed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("way", WAYS)
def test_some_steps_are_kept_and_others_are_taken_again(way: str) -> None:
    field, counts = Field(), []
    expected, _ = gradients(field, REPLAYED, rtol=1e-7, atol=1e-7, **WAYS[way])
    for memory in (0, 2**17, 2**18, 2**19, 2**30):
        adjoint = psn.DiscreteAdjoint(memory=memory)
        found, stats = gradients(field, adjoint, rtol=1e-7, atol=1e-7, **WAYS[way])
        counts.append(stats.nfe_backward)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert len(set(counts)) > 3


def test_states_of_several_parts_and_complex_ones() -> None:
    rate = torch.tensor(0.3 + 0.8j, dtype=torch.complex128, requires_grad=True)
    found = []
    for adjoint in (KEPT, REPLAYED):
        u0 = torch.tensor([1.0 + 0.5j], dtype=torch.complex128, requires_grad=True)
        problem = psn.ODEProblem(
            lambda t, u: {"a": -rate * u["a"] * u["b"], "b": rate.conj() * u["a"]},
            {"a": u0, "b": u0 + 1},
            (0.0, 1.0),
        )
        solution = psn.solve(problem, adjoint=adjoint, saveat=[0.3, 0.7, 1.0], engine="torch")
        loss = solution.u["a"].abs().sum() + solution.u["b"].real.sum()
        found.append(torch.autograd.grad(loss, (u0, rate)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_a_constant_field_and_one_without_inputs() -> None:
    constant = torch.full((2, 3), 0.5, dtype=D)
    for field, slope in ((lambda t, u: constant, 1.0), (lambda t, u: -u, math.exp(-1))):
        u0 = start()
        solution = solve(field, u0, KEPT, rtol=1e-9, atol=1e-9)
        (found,) = torch.autograd.grad(solution.u1.sum(), u0)
        torch.testing.assert_close(found, torch.full_like(found, slope), rtol=1e-7, atol=0)


def test_an_event_cuts_the_last_step() -> None:
    """`u = exp(rate t)` reaches 2 at `log(2) / rate`; at that step's end `u` grows with `rate`."""
    rate = torch.tensor(0.8, dtype=D, requires_grad=True)
    found = []
    for adjoint in (KEPT, REPLAYED):
        solution = solve(
            lambda t, u: rate * u,
            torch.ones(1, dtype=D),
            adjoint,
            tspan=(0.0, 5.0),
            rtol=1e-9,
            atol=1e-9,
            events=[psn.Event(lambda t, u: u[0] - 2)],
        )
        assert solution.event_t is not None
        found.append(torch.autograd.grad(solution.event_t, rate)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=0)
    assert found[0].item() == pytest.approx(-math.log(2) / 0.8**2, rel=1e-7)


def test_a_second_sweep_has_the_same_gradients_to_the_last_bit() -> None:
    field, u0 = Field(), start()
    solution = solve(field, u0, KEPT)
    inputs = [u0, *field.parameters()]
    first = torch.autograd.grad(solution.u1.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(solution.u1.sum(), inputs)
    assert solution.stats.nfe_backward == 0
    assert all(map(torch.equal, first, second))


def test_a_batch_of_cotangents_gives_the_rows_of_a_jacobian() -> None:
    field, u0 = Field(), start()
    u1 = solve(field, u0, KEPT).u1.flatten()
    (rows,) = torch.autograd.grad(u1, u0, torch.eye(6, dtype=D), is_grads_batched=True)
    u1 = solve(field, u0, REPLAYED).u1.flatten()
    for i, row in enumerate(rows):
        (expected,) = torch.autograd.grad(u1[i], u0, retain_graph=True)
        torch.testing.assert_close(row, expected, rtol=1e-11, atol=1e-13)


def test_nothing_is_kept_where_nothing_needs_gradients() -> None:
    seen: list[bool] = []

    def field(t: Tensor, u: Tensor) -> Tensor:
        seen.append(u.requires_grad)
        return -u

    solve(field, torch.ones(1, dtype=D), KEPT)
    # The first evaluation looks for tensors that do.
    assert not any(seen[1:])


class Counting(nn.Module):
    """Keeps weak references to what its graphs save for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0, dtype=D))
        self.held: list[weakref.ref[Tensor]] = []

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        saved = torch.ones(1, dtype=D)
        self.held.append(weakref.ref(saved))
        out: Tensor = self.weight * torch.sin(20 * t) * u * saved
        return out


def alive(field: Counting) -> int:
    gc.collect()
    return sum(reference() is not None for reference in field.held)


def test_graphs_of_rejected_steps_go_at_once_and_the_others_with_the_sweep() -> None:
    field, u0 = Counting(), start()
    solution = solve(field, u0, KEPT, rtol=1e-6, atol=1e-6, dt0=0.5)
    stats = solution.stats
    assert stats.nreject > 0
    # Six evaluations a step, and the first one.
    assert alive(field) == 6 * stats.naccept + 1
    (found,) = torch.autograd.grad(solution.u1.sum(), field.weight)
    assert alive(field) == 0
    expected = (1 - math.cos(20)) / 20
    assert found.item() == pytest.approx(
        expected * math.exp(3 * expected) * u0.sum().item(), abs=1e-4
    )


def test_a_solve_and_its_sweep_leave_nothing_to_the_garbage_collector() -> None:
    field, u0 = Field(), start()
    for adjoint in (KEPT, REPLAYED):
        gc.collect()
        gc.disable()
        try:
            solve(field, u0, adjoint).u1.sum().backward()
            left = gc.collect()
        finally:
            gc.enable()
        assert left == 0


@pytest.mark.parametrize("adjoint", [KEPT, REPLAYED, psn.InterpolatingAdjoint()])
def test_threads_go_backward_through_one_solve(adjoint: Any) -> None:
    field, u0 = Field(), start()
    u1 = solve(field, u0, adjoint).u1

    def pull(_: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(u1.sum(), [u0, *field.parameters()], retain_graph=True)

    expected = pull(0)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(pull, range(12)):
            assert all(map(torch.equal, found, expected))


def test_memory_bounds_what_is_kept() -> None:
    for memory, most in ((0, 0), (2**16, 2**16 // 4000), (2**17, 2**17 // 4000)):
        field = Counting()
        solution = solve(field, start(), psn.DiscreteAdjoint(memory=memory), rtol=1e-7, atol=1e-7)
        assert solution.stats.naccept > 20
        assert alive(field) <= most


def test_solves_inside_of_a_field_keep_no_graphs_of_their_own() -> None:
    """Beside those of the solve around them, whose number of evaluations would multiply them."""
    inner = Counting()

    def field(t: Tensor, u: Tensor) -> Tensor:
        return solve(inner, u, KEPT).u1 - u

    u0 = start()
    solution = solve(field, u0, KEPT)
    assert alive(inner) <= solution.stats.nfe
    found = torch.autograd.grad(solution.u1.sum(), (u0, inner.weight))
    # The inner solve is a factor, which makes the outer one an exponential.
    factor = math.exp(3 * (1 - math.cos(20)) / 20)
    growth = math.exp(factor - 1)
    torch.testing.assert_close(found[0], torch.full_like(found[0], growth), rtol=1e-2, atol=0)
    # A solve of its own keeps them.
    assert gradients(Field(), KEPT)[1].nfe_backward == 0


def test_a_changed_parameter_is_refused_in_the_words_of_a_replay() -> None:
    field = Field()
    solution = solve(field, start(), KEPT)
    with torch.no_grad():
        field.second.bias.mul_(2)
    with pytest.raises(RuntimeError, match=r"second\.bias has been changed in place"):
        solution.u1.sum().backward()


def test_a_change_to_equal_values_is_refused_where_a_kept_graph_reads_them() -> None:
    """Torch counts it, and asks no more."""
    for name, refused in (("second", True), ("first", False)):
        field = Field()
        part = field.second.weight if refused else field.first.bias
        part.requires_grad_(False)
        u0 = start()
        solution = solve(field, u0, KEPT)
        with torch.no_grad():
            part.mul_(1)
        if refused:
            with pytest.raises(RuntimeError, match=rf"{name}\.weight has been .* equal values"):
                solution.u1.sum().backward()
            solution = solve(field, u0, REPLAYED)
        solution.u1.sum().backward()
        (expected,) = torch.autograd.grad(solve(field, u0, KEPT).u1.sum(), u0)
        torch.testing.assert_close(u0.grad, expected, rtol=1e-11, atol=1e-13)


def test_a_change_that_torch_does_not_count_is_refused() -> None:
    field = Field()
    solution = solve(field, start(), KEPT)
    field.second.bias.data.mul_(2)
    with pytest.raises(RuntimeError, match="could not reproduce the solve"):
        solution.u1.sum().backward()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_change_that_the_start_does_not_show_is_refused(name: str) -> None:
    """The derivative `a b t u` vanishes at `t = 0`, whatever `a` is, and `b`'s gradient has it."""
    a, b = (nn.Parameter(torch.tensor(x, dtype=D)) for x in (0.7, 0.3))
    algorithm, tolerance = getattr(psn, name)(), 1e-2 if name in ALGORITHMS[:3] else 1e-6
    solution = solve(
        lambda t, u: a * b * t * u,
        start(),
        KEPT,
        algorithm=algorithm,
        rtol=tolerance,
        atol=tolerance,
    )
    a.data.mul_(2)
    with pytest.raises(RuntimeError, match="could not reproduce the solve"):
        solution.u1.sum().backward()


@pytest.mark.parametrize("name", ["Euler", "RK4", "Tsit5"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_change_that_neither_end_shows_is_refused(name: str, shared: bool) -> None:
    """`du/dt = a c(t) u` with `c` from a table, of which the ends read other entries."""
    a, table = nn.Parameter(torch.tensor(0.7, dtype=D)), torch.ones(10, dtype=D)

    def field(t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(a * u * table[min(int(10 * t), 9)])

    steps: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.1}
    for adjoint in (KEPT, REPLAYED, psn.InterpolatingAdjoint(), psn.GaussAdjoint()):
        solution = solve(field, start(), adjoint, algorithm=getattr(psn, name)(), **steps)
        if shared:
            table.numpy()[5] += 2
        else:
            table.data[5] += 2
        seen = "could not reproduce the solve" if adjoint.discrete else "has been changed in place"
        with pytest.raises(RuntimeError, match=seen):
            solution.u1.sum().backward()


def test_what_the_field_does_not_use_may_change_and_parts_may_be_replaced() -> None:
    field, u0 = Field(), start()
    field.register_buffer("other", torch.zeros(1, dtype=D))
    old = list(field.parameters())
    expected = torch.autograd.grad(solve(field, u0, REPLAYED).u1.sum(), [u0, *old])
    solution = solve(field, u0, KEPT)
    field.other.add_(1)
    field.second = nn.Linear(8, 3, dtype=D)
    found = torch.autograd.grad(solution.u1.sum(), [u0, *old])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("adjoint", [KEPT, REPLAYED, psn.InterpolatingAdjoint()])
def test_parameters_may_be_frozen_behind_the_solve(adjoint: Any) -> None:
    """`u1 = u0 exp(a b)`: what is frozen still has its part in the others' gradients."""
    field, u0 = nn.Linear(1, 1, bias=False, dtype=D), torch.ones(1, dtype=D, requires_grad=True)
    rate = nn.Parameter(torch.tensor(0.7, dtype=D))
    solution = solve(lambda t, u: rate * field(u), u0, adjoint, rtol=1e-9, atol=1e-9)
    field.weight.requires_grad_(False)
    solution.u1.sum().backward()
    weight = field.weight.item()
    growth = math.exp(0.7 * weight)
    assert u0.grad is not None
    assert rate.grad is not None
    assert u0.grad.item() == pytest.approx(growth, rel=1e-7)
    assert rate.grad.item() == pytest.approx(weight * growth, rel=1e-7)


def test_hooks_of_parameters_run_once() -> None:
    field, seen = Field(), list[Tensor]()
    solution = solve(field, start(), KEPT)
    field.second.bias.register_hook(seen.append)
    solution.u1.sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], field.second.bias.grad, rtol=0, atol=0)


def test_computed_inputs_have_the_gradients_of_what_they_were_computed_from() -> None:
    """`a` and `2 a` in one field: `u1 = exp(-3 a)`."""
    a = torch.tensor(0.4, dtype=D, requires_grad=True)
    double = 2 * a
    solution = solve(
        lambda t, u: -(a + double) * u, torch.ones(1, dtype=D), KEPT, rtol=1e-9, atol=1e-9
    )
    (found,) = torch.autograd.grad(solution.u1, a)
    assert found.item() == pytest.approx(-3 * math.exp(-1.2), rel=1e-7)


def test_modules_that_keep_or_show_values_do_not_meet_graphs() -> None:
    class Keeping(Field):
        last: Tensor | None = None

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            self.last = super().forward(t, u)
            return self.last

    keeping, hooked, shown = Keeping(), Field(), list[Tensor]()
    hooked.second.register_forward_hook(lambda module, inputs, out: shown.append(out))
    for field in (keeping, hooked):
        solution = solve(field, start(), KEPT)
        assert solution.stats.naccept > 1
    assert keeping.last is not None
    assert not keeping.last.requires_grad
    assert not any(out.requires_grad for out in shown[1:])


class Potential(Field):
    """Minus the gradient of a potential, by `torch.func`."""

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = -torch.func.grad(lambda x: super(Potential, self).forward(t, x).cos().sum())(
            u
        )
        return out


class Recomputing(Field):
    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().forward, t, u, use_reentrant=False)
        return out


class Sparse(Field):
    """Has a matrix without a storage, and tensors that cannot be compared and are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(3, dtype=D).to_sparse())
        self.register_buffer("other", torch.eye(3, dtype=D).to_sparse_csr())
        self.ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        self.shapeless = torch.ones(3, device="meta")

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return super().forward(t, u @ self.matrix.to_dense())


@pytest.mark.parametrize("kind", [Potential, Recomputing, Sparse])
def test_graphs_are_kept_of_fields_that_differentiate_recompute_or_have_sparse_parts(
    kind: type[Field],
) -> None:
    field = kind()
    kept, stats = gradients(field, KEPT)
    replayed, again = gradients(field, REPLAYED)
    assert stats.nfe_backward < again.nfe_backward
    for one, other in zip(kept, replayed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_derivatives_inside_a_field_are_those_at_a_given_state(name: str) -> None:
    """`u' = -w u d/dw (w u^2 / 2)`, of which the solution is `u = (1 + w t)^(-1/2)` from 1.

    What the state owes to `w` is no part of the inner derivative.
    """
    w = nn.Parameter(torch.tensor(1.3, dtype=D))

    def field(t: Tensor, u: Tensor) -> Tensor:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad((w * u * u).sum() / 2, w, create_graph=True)
        return -slope * u * w

    u0 = torch.ones(1, dtype=D, requires_grad=True)
    options = {"algorithm": getattr(psn, name)(), "controller": psn.FixedStep(), "dt0": 0.125}
    with torch.no_grad():
        expected = solve(field, u0, KEPT, **options).u1
    gradients = []
    for adjoint in (KEPT, REPLAYED):
        u1 = solve(field, u0, adjoint, **options).u1
        torch.testing.assert_close(u1, expected, rtol=1e-14, atol=0)
        gradients.append(torch.autograd.grad(u1.sum(), (u0, w)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


HIDDEN = threading.local()


def test_a_hidden_tensor_that_turns_up_late_has_its_gradient_or_is_refused() -> None:
    HIDDEN.late = torch.tensor(2.0, dtype=D, requires_grad=True)
    field = Field()

    def late(t: Tensor, u: Tensor) -> Tensor:
        out = field(t, u)
        return out * HIDDEN.late if t > 0.5 else out

    found = []
    for adjoint in (KEPT, psn.DirectAdjoint()):
        u1 = solve(late, start(), adjoint, tstops=[0.5]).u1
        found += torch.autograd.grad(u1.sum(), HIDDEN.late)
    torch.testing.assert_close(*found, rtol=1e-11, atol=0)
    solution = solve(late, start(), REPLAYED, tstops=[0.5])
    with pytest.raises(RuntimeError, match="were not seen at t0"):
        solution.u1.sum().backward()


@pytest.mark.parametrize("saveat", [None, [0.15, 0.3, 0.95]])
def test_a_solve_that_is_cut_back_has_the_gradients_of_its_good_steps(saveat: Any) -> None:
    """`u' = u^2` in steps of 0.1 from 5 overflows, which is seen at the end."""
    found = []
    for adjoint in (KEPT, REPLAYED):
        u0 = torch.tensor([5.0], dtype=torch.float32, requires_grad=True)
        steps: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.1, "saveat": saveat}
        solution = solve(lambda t, u: u * u, u0, adjoint, algorithm=psn.RK4(), throw=False, **steps)
        assert not solution.success
        assert 1 < solution.stats.naccept < 10
        found += torch.autograd.grad(solution.u[1].sum(), u0)
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_second_derivatives_are_refused_whether_graphs_are_kept_or_not() -> None:
    field, u0 = Field(), start()
    for adjoint in (KEPT, REPLAYED):
        u1 = solve(field, u0, adjoint).u1
        (first,) = torch.autograd.grad(u1.square().sum(), u0, create_graph=True)
        with pytest.raises(RuntimeError, match="a second derivative"):
            torch.autograd.grad(first.sum(), u0)


def test_a_field_may_differentiate_by_what_its_initial_state_was_computed_from() -> None:
    """`u' = -u d/dw (w^2 / 2)` from `u = 3 w` with `u = 3 w exp(-w t)`; once without a graph."""
    w = nn.Parameter(torch.tensor([0.8], dtype=D))

    def field(t: Tensor, u: Tensor) -> Tensor:
        with torch.enable_grad():
            torch.autograd.grad((u * w).sum(), w)
            (slope,) = torch.autograd.grad((w * w).sum() / 2, w, create_graph=True)
        return -slope * u

    for adjoint in (KEPT, REPLAYED):
        u1 = solve(field, 3 * w, adjoint, rtol=1e-9, atol=1e-9).u1
        u1.sum().backward()
        expected = 3 * (1 - w.detach()) * torch.exp(-w.detach())
        torch.testing.assert_close(w.grad, expected, rtol=1e-7, atol=0)
        w.grad = None


def test_adjoint_params_alone_receive_gradients() -> None:
    """Of `u' = -a b u` only `a` is asked for, and the graph of the steps has both."""
    a, b = (nn.Parameter(torch.tensor([x], dtype=D)) for x in (0.7, 0.3))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = a, b

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return -self.a * self.b * u

    times = torch.tensor([0.0, 1.0], dtype=D)
    ones = torch.ones(1, dtype=D)
    end = odeint_adjoint(Both(), ones, times, rtol=1e-9, atol=1e-9, adjoint_params=(a,))[-1]
    end.sum().backward()
    torch.testing.assert_close(a.grad, -b.detach() * torch.exp(-(a * b).detach()))
    assert b.grad is None


class _Noisy(torch.autograd.Function):
    """The identity, of which the derivative is another one for nothing, as clipped ones may be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0] + 0.1


def test_functions_of_the_field_are_called_once() -> None:
    """Euler steps of `u' = -noisy(w u)`: each adds `-h w 0.1` and `-h u 0.1` to the gradients."""
    w = nn.Parameter(torch.tensor(0.7, dtype=D))

    def field(t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = -_Noisy.apply(w * u) if t >= since else -w * u
        return out

    steps: dict[str, Any] = {"algorithm": psn.Euler(), "controller": psn.FixedStep(), "dt0": 0.1}
    for since in (0.0, 0.45):
        found = []
        for adjoint in (psn.DirectAdjoint(), REPLAYED, KEPT):
            u0 = torch.ones(1, dtype=D, requires_grad=True)
            u1 = solve(field, u0, adjoint, **steps).u1
            found.append(torch.autograd.grad(u1.sum(), (u0, w), retain_graph=True))
            # The sweep takes the steps again: torch would call the functions of kept ones too.
            if since and adjoint is KEPT:
                with pytest.raises(RuntimeError, match=r"had not called at the start"):
                    torch.autograd.grad(u1.sum(), (u0, w), create_graph=True)
            else:
                found.append(torch.autograd.grad(u1.sum(), (u0, w), create_graph=True))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("where", ["checkpoint", "save_on_cpu"])
def test_callers_that_look_at_saved_tensors_get_a_replay(where: str) -> None:
    field, u0 = Field(), start()
    expected = torch.autograd.grad(solve(field, u0, REPLAYED).u1.sum(), [u0, *field.parameters()])
    counts = []

    def end(u: Tensor) -> Tensor:
        solution = solve(field, u, KEPT)
        counts.append(solution.stats)
        return solution.u1

    if where == "checkpoint":
        u1 = checkpoint(end, u0, use_reentrant=False)
    else:
        with torch.autograd.graph.save_on_cpu():
            u1 = end(u0)
    found = torch.autograd.grad(u1.sum(), [u0, *field.parameters()])
    assert max(stats.nfe_backward for stats in counts) > 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "jvp"])
def test_fields_that_take_derivatives_with_torch_func(transform: str) -> None:
    # Most of its derivatives refuse hooks of saved tensors.
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=D))

    def potential(x: Tensor) -> Tensor:
        return (weight * x.square()).sum() / 2

    def field(t: Tensor, u: Tensor) -> Tensor:
        if transform == "vjp":
            return -torch.func.vjp(potential, u)[1](torch.ones((), dtype=D))[0]
        if transform == "jvp":
            rows = [torch.func.jvp(potential, (u,), (e,))[1] for e in torch.eye(3, dtype=D)]
            return -torch.stack(rows)
        return -getattr(torch.func, transform)(potential)(u)

    u0 = torch.ones(3, dtype=D, requires_grad=True)
    end = solve(field, u0, KEPT, rtol=1e-10, atol=1e-10).u1
    found = torch.autograd.grad(end.sum(), [u0, weight])
    decayed = torch.exp(-weight.detach())
    torch.testing.assert_close(found[0], decayed, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found[1], -decayed, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("memory", [-1, 0.5, "all"])
def test_memory_is_a_whole_number(memory: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="DiscreteAdjoint: memory"):
        psn.DiscreteAdjoint(memory=memory)
