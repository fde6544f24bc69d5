"""Native solves that were before: a call of C looks whether they were, another takes the steps.

One without gradients leaves a solution that knows its last state, and makes all else of the block
of its request when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.modes import has_inference
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.solutions.parts import in_parts
from pysciml_node.solutions.solution import ReturnCode, Solution
from pysciml_node.torch_engine.native.engine import NativeSolve, Steps
from pysciml_node.torch_engine.native.flight import Log, States
from pysciml_node.torch_engine.native.library import SolveRequest
from pysciml_node.torch_engine.native.prepared import Ready, foreign_class, prepared_again
from pysciml_node.torch_engine.native.run import ended_well, flight_of


def solve_again(
    problem: ODEProblem, algorithm: Algorithm, options: SolveOptions, engine: str
) -> Solution | None:
    """A native solve that was before but for its state and numbers; `None` where it was not.

    Args:
        problem: what is solved, as it was given.
        algorithm: how.
        options: of the solve.
        engine: name of the engine.
    """
    if has_inference(problem) or foreign_class(problem.u0) is not None:
        return None
    ready = prepared_again(problem, algorithm, options)
    if ready is None:
        return None
    make = partial(NativeSolve, problem, algorithm, options, engine, ready)
    left = None if torch.is_grad_enabled() else _take_steps(problem, ready, make)
    if left is None:
        return make().solution()
    parts: dict[str, Any] = {
        "problem": problem,
        "algorithm": algorithm,
        "engine": engine,
        "retcode": ReturnCode.Success,
        "u1": left.last,
        "event": None,
    }
    if left.saved is not None:
        parts["saved"] = left.saved
    return in_parts(Solution, left.part, parts)


def _take_steps(problem: ODEProblem, ready: Ready, make: Callable[[], NativeSolve]) -> _Left | None:
    """Solve to the end; `None` where that takes more room than is made at first, or fails."""
    departure, take_steps = ready.prepared.departure, ready.prepared.take_steps
    u0 = problem.u0
    if take_steps is None or type(u0) is not Tensor:
        return None
    if departure.libraries[0].lately > departure.room:
        return None
    left = take_steps(torch._C._functorch.unwrap_if_dead(u0), *ready.parameters)
    if left is None:
        return None
    block, last, saved = left
    found = SolveRequest.landed(block)
    return _Left(Log(block, departure), found, last, saved, make) if ended_well(found) else None


@dataclass(slots=True)
class _Left:
    """What C has left of a solve without gradients, put together when something looks.

    Attributes:
        log: its steps, with the states at their ends.
        found: the end of its request.
        last: the state at the end.
        saved: those at the saved times, if there are any.
        make: makes the solve.
        steps: once something has looked.
    """

    log: Log
    found: tuple[int, ...]
    last: Tensor
    saved: Tensor | None
    make: Callable[[], NativeSolve]
    steps: Steps | None = None

    def part(self, name: str) -> Any:
        """As of `Steps`."""
        if self.steps is None:
            with torch.no_grad():  # as when it was solved
                solve = self.make()
            flight = solve.flight = flight_of(self.log, self.found)
            saved = self.log.departure.nothing if self.saved is None else self.saved
            states = States(saved, self.log.ends(flight.count), self.last)
            self.steps = Steps(solve, flight, states)
        return self.steps.part(name)
