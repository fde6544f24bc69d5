"""How a solve in Julia begins: what solves of the same options have in common, worked out once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.julia_engine import plans
from pysciml_node.julia_engine.process.buffers import doubles, real_size
from pysciml_node.problems.ode import ODEProblem, ends_of
from pysciml_node.problems.state import StateSpec
from pysciml_node.steps.record import first_room
from pysciml_node.translation.recent import Recent


class Departure:
    """The plan of a solve, its times, and the room for its steps.

    Args:
        problem: gives the structure of the state and the interval.
        algorithm: of this engine.
        options: of the solve.
        keep_solution: whether SciML's solution is kept.

    Attributes:
        options, keep_solution: as given.
        plan: the options in Julia.
        marks: start, stops and end.
        size: real numbers of a state.
        room: steps that there is room for at first.
        saves: number of saved times.
        given: the arguments of `solve!` that are the same each time.
    """

    def __init__(
        self, problem: ODEProblem, algorithm: Algorithm, options: SolveOptions, keep_solution: bool
    ) -> None:
        self.options, self.keep_solution = options, keep_solution
        # Kept, so that no others are given their identities.
        self._algorithm, self._spec = algorithm, problem.spec
        spec = problem.spec
        t0, t1 = ends_of(problem)
        self.plan = plans.plan(algorithm, options, spec.dtype, sum(spec.sizes), keep_solution)
        self.size = real_size(spec)
        self.room = first_room(self.size)
        self.marks = t0, *options.tstops, t1
        marks, saveat = doubles(self.marks), doubles(options.saveat or ())
        self.saves = len(saveat)
        self.given: dict[str, Any] = {
            "plan": self.plan,
            "n": self.size,
            "nmarks": len(marks),
            "marks": marks,
            "dt0": options.dt0 or 0.0,
            "m": len(saveat),
            "saveat": saveat,
            "dense": keep_solution,
            "room": self.room,
        }


_known: Recent[tuple[Any, ...], Departure] = Recent(256)


def departure_of(
    problem: ODEProblem, algorithm: Algorithm, options: SolveOptions, keep_solution: bool
) -> Departure:
    """How a solve departs, worked out once for options that are the same object."""
    spec: StateSpec = problem.spec
    key = (id(options), id(algorithm), id(spec), keep_solution, *ends_of(problem))
    departure = _known.get(key)
    if departure is None:
        departure = Departure(problem, algorithm, options, keep_solution)
        if is_lasting(options):
            _known[key] = departure
    return departure


def is_lasting(options: SolveOptions) -> bool:
    """Whether nothing in options is of one solve alone."""
    tolerances = options.tolerances
    of_its_own = isinstance(tolerances.rtol, Tensor) or isinstance(tolerances.atol, Tensor)
    return not (of_its_own or options.events or options.saveat_tensor is not None)
