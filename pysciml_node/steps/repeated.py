"""Steps that are taken again, with gradients, for dense output and estimates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pysciml_node.problems.state import moves, recording
from pysciml_node.steps.memory import Change, Evaluate, Left, copies
from pysciml_node.steps.overwritten import may_be_written
from pysciml_node.steps.randomness import Streams
from pysciml_node.steps.start import versions_of
from pysciml_node.steps.surroundings import Surroundings

_WHY = " Dense output and estimates take steps again, whose derivatives are not those of the solve."
_INSTEAD = "ask for states by saveat= with adjoint=DirectAdjoint()"


class Repeated:
    """What a field can reach, before steps are taken again.

    The ends of steps are compared with those of the solve. They do not tell whether derivatives are
    those of the solve, where a field changes what these depend on: its count, a buffer, the random
    numbers that follow.

    Args:
        surroundings: of the field.
        device: of the state.
    """

    def __init__(self, surroundings: Surroundings, device: torch.device) -> None:
        self._surroundings, self._device = surroundings, device
        # Nobody asks for derivatives; and inside of transforms there are none to be compared.
        self._streams: Streams | None = None
        if recording() and not torch._C._are_functorch_transforms_active():
            self._streams = Streams(surroundings.generators, device)
            self._versions = versions_of(surroundings.tensors)
            self._tensors = may_be_written(surroundings)
            self._contents = copies(self._tensors)

    def expect_same(self, values: Iterable[Tensor], places: Iterable[Evaluate]) -> None:
        """Compare derivatives where the field has changed what it can reach, in the solve or since.

        Args:
            values: what has been computed from the steps.
            places: evaluations at some of their places.

        Raises:
            RuntimeError: they depend on that.
        """
        if (streams := self._streams) is None or not any(map(moves, values)):
            return
        surroundings = self._surroundings
        random = streams.moved()
        began = {id(x): (x, first) for x, first in self._written_since()}
        began |= {id(x): (x, first) for x, first in surroundings.began}
        with surroundings.undisturbed():
            replaced = [*surroundings.changes(), *surroundings.moved]
            changed = random or began or replaced or surroundings.written
            unseen = not surroundings.all_open
            if not (changed or unseen or self._versions != versions_of(surroundings.tensors)):
                return
            pairs = [*began.values()]
            before = Left([x for x, _ in pairs], [x for _, x in pairs], replaced)
            change = Change.since(before, surroundings)
            if random:
                change = change._replace(
                    what="draws random numbers, and its derivatives depend on what earlier "
                    "evaluations have left there"
                )
            after = Streams(surroundings.generators, self._device)
            try:
                self._expect_unseen(change, places)
            finally:
                after.put_back()

    def _written_since(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Small tensors that have changed since, with what they held."""
        pairs = zip(self._tensors, self._contents, strict=True)
        return ((x, then) for x, then in pairs if not torch.equal(x, then))

    def _expect_unseen(self, change: Change, places: Iterable[Evaluate]) -> None:
        trainable = [x for x in self._surroundings.tensors if x.requires_grad]
        # Neither what others have computed nor what has hooks is gone back into.
        computed = [x for x in trainable if not x.is_leaf or x._backward_hooks]
        stand_ins = {id(x): x.detach().requires_grad_() for x in computed}
        leaves = [*(x for x in trainable if not x._backward_hooks), *stand_ins.values()]
        with self._surroundings.as_seen(stand_ins):
            for there in places:
                change.expect_unseen(there, leaves, why=_WHY, instead=_INSTEAD)
