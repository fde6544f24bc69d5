"""What a Rosenbrock method has beside its combinations of stages, as C."""

from __future__ import annotations

from pysciml_node.replay.stages import Method
from pysciml_node.tableaus import RosenbrockTableau
from pysciml_node.torch_engine.native.emit_method import Single, emit_method, weighted_sum
from pysciml_node.torch_engine.native.text import number, padded


def emit_rosenbrock(method: Method, size: int) -> str:
    """The tableau's part of the emitted code.

    Args:
        method: the method; its tableau is a `RosenbrockTableau`.
        size: entries of the flat state.
    """
    tableau = method.tableau
    assert isinstance(tableau, RosenbrockTableau)
    weights = ", ".join(map(repr, tableau.time_weights))
    lines = [
        emit_method(method, size),
        f"enum {{ MATRIX = {padded(size * size)} }};",
        f"static const REAL GAMMA = {number(tableau.gamma)};",
        f"static const double TIME_WEIGHTS[] = {{{weights}}};",
        "",
        "/* The right side of a stage's linear system; `slope` is the derivative in time. */",
        "static void right_side(int stage, REAL h, const REAL *rate, const REAL *slope, "
        "const REAL *k, REAL *x) {",
        "  switch (stage) {",
    ]
    for stage, (row, weight) in enumerate(
        zip(tableau.couplings, tableau.time_weights, strict=True)
    ):
        terms = ["rate[i]"]
        terms += [weighted_sum(row, "k")] if any(row) else []
        terms += [f"slope[i] * ({number(weight)} * h)"] if weight else []
        body = f"x[i] = GAMMA * ({' + '.join(terms)});"
        lines += [f"  case {stage}:", "    " + Single.loop(body), "    break;"]
    lines += [
        "  }",
        "}",
        "",
        "/* What the right sides of later stages add to the cotangent of a stage's slope. */",
        "static void couple_bars(int stage, const REAL *y, REAL *bar) {",
        "  switch (stage) {",
    ]
    for stage in range(method.stages):
        column = [row[stage] for row in tableau.couplings[stage + 1 :]]
        if any(column):
            body = f"bar[i] += {weighted_sum(column, 'y', stage + 1)};"
            lines += [f"  case {stage}:", "    " + Single.loop(body), "    break;"]
    return "\n".join([*lines, "  }", "}", ""])
