"""What a field asks outside of its objects: clocks, files, the machine, the interpreter, frames."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from pysciml_node.steps.outside import MODULES, is_outside
from pysciml_node.translation.libraries import is_library

_OF_TORCH = (torch.get_num_threads, torch.get_num_interop_threads)
# Libraries that look around, and no number depends on what they see.
_ASIDE = frozenset(
    (
        *("importlib", "_frozen_importlib", "_frozen_importlib_external", "zipimport"),
        *("logging", "warnings", "traceback", "linecache", "tokenize", "typing", "contextlib"),
    )
)
# Libraries that import parts of their own when they are first asked for.
_LAZY = _ASIDE | {"torch", "numpy", "scipy", "pysciml_node"}
_IMPORT = import_module.__code__


@contextmanager
def outside() -> Iterator[list[str]]:
    """Collects the names of functions by which what runs inside asks outside.

    They are seen as Python calls them, in libraries too, whatever they are called in code. Where
    something else profiles Python, nothing is seen.
    """
    asked: list[str] = []
    if sys.getprofile() is not None:
        yield asked
        return

    def look(frame: types.FrameType, event: str, called: Any) -> None:
        if event == "c_call" and _is_outside(called, frame) and not _is_aside(called, frame):
            asked.append(called.__qualname__)
        elif event == "call" and frame.f_code is _IMPORT and _finds(frame.f_back):
            asked.append(import_module.__qualname__)

    sys.setprofile(look)
    try:
        yield asked
    finally:
        sys.setprofile(None)


def _is_outside(called: Any, frame: types.FrameType) -> bool:
    if called is __import__:
        return _finds(frame)
    owner = getattr(called, "__self__", None)
    if is_outside(called):
        return True
    if isinstance(owner, types.ModuleType):
        return called in _OF_TORCH
    return called.__name__ == "__subclasses__" or type(owner).__module__ in MODULES


def _finds(frame: types.FrameType | None) -> bool:
    """Whether a library looks for a module, and so for what stands there, in the field's place."""
    name = None if frame is None else str(frame.f_globals.get("__name__"))
    return is_library(name) and str(name).partition(".")[0] not in _LAZY


def _is_aside(called: Any, frame: types.FrameType) -> bool:
    name = str(frame.f_globals.get("__name__"))
    # What asks a clock in a library measures that, also where Python collects garbage meanwhile.
    measures = getattr(called, "__module__", None) == time.__name__ and is_library(name)
    return measures or name.partition(".")[0] in _ASIDE
