"""A field that has changed is told from one that rounds otherwise, entry by entry."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.replay.comparison import entry_sizes

D = torch.float64
BIG = 1e9


class Filed:
    """Rates of which one lies in a file, where nothing sees that it changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rate(2.0)

    def rate(self, rate: float) -> None:
        self.path.write_text(str(rate))

    def __call__(self, t: Tensor, u: Tensor, p: Any = None) -> Tensor:
        return torch.stack((-float(self.path.read_text()) * u[0], -0.5 * u[1]))


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
    field.rate(3.0)
    with pytest.raises(RuntimeError, match="could not reproduce"):
        torch.autograd.grad(end, u0)


def test_members_of_which_an_entry_has_changed(tmp_path: Path) -> None:
    field = Filed(tmp_path / "rate")
    u0 = torch.tensor([[1.0, BIG], [2.0, 1.0]], dtype=D, requires_grad=True)
    many = psn.EnsembleProblem(psn.ODEProblem(field, u0[0].detach(), (0.0, 1.0)), u0)
    end = psn.solve(many, psn.Tsit5(), rtol=1e-6, atol=1e-6, engine="torch").u1[0, 0]
    field.rate(3.0)
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
