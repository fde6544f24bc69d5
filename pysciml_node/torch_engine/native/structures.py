"""What the structures of C code are made of."""

from __future__ import annotations

import ctypes
from typing import Any

POINTER, DOUBLE, INTEGER = ctypes.c_void_p, ctypes.c_double, ctypes.c_int64


def fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Fields of one kind.

    Args:
        kind: theirs.
        names: with spaces between them.
    """
    return [(name, kind) for name in names.split()]
