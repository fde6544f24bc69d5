"""Collocation methods and their kin: Butcher matrices whose stages are found together.

References:
    Gauss and Radau IIA: E. Hairer, G. Wanner, Solving Ordinary Differential Equations II, IV.5.
    SDIRK2: R. Alexander, SIAM J. Numer. Anal. 14 (1977) 1006-1021.
"""

from __future__ import annotations

import math

from pysciml_node.tableaus.base import Row, hermite
from pysciml_node.tableaus.implicit import CoupledTableau


def _coupled(order: int, c: Row, a: tuple[Row, ...], b: Row) -> CoupledTableau:
    """A method from its Butcher tableau, with the explicit stage at the start put before it."""
    weights = (0.0, *b)
    return CoupledTableau(
        order=order,
        error_order=order,
        c=(0.0, *c),
        a=((), *((0.0, *row) for row in a)),
        b=weights,
        b_error=(),
        fsal=False,
        interpolant=hermite(weights, fsal=False),
    )


IMPLICIT_EULER = _coupled(1, c=(1.0,), a=((1.0,),), b=(1.0,))

IMPLICIT_MIDPOINT = _coupled(2, c=(1 / 2,), a=((1 / 2,),), b=(1.0,))

_TRAPEZOID_B = (1 / 2, 1 / 2)
TRAPEZOID = CoupledTableau(
    order=2,
    error_order=2,
    c=(0.0, 1.0),
    a=((), _TRAPEZOID_B),
    b=_TRAPEZOID_B,
    b_error=(),
    fsal=True,
    interpolant=hermite(_TRAPEZOID_B, fsal=True),
)

_R3 = math.sqrt(3) / 6
GAUSS4 = _coupled(
    4,
    c=(1 / 2 - _R3, 1 / 2 + _R3),
    a=((1 / 4, 1 / 4 - _R3), (1 / 4 + _R3, 1 / 4)),
    b=(1 / 2, 1 / 2),
)

_R15 = math.sqrt(15)
GAUSS6 = _coupled(
    6,
    c=(1 / 2 - _R15 / 10, 1 / 2, 1 / 2 + _R15 / 10),
    a=(
        (5 / 36, 2 / 9 - _R15 / 15, 5 / 36 - _R15 / 30),
        (5 / 36 + _R15 / 24, 2 / 9, 5 / 36 - _R15 / 24),
        (5 / 36 + _R15 / 30, 2 / 9 + _R15 / 15, 5 / 36),
    ),
    b=(5 / 18, 4 / 9, 5 / 18),
)

RADAU_IIA3 = _coupled(
    3,
    c=(1 / 3, 1.0),
    a=((5 / 12, -1 / 12), (3 / 4, 1 / 4)),
    b=(3 / 4, 1 / 4),
)

_R6 = math.sqrt(6)
_RADAU5_B = (4 / 9 - _R6 / 36, 4 / 9 + _R6 / 36, 1 / 9)
RADAU_IIA5 = _coupled(
    5,
    c=(2 / 5 - _R6 / 10, 2 / 5 + _R6 / 10, 1.0),
    a=(
        (11 / 45 - 7 * _R6 / 360, 37 / 225 - 169 * _R6 / 1800, -2 / 225 + _R6 / 75),
        (37 / 225 + 169 * _R6 / 1800, 11 / 45 + 7 * _R6 / 360, -2 / 225 - _R6 / 75),
        _RADAU5_B,
    ),
    b=_RADAU5_B,
)

_G = 1 - math.sqrt(2) / 2
SDIRK2 = _coupled(2, c=(_G, 1.0), a=((_G, 0.0), (1 - _G, _G)), b=(1 - _G, _G))
