"""The code of a stochastic equation: drift, diffusion and a method, as C."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from pysciml_node.problems.sde import SDEProblem
from pysciml_node.stochastic.fields import NoiseLayout, expect_shape
from pysciml_node.stochastic.step import SDEMethod
from pysciml_node.torch_engine.native.abreast import WideEmitter, abreast
from pysciml_node.torch_engine.native.crew import CALLS
from pysciml_node.torch_engine.native.emit import whole_or_by_rows
from pysciml_node.torch_engine.native.emit_stochastic import MethodText
from pysciml_node.torch_engine.native.library import (
    Library,
    Written,
    library_of,
    packed_together,
    source,
)
from pysciml_node.torch_engine.native.rows import without_repetitions
from pysciml_node.torch_engine.native.text import padded, wide
from pysciml_node.translation.export import TranslatedModule, translate, translate_diffusion
from pysciml_node.translation.first import At
from pysciml_node.translation.numbers import first_to_succeed
from pysciml_node.translation.program import Program
from pysciml_node.translation.recent import Recent

_FILES = (
    *(
        "codes.h",
        "team.h",
        "parts.h",
        "event.h",
        "control.h",
        "brownian.h",
        "stochastic_step.h",
        "stochastic.h",
    ),
    *("sweep.h", "stochastic_sweep.h", "workers.h", "stochastic_members.h"),
)
# How many solves may go abreast, and the bytes of a sweep's memory with which they do: about what a
# core keeps near.
_ABREAST, _MOST_MEMORY = (64, 32, 16), 1 << 20
_WIDTHS: Recent[Any, int] = Recent(256)
# Rows of a path in src/brownian.h.
_PATH_ROWS = 8 + 4 * 32


@dataclass(frozen=True)
class Translated:
    """Drift and diffusion as programs.

    Attributes:
        drift: of the drift.
        diffusion: of the diffusion.
        layout: how the motions act on the state.
    """

    drift: TranslatedModule
    diffusion: TranslatedModule
    layout: NoiseLayout

    @classmethod
    def of(cls, problem: SDEProblem) -> Translated:
        """The programs of a problem.

        Raises:
            UnsupportedModule: one of both cannot be translated.
            ValueError: the diffusion has another shape than the noise asks for.
        """
        return first_to_succeed(problem.p, problem.spec, partial(cls._reading, problem))

    @classmethod
    def _reading(cls, problem: SDEProblem, read: Any) -> Translated:
        spec, p, at = problem.spec, problem.p, At.start_of(problem)
        drift = translate(problem.drift, spec, p, read, at=at)
        diffusion = translate_diffusion(problem.diffusion, spec, p, read, at)
        shape = torch.Size(diffusion.program.shapes[0])
        looked_at = problem.noise in ("additive", "general")
        value = torch.empty(shape, device="meta") if looked_at else None
        layout = NoiseLayout.seen(problem, value)
        if spec.keys is None:
            expect_shape(problem, shape, layout.shape_of(spec.shapes[0]))
        return cls(drift, diffusion, layout)

    @property
    def reads_state(self) -> bool:
        """Whether the diffusion is computed from the state."""
        program = self.diffusion.program
        followed = set(program.outputs)
        for step in reversed(program.operations):
            if step.out in followed:
                followed.update(step.inputs)
        return any(id in followed for id, _ in program.state)

    def library(self, method: SDEMethod, dtype: torch.dtype) -> Library:
        """The code of both with a method."""
        drift, diffusion = self.drift.program, self.diffusion.program

        def write() -> Written:
            functions = _single(drift, dtype), _single(diffusion, dtype, "_diffusion")
            return write_stochastic(functions, method, self.layout)

        return library_of(self._made_of(method), method.tableau, dtype, write)

    def library_abreast(
        self, method: SDEMethod, dtype: torch.dtype, own: tuple[bool, ...]
    ) -> Library | None:
        """The code for several solves that take the same steps; `None` where there is none.

        Args:
            method: the method.
            dtype: of the state.
            own: of each parameter of both, whether each solve has its own.
        """
        made_of = *self._made_of(method), own
        key = made_of, id(method.tableau), dtype
        width = _WIDTHS.get(key)
        if width is None:
            _WIDTHS[key] = width = self._width(method, own)
        if not width:
            return None

        def write() -> Written:
            written = self._write_abreast(method, own, width)
            assert written is not None
            return written

        return library_of((*made_of, width), method.tableau, dtype, write)

    def _width(self, method: SDEMethod, own: tuple[bool, ...]) -> int:
        """How many solves go abreast; 0 where there is no code for several."""
        for seeds in _ABREAST:
            written = self._write_abreast(method, own, seeds)
            if written is None:
                break
            if written.sweep_memory * method.like.itemsize <= _MOST_MEMORY:
                return seeds
        return 0

    def _write_abreast(
        self, method: SDEMethod, own: tuple[bool, ...], seeds: int
    ) -> Written | None:
        count = len(self.drift.sources)
        drift = _abreast(self.drift.program, own[:count], seeds)
        diffusion = _abreast(self.diffusion.program, own[count:], seeds, "_diffusion")
        if drift is None or diffusion is None:
            return None
        return write_stochastic((drift, diffusion), method, self.layout, seeds)

    def _made_of(self, method: SDEMethod) -> tuple[Hashable, ...]:
        layout = self.layout
        how = method.error_drift, layout.samples, layout.motions, layout.matrix
        return self.drift.json, self.diffusion.json, how


class _Function(NamedTuple):
    """A drift or a diffusion as C.

    Attributes:
        program: the program.
        source: the functions `field`, `pull`, `pack` and `unpack`.
        work: entries of its values.
        bars: of their cotangents.
        packed: of its packed parameters.
        cost: multiplications of an evaluation.
        offsets: where each parameter lies packed.
        shared: how many of these it packs by itself.
    """

    program: Program
    source: str
    work: int
    bars: int
    packed: int
    cost: int
    offsets: list[int]
    shared: int


def _single(program: Program, dtype: torch.dtype, suffix: str = "") -> _Function:
    """The code for one solve."""
    emitter, emitted, _ = whole_or_by_rows(program, dtype, suffix=suffix)
    work, bars, count = emitter.work.size, emitter.bars.size, len(program.parameters)
    source, packed, cost = emitted.source, emitted.packed, emitted.cost
    return _Function(program, source, work, bars, packed, cost, emitted.offsets, count)


def _abreast(
    program: Program, own: tuple[bool, ...], seeds: int, suffix: str = ""
) -> _Function | None:
    """The code for several solves side by side; `None` where an operation has no such form.

    What each solve has of its own lies behind what is packed for all.
    """
    mine = frozenset(p.id for p, is_own in zip(program.parameters, own, strict=True) if is_own)
    wide_program = abreast(without_repetitions(program), mine, seeds)
    if wide_program is None:
        return None
    name = f"{suffix}_abreast"
    emitter = WideEmitter(wide_program, mine, seeds, name)
    emitted = emitter.emit()
    behind = padded(emitted.packed)
    packed = behind + padded(emitter.mine.size)
    shared, theirs = iter(emitted.offsets), iter(emitter.own_offsets)
    offsets = [behind + next(theirs) if p.id in mine else next(shared) for p in program.parameters]
    work, bars, cost = emitter.work.size, emitter.bars.size, emitted.cost
    text = emitted.source + _AS_ONE.format(x=suffix, inner=name, behind=behind, packed=packed)
    return _Function(program, text, work, bars, packed, cost, offsets, len(emitted.offsets))


# The same as functions of one solve, whose time is the same for all.
_AS_ONE = """
enum {{ PACKED{x} = {packed} }};

