"""Fields that draw random numbers: refused wherever an evaluation has to be repeated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pysciml_node.steps.first_graph import Evaluation
from pysciml_node.steps.memory import Evaluate, derivatives, relative_gap
from pysciml_node.steps.surroundings import Surroundings


def generators_of(surroundings: Surroundings, device: torch.device) -> list[torch.Generator]:
    """The generators that a field may draw from: those that it can reach, and torch's own."""
    generators = [torch.default_generator, *surroundings.generators]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    return generators


def expect_repeatable(
    surroundings: Surroundings, device: torch.device, evaluate: Evaluate, who: str
) -> Evaluate:
    """An evaluation that is refused if it draws random numbers.

    Args:
        surroundings: of the field; its generators are watched beside torch's own.
        device: of the state.
        evaluate: evaluates the field at the start.
        who: the method that needs equal evaluations, for the message.

    Returns:
        An evaluation that raises a `ValueError` when values, or derivatives in what it gives as
        leaves, depend on numbers drawn in it.
    """

    def checked() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        generators = generators_of(surroundings, device)
        before = [generator.get_state() for generator in generators]
        values, fresh = evaluate()
        after = [generator.get_state() for generator in generators]
        # Another thread may have drawn them, and the values may not depend on them.
        if all(map(torch.equal, before, after)):
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
