"""The Brownian motions of a stochastic solve, as native code begins them."""

from __future__ import annotations

import ctypes

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import Problem, ends_of
from pysciml_node.stochastic.march import root_length
from pysciml_node.torch_engine.native.structures import DOUBLE, INTEGER, POINTER, fields

_DEPTH = 32


class Noise(ctypes.Structure):
    """`Noise` of src/brownian.h."""

    _fields_ = (
        *fields(DOUBLE, "t0 length"),
        ("seed", ctypes.c_uint64),
        ("seeds", POINTER),
        *fields(INTEGER, "evaluations rejecting rooted last"),
        ("cells", INTEGER * _DEPTH),
        ("rows", POINTER),
    )


def noise_of(problem: Problem, options: SolveOptions) -> Noise:
    """The motions of a solve, of which nothing has been looked at."""
    t0, t1 = ends_of(problem)
    return Noise(t0=t0, length=root_length(t1 - t0, options), seed=options.seed)
