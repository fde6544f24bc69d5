"""What answers from outside of all objects: clocks, the system, the interpreter, chance."""

from __future__ import annotations

import datetime
import random
import types
from typing import Any

import numpy as np
import torch

# Modules whose functions answer what nothing that a field reaches has told them.
MODULES = frozenset(
    (
        *("time", "posix", "nt", "_winapi", "io", "_io", "_socket", "mmap", "gc", "sys"),
        *("_pickle",),
    )
)
# Those that answer nothing.
_IDLE = frozenset(("sleep", "setprofile", "fspath", "text_encoding", "intern", "exc_info"))
# Functions in Python that draw from the system's entropy.
_CHANCE = frozenset(("uuid", "secrets"))
# Classes that tell the time, or whose objects begin with that entropy where nobody gives a seed.
_KINDS = (
    *(datetime.date, random.Random, torch.Generator),
    *(np.random.RandomState, np.random.BitGenerator, np.random.SeedSequence),
)


def is_outside(x: Any) -> bool:
    """Whether a function or a class answers from outside, differently each time that it is asked.

    `time.time`, `os.urandom`, `datetime.now`, `uuid.uuid4`, `torch.Generator`, and the like.
    """
    if isinstance(x, types.BuiltinFunctionType):
        owner = x.__self__
        if isinstance(owner, types.ModuleType):
            return owner.__name__ in MODULES and x.__name__ not in _IDLE
        return isinstance(owner, type) and issubclass(owner, _KINDS)
    if isinstance(x, types.FunctionType):
        return x.__globals__.get("__name__") in _CHANCE
    return x is np.random.default_rng or (isinstance(x, type) and issubclass(x, _KINDS))
