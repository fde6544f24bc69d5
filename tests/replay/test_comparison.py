"""A field that has changed is told from one that rounds otherwise, entry by entry."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.replay.comparison import Comparison, entry_sizes, rounding
from pysciml_node.replay.members.estimates import estimates_of

D = torch.float64
BIG = 1e9


class Filed:
    """A rate and a source that lie in a file, where nothing sees that they change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write(2.0, 0.0)

    def write(self, rate: float, source: float) -> None:
        self.path.write_text(f"{rate} {source}")

    def __call__(self, t: Tensor, u: Tensor, p: Any = None) -> Tensor:
        rate, source = map(float, self.path.read_text().split())
        return torch.stack((source - rate * u[0], -0.5 * u[1]))


@pytest.mark.parametrize(
    "adjoint",
    [psn.DiscreteAdjoint(), psn.DiscreteAdjoint(memory=0), psn.GaussAdjoint()],
    ids=["kept", "again", "continuous"],
)
@pytest.mark.parametrize(
    "algorithm", [psn.Tsit5(), psn.Rodas5P(), psn.KenCarp4()], ids=lambda a: type(a).__name__
)
def test_a_change_in_an_entry_beside_a_great_one(
    algorithm: psn.Algorithm, adjoint: psn.DiscreteAdjoint, tmp_path: Path
) -> None:
    field = Filed(tmp_path / "rate")
    u0 = torch.tensor([1.0, BIG], dtype=D, requires_grad=True)
    atol = torch.tensor([1e-6, 1e-6 * BIG], dtype=D)
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    end = psn.solve(problem, algorithm, rtol=1e-6, atol=atol, adjoint=adjoint).u1[0]
    (gradient,) = torch.autograd.grad(end, u0, retain_graph=True)
    assert float(gradient[0]) == pytest.approx(math.exp(-2.0), rel=1e-4)
    field.write(2.0, 1.0)  # which no derivative tells
    with pytest.raises(RuntimeError, match="could not reproduce"):
        torch.autograd.grad(end, u0)


def test_members_of_which_an_entry_has_changed(tmp_path: Path) -> None:
    field = Filed(tmp_path / "rate")
    u0 = torch.tensor([[1.0, BIG], [2.0, 1.0]], dtype=D, requires_grad=True)
    many = psn.EnsembleProblem(psn.ODEProblem(field, u0[0].detach(), (0.0, 1.0)), u0)
    end = psn.solve(many, psn.Tsit5(), rtol=1e-6, atol=1e-6, engine="torch").u1[0, 0]
    field.write(3.0, 0.0)
    with pytest.raises(RuntimeError, match="could not reproduce"):
        torch.autograd.grad(end, u0, retain_graph=True)
    field.write(2.0, 1.0)
    with pytest.raises(RuntimeError, match="could not reproduce"):
        torch.autograd.grad(end, u0)


def test_a_field_that_mixes_small_entries_of_members_beside_great_ones_is_refused() -> None:
    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack((u[:, 0].mean() - u[:, 0], -0.5 * u[:, 1]), 1)

    u0 = torch.tensor([[1.0, BIG], [2.0, BIG]], dtype=D)
    many = psn.EnsembleProblem(psn.ODEProblem(f, u0[0], (0.0, 1.0)), u0, batched=True)
    with pytest.raises(ValueError, match="not each for itself"):
        psn.solve(many, psn.Tsit5(), engine="torch")


