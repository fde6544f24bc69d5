"""Runge-Kutta methods as data: each is a frozen table of coefficients with its dense output."""

from __future__ import annotations

from pysciml_node.tableaus.base import Interpolant, Tableau
from pysciml_node.tableaus.collocation import (
    GAUSS4,
    GAUSS6,
    IMPLICIT_EULER,
    IMPLICIT_MIDPOINT,
    RADAU_IIA3,
    RADAU_IIA5,
    SDIRK2,
    TRAPEZOID,
)
from pysciml_node.tableaus.dp5 import DP5
from pysciml_node.tableaus.dp8 import DP8
from pysciml_node.tableaus.esdirk import KENCARP4, TRBDF2
from pysciml_node.tableaus.implicit import (
    CoupledTableau,
    DiagonallyImplicitTableau,
    ImplicitTableau,
    RosenbrockTableau,
)
from pysciml_node.tableaus.low_order import BS3, EULER, HEUN, MIDPOINT, RALSTON, RK4
from pysciml_node.tableaus.rosenbrock import RODAS5P, ROSENBROCK23
from pysciml_node.tableaus.tsit5 import TSIT5
from pysciml_node.tableaus.vern7 import VERN7
from pysciml_node.tableaus.vern9 import VERN9

__all__ = [
    "BS3",
    "DP5",
    "DP8",
    "EULER",
    "GAUSS4",
    "GAUSS6",
    "HEUN",
    "IMPLICIT_EULER",
    "IMPLICIT_MIDPOINT",
    "KENCARP4",
    "MIDPOINT",
    "RADAU_IIA3",
    "RADAU_IIA5",
    "RALSTON",
    "RK4",
    "RODAS5P",
    "ROSENBROCK23",
    "SDIRK2",
    "TRAPEZOID",
    "TRBDF2",
    "TSIT5",
    "VERN7",
    "VERN9",
    "CoupledTableau",
    "DiagonallyImplicitTableau",
    "ImplicitTableau",
    "Interpolant",
    "RosenbrockTableau",
    "Tableau",
]
