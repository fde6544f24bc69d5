"""`solve`: the one verb."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.adjoints import Adjoint, DirectAdjoint
from pysciml_node.algorithms.controllers import Controller
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.algorithms.parallel import Parallel
from pysciml_node.errors import SolverFailure
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.event import Event
from pysciml_node.problems.modes import in_ordinary_modes
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import ReturnCode, Solution
from pysciml_node.solving import engines
from pysciml_node.solving.checks import USUAL, check_problem, explain_calls
from pysciml_node.solving.diagnosis import failure_message
from pysciml_node.solving.jumps import run
from pysciml_node.solving.member_options import check_members
from pysciml_node.solving.members import solve_members
from pysciml_node.solving.plans import plan_of, recent_plan
from pysciml_node.torch_engine import engine as torch_engine


def _begin(
    given: dict[str, Any],
    problem: Problem | EnsembleProblem,
    algorithm: Algorithm | None = None,
) -> Solution | EnsembleSolution:
    compiled = given.get("compile")
    if compiled is True or type(compiled) is str:
        solution = _solve_again(given, problem, algorithm)
        if solution is not None:
            return solution
    adjoint = given.get("adjoint")
    forward_mode = adjoint is not None and isinstance(adjoint, DirectAdjoint)
    if isinstance(problem, EnsembleProblem):
        return in_ordinary_modes(_solve_ensemble, problem, forward_mode, algorithm, given)
    check_problem(problem)
    if given.get("members") is not None:
        raise ValueError("members= is for an EnsembleProblem.\n  Leave it out.")
    return in_ordinary_modes(_solve_one, problem, forward_mode, algorithm, given)


@overload
def solve(
    problem: Problem,
    algorithm: Algorithm | None = ...,
    *,
    rtol: Any = ...,
    atol: Any = ...,
    saveat: Sequence[float] | Tensor | None = ...,
    engine: str | None = ...,
    adjoint: Adjoint | None = ...,
    dt0: float | None = ...,
    dtmin: float | None = ...,
    dtmax: float | None = ...,
    tstops: Sequence[float] | Tensor = ...,
    max_steps: int = ...,
    controller: Controller | None = ...,
    events: Event | Sequence[Event] = ...,
    progress: bool = ...,
    throw: bool = ...,
    compile: bool | Literal["auto"] = ...,
    generator: torch.Generator | None = ...,
) -> Solution: ...


@overload
def solve(
    problem: EnsembleProblem, algorithm: Algorithm | None = None, **options: Any
) -> EnsembleSolution: ...


# The options of an ensemble are those of a single problem.
@explain_calls(_begin)
def solve(
    problem: Problem | EnsembleProblem,
    algorithm: Algorithm | None = None,
    *,
    rtol: Any = USUAL,
    atol: Any = USUAL,
    saveat: Sequence[float] | Tensor | None = None,
    engine: str | None = None,
    adjoint: Adjoint | None = None,
    dt0: float | None = None,
    dtmin: float | None = None,
    dtmax: float | None = None,
    tstops: Sequence[float] | Tensor = (),
    max_steps: int = 100_000,
    controller: Controller | None = None,
    events: Event | Sequence[Event] = (),
    progress: bool = False,
    throw: bool = True,
    compile: bool | Literal["auto"] = False,
    generator: torch.Generator | None = None,
    members: Parallel | None = None,
) -> Solution | EnsembleSolution:
    """Solve an initial value problem, or an ensemble of them.

    Args:
        problem: what to solve: an `ODEProblem` or an `SDEProblem`, or an `EnsembleProblem` of many.
            Its members share the options, but for `rtol` and `atol`, which may have a value for
            each, `(M,)`, and `saveat`, which may have times for each, `(M, T)`.
        algorithm: how; default `Tsit5()`, and for an `SDEProblem` what its noise asks for:
            `SOSRI()`, `SOSRA()`, `LambaEM()` (general noise; with `FixedStep()` and `dt0` only), or
            `EulerHeun()` for Stratonovich equations.
        rtol: relative tolerance on the root-mean-square of the local error; a number, a tensor that
            broadcasts to `u0`, or a tuple or dict of these like `u0`. Default 1e-6, and 1e-2 for an
            `SDEProblem`.
        atol: absolute tolerance, likewise; parts and entries of `inf` never drive the step size.
        saveat: times of the output, in the order of integration, inside `tspan`; a tensor that
            requires gradients receives them. Without it: the ends of the accepted steps.
        engine: `"torch"`, `"julia"` or `"auto"`; default the one set by `set_engine` or the
            environment variable `PYSCIML_NODE_ENGINE`, else `"auto"`.
        adjoint: how gradients are taken; default `DiscreteAdjoint()`.
        dt0: size of the first step (positive); with `FixedStep` of each step. Default: Hairer's.
        dtmin: the solve fails where an adaptive step would be smaller (positive).
        dtmax: steps are never larger (positive).
        tstops: times that steps must end on, for fields with discontinuities.
        max_steps: the solve fails after this many accepted and rejected steps.
        controller: step size control; default the algorithm's, `PIController()`.
        events: what happens where conditions cross zero, or at given times: see `Event`.
        progress: draw a progress bar on stderr.
        throw: raise `SolverFailure` if the end is not reached; otherwise return what there is,
            with the reason in `retcode`.
        compile: run the solve and its discrete adjoint as native code of the torch engine (see the
            docs, "Native code"). What has none is refused by name; with `"auto"` such a solve goes
            on in Python, and says so once.
        generator: draws the seed of an `SDEProblem`'s Brownian motions, one number a solve; default
            torch's own. The seed and the interval give the path, whatever the algorithm, the
            tolerances and the steps are.
        members: `Parallel()` has the members of an ensemble solved by other processes, or by a
            cluster.

    Returns:
        The solution; time comes first in its states, `(T, *u0.shape)`. Of an `EnsembleProblem` an
        `EnsembleSolution`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range.
        SolverFailure: the end of the interval was not reached (with `throw=True`); of an
            ensemble an `EnsembleFailure`.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1).double(), (0.0, 1.0))
        >>> round(float(psn.solve(problem, psn.Tsit5(), rtol=1e-9, atol=1e-9).u1), 6)
        0.367879
    """
    given = {"rtol": rtol, "atol": atol, "saveat": saveat, "engine": engine, "adjoint": adjoint}
    given |= {"dt0": dt0, "dtmin": dtmin, "dtmax": dtmax, "tstops": tstops, "max_steps": max_steps}
    given |= {"controller": controller, "events": events, "progress": progress, "throw": throw}
    given |= {"compile": compile, "generator": generator, "members": members}
    return _begin(given, problem, algorithm)


_USUAL = {
    name: parameter.default
    for name, parameter in inspect.signature(solve).parameters.items()
    if name not in ("problem", "algorithm", "engine", "members")
}
"""What options are that were not given, but for those that say who solves."""


def _solve_again(
    given: dict[str, Any], problem: Problem | EnsembleProblem, algorithm: Algorithm | None
) -> Solution | None:
    """The solution of a solve that was before but for its state and numbers, where it is native."""
    if type(problem) is not ODEProblem or not problem._called:
        return None
    plan = recent_plan(problem, algorithm, given)
    if plan is None or plan.engine is not torch_engine:
        return None
    begun = time.perf_counter()
    solution = torch_engine.solve_again(problem, plan.algorithm, plan.options)
    return None if solution is None else _ended(solution, plan.options, begun)


def _solve_one(problem: Problem, algorithm: Algorithm | None, given: dict[str, Any]) -> Solution:
    algorithm, options, chosen, _ = plan_of(problem, algorithm, given, _USUAL)
    if isinstance(problem, SDEProblem):
        options = options.seeded(_seed(given.get("generator")))
    begun = time.perf_counter()
    return _ended(run(chosen, problem, algorithm, options), options, begun)


def _ended(solution: Solution, options: SolveOptions, begun: float) -> Solution:
    """A solution with its time by the clock, unless it is to be raised."""
    solution.seconds = time.perf_counter() - begun
    if solution.retcode is not ReturnCode.Success and options.throw and not solution.success:
        raise SolverFailure(failure_message(solution, options), solution)
    return solution


def _solve_ensemble(
    ensemble: EnsembleProblem, algorithm: Algorithm | None, given: dict[str, Any]
) -> EnsembleSolution:
    parallel = given.get("members")
    if parallel is not None:
        checks.instance("members", parallel, Parallel, example="members=Parallel()")
    asked = {name: given.get(name, usual) for name, usual in _USUAL.items()}
    problem, algorithm, options = check_members(ensemble, algorithm, **asked)
    chosen, common = engines.choose(given.get("engine"), problem, algorithm, options.common)
    seeds = _seeds(given.get("generator"), len(ensemble) * _random(problem))
    options = dataclasses.replace(options, common=common, seeds=seeds)
    begun = time.perf_counter()
    solution = solve_members(ensemble, chosen, algorithm, options, parallel)
    solution.seconds = time.perf_counter() - begun
    return solution


def _random(problem: Problem) -> bool:
    return isinstance(problem, SDEProblem)


def _seed(generator: torch.Generator | None) -> int:
    """The seed of the Brownian motions of one solve."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _seeds(generator: torch.Generator | None, count: int) -> tuple[int, ...]:
    """Those of several, as solves one after the other would draw them."""
    if generator is not None and generator.device.type != "cpu":
        return tuple(_seed(generator) for _ in range(count))
    # On the CPU numbers are drawn one after the other.
    return tuple(torch.randint(2**63 - 1, (count,), generator=generator, device="cpu").tolist())
