"""Fields that write to tensors of their own at every evaluation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pysciml_node as psn

D = torch.float64
ADJOINTS = [
    psn.DiscreteAdjoint(),
    psn.DiscreteAdjoint(memory=0),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
    psn.BacksolveAdjoint(),
]
FOUR = {"controller": psn.FixedStep(), "dt0": 0.25}


class Remembering(nn.Module):
    """`-u`, whose derivative in `k` is `-m u` at evaluation `m`."""

    def __init__(self, reads: bool = True) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(0.0, dtype=D))
        self.register_buffer("m", torch.zeros(1, dtype=D))
        self.reads = reads

    def count(self) -> Tensor | float:
        self.m += 1
        return self.m.clone()

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        m = self.count()
        return -u * (1 + (m if self.reads else 1.0) * (self.k - self.k.detach()))


class InNumber(Remembering):
    def __init__(self, reads: bool = True) -> None:
        super().__init__(reads)
        self.n = 0

    def count(self) -> float:
        self.n += 1
        return self.n


class InNewTensor(Remembering):
    def count(self) -> Tensor:
        self.m = self.m + 1
        return self.m


class InList(Remembering):
    def __init__(self, reads: bool = True) -> None:
        super().__init__(reads)
        self.calls: list[int] = []

    def count(self) -> float:
        self.calls.append(1)
        return len(self.calls)


class InDict(Remembering):
    def __init__(self, reads: bool = True) -> None:
        super().__init__(reads)
        self.counts = {"calls": 0}

    def count(self) -> float:
        self.counts["calls"] += 1
        return self.counts["calls"]


class InClass(Remembering):
    calls = 0

    def count(self) -> float:
        InClass.calls += 1
        return InClass.calls


CALLS = 0


class InGlobal(Remembering):
    def count(self) -> float:
        global CALLS
        CALLS += 1
        return CALLS


class InClosure(Remembering):
    def __init__(self, reads: bool = True) -> None:
        super().__init__(reads)
        calls = 0

        def count() -> float:
            nonlocal calls
            calls += 1
            return calls

        self.counted = count

    def count(self) -> float:
        return self.counted()


class InIterator(Remembering):
    def __init__(self, reads: bool = True) -> None:
        super().__init__(reads)
        self.calls = itertools.count(1)

    def count(self) -> float:
        return next(self.calls)


class Alternating(InNumber):
    """The derivatives of every other evaluation are the same."""

    def count(self) -> float:
        return super().count() % 2


class Within(Remembering):
    """Counts in the first entry of something else."""

    def __init__(self, where: Callable[[], Any], reads: bool = True) -> None:
        super().__init__(reads)
        self.where = where()

    def count(self) -> float:
        self.where[0] += 1
        return float(self.where[0])


class InRecord(Remembering):
    def __init__(self, reads: bool = True) -> None:
        super().__init__(reads)
        self.counts = np.zeros(1, dtype=[("calls", int)])

    def count(self) -> float:
        self.counts["calls"] += 1
        return int(self.counts["calls"][0])


class InSet(Remembering):
    def __init__(self, reads: bool = True) -> None:
        super().__init__(reads)
        self.calls = set[int]()

    def count(self) -> float:
        self.calls.add(len(self.calls))
        return len(self.calls)


class OnTensor(Remembering):
    """Counts in an attribute of a tensor."""

    def __init__(self, reads: bool = True) -> None:
        super().__init__(reads)
        self.m.calls = 0  # type: ignore[assignment]

    def count(self) -> float:
        self.m.calls += 1  # type: ignore[operator, assignment]
        return self.m.calls  # type: ignore[return-value]


class ByData(Remembering):
    """Counts in a large tensor, of which torch counts no change."""

    def __init__(self, reads: bool = True) -> None:
        super().__init__(reads)
        self.register_buffer("large", torch.zeros(10_000, dtype=D))

    def count(self) -> float:
        self.large.data[0] += 1
        return float(self.large[0])


class InSparse(Remembering):
    def __init__(self, reads: bool = True) -> None:
        super().__init__(reads)
        self.register_buffer("m", torch.zeros(1, dtype=D).to_sparse())

    def count(self) -> Tensor:
        self.m += torch.ones(1, dtype=D).to_sparse()
        return self.m.to_dense().clone()


HOLDERS = [
    *(partial(np.zeros, size) for size in (1, 10_000)),
    *(partial(np.zeros, 1, kind) for kind in (np.int32, np.longdouble, object)),
    *(lambda: np.zeros(2)[::-1], lambda: [0.0] * 10_000),
]
COUNTING: list[Callable[..., Remembering]] = [
    *(InNumber, InNewTensor, InList, InDict, InClass, InGlobal, InClosure, InIterator, Alternating),
    *(partial(Within, x) for x in HOLDERS),
    *(InRecord, InSet, OnTensor, ByData, InSparse),
]


def slope(
    field: Remembering,
    adjoint: psn.Adjoint,
    problem: psn.Problem | psn.EnsembleProblem | None = None,
) -> float:
    if problem is None:
        problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
    one = problem.problem if isinstance(problem, psn.EnsembleProblem) else problem
    algorithm = psn.EM() if isinstance(one, psn.SDEProblem) else psn.Euler()
    generator = {"generator": torch.Generator()} if algorithm == psn.EM() else {}
    options: dict[str, Any] = {"adjoint": adjoint, **FOUR, **generator}
    end = psn.solve(problem, algorithm, **options).u1.sum()
    return float(torch.autograd.grad(end, field.k)[0])


def test_steps_of_euler_have_the_derivative_of_their_own_evaluations() -> None:
    """`du/dk = -(1 + 2 + 3 + 4) h (1 - h)^3`."""
    found = slope(Remembering(), psn.DirectAdjoint())
    assert found == pytest.approx(-2.5 * 0.75**3, rel=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_derivatives_that_depend_on_earlier_evaluations_are_refused(adjoint: psn.Adjoint) -> None:
    """Their values do not: a replay reproduces the solve, and its derivatives are others."""
    with pytest.raises(RuntimeError, match=r"^the field has written to \w+\.m, and its derivat"):
        slope(Remembering(), adjoint)


def test_also_of_members_and_stochastic_equations() -> None:
    field, u0 = Remembering(), torch.ones(1, dtype=D)
    one = psn.ODEProblem(field, u0, (0.0, 1.0))
    members = psn.EnsembleProblem(one, torch.ones(2, 1, dtype=D))
    noisy = psn.SDEProblem(field, lambda t, u: 0.1 * u, u0, (0.0, 1.0))
    for problem in (members, noisy):
        with pytest.raises(RuntimeError, match="has written to"):
            slope(field, psn.DiscreteAdjoint(), problem)


@pytest.mark.parametrize("adjoint", ADJOINTS[1:], ids=repr)
@pytest.mark.parametrize("kind", COUNTING)
def test_so_are_those_that_depend_on_what_is_replaced(
    kind: Callable[..., Remembering], adjoint: psn.Adjoint
) -> None:
    with pytest.raises(RuntimeError, match="its derivatives depend on what earlier evaluations"):
        slope(kind(), adjoint)


@pytest.mark.parametrize("kind", COUNTING)
def test_members_and_stochastic_equations_are_refused_too(kind: Callable[..., Remembering]) -> None:
    field, u0 = kind(), torch.ones(1, dtype=D)
    one = psn.ODEProblem(field, u0, (0.0, 1.0))
    noisy = psn.SDEProblem(field, lambda t, u: 0.1 * u, u0, (0.0, 1.0))
    starts = torch.ones(2, 1, dtype=D)
    for problem in (
        *(noisy, psn.EnsembleProblem(noisy, starts), psn.EnsembleProblem(one, starts)),
    ):
        with pytest.raises(RuntimeError, match="its derivatives depend on what earlier evaluat"):
            slope(field, psn.DiscreteAdjoint(memory=0), problem)


class During(InNumber):
    """Reads its count between two times alone."""

    def __init__(self, begin: float = 0.5, end: float = 2.0) -> None:
        super().__init__()
        self.begin, self.end = begin, end

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        self.reads = self.begin < float(t) < self.end
        return super().forward(t, u)


class WrittenLater(Remembering):
    """Writes to its count late, and reads it there."""

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return super().forward(t, u) if float(t) > 0.4 else -u * (1 + self.k)


class ReplacedLater(InNewTensor, WrittenLater):
    pass


LATER = [During, partial(During, 0.3, 0.6), WrittenLater, ReplacedLater]


@pytest.mark.parametrize("adjoint", ADJOINTS[1:], ids=repr)
@pytest.mark.parametrize("kind", LATER)
def test_so_are_those_that_are_read_later(
    kind: Callable[[], Remembering], adjoint: psn.Adjoint
) -> None:
    with pytest.raises(RuntimeError, match="its derivatives depend on what earlier evaluations"):
        slope(kind(), adjoint)


@pytest.mark.parametrize("kind", LATER)
def test_also_later_of_members_and_stochastic_equations(kind: Callable[[], Remembering]) -> None:
    field, u0, adjoint = kind(), torch.ones(1, dtype=D), psn.DiscreteAdjoint(memory=0)
    one = psn.ODEProblem(field, u0, (0.0, 1.0))
    ito = psn.SDEProblem(field, lambda t, u: 0.1 * u, u0, (0.0, 1.0))
    other = dataclasses.replace(ito, interpretation="stratonovich")
    starts = torch.ones(2, 1, dtype=D)
    refused: list[tuple[Any, psn.Algorithm, psn.Adjoint]] = [
        (psn.EnsembleProblem(one, starts), psn.Euler(), adjoint),
        (psn.EnsembleProblem(one, starts), psn.Euler(), psn.GaussAdjoint()),
        (ito, psn.EM(), adjoint),
        (psn.EnsembleProblem(ito, starts), psn.EM(), adjoint),
        (other, psn.EulerHeun(), psn.BacksolveAdjoint()),
    ]
    for problem, algorithm, how in refused:
        options: dict[str, Any] = {"adjoint": how, **FOUR}
        if isinstance(algorithm, psn.EM | psn.EulerHeun):
            options["generator"] = torch.Generator()
        end = psn.solve(problem, algorithm, **options).u1.sum()
        with pytest.raises(RuntimeError, match="its derivatives depend on what earlier evaluat"):
            end.backward()


@pytest.mark.parametrize("adjoint", [psn.DirectAdjoint(), psn.DiscreteAdjoint()], ids=repr)
def test_graphs_of_later_reads_are_those_of_the_solve(adjoint: psn.Adjoint) -> None:
    """`du/dk = -(1 + 1 + 1 + 4) h (1 - h)^3`."""
    assert slope(During(), adjoint) == pytest.approx(-7 / 4 * 0.75**3, rel=1e-12)


@pytest.mark.parametrize("kind", [InNumber, InNewTensor, InList, InDict, InClosure, InIterator])
def test_graphs_that_were_kept_are_those_of_the_solve(kind: type[Remembering]) -> None:
    """As for `DirectAdjoint`: nothing is evaluated again."""
    assert slope(kind(), psn.DiscreteAdjoint()) == pytest.approx(-2.5 * 0.75**3, rel=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("kind", COUNTING)
def test_counts_that_are_not_read_do_no_harm(
    kind: Callable[..., Remembering], adjoint: psn.Adjoint
) -> None:
    assert slope(kind(reads=False), adjoint) == pytest.approx(
        slope(kind(reads=False), psn.DirectAdjoint()), rel=2e-2 if adjoint.discrete else 0.4
    )


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_the_check_itself_is_not_counted(adjoint: psn.Adjoint) -> None:
    """A field counts the evaluations that the statistics have."""
    field = InNumber(reads=False)
    problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
    options: dict[str, Any] = {"adjoint": adjoint, **FOUR}
    solution = psn.solve(problem, psn.RK4(), **options)
    before = field.n
    solution.u1.sum().backward()
    assert before == solution.stats.nfe
    assert field.n == before + solution.stats.nfe_backward


def test_a_table_that_is_drawn_once_stays() -> None:
    """The check puts back what the first evaluation has left, not what was there before it."""

    class Drawing(Remembering):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            if not hasattr(self, "table"):
                self.table = torch.randn(1, dtype=D)
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(t, u) * self.table

    torch.manual_seed(0)
    field = Drawing(reads=False)
    found = slope(field, psn.DiscreteAdjoint(memory=0))
    assert found == pytest.approx(slope(field, psn.DirectAdjoint()), rel=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_derivatives_that_are_drawn_are_refused(adjoint: psn.Adjoint) -> None:
    class Drawing(Remembering):
        def count(self) -> Tensor:
            return torch.rand((), dtype=D)

    with pytest.raises(ValueError, match="draws random numbers"):
        slope(Drawing(), adjoint)


@pytest.mark.parametrize("adjoint", ADJOINTS[:2], ids=repr)
def test_a_count_that_is_not_read_does_no_harm(adjoint: psn.Adjoint) -> None:
    """`du/dk = -4 h (1 - h)^3`, and the sweep leaves the count as it was."""
    field = Remembering(reads=False)
    assert slope(field, adjoint) == pytest.approx(-(0.75**3), rel=1e-12)
    assert field.m == 4


def test_running_statistics_do_no_harm() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double().train()
    u0, inputs = torch.randn(8, 3, dtype=D), [*net.parameters()]

    def gradients(adjoint: psn.Adjoint) -> tuple[Tensor, ...]:
        problem = psn.ODEProblem(lambda t, u: net(torch.tanh(u)), u0, (0.0, 1.0))
        options: dict[str, Any] = {"adjoint": adjoint, **FOUR}
        end = psn.solve(problem, psn.RK4(), **options).u1
        return torch.autograd.grad(end.square().sum(), inputs)

    found = gradients(psn.DiscreteAdjoint())
    torch.testing.assert_close(found, gradients(psn.DirectAdjoint()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_spectral_normalization_in_train_mode_is_refused(adjoint: psn.Adjoint) -> None:
    """In single precision the iteration is seen in derivatives alone."""
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(nn.Linear(40, 40))
    with torch.no_grad():
        orthogonal, _ = torch.linalg.qr(torch.randn(40, 40))
        layer.parametrizations.weight.original.copy_(orthogonal * (1 + 1e-3 * torch.rand(40)))
    problem = psn.ODEProblem(lambda t, u: torch.tanh(layer(u)), torch.randn(4, 40), (0.0, 1.0))
    options: dict[str, Any] = {"adjoint": adjoint, **FOUR}
    end = psn.solve(problem, psn.RK4(), **options).u1
    with pytest.raises(RuntimeError, match="has written to"):
        end.square().sum().backward()
