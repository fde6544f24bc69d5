"""Options of the variance-corrected optimizer: defaults by curvature, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, TypedDict, get_args

import torch

from pysciml_node import checks

Curvature: TypeAlias = Literal["terminal", "diagonal", "gauss-newton"]
Safeguard: TypeAlias = Literal["none", "bound", "backtracking", "gain-ratio"]
JacobianProduct: TypeAlias = Literal["finite-difference", "double-backward"]

# The first safeguard of each row is the default.
SAFEGUARDS: dict[Curvature, tuple[Safeguard, ...]] = {
    "terminal": ("none", "bound", "backtracking"),
    "diagonal": ("none", "backtracking"),
    "gauss-newton": ("gain-ratio", "none", "backtracking"),
}
DAMPING: dict[Curvature, float] = {"terminal": 0.0, "diagonal": 1e-3, "gauss-newton": 1e-3}

# One step is taken for all groups together: these cannot differ between them.
SHARED = (
    "curvature",
    "safeguard",
    "probes",
    "seed",
    "jvp",
    "fd_step",
    "cg_steps",
    "cg_rtol",
    "max_trials",
    "maximize",
)


class CurvatureOptions(TypedDict, total=False):
    """The measure of a curvature, and the trust in its step.

    Args:
        safeguard: the limit of a step's length; default by curvature, see `SAFEGUARDS`.
        damping: added to the curvature in its own units; default by curvature, see `DAMPING`.
        beta: weight of the past in the diagonal's running average, in [0, 1).
        probes: random signs a step for the diagonal.
        jvp: how gauss-newton gets `J v`.
        fd_step: length of that difference, relative to `1 + |theta|`.
        cg_steps: conjugate gradient steps at most.
        cg_rtol: relative residual at which they stop.
        max_trials: steps tried before the safeguard gives up.
    """

    safeguard: Safeguard | None
    damping: float | None
    beta: float
    probes: int
    jvp: JacobianProduct
    fd_step: float | None
    cg_steps: int
    cg_rtol: float
    max_trials: int


USUAL: CurvatureOptions = {
    "safeguard": None,
    "damping": None,
    "beta": 0.95,
    "probes": 1,
    "jvp": "finite-difference",
    "fd_step": None,
    "cg_steps": 20,
    "cg_rtol": 1e-3,
    "max_trials": 10,
}


def resolve_defaults(
    given: dict[str, Any], options: CurvatureOptions, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Fill in the defaults of the curvature, and draw the seed of the probes.

    Args:
        given: the constructor's named arguments.
        options: the options of the curvature.
        generator: source of the seed; used for `"diagonal"` alone.

    Returns:
        The defaults of every parameter group.

    Raises:
        TypeError: an unknown option.
        ValueError: the curvature is unknown.
    """
    checks.keywords("VarianceCorrected", options, USUAL)
    curvature = checks.choice("curvature", given["curvature"], SAFEGUARDS)
    checks.generator("generator", generator)
    resolved: dict[str, Any] = {**given, **USUAL, **options}
    if resolved["safeguard"] is None:
        resolved["safeguard"] = SAFEGUARDS[curvature][0]
    if resolved["damping"] is None:
        resolved["damping"] = DAMPING[curvature]
    resolved["seed"] = 0
    if curvature == "diagonal":
        device = generator.device if generator is not None else None
        draw = torch.randint(2**62, (), generator=generator, device=device)
        resolved["seed"] = int(draw)
    return resolved


def check_group(group: dict[str, Any]) -> None:
    """Check one group's options and parameters.

    Raises:
        ValueError: an option is out of its range or does not go with the curvature.
    """
    curvature = checks.choice("curvature", group["curvature"], SAFEGUARDS)
    checks.number("lr", group["lr"], at_least=0)
    safeguard, allowed = group["safeguard"], SAFEGUARDS[curvature]
    if not isinstance(safeguard, str) or safeguard not in allowed:
        near = checks.did_you_mean(safeguard, allowed)
        expected = f"one of {allowed} with curvature={curvature!r}"
        hint = near or f"Write safeguard={allowed[0]!r}."
        checks.refuse("safeguard", expected, safeguard, hint, ValueError)
    damping = checks.number("damping", group["damping"], at_least=0)
    if curvature == "terminal" and damping:
        expected, hint = f"0 with curvature={curvature!r}", "With this curvature lower lr instead."
        checks.refuse("damping", expected, damping, hint, ValueError)
    checks.number("beta", group["beta"], at_least=0, below=1)
    for name in ("probes", "cg_steps", "max_trials"):
        checks.whole(name, group[name])
    checks.number("cg_rtol", group["cg_rtol"], above=0, below=1)
    if group["fd_step"] is not None:
        checks.number("fd_step", group["fd_step"], above=0, below=1)
    checks.choice("jvp", group["jvp"], get_args(JacobianProduct))
    checks.flag("maximize", group["maximize"])
    if group["foreach"] is not None:
        checks.flag("foreach", group["foreach"])
    if curvature != "terminal" and any(p.is_complex() for p in group["params"]):
        raise ValueError(
            f"curvature={curvature!r} needs real parameters, but one is complex.\n"
            "  Pass its real view (torch.view_as_real), or use curvature='terminal'."
        )


def check_uniform(groups: Sequence[dict[str, Any]]) -> None:
    """Check that the options of the joint step agree in all groups.

    Raises:
        ValueError: an option differs, or gauss-newton parameters differ in dtype or device.
    """
    for name in SHARED:
        values = {group[name] for group in groups}
        if len(values) > 1:
            raise ValueError(
                f"{name} must agree in all parameter groups, but takes the values "
                f"{sorted(map(repr, values))}.\n  Use one optimizer for each."
            )
    if groups[0]["curvature"] == "gauss-newton":
        kinds = {(p.dtype, p.device) for group in groups for p in group["params"]}
        if len(kinds) > 1:
            raise ValueError(
                "gauss-newton solves for all parameters at once and needs one dtype and device, "
                f"but got {sorted(map(str, kinds))}.\n  Use one optimizer for each."
            )
