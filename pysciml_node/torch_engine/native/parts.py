"""A batch in parts of as many rows, each with memory of its own, which threads may take.

How many parts there are is a matter of the program alone, so that what comes out does not depend on
the number of threads (src/parts.h).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Parts, at most, and multiplications of a part in a step, at least: what threads cost a step is
# little beside them.
_MOST_PARTS, _LEAST_WORK = 16, 750_000
# Rows that are taken twice for all parts to be alike are counted in steps of a share of the batch;
# products take rows in fours.
_STEP, _FOUR = 100, 4


@dataclass(frozen=True)
class Parts:
    """How a batch is taken in parts; the last one begins with rows of the one before it.

    Attributes:
        count: how many they are.
        total: rows of the batch.
        rows: rows of a part.
        turn: rows that the field takes at once.
        widths: entries of a row in each tensor of the state.
    """

    count: int
    total: int
    rows: int
    turn: int
    widths: tuple[int, ...]

    @property
    def repeated(self) -> int:
        """Rows of the last part that belong to the one before it."""
        return self.count * self.rows - self.total

    @property
    def definitions(self) -> str:
        """What src/parts.h reads."""
        before = (0, *itertools.accumulate(self.widths[:-1]))
        whole = self.total * sum(self.widths)
        arrays = {"WIDTHS": self.widths, "BEFORE": before}
        return "\n".join(
            [
                f"#define PARTS {self.count}",
                f"enum {{ TOTAL = {self.total}, PART_ROWS = {self.rows}, "
                f"PIECES = {len(self.widths)}, ENTIRE = {whole} }};",
                *(
                    f"static const int {name}[] = {{{', '.join(map(str, values))}}};"
                    for name, values in arrays.items()
                ),
            ]
        )

    def joined(self, parts: Tensor) -> Tensor:
        """A state, flat.

        Args:
            parts: the state of each part, `(count, rows * sum(widths))`.
        """
        pieces = torch.split(parts, [self.rows * width for width in self.widths], 1)
        own = [x[-1, self.repeated * width :] for x, width in zip(pieces, self.widths, strict=True)]
        joined = [
            torch.cat([x[:-1].reshape(-1), last]) for x, last in zip(pieces, own, strict=True)
        ]
        return torch.cat(joined)


def split(
    widths: tuple[int, ...], total: int, work: int, turns: Sequence[int], most: int
) -> Parts | None:
    """A batch in parts; `None` where they would be too short.

    Args:
        widths: entries of a row in each tensor of the state.
        total: rows of the batch.
        work: multiplications of a step.
        turns: numbers of rows that the field may take at once; where there are none, all of a part.
        most: parts.
    """
    most = min(most, _MOST_PARTS, work // _LEAST_WORK)
    found = []
    for count in range(2, most + 1):
        for turn in turns or [-(-total // (count * _FOUR)) * _FOUR]:
            rows = -(-total // (count * turn)) * turn
            parts = Parts(-(-total // rows), total, rows, turn, widths)
            if parts.count > 1:
                found.append(parts)
    return min(found, default=None, key=_order)


def _order(parts: Parts) -> tuple[int, bool, int, int]:
    """The fewest rows twice, rows by fours, the most parts, the most rows at once."""
    twice = _STEP * parts.repeated // parts.total
    return twice, parts.turn % _FOUR != 0, -parts.count, -parts.turn
