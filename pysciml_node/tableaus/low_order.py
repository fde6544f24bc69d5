"""Classical methods of orders one to four.

References:
    Euler, Midpoint, Heun, RK4: E. Hairer, S. P. Norsett, G. Wanner, *Solving Ordinary Differential
    Equations I*, 2nd ed., Springer 1993, sections II.1 and II.4.
    Ralston: A. Ralston, "Runge-Kutta methods with minimum error bounds", Math. Comp. 16 (1962)
    431-437.
    BS3: P. Bogacki, L. F. Shampine, "A 3(2) pair of Runge-Kutta formulas", Appl. Math. Lett. 2
    (1989) 321-325; checked against `scipy/integrate/_ivp/rk.py` (RK23) and OrdinaryDiffEq.jl
    `lib/OrdinaryDiffEqLowOrderRK/src/low_order_rk_tableaus.jl`.
"""

from __future__ import annotations

from pysciml_node.tableaus.base import Tableau, hermite

# The second stage is the next step's first; Heun's corrector, which needs nothing more, is the
# embedded solution, so the estimate is h/2 (k1 - k2) = O(h^2).
EULER = Tableau(
    order=1,
    error_order=1,
    c=(0.0, 1.0),
    a=((), (1.0,)),
    b=(1.0, 0.0),
    b_error=(1 / 2, -1 / 2),
    fsal=True,
    interpolant=hermite((1.0, 0.0), fsal=True),
    stability_radius=2.0,
)

# The two-stage methods of order two share Euler's step (b = (1, 0)) as the embedded solution.
_MIDPOINT_B = (0.0, 1.0)
MIDPOINT = Tableau(
    order=2,
    error_order=1,
    c=(0.0, 1 / 2),
    a=((), (1 / 2,)),
    b=_MIDPOINT_B,
    b_error=(-1.0, 1.0),
    fsal=False,
    interpolant=hermite(_MIDPOINT_B, fsal=False),
    stability_radius=2.0,
)

_HEUN_B = (1 / 2, 1 / 2)
HEUN = Tableau(
    order=2,
    error_order=1,
    c=(0.0, 1.0),
    a=((), (1.0,)),
    b=_HEUN_B,
    b_error=(-1 / 2, 1 / 2),
    fsal=False,
    interpolant=hermite(_HEUN_B, fsal=False),
    stiffness_stages=(2, 1),
    stability_radius=2.0,
)

_RALSTON_B = (1 / 4, 3 / 4)
RALSTON = Tableau(
    order=2,
    error_order=1,
    c=(0.0, 2 / 3),
    a=((), (2 / 3,)),
    b=_RALSTON_B,
    b_error=(-3 / 4, 3 / 4),
    fsal=False,
    interpolant=hermite(_RALSTON_B, fsal=False),
    stability_radius=2.0,
)

_BS3_B = (2 / 9, 1 / 3, 4 / 9, 0.0)
BS3 = Tableau(
    order=3,
    error_order=2,
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((), (1 / 2,), (0.0, 3 / 4), _BS3_B[:3]),
    b=_BS3_B,
    b_error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    fsal=True,
    interpolant=hermite(_BS3_B, fsal=True),
    stability_radius=2.5127,
)

# The classical method has no embedded solution of its own. With k5 = f(t + h, u1), which the next
# step reuses, the weights (1/6, 1/3, 1/3, 0, 1/6) are of order three.
_RK4_B = (1 / 6, 1 / 3, 1 / 3, 1 / 6, 0.0)
RK4 = Tableau(
    order=4,
    error_order=3,
    c=(0.0, 1 / 2, 1 / 2, 1.0, 1.0),
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0), _RK4_B[:4]),
    b=_RK4_B,
    b_error=(0.0, 0.0, 0.0, 1 / 6, -1 / 6),
    fsal=True,
    interpolant=hermite(_RK4_B, fsal=True),
    stiffness_stages=(2, 1),
    stability_radius=2.7853,
)
