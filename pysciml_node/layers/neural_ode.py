"""A neural ordinary differential equation as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pysciml_node.adjoints import Adjoint
from pysciml_node.algorithms import Algorithm, Tsit5
from pysciml_node.problem import ODEProblem, Time
from pysciml_node.regularizers.augmented import Rate, augment, integrals, without_extra
from pysciml_node.regularizers.base import Regularizer, Times, attach_penalties, check_names
from pysciml_node.regularizers.integral import IntegralRegularizer
from pysciml_node.regularizers.probes import Probes
from pysciml_node.solution import Solution
from pysciml_node.solve import solve
from pysciml_node.state import State

MakeRate = Callable[[ODEProblem, Probes | None], Rate]


class NeuralODE(nn.Module):
    """Solves `du/dt = field(t, u)` from its input over a fixed interval.

    In training mode the regularizers are evaluated and `solution.penalty` is their weighted sum; in
    eval mode they cost nothing and it is 0.

    Args:
        field: the vector field, `field(t, u)` or `field(t, u, p)`; usually an `nn.Module`.
        algorithm: default `Tsit5()`.
        tspan: the interval.
        rtol: relative tolerance.
        atol: absolute tolerance.
        regularizers: what is added to the loss.
        adjoint: how gradients are taken; default `DiscreteAdjoint()`.
        saveat: times of `solution.u`; without it the ends of the steps.
        engine: `"torch"`, `"julia"` or `"auto"`.
        options: further arguments of `solve`, such as `dt0`, `controller` or `max_steps`.

    Raises:
        TypeError: a field that is not callable, a regularizer of another kind.

    Example:
        >>> import torch, pysciml_node as psn
        >>> class Field(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(3, 3)
        ...     def forward(self, t, u):
        ...         return torch.tanh(self.linear(u))
        >>> node = psn.NeuralODE(Field(), psn.Tsit5(), tspan=(0.0, 1.0), rtol=1e-5, atol=1e-5)
        >>> node(torch.zeros(8, 3)).u1.shape
        torch.Size([8, 3])
    """

    def __init__(
        self,
        field: Callable[..., Any],
        algorithm: Algorithm | None = None,
        tspan: tuple[Time, Time] = (0.0, 1.0),
        *,
        rtol: float | Tensor = 1e-6,
        atol: float | Tensor = 1e-6,
        regularizers: Sequence[Regularizer] = (),
        adjoint: Adjoint | None = None,
        saveat: Sequence[float] | Tensor | None = None,
        engine: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not callable(field):
            raise TypeError(f"field must be callable as field(t, u), but is {field!r}.")
        self.field = field
        self.algorithm = Tsit5() if algorithm is None else algorithm
        self.tspan = tspan
        self.rtol, self.atol = rtol, atol
        self.regularizers = nn.ModuleList(check_names(regularizers))
        self.adjoint, self.saveat, self.engine = adjoint, saveat, engine
        self.options = options

    def forward(
        self,
        u0: State,
        p: Any = None,
        tspan: tuple[Time, Time] | None = None,
        saveat: Times | None = None,
    ) -> Solution:
        """Solve from `u0` of shape `(B, *D)`.

        Args:
            u0: initial state.
            p: extra argument of the field.
            tspan: another interval, for this call.
            saveat: other times of `solution.u`, for this call.

        Returns:
            The solution; `solution.u1` has the shape of `u0`.
        """
        return self.integrate(u0, p, tspan, saveat)

    def integrate(
        self,
        u0: State,
        p: Any = None,
        tspan: tuple[Time, Time] | None = None,
        saveat: Times | None = None,
        *,
        driven: Mapping[str, MakeRate] | None = None,
        regularize: bool = True,
    ) -> Solution:
        """Solve as `forward` does, with rates beside the state.

        Args:
            u0: initial state.
            p: extra argument of the field.
            tspan: another interval, for this call.
            saveat: other times of `solution.u`, for this call.
            driven: for each name what makes the rate of one solve, from the problem and its probes.
                Their integrals are in `solution.integrals`, and have the state's tolerances.
            regularize: evaluate the regularizers in training mode.

        Returns:
            The solution; `solution.u1` has the shape of `u0`.
        """
        problem = ODEProblem(self.field, u0, self.tspan if tspan is None else tspan, p)
        saveat = self.saveat if saveat is None else saveat
        regularizers = self._active() if regularize else []
        for regularizer in regularizers:
            problem, saveat = regularizer.prepare(problem, saveat)
        probes = Probes(problem.u0) if isinstance(problem.u0, Tensor) else None
        # First those that are driven: regularizers share their probes.
        beside = {name: make(problem, probes) for name, make in (driven or {}).items()}
        rates = {
            r.name: r.rate(problem, probes)
            for r in regularizers
            if isinstance(r, IntegralRegularizer)
        }
        for name in beside.keys() & rates.keys():
            raise ValueError(f"a regularizer is named {name!r}, which is taken: give it name=...")
        solution = self._solve(problem, saveat, rates, beside)
        solution.penalty = torch.zeros(
            (), dtype=problem.spec.real_dtype, device=problem.spec.device
        )
        attach_penalties(solution, regularizers)
        return solution

    def _active(self) -> list[Regularizer]:
        return [r for r in self.regularizers if isinstance(r, Regularizer)] if self.training else []

    def _solve(
        self,
        problem: ODEProblem,
        saveat: Times | None,
        rates: dict[str, Rate],
        driven: dict[str, Rate],
    ) -> Solution:
        whole, rtol, atol = problem, self.rtol, self.atol
        augmented = bool(rates or driven)
        if augmented:
            whole, rtol, atol = augment(problem, rates, rtol, atol, driven)
        solution = solve(
            whole,
            self.algorithm,
            rtol=rtol,
            atol=atol,
            saveat=saveat,
            engine=self.engine,
            adjoint=self.adjoint,
            **self.options,
        )
        if not augmented:
            return solution
        found = integrals(solution)
        solution = without_extra(solution, problem)
        solution.integrals = found
        return solution

    def step_schedules(self) -> None:
        """Count one training step of every regularizer's weight schedule."""
        for regularizer in self.regularizers:
            regularizer.step()  # type: ignore[operator]

    def extra_repr(self) -> str:
        """Configuration for `repr`."""
        return f"{self.algorithm}, tspan={self.tspan}, rtol={self.rtol}, atol={self.atol}"
