"""Algorithms that change between an explicit and an implicit method where stiffness asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pysciml_node import checks
from pysciml_node.algorithms.explicit import ExplicitRungeKutta, Tsit5, Vern7
from pysciml_node.algorithms.implicit import (
    DiagonallyImplicitMethod,
    ImplicitMethod,
    OnBothEngines,
    Rodas5P,
)
from pysciml_node.algorithms.krylov import GMRES
from pysciml_node.algorithms.sciml import SciMLAlgorithm
from pysciml_node.tableaus import Tableau

# Above so many entries of a state GMRES takes less time than dense factors, as measured by
# benchmarks/krylov.py on a Brusselator with diffusion.
LARGEST_DENSE = 500


@dataclass(frozen=True)
class SwitchingMethod(OnBothEngines):
    """An explicit method where a problem is not stiff, a stiff one where it is.

    A step counts as stiff where its size times an estimate of the largest eigenvalue is more than
    nine tenths of the explicit method's stability radius. After eleven stiff steps in a row the
    stiff method takes over with twice the step; after four that are not, the explicit one with
    half of it. The estimate is Shampine's for an explicit step, `|J|` in the maximum norm for an
    implicit one.

    Args:
        stiff: takes the steps where the problem is stiff.

    Raises:
        TypeError: `stiff` is no algorithm for stiff problems.

    Reference: L. F. Shampine, SIAM J. Sci. Stat. Comput. 2 (1981) 1-10; Hairer and Wanner, Solving
    Ordinary Differential Equations II, IV.2. The limits are those of OrdinaryDiffEq.jl's
    `AutoSwitch`.
    """

    expression: str = field(init=False, repr=False)
    packages: tuple[str, ...] = field(init=False, repr=False)
    stiff: SciMLAlgorithm = field(default_factory=Rodas5P)

    explicit: ClassVar[ExplicitRungeKutta]
    package: ClassVar[str]

    def __post_init__(self) -> None:
        name, stiff = type(self).__name__, self.stiff
        checks.instance("stiff", stiff, SciMLAlgorithm, example=f"{name}(Rosenbrock23())")
        checks.settle(
            self,
            expression=f"{name}({stiff.expression})",
            packages=("OrdinaryDiffEqCore", self.package, *stiff.packages),
        )

    @property
    def embedded(self) -> bool:
        """Whether both methods are on the embedded engine."""
        return isinstance(self.stiff, ImplicitMethod)

    @property
    def tableaus(self) -> tuple[Tableau, ...]:
        """Those of the methods that take its steps, the explicit one first."""
        assert isinstance(self.stiff, ImplicitMethod)
        return (self.explicit.tableau, self.stiff.tableau)


@dataclass(frozen=True)
class AutoTsit5(SwitchingMethod):
    """`Tsit5` where the problem is not stiff, `stiff` where it is.

    Args:
        stiff: the stiff algorithm, such as `Rosenbrock23()`; default `Rodas5P()`.

    Raises:
        TypeError: `stiff` is no algorithm for stiff problems.

    Examples:
        >>> import pysciml_node as psn
        >>> psn.AutoTsit5()
        AutoTsit5(stiff=Rodas5P())
    """

    explicit = Tsit5()
    package = "OrdinaryDiffEqTsit5"


@dataclass(frozen=True)
class AutoVern7(SwitchingMethod):
    """`Vern7` where the problem is not stiff, `stiff` where it is.

    Args:
        stiff: the stiff algorithm, such as `KenCarp4()`; default `Rodas5P()`.

    Raises:
        TypeError: `stiff` is no algorithm for stiff problems.

    Examples:
        >>> import pysciml_node as psn
        >>> psn.AutoVern7(psn.Rosenbrock23())
        AutoVern7(stiff=Rosenbrock23())
    """

    explicit = Vern7()
    package = "OrdinaryDiffEqVerner"


def linsolve_of(algorithm: object, size: int) -> GMRES | None:
    """What solves the linear systems of an algorithm's steps; `None` for dense factors.

    Args:
        algorithm: any.
        size: number of entries of the state.
    """
    stiff = algorithm.stiff if isinstance(algorithm, SwitchingMethod) else algorithm
    if not isinstance(stiff, DiagonallyImplicitMethod):
        return None
    if stiff.linsolve is None and size > LARGEST_DENSE:
        return GMRES()
    return stiff.linsolve


OneStepMethod = ExplicitRungeKutta | ImplicitMethod | SwitchingMethod
"""What the embedded engine takes steps of ordinary equations with."""
