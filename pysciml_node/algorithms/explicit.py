"""Algorithms: how a problem is solved. The names are SciML's.

An explicit Runge-Kutta method is a tableau and a citation; the loop that runs it is shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pysciml_node import checks, tableaus
from pysciml_node.algorithms.adjoints import Adjoint, DiscreteAdjoint
from pysciml_node.algorithms.controllers import Controller, PIController
from pysciml_node.tableaus import Tableau

if TYPE_CHECKING:
    from pysciml_node.algorithms.options import SolveOptions


class Algorithm(checks.Configured):
    """Base of all algorithms."""

    def default_controller(self) -> Controller:
        """The step size controller used when none is given."""
        return PIController()

    def default_adjoint(self) -> Adjoint:
        """The adjoint used when none is given."""
        return DiscreteAdjoint()

    def options_on(self, engine: str, options: SolveOptions) -> SolveOptions:
        """The options, with an engine's defaults where nothing was asked for."""
        return options


@dataclass(frozen=True)
class ExplicitRungeKutta(Algorithm):
    """An explicit Runge-Kutta method with an embedded error estimate and dense output."""

    tableau: ClassVar[Tableau]

    @property
    def order(self) -> int:
        """Order of the solution that is propagated."""
        return self.tableau.order

    @property
    def tableaus(self) -> tuple[Tableau, ...]:
        """Those of the methods that take its steps."""
        return (self.tableau,)


@dataclass(frozen=True)
class Euler(ExplicitRungeKutta):
    """Explicit Euler, first order. Adaptive by the difference to Heun's corrector."""

    tableau: ClassVar[Tableau] = tableaus.EULER


@dataclass(frozen=True)
class Midpoint(ExplicitRungeKutta):
    """Explicit midpoint rule, second order, with Euler embedded.

    Reference: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.1.
    """

    tableau: ClassVar[Tableau] = tableaus.MIDPOINT


@dataclass(frozen=True)
class Heun(ExplicitRungeKutta):
    """Heun's (explicit trapezoidal) method, second order, with Euler embedded.

    Reference: K. Heun, Z. Math. Phys. 45 (1900) 23-38.
    """

    tableau: ClassVar[Tableau] = tableaus.HEUN


@dataclass(frozen=True)
class Ralston(ExplicitRungeKutta):
    """Ralston's second-order method of least error bound, with Euler embedded.

    Reference: A. Ralston, Math. Comput. 16 (1962) 431-437.
    """

    tableau: ClassVar[Tableau] = tableaus.RALSTON


@dataclass(frozen=True)
class BS3(ExplicitRungeKutta):
    """Bogacki-Shampine 3(2), four stages, first same as last. For tolerances above 1e-3.

    Reference: P. Bogacki, L. F. Shampine, Appl. Math. Lett. 2 (1989) 321-325.
    """

    tableau: ClassVar[Tableau] = tableaus.BS3


@dataclass(frozen=True)
class RK4(ExplicitRungeKutta):
    """The classic fourth-order method; adaptive by a third-order formula on its last stage.

    Reference: W. Kutta, Z. Math. Phys. 46 (1901) 435-453.
    """

    tableau: ClassVar[Tableau] = tableaus.RK4


@dataclass(frozen=True)
class Tsit5(ExplicitRungeKutta):
    """Tsitouras 5(4), seven stages, first same as last.

    The default for smooth non-stiff fields at tolerances from 1e-3 to 1e-8.

    Reference: Ch. Tsitouras, Comput. Math. Appl. 62 (2011) 770-775.
    """

    tableau: ClassVar[Tableau] = tableaus.TSIT5


@dataclass(frozen=True)
class DP5(ExplicitRungeKutta):
    """Dormand-Prince 5(4), seven stages, first same as last.

    Reference: J. R. Dormand, P. J. Prince, J. Comput. Appl. Math. 6 (1980) 19-26.
    """

    tableau: ClassVar[Tableau] = tableaus.DP5


@dataclass(frozen=True)
class DP8(ExplicitRungeKutta):
    """Dormand-Prince 8(5,3), twelve stages, seventh-order dense output.

    Reference: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.10.
    """

    tableau: ClassVar[Tableau] = tableaus.DP8


@dataclass(frozen=True)
class Vern7(ExplicitRungeKutta):
    """Verner's efficient 7(6), ten stages. For tolerances from 1e-6 to 1e-12.

    Reference: J. H. Verner, Numer. Algorithms 53 (2010) 383-396.
    """

    tableau: ClassVar[Tableau] = tableaus.VERN7


@dataclass(frozen=True)
class Vern9(ExplicitRungeKutta):
    """Verner's efficient 9(8), sixteen stages. For tolerances below 1e-10 in float64.

    Reference: J. H. Verner, Numer. Algorithms 53 (2010) 383-396.
    """

    tableau: ClassVar[Tableau] = tableaus.VERN9


Dopri5 = DP5
Dopri8 = DP8
