"""What to tell somebody whose solve has failed."""

from __future__ import annotations

import torch
from torch import Tensor

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.solutions.solution import ReturnCode, Solution
from pysciml_node.steps.field import FlatField
from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.tableaus.implicit import CoupledTableau, DiagonallyImplicitTableau


def failure_message(solution: Solution, options: SolveOptions) -> str:
    """The cause, where it happened, and remedies in the order to try them."""
    stats, problem = solution.stats, solution.problem
    t = solution.trajectory.times[-1]
    steps = stats.naccept + stats.nreject
    share = stats.nreject / steps if steps else 0.0
    cause = {
        ReturnCode.MaxIters: f"max_steps={options.max_steps} was reached",
        ReturnCode.DtLessThanMin: f"the step size fell below dtmin={options.dtmin:.3g}"
        if options.dtmin
        else "the step size fell below the resolution of time",
        ReturnCode.Unstable: "the field or the state became NaN or infinite",
    }.get(solution.retcode, solution.retcode.value)
    unmeasured, unbalanced = _unmeasured(solution, options), _unbalanced(solution, options)
    unsolved = unbalanced is None and _is_unsolved(solution, options)
    if unmeasured is not None:
        cause = "an error had no tolerance to be measured in"
    elif unbalanced is not None:
        cause = "the state did not solve the equations without derivatives"
    elif unsolved:
        cause = "the equations of an implicit step were not solved"
    where = f"{cause} at t={t:.6g} of ({problem.t0:.6g}, {problem.t1:.6g})"
    lines = [f"{where} (step {steps}, {share:.0%} rejected)."]
    if unmeasured is not None:
        lines += [
            f"  atol + rtol * |u| is 0: {unmeasured}.",
            "  Give atol > 0, the error that does no harm where the state is 0.",
        ]
    elif unbalanced is not None:
        lines += [
            f"  In these M du/dt is 0, but f is {unbalanced}.",
            "  Begin with a state at which it is 0, such as scipy.optimize.root finds.",
        ]
    elif unsolved:
        lines += [
            "  f is finite where the step begins. Newton's iteration found no end of it: f jumps "
            "with the state, or is not finite further on, or the step is too long.",
            "  Try, in order: a smaller dt0; a controller that adapts the steps; an event where f "
            "jumps; Rodas5P(), whose steps are linear equations.",
        ]
    elif solution.retcode is ReturnCode.DtLessThanMin and _piled_up(solution):
        lines += [
            f"  events[{solution.jumps[-1].event}] happens there again and again, with no time for "
            "a step between.",
            "  Try, in order: a shorter tspan, or a terminal event that ends the solve before; an "
            "affect that does not lead back to the event at once.",
        ]
    else:
        explanation = solution.trajectory.explain(options)
        lines += explanation.lines
        grown = solution.retcode is ReturnCode.DtLessThanMin and _growth(solution) > _BLOW_UP
        if grown:
            lines.append(
                f"  The state has grown {_growth(solution):.1g}-fold: the solution of the equation "
                "may become infinite there."
            )
        lines += _remedies(solution, options, explanation.stiff, grown)
    lines.append(f"  The solution up to t={t:.6g} is in .solution.")
    return "\n".join(lines)


def _unmeasured(solution: Solution, options: SolveOptions) -> str | None:
    """The component that is zero, as its tolerance is, where that has ended the solve."""
    if solution.retcode is not ReturnCode.Unstable or not options.controller.adaptive:
        return None
    scale = ErrorNorm(options.tolerances).scale(solution.trajectory.flat_states[-1].detach())
    missing = (scale == 0).nonzero()
    return solution.problem.spec.locate(int(missing[0])) if len(missing) else None


