"""A stochastic Runge-Kutta method as C: its sums of stages, with the tableau's numbers in place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pysciml_node.stochastic.fields import NoiseLayout
from pysciml_node.stochastic.step import SDEMethod, Terms
from pysciml_node.tableaus.stochastic import Integral, Row, Stage
from pysciml_node.torch_engine.native.text import number, padded, wide

_FORMULAS: dict[Integral, str] = {
    "w": "x",
    "i10": "x / 2 + area[m]",
    "i11": "(x * x - length) * over_root",
    "i111": "(x * x - 3 * length) * x * over",
}
"""Integrals of a motion, of its increment `x`; `sqrt_h` is the same number for all."""


@dataclass(frozen=True)
class _Sum:
    """What stages add up to: the argument of one, the end of the step, or its error estimate.

    Attributes:
        base: weights of the state and of the carried vector.
        drifts: weights of the drifts.
        noise: of the diffusions.
    """

    base: tuple[float, float]
    drifts: Row
    noise: Terms


def _plus(terms: Iterable[str]) -> str:
    return " + ".join(terms) or "(REAL)0"


class MethodText:
    """The code of a method for one kind of noise.

    A stage has two slots: the argument of its drift and that of its diffusion, which may be one.

    Args:
        method: the method.
        layout: how the motions act on the state.
        seeds: of how many solves on paths of their own it is; the entries of all lie side by side.

    Attributes:
        whole: entries of what is stepped.
        integrals: entries of the integrals of a step.
    """

    def __init__(self, method: SDEMethod, layout: NoiseLayout, seeds: int = 1) -> None:
        self._method, self._layout, self._seeds = method, layout, seeds
        tableau = method.tableau
        self._last = 2 * tableau.stages
        self._sums = {
            2 * i + j: _Sum(stage.base, stage.a, noise)
            for j, (stages, noises) in enumerate(
                (
                    (tableau.drift, method.drift_noise),
                    (tableau.diffusion, method.diffusion_noise),
                )
            )
            for i, (stage, noise) in enumerate(zip(stages, noises, strict=True))
            if stage is not None
        }
        self._end = _Sum((1.0, 0.0), tableau.alpha, method.noise)
        self._estimate = _Sum((0.0, 0.0), method.error_drift, method.error_noise)
        every = (*self._sums.values(), self._end, self._estimate)
        used = {kind for one in every for _, parts in one.noise for kind, _ in parts}
        self._kinds: list[Integral] = [kind for kind in _FORMULAS if kind in used]
        columns = layout.motions or 1 if layout.matrix else 1
        entries = layout.entries * seeds
        self.whole = 2 * entries if tableau.carry else entries
        self._paths = layout.size * seeds
        self._row = padded(self._paths if layout.matrix else entries)
        self.integrals = len(self._kinds) * self._row
        self.row, self.matrix_row = padded(entries), padded(entries * columns)
        self._columns = columns

    def emit(self) -> str:
        """All of it."""
        return "\n".join(
            [
                *self._sizes(),
                "",
                *self._integrals_of(),
                "",
                "/* The argument in a slot, the end of the step (END), or its error (ESTIMATE). */",
                "static void combine(int slot, REAL h, REAL root, const REAL *u, const REAL *f, "
                "const REAL *g, const REAL *I, REAL *x) {",
                "  switch (slot) {",
                *self._combinations(),
                "  }",
                "}",
                "",
                *self._pulls(),
            ]
        )

    def _sizes(self) -> list[str]:
        method, tableau, layout = self._method, self._method.tableau, self._layout
        sizes = {
            "N": self.whole,
            "ENTRIES": layout.entries * self._seeds,
            "SEEDS": self._seeds,
            "MATRIX": int(layout.matrix),
            "MOTIONS": self._columns,
            "PATHS": self._paths,
            "PATH_ROW": padded(self._paths),
            "SAMPLE": layout.entries // layout.samples,
            "INTEGRAL_ROW": self._row,
            "INTEGRALS": self.integrals,
            "STAGES": tableau.stages,
            "END": self._last,
            "ESTIMATE": self._last + 1,
            "CARRIES": int(tableau.carry),
            "PASSES_ON": int(tableau.fsal),
            "PER_ROOT": int(tableau.per_root),
            "STARTS_AT_START": int(method.starts_at_start),
        }
        for name, (first, second) in (("STEP", method.for_step), ("ERROR", method.for_error)):
            sizes |= {f"{name}_DRIFTS": first, f"{name}_DIFFUSIONS": second}
        named = ", ".join(f"{name} = {value}" for name, value in sizes.items())
        drifts, diffusions = tableau.drift, tableau.diffusion
        assert all(stage is not None for stage in diffusions)
        return [
            wide("ROW", self.row),
            wide("WHOLE", padded(self.whole)),
            wide("MATRIX_ROW", self.matrix_row),
            f"enum {{ {named} }};",
            f"static const double STRONG_ORDER = {tableau.strong_order!r};",
            _array("double", "DRIFT_NODES", map(_node, drifts)),
            _array("double", "DIFFUSION_NODES", map(_node, diffusions)),
            _array("int", "HAS_DRIFT", (int(stage is not None) for stage in drifts)),
            _array("int", "SHARED", (int(a == b) for a, b in zip(drifts, diffusions, strict=True))),
        ]

    def _integrals_of(self) -> list[str]:
        layout = self._layout
        count, motion = (
            ("PATHS", "i")
            if layout.matrix
            else ("ENTRIES", "i / (SAMPLE * SEEDS) * SEEDS + i % SEEDS")
        )
        if layout.motions is None:
            motion = "i"
        return [
            "static void integrals_of(double h, const REAL *w, const REAL *area, REAL *I) {",
            "  double divisor = h > 0x1p-126 ? h : 0x1p-126;",
            "  REAL length = (REAL)h, over = (REAL)(1 / (6 * divisor));",
            "  REAL over_root = (REAL)(1 / (2 * sqrt(divisor)));",
            "  #pragma omp simd",
            f"  for (int i = 0; i < {count}; i++) {{",
            f"    int m = {motion};",
            "    REAL x = w[m];",
            *(
                f"    I[{k} * INTEGRAL_ROW + i] = {_FORMULAS[kind]};"
                for k, kind in enumerate(self._kinds)
            ),
            "  }",
            "}",
        ]

    def _integral(self, kind: Integral, at: str) -> str:
        """An integral where the loop is."""
        return "root" if kind == "sqrt_h" else f"{at}[{self._kinds.index(kind)} * INTEGRAL_ROW{{}}]"

    def _combinations(self) -> list[str]:
        lines = []
        for slot, one in (
            *self._sums.items(),
            (self._last, self._end),
            (self._last + 1, self._estimate),
        ):
            lines += [f"  case {slot}:", *self._combination(one), "    break;"]
        return lines

    def _combination(self, one: _Sum) -> list[str]:
        bases = zip(one.base, ("u[i]", "u[ENTRIES + i]"), strict=True)
        parts = [name if w == 1.0 else f"{number(w)} * {name}" for w, name in bases if w]
        drifts = [f"{number(w)} * f[{j} * ROW + i]" for j, w in enumerate(one.drifts) if w]
        parts += [f"h * ({_plus(drifts)})"] if drifts else []
        if not self._layout.matrix:
            parts += [
                f"({self._mixed(weights, 'I', ' + i')}) * g[{j} * MATRIX_ROW + i]"
                for j, weights in one.noise
            ]
            return [*_over_entries(f"x[i] = {_plus(parts)};")]
        products = [
            f"({self._mixed(weights, 'J', ' + c * SEEDS')}) * g[{j} * MATRIX_ROW + at + c * SEEDS]"
            for j, weights in one.noise
        ]
        if not products:
            return [*_over_entries(f"x[i] = {_plus(parts)};")]
        return [
            *_OVER_ROWS,
            f"      REAL sum = {_plus(parts)};",
            f"      for (int c = 0; c < MOTIONS; c++) sum += {_plus(products)};",
            "      x[i] = sum;",
            "    }",
        ]

    def _mixed(self, weights: tuple[tuple[Integral, float], ...], base: str, at: str) -> str:
        """The weighted sum of the integrals that a diffusion is multiplied by."""
        return _plus(f"{number(w)} * {self._integral(k, base).format(at)}" for k, w in weights)

    def _later(self, stage: int) -> list[tuple[str, _Sum]]:
        """What uses the values of a stage, with the cotangents of its entries."""
        drifts, diffusions = self._method.for_step
        tableau = self._method.tableau
        found = [("bar[i]", self._end)]
        for j in range(stage + 1, max(drifts, diffusions)):
            has_drift = j < drifts and tableau.drift[j] is not None
            joined = has_drift and tableau.drift[j] == tableau.diffusion[j]
            slots = [2 * j] if has_drift else []
            slots += [2 * j + 1] if j < diffusions and not joined else []
            found += [(f"bars[{slot} * ROW + i]", self._sums[slot]) for slot in slots]
        return found

    def _pulls(self) -> list[str]:
        drifts, diffusions = self._method.for_step
        heads = (
            "/* Cotangents of a stage's drift and diffusion, and of the step's start, from those "
            "of\n   the end and of the arguments of later stages. */\n"
            "static void pull_to_drift(int stage, REAL h, const REAL *bar, const REAL *bars, "
            "REAL *f_bar) {",
            "static void pull_to_diffusion(int stage, REAL root, const REAL *bar, "
            "const REAL *bars, const REAL *I, REAL *g_bar) {",
            "static void pull_to_start(const REAL *bar, const REAL *bars, REAL *sum) {",
        )
        lines = [heads[0], "  switch (stage) {"]
        for stage in range(drifts):
            lines += [f"  case {stage}:", *self._to_drift(stage), "    break;"]
        lines += ["  }", "}", "", heads[1], "  switch (stage) {"]
        for stage in range(diffusions):
            lines += [f"  case {stage}:", *self._to_diffusion(stage), "    break;"]
        return [*lines, "  }", "}", "", heads[2], *self._to_start(), "}", ""]

    def _to_drift(self, stage: int) -> list[str]:
        terms = [
            f"{number(one.drifts[stage])} * {bar}"
            for bar, one in self._later(stage)
            if stage < len(one.drifts) and one.drifts[stage]
        ]
        return _over_entries(f"f_bar[i] = h * ({_plus(terms)});")

    def _to_diffusion(self, stage: int) -> list[str]:
        terms: dict[Integral, list[str]] = {}
        for bar, one in self._later(stage):
            for kind, w in dict(one.noise).get(stage, ()):
                terms.setdefault(kind, []).append(f"{number(w)} * {bar}")
        if not self._layout.matrix:
            products = [
                f"{self._integral(kind, 'I').format(' + i')} * ({_plus(parts)})"
                for kind, parts in terms.items()
            ]
            return _over_entries(f"g_bar[i] = {_plus(products)};")
        return [
            *_OVER_ROWS,
            *(f"      REAL p_{kind} = {_plus(parts)};" for kind, parts in terms.items()),
            "      for (int c = 0; c < MOTIONS; c++) g_bar[at + c * SEEDS] = "
            + _plus(
                f"p_{kind} * {self._integral(kind, 'J').format(' + c * SEEDS')}" for kind in terms
            )
            + ";",
            "    }",
        ]

    def _to_start(self) -> list[str]:
        later = self._later(-1)
        lines = []
        for k, place in enumerate(("i", "ENTRIES + i")[: 1 + self._method.tableau.carry]):
            terms = [
                bar if one.base[k] == 1.0 else f"{number(one.base[k])} * {bar}"
                for bar, one in later
                if one.base[k]
            ]
            lines += _over_entries(f"sum[{place}] += {_plus(terms)};")
        return lines


_OVER_ROWS = (
    "    for (int i = 0; i < ENTRIES; i++) {",
    "      int e = i / SEEDS, l = i % SEEDS, at = e * MOTIONS * SEEDS + l;",
    "      const REAL *J = I + e / SAMPLE * MOTIONS * SEEDS + l;",
)
"""A loop over the entries of the state, by the rows of its diffusion."""


def _over_entries(body: str) -> list[str]:
    """A loop over the entries of the state."""
    return ["    #pragma omp simd", f"    for (int i = 0; i < ENTRIES; i++) {body}"]


def _node(stage: Stage | None) -> str:
    return repr(0.0 if stage is None else stage.c)


def _array(kind: str, name: str, values: Iterable[object]) -> str:
    return f"static const {kind} {name}[] = {{{', '.join(map(str, values))}}};"