static void field{x}(REAL t, const REAL *u, const REAL *P, REAL *k, REAL *w) {{
  REAL time[ABREAST];
  for (int l = 0; l < ABREAST; l++) time[l] = t;
  field{inner}(time, u, P, P + {behind}, k, w);
}}

static void pull{x}(REAL t, const REAL *u, const REAL *P, const REAL *k, const REAL *w, REAL *k_bar,
                    REAL *u_bar, REAL *time_bar, REAL *D, REAL *z) {{
  REAL time[ABREAST], bars[ABREAST] = {{0}};
  for (int l = 0; l < ABREAST; l++) time[l] = t;
  pull{inner}(time, u, P, P + {behind}, k, w, k_bar, u_bar, bars, D, D + {behind}, z);
}}

static void pack{x}(const REAL *const *tensors, REAL *P) {{ pack{inner}(tensors, P); }}
static void unpack{x}(const REAL *P, REAL *D, REAL *z) {{ unpack{inner}(P, D, z); }}
"""


def write_stochastic(
    functions: tuple[_Function, _Function], method: SDEMethod, layout: NoiseLayout, seeds: int = 1
) -> Written:
    """The code of drift and diffusion for a stochastic method.

    Args:
        functions: both.
        method: the method.
        layout: how the motions act on the state of one solve.
        seeds: how many solves go abreast.
    """
    one, two = functions
    emitted, stages = MethodText(method, layout, seeds), method.tableau.stages
    row, matrix_row, whole = emitted.row, emitted.matrix_row, padded(emitted.whole)
    work, bars = padded(max(one.work, two.work)), padded(max(one.bars, two.bars))
    path = _PATH_ROWS * padded(layout.size * seeds)
    evaluations = stages * (row + matrix_row) + emitted.integrals
    march = 2 * whole + 2 * row + matrix_row + evaluations + row + work + path
    slots = 2 * stages
    slot = evaluations + slots * (row + work)
    sweep = slot + (slots + 1) * row + matrix_row + whole + bars + path
    text = (
        "#include <stdlib.h>",
        emitted.emit(),
        one.source,
        two.source,
        wide("SOME_WORK", work),
        wide("SOME_BARS", bars),
        packed_together({"": one.shared, "_diffusion": two.shared}),
        *map(source, _FILES),
    )
    drift, diffusion = one.program, two.program
    parameters = zip(
        (*drift.parameters, *diffusion.parameters),
        [*one.offsets, *(one.packed + offset for offset in two.offsets)],
        (*drift.pulled, *diffusion.pulled),
        strict=True,
    )
    return Written(
        "\n".join(text), emitted.whole, one.cost + two.cost + 20 * layout.size * seeds, stages,
        one.packed + two.packed, march, sweep, slot, (0, whole), list(parameters),
        calls=CALLS, abreast=seeds if seeds > 1 else 0,
    )  # fmt: skip
