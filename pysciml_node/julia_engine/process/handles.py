"""Handles: integers that name objects of Julia, which are freed with their owners in Python."""

from __future__ import annotations

from collections import deque
from typing import NoReturn, Self

# Finalizers run on any thread and in the middle of anything. So they only note the number, and the
# runtime frees the object with its next call.
pending: deque[int] = deque()


class Handle:
    """Owns one object of Julia's, by its number.

    The object is freed after `close`, or after the handle has been collected, with the next call
    into Julia.

    Args:
        number: the number that Julia returned, greater than 0.

    Examples:
        >>> handle = Handle(7)
        >>> handle.close()
        >>> handle.closed, pending.pop()
        (True, 7)
    """

    __slots__ = ("__weakref__", "_number")

    def __init__(self, number: int) -> None:
        self._number = number

    @property
    def number(self) -> int:
        """The number that Julia knows the object by.

        Raises:
            ValueError: the handle is closed.
        """
        if self._number == 0:
            raise ValueError(
                "this object of the Julia engine has been freed already.\n"
                "  Make it anew: solve again, or build the JuliaField again."
            )
        return self._number

    @property
    def closed(self) -> bool:
        """Whether the object has been given back."""
        return self._number == 0

    def close(self) -> None:
        """Give the object back; a second call does nothing."""
        number, self._number = self._number, 0
        if number:
            pending.append(number)

    def forget(self) -> None:
        """Julia has freed the object by itself."""
        self._number = 0

    def __del__(self) -> None:
        self.close()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        # There is one object in Julia, and it is freed once.
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an object of the Julia engine belongs to its process and cannot be pickled.\n"
            "  Pickle what it was made from: the problem, or the solution's states."
        )

    def __repr__(self) -> str:
        return f"Handle({self._number or 'closed'})"
