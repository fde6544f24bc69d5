"""Algorithms for stochastic equations. The names are SciML's.

A method is a tableau and a citation; the loop that runs them is shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pysciml_node import checks
from pysciml_node.algorithms.controllers import Controller, PIController
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.problems.sde import Interpretation, Noise, SDEProblem
from pysciml_node.tableaus import stochastic as tableaus
from pysciml_node.tableaus.stochastic import SDETableau

_EVERY: tuple[Noise, ...] = ("diagonal", "scalar", "additive", "general")
_BOTH: tuple[Interpretation, ...] = ("ito", "stratonovich")


@dataclass(frozen=True)
class StochasticRungeKutta(Algorithm):
    """A stochastic Runge-Kutta method with an embedded error estimate.

    Args:
        delta: weight of the drift part of the error estimate beside the diffusion part; SciML's
            parameter of the same name.

    Raises:
        TypeError: `delta` is no number.
        ValueError: a negative `delta`.
    """

    tableau: ClassVar[SDETableau]
    noises: ClassVar[tuple[Noise, ...]] = ("diagonal", "scalar", "additive")
    interpretations: ClassVar[tuple[Interpretation, ...]] = ("ito",)
    # Noises for which steps may be chosen by looking at the path; the others ask for fixed steps.
    adapts_to: ClassVar[tuple[Noise, ...]] = _EVERY

    delta: float = 1.0

    def __post_init__(self) -> None:
        checks.settle(self, delta=checks.number("delta", self.delta, at_least=0))

    def default_controller(self) -> Controller:
        """PI control that lets steps grow slowly: one lucky increment says little of the next."""
        return PIController(qmax=1.125)

    def tableau_for(self, problem: SDEProblem) -> SDETableau:
        """The coefficients for a problem's noise and interpretation."""
        return self.tableau

    def check(self, problem: SDEProblem) -> None:
        """Refuse problems that the method does not converge for.

        Raises:
            ValueError: another noise or interpretation than the method is made for.
        """
        name = type(self).__name__
        # The two integrals agree where the diffusion does not depend on the state.
        if problem.noise != "additive" and problem.interpretation not in self.interpretations:
            raise ValueError(
                f"{name} solves {' and '.join(self.interpretations)} equations, but the problem's "
                f'interpretation is "{problem.interpretation}".\n'
                f"  Use {usual_algorithm(problem)}, or convert the drift: Ito's is "
                "Stratonovich's plus (1/2) (dg/du) g."
            )
        if problem.noise not in self.noises:
            served = ", ".join(self.noises)
            raise ValueError(
                f'{name} is for {served} noise, but the problem\'s noise is "{problem.noise}".\n'
                f"  Use {usual_algorithm(problem)}."
            )

    def check_adaptive(self, problem: SDEProblem) -> None:
        """Refuse steps that are chosen by looking at the path, where they bias the solution.

        Raises:
            ValueError: the method does not converge with such steps for this noise.
        """
        if problem.noise in self.adapts_to:
            return
        fixed = f"controller=FixedStep(), dt0={(problem.t1 - problem.t0) / 100:.2g}"
        alternative = "the Stratonovich form of the equation with EulerHeun()"
        if problem.noise != "general":
            alternative = "SOSRI(), SRIW1() or RKMil(), which may adapt their steps"
        raise ValueError(
            f"{type(self).__name__} with adaptive steps is for {' and '.join(self.adapts_to)} "
            f'noise, but the problem\'s noise is "{problem.noise}": steps that follow the path '
            "would bias the solution.\n"
            f"  Use {fixed}; or {alternative}."
        )


def usual_algorithm(problem: SDEProblem) -> str:
    """A problem's usual method and its steps, as a message names them."""
    usual = default_algorithm(problem)
    steps = "" if problem.noise in usual.adapts_to else ", controller=FixedStep(), dt0=..."
    return f"{usual!r}{steps}"


def default_algorithm(problem: SDEProblem) -> StochasticRungeKutta:
    """The method that solves a problem when none is given."""
    if problem.noise == "additive":
        return SOSRA()
    if problem.interpretation == "stratonovich":
        return EulerHeun()
    return LambaEM() if problem.noise == "general" else SOSRI()


