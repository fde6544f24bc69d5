"""Dense output and estimates of fields whose derivatives depend on what evaluations leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.regularizers.base import Regularizer, attach_penalties

D = torch.float64
FOUR = {"controller": psn.FixedStep(), "dt0": 0.25}
REFUSED = "its derivatives depend on what earlier evaluations"


class Counting(nn.Module):
    """`-u`, whose derivative in `k` is `-m u` at evaluation `m`, or `-u`."""

    def __init__(self, reads: bool = True) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(0.0, dtype=D))
        self.reads, self.calls = reads, 0

    def count(self) -> Tensor | float:
        self.calls += 1
        return self.calls

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        m = self.count()
        return -u * (1 + (m if self.reads else 1.0) * (self.k - self.k.detach()))


class Plain(Counting):
    """`-(1 + k) u`."""

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -u * (1 + self.k)


class InBuffer(Counting):
    def __init__(self, reads: bool = True) -> None:
        super().__init__(reads)
        self.register_buffer("m", torch.zeros(1, dtype=D))

    def count(self) -> Tensor | float:
        self.m += 1
        return self.m.clone()


class Uncounted(InBuffer):
    """Torch counts no change of its buffer."""

    def count(self) -> Tensor | float:
        self.m.data += 1
        return float(self.m)


class Settled(Counting):
    """Later evaluations than the first have the same derivatives."""

    def count(self) -> Tensor | float:
        return min(super().count(), 2)


class Drawing(Counting):
    """The number that is drawn is no part of the value."""

    def count(self) -> Tensor | float:
        return torch.rand((), dtype=D)


KINDS = [Counting, InBuffer, Uncounted, Settled]
DIRECT, SWEEPS = psn.DirectAdjoint(), psn.DiscreteAdjoint(memory=0)
METHODS = [psn.Euler(), psn.Tsit5(), psn.Rodas5P(), psn.KenCarp4(), psn.EM()]


def solved(
    field: Counting,
    algorithm: psn.Algorithm,
    adjoint: psn.Adjoint,
    members: bool = False,
    **more: Any,
) -> Any:
    u0, options = torch.ones(1, dtype=D), {"adjoint": adjoint, **FOUR, **more}
    problem: Any = psn.ODEProblem(field, u0, (0.0, 1.0))
    if isinstance(algorithm, psn.EM):
        problem = psn.SDEProblem(field, lambda t, u: 0.1 * u, u0, (0.0, 1.0))
        options["generator"] = torch.Generator()
    if members:
        problem = psn.EnsembleProblem(problem, torch.ones(2, 1, dtype=D))
    return psn.solve(problem, algorithm, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adjoint", [DIRECT, SWEEPS, psn.InterpolatingAdjoint()], ids=repr)
def test_dense_output_is_refused(adjoint: psn.Adjoint, kind: type[Counting]) -> None:
    """In the first step it is that of the fifth evaluation and the sixth; values are the same."""
    solution = solved(kind(), psn.Euler(), adjoint)
    with pytest.raises(RuntimeError, match=REFUSED):
        solution(0.1)
    with torch.no_grad():
        plain = solved(Plain(), psn.Euler(), adjoint)
        assert float(solution(0.1)) == pytest.approx(float(plain(0.1)), rel=1e-12)


@pytest.mark.parametrize("members", [False, True])
@pytest.mark.parametrize("algorithm", METHODS, ids=lambda x: type(x).__name__)
def test_also_of_other_methods_and_members(algorithm: psn.Algorithm, members: bool) -> None:
    solution = solved(Counting(), algorithm, DIRECT, members)
    with pytest.raises(RuntimeError, match=REFUSED):
        (solution[0] if members else solution)(0.6)


def test_numbers_drawn_for_derivatives_are_refused() -> None:
    solution = solved(Drawing(), psn.Euler(), DIRECT)
    with pytest.raises(RuntimeError, match="draws random numbers"):
        solution(0.1)


PENALTIES: list[Callable[[], Regularizer]] = [
    lambda: psn.LocalError(stop_gradient=False),
    psn.LocalError,
    psn.GlobalError,
]


@pytest.mark.parametrize("members", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("adjoint", [DIRECT, SWEEPS], ids=repr)
def test_penalties_are_refused(
    adjoint: psn.Adjoint, penalty: Callable[[], Regularizer], members: bool
) -> None:
    solution = solved(Counting(), psn.Tsit5(), adjoint, members)
    with pytest.raises(RuntimeError, match=REFUSED):
        attach_penalties(solution, [penalty()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adjoint", [DIRECT, SWEEPS], ids=repr)
def test_what_is_not_read_does_no_harm(adjoint: psn.Adjoint, kind: type[Counting]) -> None:
    """The derivative is that of the field `-(1 + k) u`."""
    field = kind(reads=False)
    solution = solved(field, psn.Euler(), adjoint)
    calls = field.calls
    (found,) = torch.autograd.grad(solution(0.35).sum(), field.k)
    plain = Plain()
    end = solved(plain, psn.Euler(), DIRECT)(0.35)
    assert float(found) == pytest.approx(float(torch.autograd.grad(end, plain.k)[0]), rel=1e-12)
    if adjoint == DIRECT and kind is Counting:
        # Both ends of the step, and nothing of what was evaluated to compare.
        assert field.calls == calls + 2
