"""Implicit methods in native code: which solves have one, and the code of a field with one."""

from __future__ import annotations

from torch import Tensor

from pysciml_node.replay.stages import Method
from pysciml_node.tableaus import RosenbrockTableau
from pysciml_node.torch_engine.native.emit import Emitter
from pysciml_node.torch_engine.native.emit_implicit import emit_implicit
from pysciml_node.torch_engine.native.emit_method import emit_estimates
from pysciml_node.torch_engine.native.library import (
    ALONE_PACKED,
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
from pysciml_node.torch_engine.native.text import padded
from pysciml_node.translation.program import Program

LARGEST = 100
"""Entries of a state up to which it is ahead of torch, whatever the field: docs/stiff.md."""


def write_implicit(
    program: Program, pulled: Program | None, method: Method, mass: Tensor | None
) -> Written:
    """The code of a field for a Rosenbrock or a diagonally implicit method.

    Args:
        program: the field.
        pulled: the field's pullback, for gradients of a Rosenbrock method; `None` for the loop
            alone, and for other methods, whose gradients take no second derivatives.
        method: the method.
        mass: the mass matrix; `None` stands for the identity.
    """
    emitter, size = Emitter(program), size_of(program)
    emitted = emitter.emit(state_alone=True)
    rosenbrock = isinstance(method.tableau, RosenbrockTableau)
    assert rosenbrock or mass is None  # the border refuses it
    march, sweep = memory_of(method, size, emitter)
    row = padded(size)
    linear = 2 * padded(size * size) + 4 * row
    march += padded(emitter.bars.size) + (1 if rosenbrock else 2) * linear
    sweep += 2 * method.stages * row + (1 if rosenbrock else method.stages) * linear
    kind = "rosenbrock" if rosenbrock else "diagonal"
    back, calls = [*SWEEP, "linear_sweep.h", f"{kind}_sweep.h"], TAKEN_AGAIN
    text = [
        emit_implicit(method, size, mass),
        emit_estimates(method, method.nodes.dtype),
        emitted.source,
    ]
    parameters = list(zip(program.parameters, emitted.offsets, program.pulled, strict=True))
    packed, cost = emitted.packed, (size + 1) * emitted.cost + size**3 // 3
    if pulled is not None:
        second = Emitter(pulled, suffix="_pulled")
        more = second.emit()
        point = padded(2 * size + 1)
        sweep += 4 * point + padded(second.work.size) + padded(second.bars.size)
        text += [more.source, both_packed(len(parameters), point)]
        offsets = [packed + offset for offset in more.offsets]
        parameters += zip(pulled.parameters, offsets, pulled.pulled, strict=True)
        packed += more.packed
    else:
        text.append(ALONE_PACKED)
        if rosenbrock:
            back, sweep, calls = [], 0, {"take": TAKEN_AGAIN["take"]}
    text += map(source, [*LOOP, "linear.h", f"{kind}.h", "taken.h", *back])
    return Written(
        "\n".join(text), size, cost, method.stages, packed, march, sweep, 0,
        ends_of_attempt(method, size), parameters, calls=calls,
    )  # fmt: skip


def both_packed(parameters: int, point: int) -> str:
    """The packing of the parameters of a field and its pullback, one after the other.

    Args:
        parameters: how many the field packs.
        point: entries of a row of the pullback's states.
    """
    return f"{packed_together(parameters, '_pulled')}enum {{ POINT_ROW = {point} }};\n"
