"""Algorithms that only the Julia engine has: SciML's, by SciML's names.

They serve where explicit methods of medium order do not: stiff problems, equations with a mass
matrix, very smooth problems at high accuracy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pysciml_node import checks
from pysciml_node.algorithms.adjoints import Adjoint, GaussAdjoint
from pysciml_node.algorithms.controllers import AlgorithmController, Controller
from pysciml_node.algorithms.explicit import Algorithm

_CALL = re.compile(r"[A-Za-z_]\w*\(.*\)")


@dataclass(frozen=True)
class SciMLAlgorithm(Algorithm):
    """Any algorithm of SciML's solver packages, by name; runs on the Julia engine.

    The expression is code. It runs as it stands, with all that Julia may do on this machine. Take
    expressions only from people, files and web pages that you would take a program from.

    Args:
        expression: makes it in Julia, such as `"Tsit5()"` or `"Rodas4P(autodiff=...)"`.
        packages: Julia packages that export the names in it; they must be in the Julia project.

    Raises:
        TypeError: the expression is no text, or the packages are no names.
        ValueError: the expression is no call.

    Examples:
        >>> import pysciml_node as psn
        >>> psn.SciMLAlgorithm("ROCK4()", ("OrdinaryDiffEqStabilizedRK",))
        SciMLAlgorithm(expression='ROCK4()', packages=('OrdinaryDiffEqStabilizedRK',))
    """

    expression: str
    packages: tuple[str, ...]

    def __post_init__(self) -> None:
        hint = 'Write it as Julia does, for example "Rodas5P()".'
        if not _CALL.fullmatch(checks.text("expression", self.expression, hint=hint)):
            raise ValueError(
                f"expression must make an algorithm, but is {self.expression!r}.\n  {hint}"
            )
        packages: Any = self.packages
        if isinstance(packages, str):
            packages = (packages,)
        if not isinstance(packages, tuple | list):
            hint = 'Write packages=("OrdinaryDiffEqRosenbrock",).'
            checks.refuse("packages", "a tuple of names of Julia packages", packages, hint)
        names = tuple(checks.text(f"packages[{i}]", x) for i, x in enumerate(packages))
        checks.settle(self, packages=names)

    def default_controller(self) -> Controller:
        """The algorithm's own."""
        return AlgorithmController()

    def default_adjoint(self) -> Adjoint:
        """A continuous adjoint: only explicit Runge-Kutta methods are replayed step by step."""
        return GaussAdjoint()


@dataclass(frozen=True)
class NamedAlgorithm(SciMLAlgorithm):
    """An algorithm of a fixed name without options."""

    package: ClassVar[str]
    expression: str = field(init=False, repr=False)
    packages: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        checks.settle(self, expression=f"{type(self).__name__}()", packages=(self.package,))


class Vern6(NamedAlgorithm):
    """Verner's efficient 6(5). Reference: J. H. Verner, Numer. Algorithms 53 (2010) 383-396."""

    package = "OrdinaryDiffEqVerner"


class Vern8(NamedAlgorithm):
    """Verner's efficient 8(7). Reference: J. H. Verner, Numer. Algorithms 53 (2010) 383-396."""

    package = "OrdinaryDiffEqVerner"


class VCABM(NamedAlgorithm):
    """Adams-Bashforth-Moulton of variable order and step, for expensive smooth fields.

    Reference: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, III.5.
    """

    package = "OrdinaryDiffEqAdamsBashforthMoulton"


class FBDF(NamedAlgorithm):
    """Backward differentiation of order 1 to 5 with fixed leading coefficient, for large systems.

    Reference: L. F. Shampine, J. Numer. Math. 10 (2002) 291-310.
    """

    package = "OrdinaryDiffEqBDF"


class QNDF(NamedAlgorithm):
    """Numerical differentiation formulas of order 1 to 5, quasi-constant step.

    Reference: L. F. Shampine, M. W. Reichelt, SIAM J. Sci. Comput. 18 (1997) 1-22.
    """

    package = "OrdinaryDiffEqBDF"
