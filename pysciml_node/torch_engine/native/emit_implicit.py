"""What an implicit method has beside its combinations of stages, as C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pysciml_node.replay.newton import ITERATIONS, SLOW, newton_rounding, noise
from pysciml_node.replay.stages import Method
from pysciml_node.tableaus import DiagonallyImplicitTableau, RosenbrockTableau
from pysciml_node.torch_engine.native.emit_method import emit_method, style_of, weighted_sum
from pysciml_node.torch_engine.native.text import number, padded


def emit_implicit(method: Method, size: int, mass: Tensor | None, abreast: int = 0) -> str:
    """The tableau's part of the emitted code.

    Args:
        method: the method; its tableau is that of a Rosenbrock or a diagonally implicit method.
        size: entries of the flat state.
        mass: the mass matrix, `(size, size)`; `None` stands for the identity.
        abreast: members that step at once, of an ensemble; 0 for a single solve.
    """
    tableau = method.tableau
    assert isinstance(tableau, RosenbrockTableau | DiagonallyImplicitTableau)
    lines = [
        emit_method(method, size, abreast),
        f"enum {{ MATRIX = {padded(size * size * max(abreast, 1))} }};",
        f"static const REAL GAMMA = {number(tableau.gamma)};",
        *([] if mass is None else _mass(mass)),
    ]
    if isinstance(tableau, RosenbrockTableau):
        return "\n".join([*lines, *_couplings(method, tableau, abreast), ""])
    dtype = method.nodes.dtype
    lines += [
        f"enum {{ ITERATIONS = {ITERATIONS} }};",
        f"static const REAL NEWTON_ACCURACY = {number(newton_rounding(dtype))};",
        f"static const REAL SLOW = {number(SLOW)};",
        f"static const REAL NOISE = {number(noise(dtype))};",
        f"static const REAL TINY = {number(torch.finfo(dtype).tiny)};",
    ]
    return "\n".join([*lines, ""])


def _mass(mass: Tensor) -> list[str]:
    """The mass matrix, by rows."""
    entries = ", ".join(map(number, mass.reshape(-1).tolist()))
    return ["#define WITH_MASS", f"static const REAL MASS[] = {{{entries}}};"]


def _couplings(method: Method, tableau: RosenbrockTableau, abreast: int) -> list[str]:
    """How the stages of a Rosenbrock method enter one another's equations."""
    rows = {i: (row, 0) for i, row in enumerate(tableau.couplings)}
    columns = {
        i: (tuple(row[i] for row in tableau.couplings[i + 1 :]), i + 1)
        for i in range(method.stages)
    }
    return [
        f"static const double TIME_WEIGHTS[] = {{{', '.join(map(repr, tableau.time_weights))}}};",
        "",
        "/* What earlier slopes add to the right side of a stage's linear system. */",
        "static void couple(int stage, const REAL *k, REAL *x) {",
        *_sums("x", "k", rows, abreast),
        "}",
        "",
        "/* What the right sides of later stages add to the cotangent of a stage's slope. */",
        "static void couple_bars(int stage, const REAL *y, REAL *x) {",
        *_sums("x", "y", columns, abreast),
        "}",
    ]


def _sums(
    into: str, base: str, rows: Mapping[int, tuple[Sequence[float], int]], abreast: int
) -> list[str]:
    """Of each stage the sum of vectors from one on, by their weights."""
    style, lines = style_of(abreast), ["  switch (stage) {"]
    for stage, (row, first) in rows.items():
        body = f"{into}[i] = {weighted_sum(row, base, first)};"
        lines += [f"  case {stage}:", "    " + style.loop(body), "    break;"]
    return [*lines, "  }"]
