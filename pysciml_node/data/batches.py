"""Mini-batches: shuffled ones for training, ordered ones for evaluation."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Generic, Self

import torch

from pysciml_node import checks
from pysciml_node.data.labelled import DataT


class ShuffledBatches(Generic[DataT]):
    """Endless mini-batches, each pass over the data in a new random order.

    All batches have the same size: samples left over at the end of a pass are left out of it. The
    position can be saved and restored, so training continues with the batches it would have seen.

    Args:
        data: where the samples come from.
        batch_size: samples a batch.
        generator: source of the random orders; its state is part of the position.

    Raises:
        ValueError: `batch_size` is not between one and the number of samples.

    Examples:
        >>> from pysciml_node.data import LabelledData
        >>> data = LabelledData(torch.arange(4.0).unsqueeze(1), torch.arange(4))
        >>> batches = ShuffledBatches(data, 2, generator=torch.Generator().manual_seed(0))
        >>> sorted(next(batches).y.tolist() + next(batches).y.tolist())
        [0, 1, 2, 3]
    """

    def __init__(self, data: DataT, batch_size: int, *, generator: torch.Generator) -> None:
        batch_size = _batch_size(data, batch_size)
        checks.instance(
            "generator", generator, torch.Generator, example="torch.Generator().manual_seed(0)"
        )
        if not 1 <= batch_size <= len(data):
            raise ValueError(
                f"batch_size must be between 1 and the {len(data)} samples of data, but is "
                f"{batch_size}.\n  A pass over all of them is batch_size=len(data)."
            )
        self.data = data
        self.batch_size = batch_size
        self.generator = generator
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> DataT:
        stop = self._position + self.batch_size
        if stop > len(self._order):
            self._order = torch.randperm(len(self.data), generator=self.generator)
            stop = self.batch_size
        self._position = stop
        return self.data[self._order[stop - self.batch_size : stop]]

    def state_dict(self) -> dict[str, Any]:
        """The order of the current pass, the position in it and the generator's state."""
        return {
            "order": self._order,
            "position": self._position,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: the state belongs to a data set of another size.
        """
        order = state["order"]
        if len(order) not in (0, len(self.data)):
            raise ValueError(
                f"the saved position is in a pass over {len(order)} samples, "
                f"but the data has {len(self.data)}.\n"
                "  Continue with the data that the position was saved with."
            )
        self._order = order
        self._position = state["position"]
        self.generator.set_state(state["generator"])


def ordered_batches(data: DataT, batch_size: int) -> Iterator[DataT]:
    """Go through the data once, in order; the last batch may be smaller.

    Args:
        data: where the samples come from.
        batch_size: samples a batch, at least one.

    Yields:
        The batches.

    Raises:
        ValueError: `batch_size` is below one.

    Examples:
        >>> from pysciml_node.data import LabelledData
        >>> data = LabelledData(torch.zeros(5, 1), torch.zeros(5, dtype=torch.int64))
        >>> [len(batch) for batch in ordered_batches(data, 2)]
        [2, 2, 1]
    """
    batch_size = checks.whole("batch_size", _batch_size(data, batch_size))
    for start in range(0, len(data), batch_size):
        yield data[start : start + batch_size]


def _batch_size(data: Any, batch_size: int) -> int:
    listed = isinstance(data, Sequence | Mapping) or getattr(data, "ndim", 1) == 0
    if listed or not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        hint = "Write LabelledData(x, y), or a class with __len__ and __getitem__."
        checks.refuse("data", "data with samples, such as LabelledData(x, y)", data, hint)
    return checks.whole("batch_size", batch_size, at_least=None)
