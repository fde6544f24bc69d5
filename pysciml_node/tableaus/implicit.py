"""Implicit one-step methods as tables, in terms of slopes.

Both kinds leave slopes `k_i` with `u1 = u + h sum_i b_i k_i`, an error estimate and a dense output
that are linear in them, as an explicit method does. They differ in how a slope is found.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pysciml_node.tableaus.base import Row, Tableau


@dataclass(frozen=True)
class RosenbrockTableau(Tableau):
    """A linearly implicit method: each slope is the solution of one linear system.

    With `J = df/du` and `f_t = df/dt` at the start of the step, and `M` the mass matrix,

        (M - h gamma J) k_i = gamma [f(t + c_i h, u + h sum_j a_ij k_j)
                                     + M sum_j C_ij k_j + h d_i f_t].

    Args:
        gamma: the diagonal coefficient.
        couplings: rows of `C`; row `i` has `i` entries.
        time_weights: `d`.

    Reference: Hairer and Wanner, Solving Ordinary Differential Equations II, IV.7 (7.25); these
    slopes are its `u_i / h`.
    """

    gamma: float = field(kw_only=True)
    couplings: tuple[Row, ...] = field(kw_only=True)
    time_weights: Row = field(kw_only=True)


@dataclass(frozen=True)
class DiagonallyImplicitTableau(Tableau):
    """A singly diagonally implicit method whose first stage is explicit, and stiffly accurate.

    The first slope is `f(t, u)`; each other one solves

        M k_i = f(t + c_i h, u + h sum_{j<i} a_ij k_j + h gamma k_i)

    by Newton's iteration. The last stage is the end of the step.

    Args:
        gamma: the diagonal coefficient of all stages but the first.
    """

    gamma: float = field(kw_only=True)


@dataclass(frozen=True)
class CoupledTableau(Tableau):
    """An implicit method whose stages are found together, after an explicit one at the start.

    The first slope is `f(t, u)`, which may have no weight; the others solve

        k_i = f(t + c_i h, u + h sum_j a_ij k_j)

    as one system, by Newton's iteration. The rows of `a` but the first have an entry for each
    stage. There is no error estimate: these are for steps of fixed sizes.
    """


ImplicitTableau = RosenbrockTableau | DiagonallyImplicitTableau | CoupledTableau
