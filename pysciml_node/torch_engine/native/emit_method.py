"""A Runge-Kutta method as C: its combinations of stages, with the tableau's numbers in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from typing_extensions import override

from pysciml_node.replay.stages import Method
from pysciml_node.tableaus import DiagonallyImplicitTableau, Tableau
from pysciml_node.torch_engine.native.text import number, padded, wide


def weighted_sum(weights: Sequence[float], base: str, first: int = 0) -> str:
    """`w_0 base[0] + w_1 base[ROW] + ...` at entry `i`, without vanishing terms."""
    terms = [
        f"{number(w)} * {base}[{j} * ROW + i]" for j, w in enumerate(weights, first) if w != 0.0
    ]
    return " + ".join(terms) if terms else "(REAL)0"


class Single:
    """Loops over the state of one solve."""

    h, size_of_step, count = "h", "REAL h", "N"

    @staticmethod
    def loop(body: str) -> str:
        """A loop over the entries `i` of the state."""
        return f"#pragma omp simd\n    for (int i = 0; i < N; i++) {body}"


class _Abreast(Single):
    """Loops over the states of members abreast, each with a step size of its own."""

    h, size_of_step, count = "h[l]", "const REAL *restrict h", "N * ABREAST"

    @staticmethod
    @override
    def loop(body: str) -> str:
        return (
            "for (int entry = 0; entry < N; entry++)\n    #pragma omp simd\n    "
            f"for (int l = 0; l < ABREAST; l++) {{ int i = entry * ABREAST + l; {body} }}"
        )


def style_of(abreast: int) -> type[Single]:
    """Loops for so many members at once; for a single solve with 0."""
    return _Abreast if abreast else Single


def emit_method(method: Method, size: int, abreast: int = 0) -> str:
    """The tableau's part of the emitted code.

    Args:
        method: the method.
        size: entries of the flat state.
        abreast: members that step at once, of an ensemble; 0 for a single solve.
    """
    tableau = method.tableau
    style = style_of(abreast)
    restrict = "restrict " if abreast else ""
    rows = [*method.host_rows, tableau.b]
    lines = [
        wide("ROW", padded(size * max(abreast, 1))),
        f"enum {{ N = {size}, STAGES = {method.stages}, "
        f"ALL_STAGES = {method.all_stages}, END = {method.all_stages}, "
        f"FSAL = {int(_ends_on_a_stage(tableau))}, ORDER = {tableau.order}, "
        f"END_STAGE = {-1 if method.end_stage is None else method.end_stage}, "
        f"POWERS = {method.dense.shape[1]} }};",
        f"static const double NODES[] = {{{', '.join(map(repr, method.host_nodes))}}};",
        "static const double DENSE[ALL_STAGES][POWERS] = {",
        *(f"  {{{', '.join(repr(w) for w in row)}}}," for row in method.dense.tolist()),
        "};",
        "",
        "/* The argument of a stage, or (END) the end of the step. */",
        f"static void combine(int stage, {style.size_of_step}, const REAL *{restrict}u, "
        f"const REAL *{restrict}k, REAL *{restrict}g) {{",
        "  switch (stage) {",
    ]
    for stage, row in enumerate(rows):
        lines.append(f"  case {stage}:")
        if any(row):
            lines.append(
                "    " + style.loop(f"g[i] = u[i] + {style.h} * ({weighted_sum(row, 'k')});")
            )
        else:
            lines.append(f"    memcpy(g, u, {style.count} * sizeof(REAL));")
        lines.append("    break;")
    lines += ["  }", "}", ""]
    estimates = {"error_of": tableau.b_error}
    if tableau.b_error_low is not None:
        lines.append("#define TWO_ERRORS")
        estimates["error_low_of"] = tableau.b_error_low
    for name, row in estimates.items():
        lines += [
            f"static void {name}(const REAL *{restrict}k, REAL *{restrict}error) {{",
            "    " + style.loop(f"error[i] = {weighted_sum(row, 'k')};"),
            "}",
            "",
        ]
    return "\n".join([*lines, *_bars(method, style, restrict)])


def emit_alike(method: Method, dtype: torch.dtype) -> str:
    """The stages of a step from which its stiffness follows, and the unit of rounding.

    Args:
        method: the method.
        dtype: of the state.
    """
    first, second = method.tableau.stiffness_stages or (-1, -1)
    return (
        f"enum {{ FIRST_ALIKE = {first}, SECOND_ALIKE = {second} }};\n"
        f"static const double ROUNDING = {torch.finfo(dtype).eps!r};\n"
    )


def emit_estimates(method: Method, dtype: torch.dtype) -> str:
    """What src/taken.h reads of a tableau: the weights of its estimates.

    Args:
        method: the method.
        dtype: of the state.
    """
    tableau = method.tableau
    between = [0.0] * method.all_stages
    if tableau.stiffness_stages is not None:
        for sign, stage in zip((1.0, -1.0), tableau.stiffness_stages, strict=True):
            for j, weight in enumerate(method.host_rows[stage]):
                between[j] += sign * weight
    rows = {"ERROR": tableau.b_error, "BETWEEN": between}
    if tableau.b_error_low is not None:
        rows["ERROR_LOW"] = tableau.b_error_low
    return "\n".join(
        [
            emit_alike(method, dtype),
            *(
                f"static const REAL {name}[ALL_STAGES] = {{{', '.join(map(number, row))}}};"
                for name, row in rows.items()
            ),
        ]
    )


def _ends_on_a_stage(tableau: Tableau) -> bool:
    """Whether the end of a step is its last stage's argument, but for that stage's own slope."""
    return tableau.fsal and not isinstance(tableau, DiagonallyImplicitTableau)


def _bars(method: Method, style: type[Single], restrict: str) -> list[str]:
    """The cotangent of a stage's derivative, from those of the end and of later arguments."""
    tableau, h = method.tableau, style.h
    rows = method.host_rows
    # The last stage of such a method serves the next step, which replays it as its first.
    usual = method.stages - 1 if _ends_on_a_stage(tableau) else method.stages
    lines = [
        f"static void combine_bars(int stage, int count, {style.size_of_step}, "
        f"const REAL *{restrict}bar, const REAL *{restrict}bars, REAL *{restrict}k_bar) {{",
        "  switch (stage) {",
    ]
    for stage in range(method.all_stages):
        column = [rows[j][stage] for j in range(stage + 1, method.all_stages)]
        b = tableau.b[stage] if stage < method.stages else 0.0
        near = column[: max(usual - stage - 1, 0)]
        far = column[len(near) :]
        start = f"{number(b)} * bar[i] + " if b else ""
        lines.append(f"  case {stage}:")
        near_sum = weighted_sum(near, "bars", stage + 1)
        if any(far):
            far_sum = weighted_sum(far, "bars", stage + 1 + len(near))
            lines += [
                f"    if (count > {usual}) {{",
                "    "
                + style.loop(f"k_bar[i] = {h} * (k_bar[i] + {start}{near_sum} + {far_sum});"),
                "    break;",
                "    }",
            ]
        lines += [
            "    " + style.loop(f"k_bar[i] = {h} * (k_bar[i] + {start}{near_sum});"),
            "    break;",
        ]
    return [*lines, "  }", "}", ""]
