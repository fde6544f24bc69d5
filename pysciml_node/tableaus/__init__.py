"""Runge-Kutta methods as data: each is a frozen table of coefficients with its dense output."""

from __future__ import annotations

from pysciml_node.tableaus.base import Interpolant, Tableau
from pysciml_node.tableaus.dp5 import DP5
from pysciml_node.tableaus.dp8 import DP8
from pysciml_node.tableaus.esdirk import KENCARP4, TRBDF2
from pysciml_node.tableaus.implicit import (
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
    "HEUN",
    "KENCARP4",
    "MIDPOINT",
    "RALSTON",
    "RK4",
    "RODAS5P",
    "ROSENBROCK23",
    "TRBDF2",
    "TSIT5",
    "VERN7",
    "VERN9",
    "DiagonallyImplicitTableau",
    "ImplicitTableau",
    "Interpolant",
    "RosenbrockTableau",
    "Tableau",
]