def _unbalanced(solution: Solution, options: SolveOptions) -> str | None:
    """Where `f` is farthest from the 0 that an equation without derivatives asks for, if far."""
    mass, stuck = solution.problem.mass, (ReturnCode.Unstable, ReturnCode.DtLessThanMin)
    if mass is None or solution.retcode not in stuck:
        return None
    rate = _last_rate(solution)
    left, sizes, _ = torch.linalg.svd(mass)
    free = left[:, sizes <= sizes.max() * len(mass) * torch.finfo(mass.dtype).eps]
    rest = (free @ (free.mH @ rate)).abs()
    index = int(rest.argmax())
    rtol, atol = (
        float(torch.as_tensor(x).max()) for x in (options.tolerances.rtol, options.tolerances.atol)
    )
    worst = float(rest[index])
    if not worst > _FAR * (atol + rtol * float(rate.abs().max())):
        return None
    return f"{worst:.3g} in {solution.problem.spec.locate(index)}"


# What an equation without derivatives may leave, in units of the tolerance.
_FAR = 100.0


def _is_unsolved(solution: Solution, options: SolveOptions) -> bool:
    """Whether a step of a fixed size has failed whose stages are found by Newton's iteration."""
    tableaus = getattr(solution.algorithm, "tableaus", ())
    newton = any(isinstance(x, DiagonallyImplicitTableau | CoupledTableau) for x in tableaus)
    if not newton or solution.retcode is not ReturnCode.Unstable or options.controller.adaptive:
        return False
    return bool(torch.isfinite(_last_rate(solution)).all())


def _last_rate(solution: Solution) -> Tensor:
    """The field at the last state."""
    problem, trajectory = solution.problem, solution.trajectory
    assert isinstance(problem, ODEProblem)
    u = trajectory.flat_states[-1].detach()[: sum(problem.spec.sizes)]
    with torch.no_grad():
        return FlatField(problem)(problem.time_tensor([trajectory.times[-1]])[0], u)


def _piled_up(solution: Solution) -> bool:
    """Whether the last jumps are one event at times that cannot be told apart."""
    if len(solution.jumps) < 2:
        return False
    before, last = solution.jumps[-2:]
    apart = abs(float(last.t.detach() - before.t.detach()))
    eps = torch.finfo(solution.problem.spec.real_dtype).eps
    return before.event == last.event and apart <= 1000 * eps * abs(float(last.t.detach()))


# Growth at which a vanishing step is taken for the pole of a solution.
_BLOW_UP = 1e6


def _growth(solution: Solution) -> float:
    """The largest entry of the last state, in units of the largest of the first."""
    states = solution.trajectory.flat_states
    first, last = (float(u.detach().abs().max()) for u in (states[0], states[-1]))
    return last / (first or 1.0)


def _remedies(solution: Solution, options: SolveOptions, stiff: bool, grown: bool) -> list[str]:
    """What to try.

    Args:
        solution: the failed one.
        options: of the solve.
        stiff: whether its steps were bound by stability.
        grown: whether the state goes to infinity.
    """
    tries: list[str] = []
    if grown:
        tries.append("a tspan that ends before, or a look at the signs of f")
    if solution.retcode is ReturnCode.Unstable:
        tries += [
            "check f for divisions by zero, logarithms and roots at the state named above",
            "a smaller dtmax" if options.controller.adaptive else "a smaller dt0",
            "bounded activations or weight decay, if the field is learned",
        ]
    else:
        if stiff:
            tries.append("a stiff solver such as Rodas5P()")
        if solution.retcode is ReturnCode.MaxIters:
            tries.append(f"a larger max_steps than {options.max_steps}")
        eps = torch.finfo(solution.problem.spec.real_dtype).eps
        given = options.tolerances.rtol
        rtol = given if isinstance(given, float) else float(given.min())
        near = f" (rtol={rtol:.1g} is near the state's precision)" if rtol < 20 * eps else ""
        tries.append(f"larger tolerances{near}")
        if near:
            tries.append("float64")
        tries.append("a smoother or smaller field, or a regularizer such as LocalError")
    return ["  Try, in order: " + "; ".join(tries) + "."]
