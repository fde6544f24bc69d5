"""Implicit methods in native code: which solves have one, and the code of a field with one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pysciml_node.replay.stages import Method
from pysciml_node.tableaus import RosenbrockTableau
from pysciml_node.torch_engine.native.emit import Emitter
from pysciml_node.torch_engine.native.emit_implicit import emit_implicit
from pysciml_node.torch_engine.native.emit_method import emit_estimates
from pysciml_node.torch_engine.native.library import (
    LOOP,
    SWEEP,
    TAKEN_AGAIN,
    Written,
    ends_of_attempt,
    memory_of,
    packed_together,
    size_of,
    source,
)
from pysciml_node.torch_engine.native.pulled import PulledProgram
from pysciml_node.torch_engine.native.text import padded
from pysciml_node.translation.export import TranslatedModule
from pysciml_node.translation.program import Program

LARGEST = 100
"""Entries of a state up to which it is ahead of torch, whatever the field: docs/stiff.md."""


class Derivatives(NamedTuple):
    """Programs of derivatives of a field that its own pullback does not give.

    Attributes:
        pulled: the field's pullback, for gradients of Rosenbrock methods.
        given: the Jacobian that the problem brings.
    """

    pulled: PulledProgram | None = None
    given: TranslatedModule | None = None

    @property
    def texts(self) -> tuple[str, str]:
        """Both as text."""
        pulled, given = self
        return ("" if pulled is None else pulled.json, "" if given is None else given.json)


def write_implicit(
    program: Program, derivatives: Derivatives, method: Method, mass: Tensor | None
) -> Written:
    """The code of a field for a Rosenbrock or a diagonally implicit method.

    Args:
        program: the field.
        derivatives: without the field's pullback the code of a Rosenbrock method is the loop
            alone; gradients of other methods take no second derivatives.
        method: the method.
        mass: the mass matrix; `None` stands for the identity.
    """
    emitter, size = Emitter(program), size_of(program)
    emitted = emitter.emit(state_alone=True)
    rosenbrock = isinstance(method.tableau, RosenbrockTableau)
    assert rosenbrock or mass is None  # the border refuses it
    march, sweep = memory_of(method, size, emitter)
    row, given_work = padded(size), 0
    back, calls = [*SWEEP, "linear_sweep.h", f"{kind_of(method)}_sweep.h"], TAKEN_AGAIN
    text = [
        emit_implicit(method, size, mass),
        emit_estimates(method, method.nodes.dtype),
        emitted.source,
    ]
    programs, offsets = {"": program}, {"": emitted.offsets}
    packed, cost = emitted.packed, (size + 1) * emitted.cost + size**3 // 3
    pulled, given = derivatives
    if pulled is not None:
        second = Emitter(pulled.program, suffix="_pulled")
        more = second.emit()
        point = padded(2 * size + 1)
        sweep += 4 * point + padded(second.work.size) + padded(second.bars.size)
        text += [more.source, f"enum {{ POINT_ROW = {point} }};"]
        programs["_pulled"] = pulled.program
        offsets["_pulled"] = [packed + offset for offset in more.offsets]
        packed += more.packed
    elif rosenbrock:
        back, sweep, calls = [], 0, {"take": TAKEN_AGAIN["take"]}
    if given is not None:
        third = Emitter(given.program, suffix="_given")
        more = third.emit()
        given_work = padded(third.work.size)
        text += [more.source, f"#define WITH_GIVEN\nenum {{ GIVEN_AT = {packed} }};"]
        programs["_given"] = given.program
        offsets["_given"] = [packed + offset for offset in more.offsets]
        packed, cost = packed + more.packed, cost + more.cost
    text += [
        f"enum {{ GIVEN_WORK = {given_work} }};",
        packed_together({x: len(of.parameters) for x, of in programs.items()}, ("_given",)),
        *map(source, [*LOOP, "linear.h", f"{kind_of(method)}.h", "taken.h", *back]),
    ]
    linear = 2 * padded(size * size) + 4 * row + given_work
    march += padded(emitter.bars.size) + (1 if rosenbrock else 2) * linear
    if sweep:
        sweep += 2 * method.stages * row + (1 if rosenbrock else method.stages) * linear
    parameters = [
        (parameter, offset, pulled and x != "_given")
        for x, of in programs.items()
        for parameter, offset, pulled in zip(of.parameters, offsets[x], of.pulled, strict=True)
    ]
    return Written(
        "\n".join(text), size, cost, method.stages, packed, march, sweep, 0,
        ends_of_attempt(method, size), parameters, calls=calls,
    )  # fmt: skip


def kind_of(method: Method) -> str:
    """Of the files of src/ that take its steps."""
    return "rosenbrock" if isinstance(method.tableau, RosenbrockTableau) else "diagonal"
