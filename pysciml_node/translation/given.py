"""What a function was given when it was made, as a walk has seen it.

Fields are often functions that are made anew for each solve, of the same code: what has been seen
of one serves the next if both were given the same, and tensors of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import call, is_
from typing import Any

from torch import Tensor

from pysciml_node.translation.recent import reference


@dataclass
class Given:
    """The parts of a function, by `parts_of`. They are not kept alive where that can be.

    Attributes:
        kinds: the class of each part.
        places: which parts have to be the same objects.
        seen: functions that give these objects.
        first: the part at which each tensor is first met, in the order of the tensors' numbers.
        tensors: which parts are tensors.
        numbers: of each of these the number of its tensor.
    """

    kinds: list[type]
    places: list[int] = field(default_factory=list)
    seen: list[Callable[[], Any]] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def expect(self, place: int, part: Any, gone: Callable[[Any], None]) -> None:
        """Look later whether a part is still this one; `gone` is told when it is no more."""
        self.places.append(place)
        self.seen.append(reference(part, gone))

    def expect_tensor(self, place: int, number: int) -> None:
        """Look later whether a part is the tensor of a number."""
        if number == len(self.first):
            self.first.append(place)
        self.tensors.append(place)
        self.numbers.append(number)

    def repeat(self, numbers: list[int]) -> bool:
        """Whether tensors are among them that a function was given."""
        return any(number < len(self.first) for number in numbers)

    def holds(self, parts: tuple[Any, ...], tensors: list[Tensor]) -> bool:
        """Whether other parts come to the same, but for the tensors, which are these."""
        held = map(parts.__getitem__, self.tensors)
        return (
            list(map(type, parts)) == self.kinds
            and all(map(is_, map(parts.__getitem__, self.places), map(call, self.seen)))
            and all(map(is_, held, map(tensors.__getitem__, self.numbers)))
        )
