"""The Brownian motions of a stochastic solve, as native code begins them."""

from __future__ import annotations

import ctypes

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import Problem, ends_of
from pysciml_node.stochastic.march import root_length

_DEPTH = 32


class Noise(ctypes.Structure):
    """`Noise` of src/brownian.h."""

    _fields_ = (
        ("t0", ctypes.c_double),
        ("length", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("seeds", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("evaluations", "rejecting", "rooted", "last")),
        ("cells", ctypes.c_int64 * _DEPTH),
        ("rows", ctypes.c_void_p),
    )


def noise_of(problem: Problem, options: SolveOptions) -> Noise:
    """The motions of a solve, of which nothing has been looked at."""
    t0, t1 = ends_of(problem)
    return Noise(t0=t0, length=root_length(t1 - t0, options), seed=options.seed)
