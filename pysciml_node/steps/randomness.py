"""Fields that draw random numbers: refused wherever an evaluation has to be repeated."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node.steps.first_graph import Evaluation
from pysciml_node.steps.memory import Evaluate, derivatives, relative_gap
from pysciml_node.steps.surroundings import Surroundings


class Streams:
    """How far the random numbers have come that a field may draw.

    They are those of the generators that it can reach, Python's and NumPy's among them, and torch's
    own.

    Args:
        generators: that a field can reach.
        device: of the state.
    """

    def __init__(self, generators: Sequence[Any], device: torch.device) -> None:
        self._generators = [torch.default_generator, *generators]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generators.append(torch.cuda.default_generators[index])
        self._states = [*map(_state, self._generators)]

    def moved(self) -> bool:
        """Whether some have been drawn since."""
        return not all(map(_equal, self._states, map(_state, self._generators)))

    def put_back(self) -> None:
        """Let them go on as if none had been drawn."""
        for generator, state in zip(self._generators, self._states, strict=True):
            if not _equal(state, _state(generator)):
                _put(generator, state)


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return pickle.dumps(generator.get_state())
    if isinstance(generator, np.random.Generator):
        return pickle.dumps(generator.bit_generator.state)
    state = generator.get_state()
    # Every solve with gradients compares them, and torch takes bytes one by one.
    return state.view(torch.int64) if state.numel() % 8 == 0 else state


def _equal(state: Any, other: Any) -> bool:
    return torch.equal(state, other) if isinstance(state, Tensor) else state == other


def _put(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(pickle.loads(state))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = pickle.loads(state)
    else:
        generator.set_state(state.view(torch.uint8))


def expect_repeatable(
    surroundings: Surroundings, device: torch.device, evaluate: Evaluate, who: str
) -> Evaluate:
    """An evaluation that is refused if it draws random numbers.

    Args:
        surroundings: of the field.
        device: of the state.
        evaluate: evaluates the field at the start.
        who: the method that needs equal evaluations, for the message.

    Returns:
        An evaluation that raises a `ValueError` when values, or derivatives in what it gives as
        leaves, depend on numbers drawn in it.
    """

    def checked() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        streams = Streams(surroundings.generators, device)
        values, fresh = evaluate()
        # Another thread may have drawn them, and the values may not depend on them.
        if not streams.moved():
            return values, fresh
        leaves = [x for x in surroundings.tensors if x.is_leaf and x.requires_grad]
        if not _agree((values, fresh), evaluate(), leaves):
            raise ValueError(
                f"the field draws random numbers{_drawers(surroundings)}, so that two evaluations "
                f"differ, and {who} needs them to agree.\n"
                "  Use field.eval(); or draw the numbers once before each solve (a mask passed as "
                "p=); or take FixedStep() with adjoint=DirectAdjoint()."
            )
        return values, fresh

    return checked


def _agree(first: Evaluation, second: Evaluation, leaves: Sequence[Tensor]) -> bool:
    """Whether two evaluations agree, and their derivatives, where such are asked for."""
    if not _same(first[0], second[0]):
        return False
    return not first[1] or not relative_gap(
        *(derivatives(evaluation, leaves) for evaluation in (first, second))
    )


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(
        torch.equal(x.detach(), y.detach()) for x, y in zip(first, second, strict=True)
    ) or any(bool(x.detach().isnan().any()) for x in first)


def _drawers(surroundings: Surroundings) -> str:
    """The dropout layers in train mode, in words."""
    layers = surroundings.training(torch.nn.modules.dropout._DropoutNd)
    return f" ({', '.join(layers)})" if layers else ""
