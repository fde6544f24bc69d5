"""A neural ordinary differential equation as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, Unpack, overload

from torch import Tensor
from typing_extensions import override

from pysciml_node import checks
from pysciml_node.algorithms.explicit import Algorithm, Tsit5
from pysciml_node.layers.augmented import (
    Augmentation,
    augmented_events,
    without_extra,
)
from pysciml_node.layers.autonomous import check_function
from pysciml_node.layers.neural_de import NeuralDE, Out, Output
from pysciml_node.layers.options import SolverOptions
from pysciml_node.layers.rows import OfRow, attach_row_penalties, refuse_rates, rows_of
from pysciml_node.problems.event import Event
from pysciml_node.problems.modes import uncompiled
from pysciml_node.problems.ode import ODEProblem, Time
from pysciml_node.problems.state import State, StateSpec
from pysciml_node.regularizers.base import Regularizer, Times
from pysciml_node.regularizers.probes import Probes, batch_of
from pysciml_node.regularizers.rates import Rate
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import Solution
from pysciml_node.solving.solve import solve
from pysciml_node.translation.recent import Recent

MakeRate = Callable[[ODEProblem, Probes | None], Rate]

KINDS = 8
"""Kinds of states of which a layer knows what it has made for an earlier solve."""


class NeuralODE(NeuralDE[Out], Generic[Out]):
    """Solves `du/dt = field(t, u)` from its input over a fixed interval.

    In training mode the regularizers are evaluated and `solution.penalty` is their weighted sum; in
    eval mode they cost nothing and it is 0.

    Args:
        field: the vector field, `field(t, u)` or `field(t, u, p)`; usually an `nn.Module`. One
            whose signature has a single argument, such as an `nn.Sequential`, is given the state.
        algorithm: default `Tsit5()`.
        tspan: the interval.
        independent: the rows of `u0` are members of an ensemble: each has steps of its own. The
            solution is an `EnsembleSolution`, whose `u1` has the shape of `u0` and whose `u` is
            `(B, T, *D)`; `solution[i]` is that of a row. Regularizers read the steps of each row,
            and their values are means over the rows; those that integrate a rate are refused. The
            field is given each row as a batch of one.
        output: what a call returns: the `"solution"`, or its end state `"u1"`, as a layer of an
            `nn.Sequential` has to; `node.penalty` and `node.last` are then of the last call.
        options: `rtol` and `atol` (both 1e-6), `regularizers` (what is added to the loss),
            `adjoint`, `saveat` (times of `solution.u`; without it the ends of the steps), `engine`,
            and the other arguments of `solve`, such as `dt0`, `controller` or `max_steps`: see
            `SolverOptions`.

    Raises:
        TypeError: a field that is not callable, an unknown option, a regularizer of another kind.
        ValueError: two regularizers of one name.

    Examples:
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

    @overload
    def __init__(
        self: NeuralODE[Solution],
        field: Callable[..., Any],
        algorithm: Algorithm | None = ...,
        tspan: tuple[Time, Time] = ...,
        *,
        output: Literal["solution"] = ...,
        independent: Literal[False] = ...,
        **options: Unpack[SolverOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: NeuralODE[EnsembleSolution],
        field: Callable[..., Any],
        algorithm: Algorithm | None = ...,
        tspan: tuple[Time, Time] = ...,
        *,
        output: Literal["solution"] = ...,
        independent: Literal[True],
        **options: Unpack[SolverOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: NeuralODE[Any],
        field: Callable[..., Any],
        algorithm: Algorithm | None = ...,
        tspan: tuple[Time, Time] = ...,
        *,
        output: Literal["u1"],
        independent: bool = ...,
        **options: Unpack[SolverOptions],
    ) -> None: ...

    def __init__(
        self,
        field: Callable[..., Any],
        algorithm: Algorithm | None = None,
        tspan: tuple[Time, Time] = (0.0, 1.0),
        *,
        output: Output = "solution",
        independent: bool = False,
        **options: Unpack[SolverOptions],
    ) -> None:
        super().__init__(Tsit5() if algorithm is None else algorithm, tspan, output, options)
        check_function("field", field, "t", "u")
        self.field = field
        self._augmented: Recent[StateSpec, Augmentation] = Recent(KINDS)
        self.independent = checks.flag("independent", independent)
        if self.independent:
            refuse_rates(list(self.regularizers))  # type: ignore[arg-type]

    def forward(
        self,
        u0: State,
        p: Any = None,
        tspan: tuple[Time, Time] | None = None,
        saveat: Times | None = None,
    ) -> Out:
        """Solve from `u0` of shape `(B, *D)`.

        Args:
            u0: initial state.
            p: extra argument of the field.
            tspan: another interval, for this call.
            saveat: other times of `solution.u`, for this call.

        Returns:
            The solution, whose `u1` has the shape of `u0`; or this end state.
        """
        run = self._by_rows if self.independent else self.integrate
        returned: Out = self.give(run(u0, p, tspan, saveat))
        return returned

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_augmented": Recent(KINDS)}

    @uncompiled
    def _by_rows(
        self, u0: State, p: Any, tspan: tuple[Time, Time] | None, saveat: Times | None
    ) -> EnsembleSolution:
        """Solve the rows with steps of their own."""
        given = ODEProblem(self.function("field"), u0, self.tspan if tspan is None else tspan, p)
        with self.ready(given) as problem:
            saveat = self.saveat if saveat is None else saveat
            regularizers = self.active_regularizers()
            for regularizer in regularizers:
                problem, saveat = regularizer.prepare(problem, saveat)
            known = self._functions.get("row")
            # One function for one field: native code knows it again.
            if known is None or known[0] is not problem.f:
                known = self._functions["row"] = problem.f, OfRow(problem.f)
            rows = rows_of(problem, known[1])
            solution = solve(rows, self.algorithm, **self.settings(saveat=saveat))
            attach_row_penalties(solution, regularizers)
            self.show(solution)
            return solution

    @uncompiled
    def integrate(
        self,
        u0: State,
        p: Any = None,
        tspan: tuple[Time, Time] | None = None,
        saveat: Times | None = None,
        *,
        driven: Mapping[str, MakeRate] | None = None,
        batch: int | None = None,
        regularize: bool = True,
        whole: bool = False,
    ) -> Solution:
        """Solve as `forward` does, with rates beside the state.

        Args:
            u0: initial state.
            p: extra argument of the field.
            tspan: another interval, for this call.
            saveat: other times of `solution.u`, for this call.
            driven: for each name what makes the rate of one solve, from the problem and its probes.
                Their integrals are in `solution.integrals`, and have the state's tolerances.
            batch: how many samples `u0` holds; default the length of its first axis, and 1 for a
                state with a single axis.
            regularize: evaluate the regularizers in training mode.
            whole: solve over the interval as it is, whatever regularizers would make of it.

        Returns:
            The solution; `solution.u1` has the shape of `u0`.

        Raises:
            ValueError: the rows are independent.
        """
        if self.independent:
            raise ValueError(
                f"this {type(self).__name__} is solved as a whole here, but independent=True was "
                "given: its rows have no steps in common.\n  Leave it out."
            )
        given = ODEProblem(self.function("field"), u0, self.tspan if tspan is None else tspan, p)
        saveat = self.saveat if saveat is None else saveat
        regularizers = self.active_regularizers() if regularize else []
        if not (regularizers or driven or self._solve_hooks):
            # Nothing else here depends on the modes, which `solve` looks at itself.
            return self.penalize(self.solve(given, saveat=saveat), [])
        with self.ready(given) as problem:
            for regularizer in [] if whole else regularizers:
                problem, saveat = regularizer.prepare(problem, saveat)
            solution = self._solve(problem, saveat, regularizers, driven or {}, batch)
            return self.penalize(solution, regularizers)

    def _solve(
        self,
        problem: ODEProblem,
        saveat: Times | None,
        regularizers: Sequence[Regularizer],
        driven: Mapping[str, MakeRate],
        batch: int | None,
    ) -> Solution:
        if not (regularizers or driven):
            return self.solve(problem, saveat=saveat)
        probes: Probes | None = None
        if isinstance(problem.u0, Tensor):
            batch = batch_of(problem.u0) if batch is None else batch
            probes = Probes(problem.u0, batch)
        # First those that are driven: regularizers share their probes.
        beside = {name: make(problem, probes) for name, make in driven.items()}
        every = {r.name: r.rate(problem, probes) for r in regularizers}
        rates = {name: rate for name, rate in every.items() if rate is not None}
        for name in beside.keys() & rates.keys():
            raise ValueError(
                f"a regularizer is named {name!r}, which is taken.\n  Give it name=..."
            )
        if not (rates or beside):
            return self.solve(problem, saveat=saveat)
        batch = batch_of(problem.u0) if batch is None else batch
        # One field for one kind of state: native code knows it again.
        bigger = self._augmented.get(problem.spec)
        if bigger is None or not bigger.serves(problem, rates, beside, batch):
            bigger = Augmentation(problem, rates, beside, batch)
            if all(getattr(x, "lasting", False) for x in (*rates.values(), *beside.values())):
                self._augmented[problem.spec] = bigger
        rtol, atol = bigger.tolerances(self.rtol, self.atol)
        given = checks.sequence("events", self.options.get("events", ()), Event, example="Event(f)")
        events = augmented_events(given, problem.spec)
        solution = self.solve(
            bigger.problem(problem), rtol=rtol, atol=atol, saveat=saveat, events=events
        )
        return without_extra(solution, problem)
