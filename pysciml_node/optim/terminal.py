"""The paper's scalar curvature: horizon squared times the second moment of the terminal state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.problems.state import tensors_of


class TerminalSolution(Protocol):
    """The part of a `Solution` that this package's optimizers read."""

    @property
    def u1(self) -> Any:
        """State at the end, `(B, *D)`, or a tuple or mapping of such tensors."""

    @property
    def problem(self) -> Any:
        """The problem solved; its `tspan` is `(t0, t1)`."""


@torch.enable_grad()
def terminal_state(source: TerminalSolution | Tensor) -> Tensor:
    """Bring the end of a solution into one matrix, a row a sample.

    Args:
        source: a solution, or its terminal state or any other outputs `(B, *D)`, batch first. The
            tensors of a tuple or mapping state are joined sample by sample.

    Returns:
        Tensor `(B, n)`, in the autograd graph of the source; `(1, 1)` for a single number.

    Raises:
        TypeError: the source is neither a tensor nor has a terminal state `u1`.

    Examples:
        >>> terminal_state(torch.zeros(8, 3, 2)).shape
        torch.Size([8, 6])
    """
    leaves = list(tensors_of(source if isinstance(source, Tensor) else getattr(source, "u1", None)))
    for leaf in leaves:
        checks.tensor("solution", leaf, filled=True)
        if not (leaf.is_floating_point() or leaf.is_complex()):
            hint = "Convert it: solution.double()."
            checks.refuse("solution", "a floating-point or complex tensor", leaf, hint)
    if not leaves:
        expected = "a solution (an object with u1 and problem.tspan) or a tensor (B, *D)"
        hint = "Return (loss, node(x)) from the closure."
        checks.refuse("solution", expected, source, hint)
    rows = [leaf.reshape(leaf.shape[0] if leaf.ndim else 1, -1) for leaf in leaves]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def terminal_moments(
    solution: TerminalSolution | Tensor | None,
    horizon: float | Tensor | None = None,
    second_moment: float | Tensor | None = None,
) -> tuple[float, float]:
    r"""Horizon `t` and terminal second moment `E|x_t|^2`, from a solution or as given.

    The expectation is the mean over the batch, and the norm sums over the state's entries. A number
    that is given replaces the solution's.

    Args:
        solution: the solution, or its terminal state `(B, *D)` when `horizon` is given.
        horizon: length of the time interval, in the units of `tspan`.
        second_moment: the moment, in the units of the state squared.

    Returns:
        The pair `(t, E|x_t|^2)`.

    Raises:
        ValueError: horizon or moment is missing, or is not positive and finite.
    """
    if horizon is None:
        tspan = getattr(getattr(solution, "problem", None), "tspan", None)
        if tspan is None:
            raise ValueError(
                "the horizon is unknown.\n"
                "  Pass solution=sol (with u1 and problem.tspan), or horizon= as a number."
            )
        t0, t1 = (float(end.detach() if isinstance(end, Tensor) else end) for end in tspan)
        horizon = abs(t1 - t0)
    if second_moment is None:
        if solution is None:
            raise ValueError(
                "the terminal second moment is unknown.\n"
                "  Pass solution=sol, or second_moment= as a number."
            )
        state = terminal_state(solution).detach()
        second_moment = state.abs().square().sum(dim=1).mean()
    hint = (
        "A moment of zero or infinity means that the flow collapsed or blew up: start from "
        "parameters closer to zero, or shorten the horizon."
    )
    return (
        checks.number("horizon", horizon, above=0, hint=hint),
        checks.number("second_moment", second_moment, above=0, hint=hint),
    )


@torch.no_grad()
def scale_by_terminal_variance_(
    params: Tensor | Iterable[Tensor],
    solution: TerminalSolution | Tensor | None = None,
    *,
    horizon: float | None = None,
    second_moment: float | None = None,
) -> float:
    r"""Divide the gradients by `t^2 E|x_t|^2`, in place, in front of any torch optimizer.

    With `torch.optim.SGD` this is the rule of `VarianceCorrected(curvature="terminal")`. Optimizers
    that normalize gradients by their history, such as Adam, see only how the factor changes from
    one iteration to the next.

    Args:
        params: the parameter or parameters whose `.grad` is scaled, where it has one.
        solution: the solution the loss was computed from, or its terminal state `(B, *D)`.
        horizon: length of the time interval; default the solution's.
        second_moment: `E|x_t|^2`; default the mean over the solution's batch.

    Returns:
        The factor the gradients were multiplied by.

    Raises:
        ValueError: horizon or moment is missing, or is not positive and finite.

    Examples:
        >>> a = torch.nn.Parameter(torch.tensor(0.5))
        >>> (3.0 * a).backward()
        >>> scale_by_terminal_variance_(a, horizon=2.0, second_moment=3.0) * 12
        1.0
        >>> a.grad
        tensor(0.2500)

    Reference: Okamoto, Takeuchi, Sakemi, arXiv 2505.02019, variance-corrected rule.
    """
    t, moment = terminal_moments(solution, horizon, second_moment)
    factor = 1.0 / (t * t * moment)
    listed: list[Tensor] = checks.sequence(
        "params",
        [params] if isinstance(params, Tensor) else params,
        Tensor,
        example="module.parameters()",
    )
    for param in listed:
        if param.grad is not None:
            param.grad.mul_(factor)
    return factor
