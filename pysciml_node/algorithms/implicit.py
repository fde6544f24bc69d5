"""Implicit methods for stiff problems, on both engines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from pysciml_node import checks, tableaus
from pysciml_node.algorithms.adjoints import Adjoint, DiscreteAdjoint, GaussAdjoint
from pysciml_node.algorithms.controllers import AlgorithmController, Controller, PIController
from pysciml_node.algorithms.krylov import GMRES
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.algorithms.sciml import NamedAlgorithm, SciMLAlgorithm
from pysciml_node.tableaus import ImplicitTableau, Tableau


class OnBothEngines(SciMLAlgorithm):
    """An algorithm of SciML that the embedded engine has too, each with its own defaults."""

    @override
    def default_controller(self) -> Controller:
        """The embedded engine's; see `options_on`."""
        return PIController()

    @override
    def default_adjoint(self) -> Adjoint:
        """The embedded engine's; see `options_on`."""
        return DiscreteAdjoint()

    @override
    def options_on(self, engine: str, options: SolveOptions) -> SolveOptions:
        """On Julia's engine, SciML's adjoint and controller where none was asked for."""
        if engine != "julia":
            return options
        defaults = {"adjoint": GaussAdjoint(), "controller": AlgorithmController()}
        changes = {name: value for name, value in defaults.items() if name in options.defaulted}
        return dataclasses.replace(options, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ImplicitMethod(NamedAlgorithm, OnBothEngines):
    """A one-step method that solves linear systems with the field's Jacobian.

    The embedded engine runs it by its tableau. The Julia engine runs it by its name, with SciML's
    step size control and `GaussAdjoint` unless others are asked for.
    """

    tableau: ClassVar[ImplicitTableau]

    @property
    def order(self) -> int:
        """Order of the solution that is propagated."""
        return self.tableau.order

    @property
    def tableaus(self) -> tuple[Tableau, ...]:
        """Those of the methods that take its steps."""
        return (self.tableau,)


class Rosenbrock23(ImplicitMethod):
    """Rosenbrock-W 2(3), L-stable, for stiff problems at tolerances above 1e-2.

    Takes mass matrices.

    Reference: L. F. Shampine, M. W. Reichelt, SIAM J. Sci. Comput. 18 (1997) 1-22.
    """

    tableau = tableaus.ROSENBROCK23
    package = "OrdinaryDiffEqRosenbrock"


class Rodas5P(ImplicitMethod):
    """Rosenbrock method of order 5, stiffly stable: the first choice for stiff problems.

    Takes singular mass matrices (differential-algebraic equations of index one).

    Reference: G. Steinebach, BIT 63 (2023) 27.
    """

    tableau = tableaus.RODAS5P
    package = "OrdinaryDiffEqRosenbrock"


@dataclass(frozen=True)
class DiagonallyImplicitMethod(ImplicitMethod):
    """An implicit method whose stages Newton's iteration finds one by one.

    What is missing of a stage is at most a hundredth of the tolerance, entry by entry, and near
    rounding beside its greatest entry; of fixed steps, near rounding of each entry.

    Args:
        linsolve: how the embedded engine solves the iteration's linear systems; default dense
            factors for small states and `GMRES()` for large ones.

    Raises:
        TypeError: `linsolve` is no `GMRES`.
    """

    linsolve: GMRES | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.linsolve is not None:
            checks.instance("linsolve", self.linsolve, GMRES, example="GMRES()")


class KenCarp4(DiagonallyImplicitMethod):
    """Singly diagonally implicit Runge-Kutta of order 4, stiffly accurate.

    Args:
        linsolve: how the embedded engine solves the iteration's linear systems; default dense
            factors for small states and `GMRES()` for large ones.

    Reference: C. A. Kennedy, M. H. Carpenter, Appl. Numer. Math. 44 (2003) 139-181.
    """

    tableau = tableaus.KENCARP4
    package = "OrdinaryDiffEqSDIRK"


class TRBDF2(DiagonallyImplicitMethod):
    """Trapezoidal rule and second-order backward differentiation in one step.

    Args:
        linsolve: as of `KenCarp4`.

    Reference: R. E. Bank et al., IEEE Trans. Electron Devices 32 (1985) 1992-2007.
    """

    tableau = tableaus.TRBDF2
    package = "OrdinaryDiffEqSDIRK"