@pytest.mark.parametrize("shape", [(3,), (5, 3), (5, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_of_entries(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Each its own, and above what rounding of the greatest in its row may leave."""
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, *shape, dtype=dtype, generator=generator).exp()
    sizes, eps = entry_sizes(end, start), torch.finfo(dtype).eps
    own = torch.maximum(start, end)
    greatest = own.amax(-1, keepdim=True)
    assert (sizes >= own).all()
    assert (sizes <= 2 * greatest).all()
    assert (sizes >= min(1.0, 1e3 * eps**0.5) * greatest).all()


class Rated(torch.nn.Module):
    """`u' = -w tanh(u)`."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(1.0, dtype=D))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.w * torch.tanh(u)


def by_data(w: Tensor) -> None:
    w.data.mul_(3)


def by_other_data(w: Tensor) -> None:
    w.data = 3 * w.data


def by_numpy(w: Tensor) -> None:
    w.detach().numpy()[...] *= 3


UNCOUNTED = [by_data, by_other_data, by_numpy]
FIXED = {"controller": psn.FixedStep(), "dt0": 0.1}
STEPS: list[tuple[psn.Algorithm, dict[str, Any]]] = [
    (psn.Tsit5(), {}),
    (psn.Vern7(), {}),
    (psn.Rosenbrock23(), {}),
    (psn.Rodas5P(), {}),
    (psn.KenCarp4(), {}),
    (psn.AutoTsit5(psn.Rodas5P()), {}),
    (psn.Euler(), FIXED),
    (psn.EM(), FIXED),
    (psn.SOSRI(), FIXED),
]
every_step = pytest.mark.parametrize(
    ("algorithm", "options"), STEPS, ids=[type(x).__name__ for x, _ in STEPS]
)


def solved(
    f: Rated,
    algorithm: psn.Algorithm,
    options: dict[str, Any],
    members: bool = False,
    dtype: torch.dtype = D,
) -> Any:
    """A solution, or those of two members, by a method for either kind of equation."""
    u0 = torch.tensor([[1.0], [0.5]], dtype=dtype)
    start = u0[0] if members else u0
    problem: Any = psn.ODEProblem(f, start, (0.0, 1.0))
    if isinstance(algorithm, psn.EM | psn.SOSRI):
        problem = psn.SDEProblem(f, lambda t, u: 0.1 * torch.cos(u), start, (0.0, 1.0))
        options = {**options, "generator": torch.Generator().manual_seed(0)}
    if members:
        problem = psn.EnsembleProblem(problem, u0)
    return psn.solve(problem, algorithm, rtol=1e-3, atol=1e-3, engine="torch", **options)


def looks(solution: psn.Solution) -> dict[str, Any]:
    """What takes steps again: inside of one, at the start of one, and all."""
    start, tsit5 = float(solution.step_times[1]), None
    if isinstance(solution.algorithm, psn.Euler) or "Auto" in repr(solution.algorithm):
        tsit5 = psn.Tsit5()
    return {
        "inside": lambda: solution(0.345),
        "local": lambda: solution.local_estimate(0.345, tsit5).error,
        "at a start": lambda: solution.local_estimate(start, tsit5).error,
        "all": lambda: torch.stack([step.error for step in solution.step_estimates()]),
    }


@every_step
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("members", [True, False])
def test_changes_that_torch_does_not_count_are_seen(
    algorithm: psn.Algorithm, options: dict[str, Any], recorded: bool, members: bool
) -> None:
    f = Rated()
    whole = solved(f, algorithm, options, members)
    solution = whole[1] if members else whole
    asked = looks(solution)
    with torch.set_grad_enabled(recorded):
        for look in asked.values():
            look()
        for change in UNCOUNTED:
            change(f.w)
            for look in asked.values():
                with pytest.raises(RuntimeError, match="could not reproduce the solve"):
                    look()
            f.w.data = torch.tensor(1.0, dtype=D)
        for look in asked.values():
            look()


@pytest.mark.parametrize(
    ("algorithm", "options", "kept"),
    [
        (psn.Tsit5(), {}, False),
        (psn.Tsit5(), {"adjoint": psn.DirectAdjoint()}, False),
        (psn.Tsit5(), {"compile": True}, True),
        (psn.Rodas5P(), {"compile": True}, True),
    ],
    ids=["discrete", "direct", "native", "native Rodas5P"],
)
def test_a_change_between_estimates_and_their_gradient(
    algorithm: psn.Algorithm, options: dict[str, Any], kept: bool
) -> None:
    """It is seen, where the gradient is not of numbers that the solve has kept."""
    f = Rated()
    problem = psn.ODEProblem(f, torch.ones(2, dtype=D), (0.0, 1.0))
    solution = psn.solve(problem, algorithm, **options)
    first, second = (
        torch.stack([step.error for step in solution.step_estimates()]).sum() for _ in range(2)
    )
    right = torch.autograd.grad(first, f.w, retain_graph=True)
    f.w.data.mul_(3)
    if kept:
        torch.testing.assert_close(torch.autograd.grad(second, f.w), right)
        return
    with pytest.raises(RuntimeError, match="could not reproduce the solve"):
        torch.autograd.grad(second, f.w)


@pytest.mark.parametrize("sampling", ["biased", "unbiased"])
def test_members_in_one_batch_see_a_change_that_torch_does_not_count(sampling: Any) -> None:
    f, u0 = Rated(), torch.tensor([[1.0], [0.5]], dtype=D)
    many = psn.EnsembleProblem(psn.ODEProblem(f, u0[0], (0.0, 1.0)), u0)
    found = estimates_of(psn.solve(many, psn.Tsit5(), engine="torch").members)
    assert found is not None
    inside = np.array([0.3, 0.4]) if sampling == "unbiased" else found.steps.ends[[0, -2]]
    late = found.every_step().error.sum()
    for look in (lambda: found.local(inside, psn.Tsit5(), True, None), found.every_step):
        look()
        f.w.data.mul_(3)
        with pytest.raises(RuntimeError, match="could not reproduce the solve"):
            look()
        f.w.data.div_(3)
    f.w.data.mul_(3)
    with pytest.raises(RuntimeError, match="could not reproduce the solve"):
        late.backward()


@every_step
@pytest.mark.parametrize("dtypes", [(torch.float32, D), (D, torch.float32)])
def test_copies_in_another_precision_are_compared_in_the_lower_one(
    algorithm: psn.Algorithm, options: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    first, second = dtypes
    f = Rated().to(first)
    solution = solved(f, algorithm, options, dtype=first)
    f.to(second)
    copy = solution.to(second)
    for look in looks(copy).values():
        look()
    f.w.data.mul_(3)
    for look in looks(copy).values():
        with pytest.raises(RuntimeError, match="could not reproduce the solve"):
            look()


@every_step
@pytest.mark.parametrize("members", [True, False])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_result_belongs_to_its_owner(
    algorithm: psn.Algorithm, options: dict[str, Any], members: bool, recorded: bool
) -> None:
    """Changed in place, it leaves the steps as they are."""
    f = Rated()
    with torch.set_grad_enabled(recorded):
        whole = solved(f, algorithm, options, members)
        solution = whole[1] if members else whole
        times = torch.tensor([0.345, 0.99, 1.0], dtype=D)
        asked = solution(times).clone()
        with torch.no_grad():
            solution.u1.zero_()
            solution.u.detach().numpy()[...] = 0
        torch.testing.assert_close(solution(times), asked, rtol=0, atol=0)
        if recorded:
            torch.autograd.grad(solution(times).sum(), f.w)


def test_steps_far_from_time_zero_are_as_precise_as_their_times_were() -> None:
    """Times of single precision, 300 step sizes from zero, have lost so much of theirs."""
    end, start = torch.ones(2, 3), torch.zeros(2, 3)
    off = 4 * rounding(torch.float32)
    for late in (300.0, torch.tensor([[300.0], [300.0]], dtype=torch.float64)):
        comparison = Comparison()
        comparison.add(end * (1 + off), end, start, late=late)
        comparison.expect_equal([])
        comparison.add(end * (1 + 10 * off), end, start, late=late)
        with pytest.raises(RuntimeError, match="could not reproduce"):
            comparison.expect_equal([])
    near = Comparison()
    near.add(end * (1 + off), end, start, late=0.5)
    with pytest.raises(RuntimeError, match="could not reproduce"):
        near.expect_equal([])
