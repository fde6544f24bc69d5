"""`tune`: measure algorithms, tolerances and adjoints for a trained field."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.adjoints import (
    Adjoint,
    BacksolveAdjoint,
    DirectAdjoint,
    DiscreteAdjoint,
    GaussAdjoint,
    InterpolatingAdjoint,
)
from pysciml_node.algorithms.explicit import (
    BS3,
    DP5,
    RK4,
    Algorithm,
    Euler,
    Midpoint,
    Tsit5,
    Vern7,
    Vern9,
)
from pysciml_node.errors import CompileError, EngineUnavailable, JuliaError, SolverFailure
from pysciml_node.layers.neural_cde import NeuralCDE
from pysciml_node.layers.neural_ode import NeuralODE
from pysciml_node.problems.state import State, StateSpec, map_tensors, tensors_of
from pysciml_node.solutions.solution import Solution
from pysciml_node.tuning.trials import AdjointTrial, Choice, Trial, Tuning, judged, ordered

Metric = Callable[[Solution], Any]

ALGORITHMS: tuple[Algorithm, ...] = (BS3(), Tsit5(), DP5(), Vern7())
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
FIXED: tuple[Algorithm, ...] = (Euler(), Midpoint(), RK4())
STEPS = (1, 2, 4, 8, 16, 32)
ADJOINTS: tuple[Adjoint, ...] = (
    DiscreteAdjoint(),
    DirectAdjoint(),
    InterpolatingAdjoint(),
    GaussAdjoint(),
    BacksolveAdjoint(),
)
# How many of the cheapest choices are tried as native code.
_COMPILED = 3
_FAILURES = (SolverFailure, CompileError, EngineUnavailable, JuliaError, ValueError, TypeError)


def tune(
    node: NeuralODE[Any],
    batch: State,
    metric: Metric | None = None,
    *,
    slack: float = 1e-3,
    work: Literal["seconds", "nfe"] = "seconds",
    algorithms: Algorithm | Sequence[Algorithm] = ALGORITHMS,
    tolerances: Sequence[float] = TOLERANCES,
    fixed: Algorithm | Sequence[Algorithm] = FIXED,
    steps: Sequence[int] = STEPS,
    adjoints: Adjoint | Sequence[Adjoint] = ADJOINTS,
    compile: bool = True,
    repeats: int = 3,
) -> Tuning:
    """Find out which solver gives equal results for the least work.

    Every algorithm is tried at every tolerance, and those of `fixed` with fixed steps; the cheapest
    of them as native code too. Their results are compared with a reference at a far smaller
    tolerance. Then the adjoints of the best choice are compared, by the gradient of a random
    combination of the end state's entries. The layer is left as it was: `tuning.apply(node)` gives
    it what was found.

    Args:
        node: a trained layer. It is solved in eval mode.
        batch: its input, as large as in use: steps are shared by a batch.
        metric: what the solution is for: `metric(solution)` returns a number, such as the accuracy
            of a classifier on the batch. Default: the end state itself.
        slack: results are equal where the metric deviates from the reference's by at most this, or
            the end state by at most this share of its norm. Gradients may deviate by this share of
            theirs.
        work: what is to be least, the time of a solve, or evaluations of the field.
        algorithms: with steps that adapt.
        tolerances: relative and absolute ones.
        fixed: algorithms with fixed steps.
        steps: how many of these.
        adjoints: of the best choice, as native code if it is that; `()` for none.
        compile: try native code.
        repeats: timed solves of each; the fastest counts, which the machine disturbed least.

    Returns:
        All that was tried, the best first.

    Raises:
        TypeError: `node` is no `NeuralODE`, or a `NeuralCDE`; an argument of the wrong kind.
        ValueError: nothing to try, or a number out of range.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> node = psn.NeuralODE(torch.nn.Linear(2, 2), rtol=1e-7, atol=1e-7)
        >>> tuning = psn.tune(node, torch.ones(4, 2), tolerances=[1e-3, 1e-5], adjoints=(),
        ...                   compile=False)
        >>> tuning.best.deviation <= 1e-3
        True
    """
    checks.instance("node", node, NeuralODE, example="NeuralODE(field)")
    if isinstance(node, NeuralCDE):
        raise TypeError(
            "tune solves a layer from a batch alone, but a NeuralCDE needs a path, too.\n"
            "  Compare algorithms and tolerances in a loop over cde(z0, path)."
        )
    checks.number("slack", slack, above=0)
    checks.choice("work", work, ("seconds", "nfe"))
    repeats = checks.whole("repeats", repeats, at_least=1)
    choices = _choices(node, algorithms, tolerances, fixed, steps)
    if not choices:
        raise ValueError("there is nothing to try.\n  Give algorithms and tolerances, or fixed.")
    adjoints = checks.sequence("adjoints", adjoints, Adjoint, example="DiscreteAdjoint()")
    if metric is not None:
        checks.function("metric", metric, "solution")
    with _restored(node), torch.inference_mode(False):
        bench = _Bench(node, batch, metric, slack, repeats)
        trials = ordered([bench.trial(choice) for choice in choices], work)
        if compile:
            candidates = [trial for trial in trials if trial.equal][:_COMPILED]
            native = [bench.trial(replace(trial.choice, compile=True)) for trial in candidates]
            trials = ordered([*trials, *native], work)
        adjoint_trials: list[AdjointTrial] = []
        if trials[0].equal and adjoints:
            adjoint_trials = bench.adjoints(trials[0].choice, adjoints)
    return Tuning(trials, tuple(adjoint_trials), slack, bench.metric_value, work)


def _choices(
    node: NeuralODE[Any],
    algorithms: Algorithm | Sequence[Algorithm],
    tolerances: Sequence[float],
    fixed: Algorithm | Sequence[Algorithm],
    steps: Sequence[int],
) -> list[Choice]:
    t0, t1 = (float(torch.as_tensor(t)) for t in node.tspan)
    sizes = [abs(t1 - t0) / checks.whole("steps", count, at_least=1) for count in steps]
    limits = [
        checks.number(f"tolerances[{i}]", tolerance, above=0)
        for i, tolerance in enumerate(checks.numbers("tolerances", tolerances))
    ]
    adapting = checks.sequence("algorithms", algorithms, Algorithm, example="Tsit5()")
    with_fixed = checks.sequence("fixed", fixed, Algorithm, example="RK4()")
    adaptive = [Choice(algorithm, limit) for algorithm in adapting for limit in limits]
    return adaptive + [Choice(algorithm, dt0=size) for algorithm in with_fixed for size in sizes]


@contextmanager
def _restored(node: NeuralODE[Any]) -> Iterator[None]:
    """Eval mode, and afterwards all settings as they were."""
    names = ("algorithm", "rtol", "atol", "adjoint", "options", "last")
    before, training = {name: getattr(node, name) for name in names}, node.training
    node.eval()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(node, name, value)
        node.train(training)


class _Bench:
    """Solves one problem in many ways and compares the results with a reference."""

    def __init__(
        self, node: NeuralODE[Any], batch: State, metric: Metric | None, slack: float, repeats: int
    ) -> None:
        self.node, self.batch, self.metric = node, batch, metric
        self.slack, self.repeats = slack, repeats
        # Of the module alone: a field that is a function has none, and need not be warned of.
        every = torch.nn.Module.parameters(node)
        self.parameters = [p for p in every if p.requires_grad]
        double = StateSpec.of(batch).real_dtype == torch.float64
        self._reference = Choice(Vern9(), 1e-12) if double else Choice(Tsit5(), 1e-6)
        with torch.no_grad():
            solution, _ = self._solve(self._reference)
        self.end = [part.double() for part in _real(solution)]
        self.metric_value = math.nan
        if metric is not None:
            self.metric_value = checks.number("metric(solution)", metric(solution))

    def _solve(self, choice: Choice) -> tuple[Solution, float]:
        return self._solve_from(self.batch, choice)

    def _solve_from(self, start: State, choice: Choice) -> tuple[Solution, float]:
        choice.apply(self.node)
        _wait(start)
        begun = time.perf_counter()
        solution = self.node.integrate(start)
        _wait(start)
        return solution, time.perf_counter() - begun

    def trial(self, choice: Choice) -> Trial:
        """What a choice gives."""
        try:
            with torch.no_grad():
                # The first solve is not timed: it may compile.
                solution, _ = self._solve(choice)
                seconds = min(self._solve(choice)[1] for _ in range(self.repeats))
        except _FAILURES as error:
            return Trial(choice, failure=_first_line(error))
        value, deviation = math.nan, _distance(_real(solution), self.end)
        if self.metric is not None:
            value = float(self.metric(solution))
            deviation = abs(value - self.metric_value)
        nfe = float(solution.stats.nfe)
        measured = Trial(choice, nfe, seconds, value, _finite(deviation))
        return judged(measured, self.slack)

    def adjoints(self, choice: Choice, adjoints: Sequence[Adjoint]) -> list[AdjointTrial]:
        """What adjoints of a choice give, the fastest with an equal gradient first."""
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(e.shape, generator=generator, dtype=e.dtype) for e in self.end]
        reference, _, _ = self._gradient(self._reference, DiscreteAdjoint(), weights)
        trials = [self._adjoint(choice, adjoint, weights, reference) for adjoint in adjoints]
        return sorted(trials, key=lambda t: (bool(t.failure), not t.equal, _finite(t.seconds)))

    def _adjoint(
        self,
        choice: Choice,
        adjoint: Adjoint,
        weights: Sequence[Tensor],
        reference: Sequence[Tensor],
    ) -> AdjointTrial:
        try:
            runs = [self._gradient(choice, adjoint, weights) for _ in range(self.repeats + 1)]
        except _FAILURES as error:
            return AdjointTrial(adjoint, failure=_first_line(error))
        # The first run is not timed: it may compile.
        gradient, nfe, _ = runs.pop(0)
        deviation = _finite(_distance(gradient, reference))
        seconds = min(run[2] for run in runs)
        return AdjointTrial(adjoint, nfe, seconds, deviation, deviation <= self.slack)

    def _gradient(
        self, choice: Choice, adjoint: Adjoint, weights: Sequence[Tensor]
    ) -> tuple[list[Tensor], float, float]:
        """Gradient with respect to start and parameters, backward evaluations, seconds."""
        self.node.adjoint = adjoint
        with torch.enable_grad():
            start = map_tensors(lambda part: part.detach().clone().requires_grad_(), self.batch)
            leaves = [*tensors_of(start), *self.parameters]
            solution, seconds = self._solve_from(start, choice)
            begun = time.perf_counter()
            pairs = zip(_real(solution), weights, strict=True)
            products = [(part * weight.to(part)).sum() for part, weight in pairs]
            gradients = torch.autograd.grad(
                torch.stack(products).sum(), leaves, materialize_grads=True, allow_unused=True
            )
            _wait(start)
        seconds += time.perf_counter() - begun
        gradient = [torch.view_as_real(g) if g.is_complex() else g for g in gradients]
        return [g.double() for g in gradient], float(solution.stats.nfe_backward), seconds


def _real(solution: Solution) -> list[Tensor]:
    """The end state's parts as real tensors."""
    parts = tensors_of(solution.u1)
    return [torch.view_as_real(part) if part.is_complex() else part for part in parts]


def _distance(given: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference, relative to the norm."""
    pairs = zip(given, expected, strict=True)
    error = math.hypot(*(float((a.detach().double() - b).norm()) for a, b in pairs))
    norm = math.hypot(*(float(b.norm()) for b in expected))
    return error / norm if norm else error


def _finite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _wait(batch: State) -> None:
    """Let a device finish, so that its time is counted."""
    device = next(tensors_of(batch)).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
