"""Times as whole numbers, and where an interval of them is split."""

from __future__ import annotations

import math
from bisect import bisect_left

# Of an interval up to one: six decimal and sixteen binary digits.
_FIVES, _TWOS = 6, 16


class Ticks:
    """Times counted in ticks, of which each decimal and each binary fraction has a whole number.

    A unit of time has `2**twos * 5**fives` ticks.

    Args:
        twos: how often a tick's share of the unit can be doubled.
        fives: how often it can be multiplied by five.
        origin: the time that is counted from.
        unit: length of the unit.
        span: the longest interval that is split, in units.

    Examples:
        >>> ticks = Ticks.for_span(1.0)
        >>> start, stop = ticks.at(0.0), ticks.at(1.0)
        >>> ticks.split(start, stop) == ticks.at(0.5)
        True
        >>> ticks.split(ticks.at(0.2), ticks.at(0.4)) == ticks.at(0.25)
        True
    """

    def __init__(
        self, twos: int, fives: int, span: float, origin: float = 0.0, unit: float = 1.0
    ) -> None:
        self.origin = origin
        self._rate = 2.0**twos * 5.0**fives / unit
        self.length = 1 / self._rate
        count = span * unit * self._rate
        # 1, 2 and 5 times the powers of ten, and the powers of two.
        tens = [(twos, fives), (twos + 1, fives), (twos, fives + 1)]
        decimal = [step for powers in tens for step in _powers(*powers, 10, count)]
        binary = _powers(twos, fives, 2, count)
        steps = sorted({1, *decimal, *binary}, reverse=True)
        self._steps, self._sought = steps, [-step for step in steps]

    @classmethod
    def for_span(cls, span: float) -> Ticks:
        """Nine digits of an interval, of which six are decimal and the others binary."""
        tens = math.ceil(math.log10(span)) if span > 0 else 0
        fives = max(0, _FIVES - tens)
        twos = round(_TWOS + _FIVES * math.log2(5) - tens * math.log2(10) - fives * math.log2(5))
        return cls(twos, fives, span)

    @classmethod
    def of_digits(cls, digits: int, span: float) -> Ticks:
        """So many decimal digits."""
        return cls(digits, digits, span)

    @classmethod
    def of_steps(cls, origin: float, dt: float, span: float) -> Ticks:
        """Multiples of `dt` from `origin`, and six digits of it."""
        return cls(_FIVES, _FIVES, span / dt, origin, dt)

    def at(self, t: float) -> int:
        """The number of a time."""
        return round((t - self.origin) * self._rate)

    def time(self, place: int) -> float:
        """The time of a number."""
        return self.origin + place * self.length

    def split(self, start: int, stop: int) -> int:
        """Where an interval of at least two ticks is split; depends on its ends alone.

        At a number so round that few of its kind can lie inside, wherever it lies; or else at the
        roundest number of the middle half.
        """
        length = stop - start
        quarter = max(1, length // 4)
        for step in self._steps[bisect_left(self._sought, -4 * length) :]:
            margin = 1 if 2 * step >= length else quarter
            low, high = start + margin, stop - margin
            last = high // step * step
            if last >= low:
                middle = round((start + stop) / (2 * step)) * step
                return min(max(middle, -(-low // step) * step), last)
        raise AssertionError("every interval holds a whole number")


def _powers(twos: int, fives: int, base: int, most: float) -> list[int]:
    """The whole numbers of ticks that a power of the base is, in units, up to `most`."""
    first = -min(twos, fives) if base == 10 else -twos
    steps = []
    for power in range(first, first + 80):
        two, five = twos + power, fives + (power if base == 10 else 0)
        if two < 0 or five < 0:
            continue
        step = 2**two * 5**five
        if step > most:
            break
        steps.append(step)
    return steps