@dataclass(frozen=True)
class EM(StochasticRungeKutta):
    """Euler-Maruyama, strong order 1/2 (1 for additive noise), weak order 1; Ito, any noise.

    It adapts its steps to additive noise, by the terms that Milstein's step has beyond it (Lamba's
    estimate). Other noise needs `FixedStep`: steps that are chosen by looking at the path leave a
    bias of the order of the tolerance, and convergence needs the terms of Milstein's or Heun's
    method.

    Reference: Kloeden and Platen, Numerical Solution of Stochastic Differential Equations, 10.2;
    H. Lamba, J. Comput. Appl. Math. 161 (2003) 417-430; J. G. Gaines and T. J. Lyons, SIAM J. Appl.
    Math. 57 (1997) 1455-1484; J. Foster and A. Jelincic, arXiv 2311.14201.
    """

    tableau: ClassVar[SDETableau] = tableaus.EM
    noises: ClassVar[tuple[Noise, ...]] = _EVERY
    adapts_to: ClassVar[tuple[Noise, ...]] = ("additive",)

    def tableau_for(self, problem: SDEProblem) -> SDETableau:
        """The coefficients for a problem's noise."""
        general = problem.noise in ("general", "additive")
        return tableaus.EM_GENERAL if general else self.tableau


@dataclass(frozen=True)
class LambaEM(EM):
    """As `EM`, with the diffusion at the end of the step's interval.

    This is StochasticDiffEq's adaptive form, for adaptive solves on the Julia engine. As with `EM`,
    the noise has to be additive. Where the diffusion does not depend on time, its steps are `EM`'s.

    Reference: H. Lamba, J. Comput. Appl. Math. 161 (2003) 417-430.
    """

    def tableau_for(self, problem: SDEProblem) -> SDETableau:
        """The coefficients for a problem's noise."""
        general = problem.noise in ("general", "additive")
        return tableaus.LAMBA_EM_GENERAL if general else tableaus.LAMBA_EM


@dataclass(frozen=True)
class RKMil(StochasticRungeKutta):
    """Milstein without derivatives, strong and weak order 1; Ito or Stratonovich.

    For diagonal and scalar noise. Adaptive by its correction of the Euler-Maruyama step.

    Reference: Kloeden and Platen, Numerical Solution of Stochastic Differential Equations, 11.1.
    """

    tableau: ClassVar[SDETableau] = tableaus.RKMIL
    noises: ClassVar[tuple[Noise, ...]] = ("diagonal", "scalar")
    interpretations: ClassVar[tuple[Interpretation, ...]] = _BOTH

    def tableau_for(self, problem: SDEProblem) -> SDETableau:
        """The coefficients for a problem's interpretation."""
        ito = problem.interpretation == "ito"
        return self.tableau if ito else tableaus.RKMIL_STRATONOVICH


@dataclass(frozen=True)
class EulerHeun(StochasticRungeKutta):
    """Euler-Heun for Stratonovich equations, any noise; weak order 1.

    Strong order 1 where the noise commutes (diagonal, scalar and additive noise do), else 1/2.

    Reference: W. Ruemelin, SIAM J. Numer. Anal. 19 (1982) 604-613.
    """

    tableau: ClassVar[SDETableau] = tableaus.EULER_HEUN
    noises: ClassVar[tuple[Noise, ...]] = _EVERY
    interpretations: ClassVar[tuple[Interpretation, ...]] = ("stratonovich",)

    def tableau_for(self, problem: SDEProblem) -> SDETableau:
        """The coefficients, with the order that a problem's noise leaves."""
        return tableaus.EULER_HEUN_GENERAL if problem.noise == "general" else self.tableau


