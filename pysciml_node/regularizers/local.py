"""Local regularization: the solver's own estimates at one random time.

Reference: Pal, Edelman, Rackauckas, Locally Regularized Neural Differential Equations: Some Black
Boxes Were Meant to Remain Closed!, ICML 2023, arXiv 2303.02262, section 3.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta, Tsit5
from pysciml_node.algorithms.stochastic import StochasticRungeKutta
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.regularizers.base import Regularizer, stability_radius
from pysciml_node.replay.members.estimates import StackedEstimates, estimates_of
from pysciml_node.schedules import Schedule
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import Solution, StepEstimate, StopGradient

Sampling = Literal["unbiased", "biased"]
StepSize = Literal["hairer", "solver"]


class _LocalRegularizer(Regularizer):
    """One step of an embedded pair from a sampled time of the solution.

    Args:
        sampling: `"unbiased"` draws a time uniformly from the interval. `"biased"` draws the start
            of a step, all steps being equally likely, so times where steps are small are drawn more
            often. The end of the interval is never drawn.
        weight: factor of the penalty in the loss, or a schedule of it.
        step_size: `"hairer"` takes the first step that a solve from the sampled state would try, as
            the paper's code does. `"solver"` takes the size of the step that contains the sampled
            time, as its text says.
        stop_gradient: `True` keeps gradients out of the sampled state and the first stage, so they
            reach the field's parameters through the other stages alone, as in the paper's code.
            `"state"` keeps them out of the state, and they flow through the whole of the step. With
            `False` they also flow through the state into the solve.
        include_start: let `"biased"` draw the start of the interval too. The paper's code does so
            only where there is no other step.
        algorithm: the embedded pair. The default is `Tsit5()` whatever the solve used, as in the
            paper's code, and the solve's own method for stochastic solves. A stochastic step draws
            new noise each time, and its first stage is part of it: `stop_gradient=True` is
            `"state"` there.
        generator: draws the times; a CPU generator. Default torch's own.
        name: key in `Solution.penalties`.
    """

    def __init__(
        self,
        sampling: Sampling = "unbiased",
        weight: float | Schedule = 1.0,
        *,
        step_size: StepSize = "hairer",
        stop_gradient: StopGradient = True,
        include_start: bool = False,
        algorithm: ExplicitRungeKutta | StochasticRungeKutta | None = None,
        generator: torch.Generator | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.sampling = checks.choice("sampling", sampling, get_args(Sampling))
        self.step_size = checks.choice("step_size", step_size, get_args(StepSize))
        allowed: tuple[StopGradient, ...] = (True, False, "state")
        self.stop_gradient = checks.choice("stop_gradient", stop_gradient, allowed)
        self.include_start = checks.flag("include_start", include_start)
        if algorithm is not None:
            kinds: Any = ExplicitRungeKutta | StochasticRungeKutta
            checks.instance("algorithm", algorithm, kinds, example="Tsit5()")
        self.algorithm = algorithm
        self.generator = checks.generator("generator", generator)

    def sample_time(self, solution: Solution) -> float:
        """Draw a time of the solution."""
        times = solution.trajectory.times
        if self.sampling == "unbiased":
            share = torch.rand((), generator=self.generator, dtype=torch.float64).item()
            return times[0] + share * (times[-1] - times[0])
        first = 0 if self.include_start or len(times) == 2 else 1
        return times[int(torch.randint(first, len(times) - 1, (), generator=self.generator))]

    def pair(self, solution: Solution) -> Algorithm:
        """The method of the local step."""
        if self.algorithm is not None:
            return self.algorithm
        return solution.algorithm if isinstance(solution.problem, SDEProblem) else Tsit5()

    def estimate(self, solution: Solution, t: float | None = None) -> StepEstimate:
        """The step at `t`, or at a sampled time."""
        t = self.sample_time(solution) if t is None else t
        dt = solution.step_size(t) if self.step_size == "solver" else None
        pair = self.pair(solution)
        return solution.local_estimate(t, pair, dt=dt, stop_gradient=self.stop_gradient)

    @abstractmethod
    def _value(self, step: StepEstimate, pair: Algorithm) -> Tensor:
        """The penalty of a step of a pair, or of a step of each member, `(M,)`."""

    def forward(self, solution: Solution) -> Tensor:
        """The penalty, a 0-d tensor."""
        return self._value(self.estimate(solution), self.pair(solution))

    def _over_members(self, solution: EnsembleSolution) -> Tensor | None:
        """The mean over members, each with a time of its own."""
        found = estimates_of(solution.members)
        pair = Tsit5() if self.algorithm is None else self.algorithm
        if found is None or not isinstance(pair, ExplicitRungeKutta) or self._own_rules():
            return super()._over_members(solution)
        t = self._sample_times(found)
        dt = found.sizes_at(t) if self.step_size == "solver" else None
        return self._value(found.local(t, pair, self.stop_gradient, dt), pair).mean()

    def _own_rules(self) -> bool:
        """Whether a derived class takes its step of a solution in another way."""
        rules = ("sample_time", "pair", "estimate", "forward")
        return any(getattr(type(self), x) is not getattr(_LocalRegularizer, x) for x in rules)

    def _sample_times(self, found: StackedEstimates) -> np.ndarray[Any, Any]:
        """Draw a time of each member, as `sample_time` does."""
        if self.sampling == "unbiased":
            t0, size = found.spans[0], len(found.ends)
            share = torch.rand(size, generator=self.generator, dtype=torch.float64).numpy()
            times: np.ndarray[Any, Any] = t0 + share * (found.ends - t0)
            return times
        drawn = []
        for m in range(len(found.ends)):
            starts = found.starts(m)
            first = 0 if self.include_start or len(starts) == 1 else 1
            n = int(torch.randint(first, len(starts), (), generator=self.generator))
            drawn.append(starts[n])
        return np.array(drawn)

    def extra_repr(self) -> str:
        """Configuration for `repr`."""
        return f"{self.sampling}, {super().extra_repr()}, step_size={self.step_size!r}"


class LocalError(_LocalRegularizer):
    """Local error regularization: `R = |dt| * E` at one random time.

    `E` is the root-mean-square, over batch and components, of the embedded error estimate divided
    by `atol + rtol * max(|u|, |u1|)`, with the tolerances of the solve. The extra memory is one
    step's, whatever the adjoint of the solve.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> field = torch.nn.Linear(2, 2)
        >>> node = psn.NeuralODE(lambda t, u: field(u), psn.Tsit5(),
        ...                      regularizers=[psn.LocalError("unbiased", weight=2.5)])
        >>> solution = node(torch.ones(4, 2))
        >>> bool(solution.penalty > 0)
        True

    Reference: arXiv 2303.02262, section 3 and Algorithm 1.
    """

    def _value(self, step: StepEstimate, pair: Algorithm) -> Tensor:
        """Error times size."""
        return step.error * step.dt.abs()


class LocalStiffness(_LocalRegularizer):
    """Local stiffness regularization: the stiffness estimate at one random time.

    `R = |k_i - k_j| / |g_i - g_j| / S`, with the two stages that share a node, their arguments
    `g`, and the pair's stability radius `S` (3.5068 for Tsit5). The paper reports no gain from it.

    Reference: arXiv 2303.02262, section 3; Shampine, Math. Comput. 31 (1977) 412-421.
    """

    def _value(self, step: StepEstimate, pair: Algorithm) -> Tensor:
        """Stiffness in units of stability."""
        return step.stiffness / stability_radius(pair)
