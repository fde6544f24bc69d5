"""`Budget`: the weight of a penalty, chosen while training so that solves cost what they may."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from pysciml_node import checks, plot
from pysciml_node.budgets.control import Average, DualWeight
from pysciml_node.budgets.costs import UNITS, Kind, cost_of, has_fixed_steps, smooth_cost_of
from pysciml_node.budgets.history import History
from pysciml_node.budgets.ranks import mean_over_ranks
from pysciml_node.errors import PsnWarning
from pysciml_node.schedules import Schedule
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import Solution

# Training steps between two calls of `measure`.
MEASURE_EVERY = 10
_USUAL_WARMUP = 50
_USUAL_RESPONSE = 50.0
# Of the horizon: where the weight becomes constant.
_HANDOVER = 0.95
# The violation is taken ahead by this many times what it has changed by within a response.
_LEAD = 1.0
# Where the cost starts above the budget it has this part of the horizon to come down, or this many
# responses: a weight that forces it at once costs more of the loss than one that leaves it time.
_APPROACH, _USUAL_APPROACH = 0.5, 4.0
# A budget counts as missed where the cost is above it by more than this share.
_MISSED = 0.1
# The weight has been at its limit for so many responses: it will stay there.
_PATIENCE = 4


class Budget(Schedule):
    """A weight that is adjusted while training so that a solve costs no more than it may.

    Given as the weight of one or several regularizers, it watches every solve in training mode, and
    raises their weight while solves are too expensive, and lowers it, down to 0, while they are
    cheaper. Nothing else in a training loop changes: no call of `step_schedules` is needed. It can
    be scaled, `0.1 * budget`, for regularizers that share it in another proportion.

    The weight is the dual variable of the constraint `cost <= target`. How it is found is in
    `pysciml_node.budgets.control`, and which cost it sees in `pysciml_node.budgets.costs`.

    Args:
        nfe: evaluations of the field that a solve may take.
        steps: accepted and rejected steps that it may take.
        seconds: time that it may take, by the clock.
        fraction: of the evaluations that solves take in the warm-up, when the penalty has no
            weight. A field that is still learning gets more expensive: the cost without a penalty
            at the end of training is larger.
        warmup: training steps in which the weight is 0; default 0, and 50 with `fraction`.
        horizon: training steps in all. For the last twentieth of them the weight is constant, the
            mean of what it was just before, so that training ends with one objective. Without it
            the weight is adjusted until `freeze` is called.
        limit: what the weighted penalty may cost at most, in units of the loss. A fiftieth of it
            is where weights begin: give about what the loss is at the start of training.
        measure: what to hold the budget instead of the training solves' own cost: a function
            without arguments that returns the cost, such as the evaluations for a held-out batch in
            eval mode. It is called every tenth training step; in between the cost is taken to move
            as that of the training solves does.
        response: training steps in which the cost answers to the weight, roughly; default a
            tenth of `horizon`, at least 10, or 50.
        synchronize: where `torch.distributed` runs, take the mean of the ranks' costs, so that all
            have the same weight. All of them have to make the same number of solves.

    Attributes:
        history: what was measured and done in every training step.
        weight: the present weight.
        target: the budget; NaN before the end of a warm-up that it is a fraction of.
        reached: the cost, averaged over the last training steps; NaN before the first.

    Raises:
        TypeError: not exactly one of `nfe`, `steps`, `seconds` and `fraction`.
        ValueError: a number out of range. Of a solve: its steps are fixed.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> budget = psn.Budget(nfe=26)
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> node = psn.NeuralODE(net, regularizers=[psn.LocalError(weight=budget)])
        >>> for _ in range(3):
        ...     loss = node(torch.ones(4, 2)).penalty
        >>> len(budget.history), budget.target
        (2, 26.0)

    References:
        Pal et al., arXiv 2303.02262 and 2105.03918 (penalties); Stooke et al., arXiv 2007.03964
        (control of multipliers).
    """

    def __init__(
        self,
        nfe: float | None = None,
        *,
        steps: float | None = None,
        seconds: float | None = None,
        fraction: float | None = None,
        warmup: int | None = None,
        horizon: int | None = None,
        limit: float = 1.0,
        measure: Callable[[], float] | None = None,
        response: float | None = None,
        synchronize: bool = True,
    ) -> None:
        given: dict[Kind, float | None] = {"nfe": nfe, "steps": steps, "seconds": seconds}
        amounts = {kind: value for kind, value in given.items() if value is not None}
        if len(amounts) + (fraction is not None) != 1:
            raise TypeError(
                f"a budget is one of nfe, steps, seconds and fraction, but "
                f"{', '.join(amounts) or 'none'} {'are' if len(amounts) > 1 else 'is'} given.\n"
                "  Write Budget(nfe=60)."
            )
        self.kind: Kind = next(iter(amounts), "nfe")
        self.fraction = None
        self.target = math.nan
        if fraction is None:
            self.target = checks.number(self.kind, amounts[self.kind], above=0)
        else:
            self.fraction = checks.number("fraction", fraction, above=0, at_most=1)
        usual = _USUAL_WARMUP if self.fraction else 0
        self.warmup = usual if warmup is None else checks.whole("warmup", warmup, at_least=0)
        if self.fraction and not self.warmup:
            raise ValueError(
                "a fraction of the unregularized cost needs a warm-up, but warmup is 0.\n"
                "  Leave warmup out, or give the number of training steps to measure."
            )
        self.horizon = None if horizon is None else checks.whole("horizon", horizon, at_least=1)
        self.limit = checks.number("limit", limit, above=0)
        self.measure = None if measure is None else checks.function("measure", measure)
        if response is None:
            response = max(self.horizon / 10, 10.0) if self.horizon else _USUAL_RESPONSE
        self.response = checks.number("response", response, at_least=1)
        self.synchronize = checks.flag("synchronize", synchronize)
        self.history = History(UNITS[self.kind])
        self._reset()

    def _reset(self) -> None:
        quick = self.response / 5
        self._control = DualWeight(self.response, self.limit)
        self._violation, self._before = Average(quick), Average(self.response)
        self._penalty = Average(self.response)
        self._cost = Average(self.response)
        # What `measure` has returned, and the smooth cost of training solves beside it.
        self._measured, self._beside = Average(3.0), Average(3.0)
        self._round = _Round()
        self._frozen = self._told = False
        self._start = math.nan

    def __call__(self, step: int) -> float:
        """The present weight, whatever the step."""
        return self.weight

    @property
    def weight(self) -> float:
        """The present weight."""
        return self._control.weight

    @property
    def reached(self) -> float:
        """The cost, averaged over the last training steps; NaN before the first."""
        return self._measured.value if self.measure else self._cost.value

    def observe(self, source: object, solution: Solution | EnsembleSolution) -> None:
        """Take note of a solve in training mode.

        What different sources report belongs to one training step, their costs together; where a
        source reports again, the next one has begun.

        Args:
            source: who solved.
            solution: what was solved, before the field is evaluated for penalties.
        """
        if not torch.is_grad_enabled():
            return
        if has_fixed_steps(solution):
            raise ValueError(
                "a budget is held by smaller errors, which allow larger steps, but the steps of "
                "this solve are fixed.\n  Leave controller=FixedStep() out, or give the weight as "
                "a number."
            )
        if self._round.is_over(source):
            self._advance(self._round)
            self._round = _Round()
        cost, smooth = cost_of(solution, self.kind), smooth_cost_of(solution, self.kind)
        self._round.take(source, cost, smooth)

    def charge(self, penalty: float) -> None:
        """Take note of a penalty that the weight is for, without the weight."""
        if torch.is_grad_enabled():
            self._round.penalty += penalty

    def _advance(self, ended: _Round) -> None:
        """Close a training step: adjust the weight."""
        step = len(self.history)
        values = [ended.cost, ended.smooth, ended.penalty]
        measured = self.measure is not None and step % MEASURE_EVERY == 0
        if self.measure is not None and measured:
            values.append(checks.number("measure()", self.measure(), at_least=0))
        if self.synchronize:
            values = mean_over_ranks(values)
        cost, smooth, penalty = values[:3]
        self._cost.add(cost)
        if measured:
            self._measured.add(values[3])
            self._beside.add(smooth)
        if self.measure is not None:
            smooth *= self._measured.value / self._beside.value
        usual_penalty = self._penalty.add(penalty)
        if step < self.warmup:
            if self.fraction and step + 1 == self.warmup:
                self.target = self.fraction * self.reached
        elif not self._frozen:
            violation = math.log(max(smooth, 1e-12) / self._goal(step, smooth))
            now, before = self._violation.add(violation), self._before.add(violation)
            self._control.update(now, _LEAD * (now - before), usual_penalty)
        shown = values[3] if measured else (math.nan if self.measure else cost)
        self.history.add(shown, smooth, penalty, self.weight, self.target)
        if self.horizon is None:
            if self._control.limited >= _PATIENCE * self.response:
                self._say_if_missed()
        elif step + 1 == math.ceil(_HANDOVER * self.horizon):
            self.freeze()
        elif step + 2 == self.horizon:
            # The last training step that is closed by one after it.
            self._say_if_missed()

    def _goal(self, step: int, cost: float) -> float:
        """What the cost is to be now: it goes from where it starts to the budget."""
        if math.isnan(self._start):
            self._start = max(cost, self.target)
        way = _APPROACH * self.horizon if self.horizon else _USUAL_APPROACH * self.response
        left = max(1.0 - (step - self.warmup) / way, 0.0)
        return self.target * math.pow(self._start / self.target, left)

    def freeze(self) -> None:
        """Keep the weight constant from here on: the mean of what it was of late."""
        if not self._frozen:
            self._control.settle(self._penalty.value)
            self._frozen = True

    def _say_if_missed(self) -> None:
        missed = self.reached > (1 + _MISSED) * self.target
        if missed and not self._told:
            self._told = True
            warnings.warn(
                f"the budget has not been reached: {self.report()}.\n"
                "  Raise the budget or limit, loosen the tolerances, or train longer.",
                PsnWarning,
                stacklevel=2,
            )

    def report(self) -> str:
        """What was asked for and what was reached, in one line."""
        unit = UNITS[self.kind]
        price = self.weight * self._penalty.value
        return (
            f"{self.target:.4g} {unit} were asked for, {self.reached:.4g} are reached on average "
            f"after {len(self.history)} training steps, at a weight of {self.weight:.4g}, which "
            f"costs {price:.3g} in the loss (at most {self.limit:g})"
        )

    def plot(self, axes: Any = None) -> Any:
        """Draw cost and weight over training; see `pysciml_node.plot.budget`.

        Args:
            axes: matplotlib's; the current ones by default.

        Returns:
            The axes of the cost.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plot.budget(self.history, axes=axes)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the weight goes on, and the history.

        It is part of the `state_dict` of regularizers, and so of models.
        """
        numbers = [
            self.target,
            self._start,
            float(self._frozen),
            float(self._told),
            *self._control.numbers(),
            *(x for average in self._averages() for x in average.numbers()),
            *self._round.numbers(),
        ]
        return {
            "control": torch.tensor(numbers, dtype=torch.float64, device="cpu"),
            # Not a tensor: a distributed checkpoint loads tensors into those of equal shape.
            "history": self.history.tensor().tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._reset()
        numbers = iter(state["control"].tolist())
        target, self._start = next(numbers), next(numbers)
        self.target = target if self.fraction else self.target
        self._frozen, self._told = bool(next(numbers)), bool(next(numbers))
        self._control.restore([next(numbers) for _ in self._control.numbers()])
        for average in self._averages():
            average.restore([next(numbers), next(numbers)])
        self._round = _Round.of(list(numbers))
        self.history.restore(torch.as_tensor(state["history"], dtype=torch.float64))

    def _averages(self) -> tuple[Average, ...]:
        times = (self._violation, self._before)
        return (*times, self._penalty, self._cost, self._measured, self._beside)

    def __repr__(self) -> str:
        amount = f"fraction={self.fraction:g}" if self.fraction else f"{self.kind}={self.target:g}"
        return f"Budget({amount}, weight={self.weight:.4g})"


class _Round:
    """What the solves of one training step have cost so far."""

    def __init__(self) -> None:
        self.cost = self.smooth = self.penalty = 0.0
        # Who has reported; after a checkpoint nobody knows who it was.
        self._sources: set[int] | None = set()

    def is_over(self, source: object) -> bool:
        return self._sources is None or id(source) in self._sources

    def take(self, source: object, cost: float, smooth: float) -> None:
        assert self._sources is not None
        self._sources.add(id(source))
        self.cost += cost
        self.smooth += smooth

    def numbers(self) -> list[float]:
        begun = self._sources is None or len(self._sources) > 0
        return [float(begun), self.cost, self.smooth, self.penalty]

    @classmethod
    def of(cls, numbers: list[float]) -> _Round:
        restored = cls()
        begun, restored.cost, restored.smooth, restored.penalty = numbers
        restored._sources = None if begun else set()
        return restored

    def __getstate__(self) -> dict[str, Any]:
        return {"numbers": self.numbers()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(_Round.of(state["numbers"]).__dict__)
