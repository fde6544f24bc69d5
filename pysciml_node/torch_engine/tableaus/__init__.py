"""Runge-Kutta methods as data: each is a frozen table of coefficients with its dense output."""

from __future__ import annotations

from pysciml_node.torch_engine.tableaus.base import Interpolant, Tableau
from pysciml_node.torch_engine.tableaus.dp5 import DP5
from pysciml_node.torch_engine.tableaus.low_order import BS3, EULER, HEUN, MIDPOINT, RALSTON, RK4
from pysciml_node.torch_engine.tableaus.tsit5 import TSIT5

__all__ = [
    "BS3",
    "DP5",
    "EULER",
    "HEUN",
    "MIDPOINT",
    "RALSTON",
    "RK4",
    "TSIT5",
    "Interpolant",
    "Tableau",
]