@dataclass(frozen=True)
class StratonovichMidpoint(StochasticRungeKutta):
    """The midpoint rule for Stratonovich equations, any noise; weak order 1.

    Strong order 1 where the noise commutes (diagonal, scalar and additive noise do), else 1/2. Of
    the two evaluations in a step, only the second enters the new state.

    Reference: K. Burrage, P. M. Burrage, T. Tian, Proc. R. Soc. Lond. A 460 (2004) 373-402.
    """

    tableau: ClassVar[SDETableau] = tableaus.STRATONOVICH_MIDPOINT
    noises: ClassVar[tuple[Noise, ...]] = _EVERY
    interpretations: ClassVar[tuple[Interpretation, ...]] = ("stratonovich",)

    def tableau_for(self, problem: SDEProblem) -> SDETableau:
        """The coefficients, with the order that a problem's noise leaves."""
        general = problem.noise == "general"
        return tableaus.STRATONOVICH_MIDPOINT_GENERAL if general else self.tableau


@dataclass(frozen=True)
class ReversibleHeun(StochasticRungeKutta):
    """Reversible Heun for Stratonovich equations, any noise; one evaluation a step.

    Carries the state at which the fields were last evaluated. Strong order 1 for additive noise,
    1/2 in general; weak order 1.

    Reference: Kidger, Foster, Li, Lyons, arXiv 2105.13493, algorithm 1.
    """

    tableau: ClassVar[SDETableau] = tableaus.REVERSIBLE_HEUN
    noises: ClassVar[tuple[Noise, ...]] = _EVERY
    interpretations: ClassVar[tuple[Interpretation, ...]] = ("stratonovich",)

    def tableau_for(self, problem: SDEProblem) -> SDETableau:
        """The coefficients, with the order that a problem's noise leaves."""
        return tableaus.REVERSIBLE_HEUN_GENERAL if problem.noise == "general" else self.tableau


@dataclass(frozen=True)
class SRA1(StochasticRungeKutta):
    """Roessler's SRA1 for additive noise, two stages; strong order 3/2, weak order 2.

    Reference: A. Roessler, SIAM J. Numer. Anal. 48 (2010) 922-952, table 6.3.
    """

    tableau: ClassVar[SDETableau] = tableaus.SRA1
    noises: ClassVar[tuple[Noise, ...]] = ("additive",)
    interpretations: ClassVar[tuple[Interpretation, ...]] = _BOTH


@dataclass(frozen=True)
class SOSRA(SRA1):
    """Stability-optimized SRA for additive noise, three stages; strong order 3/2, weak order 2.

    Reference: Rackauckas and Nie, arXiv 1804.04344.
    """

    tableau: ClassVar[SDETableau] = tableaus.SOSRA


@dataclass(frozen=True)
class SOSRA2(SRA1):
    """As `SOSRA`, with two stages at one time, which give a stiffness estimate.

    Reference: Rackauckas and Nie, arXiv 1804.04344.
    """

    tableau: ClassVar[SDETableau] = tableaus.SOSRA2


@dataclass(frozen=True)
class SRIW1(StochasticRungeKutta):
    """Roessler's SRIW1 for diagonal and scalar Ito noise; strong order 3/2, weak order 2.

    Reference: A. Roessler, SIAM J. Numer. Anal. 48 (2010) 922-952, table 6.1.
    """

    tableau: ClassVar[SDETableau] = tableaus.SRIW1
    noises: ClassVar[tuple[Noise, ...]] = ("diagonal", "scalar")
    delta: float = 1 / 6


@dataclass(frozen=True)
class SOSRI(StochasticRungeKutta):
    """Stability-optimized SRI for diagonal and scalar Ito noise; strong order 3/2, weak order 2.

    The default for such noise.

    Reference: Rackauckas and Nie, arXiv 1804.04344.
    """

    tableau: ClassVar[SDETableau] = tableaus.SOSRI
    noises: ClassVar[tuple[Noise, ...]] = ("diagonal", "scalar")


@dataclass(frozen=True)
class SOSRI2(SOSRI):
    """As `SOSRI`, with two stages at one time, which give a stiffness estimate.

    Reference: Rackauckas and Nie, arXiv 1804.04344.
    """

    tableau: ClassVar[SDETableau] = tableaus.SOSRI2
