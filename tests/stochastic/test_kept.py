"""Graphs of stochastic steps that a forward solve keeps for its backward sweep."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from stochastic.sde_nets import (
    ADAPTIVE,
    DIRECT,
    FIXED,
    KEPT,
    REPLAYED,
    Counting,
    D,
    Nets,
    expect_close,
    solve,
    start,
)
from torch import Tensor, nn

import pysciml_node as psn


def gradients(nets: Nets, adjoint: Any, **options: Any) -> tuple[list[Tensor], psn.Stats]:
    u0 = start()
    solution = solve(nets.f, nets.g, u0, adjoint, noise=nets.noise_type, **options)
    weights = torch.sin(torch.arange(solution.u.numel(), dtype=D)).reshape(solution.u.shape)
    loss = (solution.u * weights).sum() + solution.u1.square().sum()
    return list(torch.autograd.grad(loss, [u0, *nets.parameters()])), solution.stats


METHODS = [
    (psn.EM(), "diagonal", FIXED),
    (psn.EM(), "general", FIXED),
    (psn.EM(), "additive", ADAPTIVE),
    (psn.LambaEM(), "general", FIXED),
    (psn.RKMil(), "scalar", FIXED),
    (psn.EulerHeun(), "general", FIXED),
    (psn.StratonovichMidpoint(), "general", FIXED),
    (psn.SRA1(), "additive", ADAPTIVE),
    (psn.SOSRA(), "additive", FIXED),
    (psn.SRIW1(), "diagonal", FIXED),
    (psn.SOSRI(), "diagonal", ADAPTIVE),
    (psn.SOSRI2(), "scalar", ADAPTIVE),
]
WAYS: dict[str, dict[str, Any]] = {
    "every step": {},
    "a grid": {"saveat": torch.linspace(0, 1, 30, dtype=D)},
    "a stop": {"tstops": [0.35], "saveat": [0.2, 0.35, 0.8]},
    "an early time": {"saveat": [0.3]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("algorithm", "noise", "control"), METHODS)
def test_gradients_are_those_of_a_replay(
    algorithm: Any, noise: str, control: dict[str, Any], way: str
) -> None:
    options = {"algorithm": algorithm, **control, **WAYS[way]}
    nets = Nets(noise)
    kept, stats = gradients(nets, KEPT, **options)
    replayed, again = gradients(nets, REPLAYED, **options)
    for count in ("nfe", "nfe_diffusion", "naccept", "nreject", "naccept_backward", "nvjp"):
        assert getattr(stats, count) == getattr(again, count), count
    assert stats.nfe_backward == 0 < again.nfe_backward
    expect_close(kept, replayed)


def test_sums_in_the_same_order_are_the_same_to_the_last_bit() -> None:
    """A step of Euler-Maruyama reads each parameter once; the sum goes from the last to the first.

    What a step hands on to the one before is a sum of three terms, in an order of torch's own.
    """
    a, s = (nn.Parameter(torch.tensor([x], dtype=D)) for x in (0.7, 0.3))
    found = []
    for adjoint in (KEPT, REPLAYED):
        u0 = torch.tensor([[0.9]], dtype=D)
        solution = solve(lambda t, u: a * torch.cos(u), lambda t, u: s * u.sin(), u0, adjoint)
        found.append(torch.autograd.grad(solution.u1.sum(), (a, s)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("way", WAYS)
def test_some_steps_are_kept_and_others_are_taken_again(way: str) -> None:
    nets, counts = Nets(), []
    options = {"algorithm": psn.SOSRI(), **FIXED, **WAYS[way], "dt0": 0.02}
    expected, _ = gradients(nets, REPLAYED, **options)
    for memory in (0, 2**17, 2**18, 2**19, 2**30):
        found, stats = gradients(nets, psn.DiscreteAdjoint(memory=memory), **options)
        counts.append(stats.nfe_backward)
        expect_close(found, expected)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert len(set(counts)) > 3


def test_states_of_several_parts_and_what_needs_no_gradient_at_the_start() -> None:
    rate = nn.Parameter(torch.tensor(0.8, dtype=D))
    found = []
    for adjoint in (KEPT, REPLAYED):
        u0 = {"a": torch.ones(2, 1, dtype=D), "b": torch.full((2, 1), 0.5, dtype=D)}
        problem = psn.SDEProblem(
            lambda t, u: {"a": -rate * u["a"] * u["b"], "b": rate * u["a"]},
            lambda t, u: {"a": 0.1 * rate * u["b"], "b": 0.1 * u["a"]},
            u0,
            (0.0, 1.0),
        )
        solution = psn.solve(
            problem,
            psn.SOSRI(),
            adjoint=adjoint,
            saveat=[0.3, 1.0],
            engine="torch",
            generator=torch.Generator().manual_seed(1),
        )
        loss = solution.u["a"].square().sum() + solution.u["b"].sum()
        found.append(list(torch.autograd.grad(loss, rate)))
    expect_close(*found)


def test_a_second_sweep_a_batch_of_them_and_their_derivatives() -> None:
    nets, u0 = Nets(), start()
    solution = solve(nets.f, nets.g, u0, KEPT)
    inputs = [u0, *nets.parameters()]
    first = torch.autograd.grad(solution.u1.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(solution.u1.sum(), inputs, retain_graph=True)
    assert solution.stats.nfe_backward == 0
    assert all(map(torch.equal, first, second))
    u1 = solution.u1.flatten()
    (rows,) = torch.autograd.grad(
        u1, u0, torch.eye(6, dtype=D), is_grads_batched=True, retain_graph=True
    )
    expected = [torch.autograd.grad(x, u0, retain_graph=True)[0] for x in u1]
    expect_close([*rows], expected)
    (third,) = torch.autograd.grad(u1.square().sum(), u0, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(third.sum(), u0)


@pytest.mark.parametrize("adjoint", [KEPT, REPLAYED])
def test_dense_output_and_estimates_of_all_steps_have_the_same_gradients(adjoint: Any) -> None:
    nets, found = Nets(), []
    for way in (adjoint, DIRECT):
        u0 = start()
        solution = solve(nets.f, nets.g, u0, way, psn.SOSRI(), **ADAPTIVE)
        estimates = solution.trajectory.step_estimates()  # type: ignore[attr-defined]
        loss = solution(0.4321).square().sum() + sum(x.error for x in estimates)
        found.append(list(torch.autograd.grad(loss, [u0, *nets.parameters()])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_graphs_of_rejected_steps_go_at_once_and_the_others_with_the_sweep() -> None:
    nets, u0 = Counting(), start()
    options = {"rtol": 1e-2, "atol": 1e-2, "dt0": 0.5}
    solution = solve(nets.f, nets.g, u0, KEPT, psn.SOSRI(), **options)
    stats = solution.stats
    assert stats.nreject > 0
    each = len(psn.SOSRI().tableau_for(solution.problem).drift)  # type: ignore[arg-type]
    assert 0 < nets.alive() <= each * stats.naccept
    solution.u1.sum().backward()
    assert nets.alive() == 0


def test_memory_bounds_what_is_kept() -> None:
    for memory, most in ((0, 0), (2**16, 2**16 // 4000), (2**17, 2**17 // 4000)):
        nets = Counting()
        adjoint = psn.DiscreteAdjoint(memory=memory)
        solution = solve(nets.f, nets.g, start(), adjoint, controller=psn.FixedStep(), dt0=1 / 64)
        assert solution.stats.naccept == 64
        assert nets.alive() <= most


def test_a_solve_and_its_sweep_leave_nothing_to_the_garbage_collector() -> None:
    nets, u0 = Nets(), start()
    for adjoint in (KEPT, REPLAYED):
        gc.collect()
        gc.disable()
        try:
            solve(nets.f, nets.g, u0, adjoint).u1.sum().backward()
            left = gc.collect()
        finally:
            gc.enable()
        assert left == 0


def test_solves_inside_of_a_field_keep_no_graphs_of_their_own() -> None:
    inner, u0 = Counting(), start()

    def f(t: Tensor, u: Tensor) -> Tensor:
        return solve(inner.f, inner.g, u, KEPT).u1 - u

    found = []
    for adjoint in (KEPT, REPLAYED):
        solution = solve(f, lambda t, u: 0.1 * u, u0, adjoint)
        if adjoint is KEPT:
            assert inner.alive() <= solution.stats.nfe
        found.append(list(torch.autograd.grad(solution.u1.sum(), (u0, inner.weight))))
    expect_close(*found)
    assert gradients(Nets(), KEPT)[1].nfe_backward == 0


def test_graphs_of_fields_that_count_their_calls_are_those_of_the_solve() -> None:
    """Their derivatives depend on the count, their values do not."""
    nets, found = Nets(), []
    for adjoint in (KEPT, DIRECT):
        calls: list[int] = []

        def f(t: Tensor, u: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return nets.f(t, u) + 0.1 * len(calls) * (u - u.detach())

        u0 = start()
        solution = solve(f, nets.g, u0, adjoint)
        found.append(list(torch.autograd.grad(solution.u1.sum(), [u0, *nets.parameters()])))
        assert len(calls) - solution.stats.nfe == solution.stats.nfe_backward
    expect_close(*found)


def test_a_changed_parameter_is_refused_by_its_name() -> None:
    nets = Nets()
    for part, said in ((nets.second.bias, r"second\.bias"), (nets.mixing, "mixing")):
        solution = solve(nets.f, nets.g, start(), KEPT)
        with torch.no_grad():
            part.mul_(2)
        with pytest.raises(RuntimeError, match=rf"{said} has been changed in place"):
            solution.u1.sum().backward()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("which", ["drift", "diffusion"])
def test_a_change_that_neither_end_shows_is_refused(which: str, shared: bool) -> None:
    """A table by time, of which the first and the last step read other entries."""
    a, table = nn.Parameter(torch.tensor(0.7, dtype=D)), torch.ones(10, dtype=D)

    def looked_up(t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(a * u * table[min(int(10 * t), 9)])

    def other(t: Tensor, u: Tensor) -> Tensor:
        return 0.1 * u

    both = (looked_up, other) if which == "drift" else (other, looked_up)
    for adjoint in (KEPT, REPLAYED, DIRECT):
        solution = solve(*both, start(), adjoint, controller=psn.FixedStep(), dt0=0.1)
        if shared:
            table.numpy()[5] += 2
        else:
            table.data[5] += 2
        with pytest.raises(RuntimeError, match=r"could not reproduce|has been changed in place"):
            solution.u1.sum().backward()


def test_parts_may_be_replaced_and_frozen_behind_the_solve() -> None:
    nets, u0 = Nets(), start()
    old = list(nets.parameters())
    expected = torch.autograd.grad(solve(nets.f, nets.g, u0, REPLAYED).u1.sum(), [u0, *old])
    solution = solve(nets.f, nets.g, u0, KEPT)
    nets.second = nn.Linear(5, 3, dtype=D)
    found = torch.autograd.grad(solution.u1.sum(), [u0, *old])
    expect_close([*found], [*expected])


def test_hooks_of_modules_and_functions_of_others_are_met_in_a_replay() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, upon: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * upon + (upon == 0)

    nets, hooked = Nets(), Nets()
    seen: list[bool] = []
    hooked.second.register_forward_hook(lambda *given: seen.append(given[-1].requires_grad))
    for f in (hooked.f, lambda t, u: Twice.apply(nets.f(t, u))):  # type: ignore[no-untyped-call]
        u0 = start()
        found = []
        for adjoint in (KEPT, REPLAYED):
            solution = solve(f, nets.g, u0, adjoint)
            found.append([*torch.autograd.grad(solution.u1[0].sum(), u0)])
            assert solution.stats.nfe_backward > 0
        assert torch.equal(*(x for (x,) in found))
    assert not any(seen[1:9])


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize(("algorithm", "noise", "control"), METHODS)
def test_derivatives_inside_are_those_at_a_given_state(
    algorithm: Any, noise: str, control: dict[str, Any], keeps: bool
) -> None:
    """What the state owes to a parameter is no part of a derivative by that parameter inside."""
    nets = Nets(noise)
    w = nn.Parameter(torch.tensor(1.3, dtype=D))

    def slope(u: Tensor) -> Tensor:
        with torch.enable_grad():
            value = (w * u * u).sum() / 2
            (found,) = torch.autograd.grad(value, w, create_graph=True, retain_graph=keeps)
        return found

    def f(t: Tensor, u: Tensor) -> Tensor:
        return -slope(u) * u * w

    def g(t: Tensor, u: Tensor) -> Tensor:
        return nets.g(t, u) if noise == "additive" else nets.g(t, u) * slope(u) * w

    u0 = start()
    options = {"algorithm": algorithm, "noise": noise, **control}
    with torch.no_grad():
        expected = solve(f, g, u0, KEPT, **options).u1
    found = []
    for adjoint in (KEPT, REPLAYED):
        u1 = solve(f, g, u0, adjoint, **options).u1
        torch.testing.assert_close(u1, expected, rtol=1e-12, atol=1e-13)
        if keeps or isinstance(algorithm, psn.EM):
            found.append(list(torch.autograd.grad(u1.sum(), (u0, w, nets.mixing))))
            continue
        # A step of several stages is recorded as a whole.
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            torch.autograd.grad(u1.sum(), (u0, w, nets.mixing))
    if found:
        expect_close(*found)


def test_a_solve_that_fails_has_the_gradients_of_its_good_steps() -> None:
    """Steps behind `t = 1/2` are not finite."""
    a = nn.Parameter(torch.tensor(0.7, dtype=D))
    found = []
    for adjoint in (KEPT, REPLAYED, DIRECT):
        solution = solve(
            lambda t, u: a * u / (t < 0.5),
            lambda t, u: a * u,
            start(),
            adjoint,
            controller=psn.FixedStep(),
            dt0=0.1,
            saveat=[0.25, 0.75, 0.95],
            throw=False,
        )
        assert not solution.success
        loss = solution.u.sum() + solution.u1.square().sum()
        assert bool(torch.isfinite(loss))
        found.append(list(torch.autograd.grad(loss, a)))
    expect_close(*found[:2])
    expect_close(*found[1:])
