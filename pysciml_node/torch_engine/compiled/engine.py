"""`solve(..., compile=True)`: from a checked problem to a compiled solve and back to a solution."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import DiscreteAdjoint
from pysciml_node.algorithms.controllers import Controller, FixedStep, IController, PIController
from pysciml_node.algorithms.explicit import ExplicitRungeKutta
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.errors import PsnWarning
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.replay.stages import Method
from pysciml_node.replay.trajectory import TorchTrajectory
from pysciml_node.solutions.solution import ReturnCode, Solution, Stats
from pysciml_node.steps.record import Record
from pysciml_node.torch_engine.compiled.stepper import (
    CompiledResult,
    CompileError,
    Status,
    StepControl,
    compiled_solver,
    compiler_available,
)

_RETCODES = {
    Status.SUCCESS: ReturnCode.Success,
    Status.OUT_OF_STEPS: ReturnCode.MaxIters,
    Status.SIZE_TOO_SMALL: ReturnCode.DtLessThanMin,
    Status.NON_FINITE: ReturnCode.Unstable,
}
_warned = False


def can_compile() -> bool:
    """Whether there is a C++ compiler; says once where there is none."""
    global _warned
    available, reason = compiler_available()
    if not available and not _warned:
        _warned = True
        warnings.warn(
            f"compile=True was asked for, but {reason}.\n"
            "  Solving uncompiled. Install a C++ compiler, or leave compile=True out.",
            PsnWarning,
            stacklevel=4,
        )
    return available


def _check(problem: ODEProblem, options: SolveOptions) -> None:
    """Refuse what a compiled solve cannot do, by name."""
    size = sum(problem.spec.sizes)
    refused = {
        "a state of several tensors": problem.spec.keys is not None,
        "events": bool(options.events),
        "tstops": bool(options.tstops),
        "tolerances that are tensors": isinstance(options.rtol, Tensor)
        or isinstance(options.atol, Tensor)
        or options.driven != size,
        f"{type(options.adjoint).__name__}": not isinstance(options.adjoint, DiscreteAdjoint),
        f"{type(options.controller).__name__}": not isinstance(
            options.controller, PIController | IController | FixedStep
        ),
    }
    for what, found in refused.items():
        if found:
            raise CompileError(
                f"a compiled solve does not support {what}.\n  Solve with compile=False."
            )


def _control(controller: Controller, error_order: int) -> StepControl:
    if isinstance(controller, PIController | IController):
        beta1, beta2 = controller.exponents(error_order)
        return StepControl(beta1, beta2, controller.gamma, controller.qmin, controller.qmax)
    return StepControl(beta1=0.0, fixed=True)


def solve_compiled(
    problem: ODEProblem, algorithm: ExplicitRungeKutta, options: SolveOptions, engine: str
) -> Solution:
    """Run a checked problem as one compiled graph.

    Raises:
        CompileError: the field or an option cannot be compiled.
    """
    _check(problem, options)
    tableau, spec = algorithm.tableau, problem.spec
    saveat = None
    if options.saveat is not None:
        saveat = options.saveat_tensor
        if saveat is None:
            saveat = torch.tensor(options.saveat, dtype=torch.float64)
    u0 = problem.u0
    assert isinstance(u0, Tensor)
    assert isinstance(options.rtol, float)
    assert isinstance(options.atol, float)
    result = compiled_solver(problem.f, tableau)(
        u0,
        *problem.tspan,
        options.rtol,
        options.atol,
        _control(options.controller, tableau.error_order),
        dt0=options.dt0,
        dtmin=options.dtmin,
        dtmax=options.dtmax,
        max_steps=options.max_steps,
        saveat=saveat,
        p=problem.p,
        keep_states=True,
    )
    stats = Stats(nfe=result.nfe, naccept=result.naccept, nreject=result.nreject)
    # Not the result itself: it holds the solve that holds the listener.
    counts = result.nfe_backward, result.naccept
    result.on_backward(lambda: _count_backward(stats, *counts))
    retcode = _RETCODES[result.status]
    method = Method.of(tableau, spec.dtype, spec.device)
    trajectory = TorchTrajectory(problem, method, _loader(problem, result, retcode), stats, options)
    saved = result.saved
    if options.saveat is None:
        t = problem.time_tensor(trajectory.times)
    else:
        sign = problem.direction
        reached = options.saveat
        if not retcode.successful:
            reached = tuple(x for x in options.saveat if sign * x <= sign * result.t)
            saved = None if saved is None else saved[: len(reached)]
        t = problem.time_tensor(list(reached))
    return Solution(
        problem=problem,
        algorithm=algorithm,
        engine=engine,
        retcode=retcode,
        stats=stats,
        t=t,
        u1=result.u1,
        trajectory=trajectory,
        saved=saved,
    )


def _count_backward(stats: Stats, nfe: int, naccept: int) -> None:
    stats.nfe_backward += nfe
    stats.nvjp += nfe
    stats.naccept_backward += naccept


def _loader(
    problem: ODEProblem, result: CompiledResult, retcode: ReturnCode
) -> Callable[[], tuple[Record, list[Tensor]]]:
    """Reads the steps from the device when something looks at them."""

    def load() -> tuple[Record, list[Tensor]]:
        rows = result.steps.tolist()
        record = Record(
            times=[problem.t0, *(row[2] for row in rows)],
            sizes=[row[1] for row in rows],
            errors=[row[3] for row in rows],
            stops=[None] * len(rows),
            retcode=retcode,
        )
        states = [*result.states.flatten(1).unbind(), result.u1.reshape(-1)]
        return record, states if rows else states[-1:]

    return load
