"""torchdiffeq's methods by their names there: tables and classes of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pysciml_node import tableaus
from pysciml_node.algorithms.explicit import (
    BS3,
    DP5,
    DP8,
    Algorithm,
    Euler,
    ExplicitRungeKutta,
    Heun,
    Midpoint,
    Tsit5,
)
from pysciml_node.algorithms.implicit import ImplicitMethod
from pysciml_node.tableaus import CoupledTableau, Interpolant, Tableau
from pysciml_node.tableaus.base import hermite

_HEUN3_B = (1 / 4, 0.0, 3 / 4)


@dataclass(frozen=True)
class _Heun3(ExplicitRungeKutta):
    """Heun's third-order method, with a second-order formula embedded."""

    tableau: ClassVar[Tableau] = Tableau(
        order=3,
        error_order=2,
        c=(0.0, 1 / 3, 2 / 3),
        a=((), (1 / 3,), (0.0, 2 / 3)),
        b=_HEUN3_B,
        b_error=(1 / 4, -1 / 2, 1 / 4),
        fsal=False,
        interpolant=hermite(_HEUN3_B, fsal=False),
    )


@dataclass(frozen=True)
class _ThreeEighths(ExplicitRungeKutta):
    """Kutta's 3/8 rule (what torchdiffeq calls `rk4`), with a second-order formula embedded.

    Its interpolant is the third-order one on its own four stages.
    """

    tableau: ClassVar[Tableau] = Tableau(
        order=4,
        error_order=2,
        c=(0.0, 1 / 3, 2 / 3, 1.0),
        a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
        b_error=(1 / 8, -3 / 8, 3 / 8, -1 / 8),
        fsal=False,
        interpolant=Interpolant(
            weights=(
                (1.0, -15 / 8, 1.0),
                (0.0, 15 / 8, -3 / 2),
                (0.0, 3 / 8, 0.0),
                (0.0, -3 / 8, 1 / 2),
            ),
            order=3,
        ),
    )


_FEHLBERG2_B = (1 / 512, 255 / 256, 1 / 512)


@dataclass(frozen=True)
class _Fehlberg2(ExplicitRungeKutta):
    """Fehlberg's 1(2), the second-order formula propagated.

    Reference: E. Fehlberg, NASA Technical Report R-315 (1969).
    """

    tableau: ClassVar[Tableau] = Tableau(
        order=2,
        error_order=1,
        c=(0.0, 1 / 2, 1.0),
        a=((), (1 / 2,), (1 / 256, 255 / 256)),
        b=_FEHLBERG2_B,
        b_error=(-1 / 512, 0.0, 1 / 512),
        fsal=False,
        interpolant=hermite(_FEHLBERG2_B, fsal=False),
    )


class _Coupled(ImplicitMethod):
    """An implicit method with steps of fixed sizes, known here by its table alone."""

    package = ""


class _ImplicitEuler(_Coupled):
    """The implicit Euler method."""

    tableau: ClassVar[CoupledTableau] = tableaus.IMPLICIT_EULER


class _ImplicitMidpoint(_Coupled):
    """The implicit midpoint rule."""

    tableau: ClassVar[CoupledTableau] = tableaus.IMPLICIT_MIDPOINT


class _Trapezoid(_Coupled):
    """The trapezoidal rule."""

    tableau: ClassVar[CoupledTableau] = tableaus.TRAPEZOID


class _RadauIIA3(_Coupled):
    """Radau IIA with two stages."""

    tableau: ClassVar[CoupledTableau] = tableaus.RADAU_IIA3


class _RadauIIA5(_Coupled):
    """Radau IIA with three stages."""

    tableau: ClassVar[CoupledTableau] = tableaus.RADAU_IIA5


class _Gauss4(_Coupled):
    """Gauss with two stages."""

    tableau: ClassVar[CoupledTableau] = tableaus.GAUSS4


class _Gauss6(_Coupled):
    """Gauss with three stages."""

    tableau: ClassVar[CoupledTableau] = tableaus.GAUSS6


class _SDIRK2(_Coupled):
    """Alexander's singly diagonally implicit method with two stages."""

    tableau: ClassVar[CoupledTableau] = tableaus.SDIRK2


class _TRBDF2(_Coupled):
    """The trapezoidal rule and backward differentiation in one step, with one matrix a step."""

    tableau: ClassVar[CoupledTableau] = CoupledTableau(
        order=2,
        error_order=2,
        c=tableaus.TRBDF2.c,
        a=(
            (),
            (*tableaus.TRBDF2.a[1], tableaus.TRBDF2.gamma, 0.0),
            (*tableaus.TRBDF2.a[2], tableaus.TRBDF2.gamma),
        ),
        b=tableaus.TRBDF2.b,
        b_error=(),
        fsal=True,
        interpolant=tableaus.TRBDF2.interpolant,
    )


ADAPTIVE: dict[str, Algorithm] = {
    "dopri8": DP8(),
    "dopri5": DP5(),
    "tsit5": Tsit5(),
    "bosh3": BS3(),
    "fehlberg2": _Fehlberg2(),
    "adaptive_heun": Heun(),
}
FIXED: dict[str, Algorithm] = {
    "euler": Euler(),
    "midpoint": Midpoint(),
    "heun2": Heun(),
    "heun3": _Heun3(),
    "rk4": _ThreeEighths(),
    "implicit_euler": _ImplicitEuler(),
    "implicit_midpoint": _ImplicitMidpoint(),
    "trapezoid": _Trapezoid(),
    "radauIIA3": _RadauIIA3(),
    "gl4": _Gauss4(),
    "radauIIA5": _RadauIIA5(),
    "gl6": _Gauss6(),
    "sdirk2": _SDIRK2(),
    "trbdf2": _TRBDF2(),
}
