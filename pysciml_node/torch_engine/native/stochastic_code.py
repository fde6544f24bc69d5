"""The code of a stochastic equation: drift, diffusion and a method, as C."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pysciml_node.problems.sde import SDEProblem
from pysciml_node.stochastic.fields import NoiseLayout, expect_shape
from pysciml_node.stochastic.step import SDEMethod
from pysciml_node.torch_engine.native.emit import whole_or_by_rows
from pysciml_node.torch_engine.native.emit_stochastic import MethodText
from pysciml_node.torch_engine.native.library import (
    Library,
    Written,
    library_of,
    packed_together,
    source,
)
from pysciml_node.torch_engine.native.text import padded, wide
from pysciml_node.translation.export import TranslatedModule, translate, translate_diffusion
from pysciml_node.translation.program import Program

_FILES = (
    *(
        "codes.h",
        "parts.h",
        "event.h",
        "control.h",
        "brownian.h",
        "stochastic_step.h",
        "stochastic.h",
    ),
    *("sweep.h", "stochastic_sweep.h"),
)
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
        spec = problem.spec
        drift = translate(problem.drift, spec, problem.p)
        diffusion = translate_diffusion(problem.diffusion, spec, problem.p)
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
        layout = self.layout
        how = method.error_drift, layout.samples, layout.motions, layout.matrix
        made_of = self.drift.json, self.diffusion.json, how
        programs = self.drift.program, self.diffusion.program
        return library_of(
            made_of, method.tableau, dtype, lambda: write_stochastic(*programs, method, layout)
        )


def write_stochastic(
    drift: Program, diffusion: Program, method: SDEMethod, layout: NoiseLayout
) -> Written:
    """The code of two fields for a stochastic method.

    Args:
        drift: the program of the drift.
        diffusion: that of the diffusion.
        method: the method.
        layout: how the motions act on the state.
    """
    dtype = method.like.dtype
    first, one, _ = whole_or_by_rows(drift, dtype)
    second, two, _ = whole_or_by_rows(diffusion, dtype, suffix="_diffusion")
    emitted, stages = MethodText(method, layout), method.tableau.stages
    row, matrix_row, whole = emitted.row, emitted.matrix_row, padded(emitted.whole)
    work, bars = (
        padded(max(getattr(first, name).size, getattr(second, name).size))
        for name in ("work", "bars")
    )
    path = _PATH_ROWS * padded(layout.size)
    evaluations = stages * (row + matrix_row) + emitted.integrals
    march = 2 * whole + 2 * row + matrix_row + evaluations + row + work + path
    slots = 2 * stages
    slot = evaluations + slots * (row + work)
    sweep = slot + (slots + 1) * row + matrix_row + whole + bars + path
    text = (
        emitted.emit(),
        one.source,
        two.source,
        wide("SOME_WORK", work),
        wide("SOME_BARS", bars),
        packed_together(len(drift.parameters), "_diffusion"),
        *map(source, _FILES),
    )
    offsets = [*one.offsets, *(one.packed + offset for offset in two.offsets)]
    parameters = zip(
        (*drift.parameters, *diffusion.parameters),
        offsets,
        (*drift.pulled, *diffusion.pulled),
        strict=True,
    )
    return Written(
        "\n".join(text), emitted.whole, one.cost + two.cost + 20 * layout.size, stages,
        one.packed + two.packed, march, sweep, slot, (0, whole), list(parameters),
    )  # fmt: skip
