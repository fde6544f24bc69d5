"""What was tried, what came of it, and what is to be chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pysciml_node import plot
from pysciml_node.algorithms.adjoints import Adjoint
from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.layers.neural_de import NeuralDE


@dataclass(frozen=True)
class Choice:
    """How an equation is solved.

    Attributes:
        algorithm: the method.
        tolerance: relative and absolute; `None` for fixed steps.
        dt0: size of fixed steps; `None` for those that adapt.
        compile: whether the solve is native code.
    """

    algorithm: Algorithm
    tolerance: float | None = None
    dt0: float | None = None
    compile: bool = False

    def apply(self, node: NeuralDE[Any]) -> None:
        """Give a layer these settings; its other ones stay as they are."""
        node.algorithm = self.algorithm
        kept = {k: v for k, v in node.options.items() if k not in ("controller", "dt0", "compile")}
        if self.tolerance is not None:
            node.rtol = node.atol = self.tolerance
        else:
            kept |= {"controller": FixedStep(), "dt0": self.dt0}
        node.options = kept | ({"compile": True} if self.compile else {})

    def __str__(self) -> str:
        how = f"dt0={self.dt0:.3g}" if self.tolerance is None else f"{self.tolerance:.0e}"
        return f"{self.algorithm} {how}{' compiled' if self.compile else ''}"


@dataclass(frozen=True)
class Trial:
    """A choice and what it gave.

    Attributes:
        choice: how the equation was solved.
        nfe: evaluations of the field.
        seconds: of a solve, the fastest of several.
        metric: what `metric` returned for the solution; NaN without one.
        deviation: of the metric from the reference's, or else of the end state, relative.
        equal: whether the deviation is within the slack.
        failure: why there is no solution, in one line; empty where there is one.
    """

    choice: Choice
    nfe: float = math.nan
    seconds: float = math.nan
    metric: float = math.nan
    deviation: float = math.inf
    equal: bool = False
    failure: str = ""


@dataclass(frozen=True)
class AdjointTrial:
    """An adjoint of the best choice and what it gave.

    Attributes:
        adjoint: how gradients were taken.
        nfe: evaluations of the field in the backward sweep; none where graphs of steps are kept.
        seconds: of a solve and its gradient, the fastest of several.
        deviation: of the gradient from the reference's, relative.
        equal: whether the deviation is within the slack.
        failure: why there is no gradient, in one line; empty where there is one.
    """

    adjoint: Adjoint
    nfe: float = math.nan
    seconds: float = math.nan
    deviation: float = math.inf
    equal: bool = False
    failure: str = ""


@dataclass(frozen=True)
class Tuning:
    """The result of `tune`.

    Attributes:
        trials: all choices, those with equal results first, each group from the fastest on.
        adjoints: those of the best choice, in the same order.
        slack: what deviations are compared with.
        metric: the reference's; NaN without one.
        work: what the best is judged by, `"seconds"` or `"nfe"`.
    """

    trials: tuple[Trial, ...]
    adjoints: tuple[AdjointTrial, ...]
    slack: float
    metric: float
    work: str

    @property
    def best(self) -> Trial:
        """The cheapest choice whose result is equal.

        Raises:
            ValueError: there is none.
        """
        if not self.trials[0].equal:
            raise ValueError(
                f"no choice comes within {self.slack:g} of the reference; the nearest is "
                f"{min(self.trials, key=lambda trial: trial.deviation).choice}.\n"
                "  Try smaller tolerances, or allow more slack."
            )
        return self.trials[0]

    @property
    def best_adjoint(self) -> AdjointTrial | None:
        """The fastest adjoint of the best choice whose gradient is equal, if there is one."""
        return next((trial for trial in self.adjoints if trial.equal), None)

    def apply(self, node: NeuralDE[Any]) -> None:
        """Give a layer the best choice, and the best adjoint where one was found."""
        self.best.choice.apply(node)
        if self.best_adjoint is not None:
            node.adjoint = self.best_adjoint.adjoint

    def table(self, most: int = 12) -> str:
        """The first rows as text: choices, then adjoints.

        Args:
            most: how many of each.
        """
        lines = [f"{'':<28} {'NFE':>7} {'ms':>9} {'deviation':>10}"]
        for trial in self.trials[:most]:
            lines.append(_row(str(trial.choice), trial))
        for with_adjoint in self.adjoints[:most]:
            lines.append(_row(f"with {with_adjoint.adjoint}".partition("(")[0], with_adjoint))
        return "\n".join(lines)

    def plot(self, axes: Any = None) -> Any:
        """Draw deviation against work; see `pysciml_node.plot.work_precision`.

        Args:
            axes: matplotlib's; the current ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        curves: dict[str, list[tuple[float, float]]] = {}
        for trial in sorted(self.trials, key=lambda trial: trial.nfe):
            if not trial.failure:
                fixed = "" if trial.choice.dt0 is None else ", fixed steps"
                native = ", compiled" if trial.choice.compile else ""
                point = (getattr(trial, self.work), max(trial.deviation, 1e-16))
                curves.setdefault(f"{trial.choice.algorithm}{fixed}{native}", []).append(point)
        axes = plot.work_precision(curves, work=self.work, axes=axes)
        axes.axhline(self.slack, color="#999999", linestyle=":")
        axes.set(ylabel="deviation")
        return axes


def _row(name: str, trial: Trial | AdjointTrial) -> str:
    if trial.failure:
        return f"{name:<28} {trial.failure}"
    mark = "" if trial.equal else "  (not equal)"
    return (
        f"{name:<28} {trial.nfe:>7.0f} {1e3 * trial.seconds:>9.3f} {trial.deviation:>10.1e}{mark}"
    )


def ordered(trials: Sequence[Trial], work: str) -> tuple[Trial, ...]:
    """Those with equal results first, each group from the cheapest on, failures last."""
    return tuple(
        sorted(trials, key=lambda trial: (bool(trial.failure), not trial.equal, _of(trial, work)))
    )


def _of(trial: Trial, work: str) -> float:
    value: float = getattr(trial, work)
    return math.inf if math.isnan(value) else value


def judged(trial: Trial, slack: float) -> Trial:
    """The same with `equal` set."""
    return replace(trial, equal=trial.deviation <= slack)
