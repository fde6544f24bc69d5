"""Runge-Kutta methods as frozen tables of coefficients."""

from __future__ import annotations

from dataclasses import dataclass

Row = tuple[float, ...]


@dataclass(frozen=True)
class Interpolant:
    """Continuous extension `u(t + theta*h) = u + h * sum_i b_i(theta) * k_i`, `0 <= theta <= 1`.

    Args:
        weights: one row per stage (the method's stages, then `c`'s extra ones); entry `j` of a
            row is the coefficient of `theta**(j+1)` in `b_i(theta)`. At `theta = 1` the rows
            sum to the method's own `b`, so the extension is continuous.
        order: order of accuracy of the extension (its local error is `O(h**(order+1))`).
        c: nodes of the extra stages, evaluated only when dense output is asked for.
        a: rows of the extra stages: row `j` has `n_stages + j` entries.
    """

    weights: tuple[Row, ...]
    order: int
    c: Row = ()
    a: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of an explicit method with an embedded error estimate.

    Args:
        order: order of the solution that is propagated.
        error_order: order of the embedded solution; the local error estimate is
            `O(h**(error_order+1))`, which sets the controller's exponent.
        c: nodes, `c[0] == 0`.
        a: rows of the stage matrix; row `i` has `i` entries.
        b: weights of the propagated solution.
        b_error: weights of the error estimate (`b - b_embedded`): error `= h * sum b_error_i k_i`.
        fsal: the last stage is `f(t + h, u1)`: it is the next step's first stage.
        interpolant: dense output.
        b_error_low: second, lower-order error estimate where a method combines two
            (Dormand-Prince 8: `e5**2 / sqrt(e5**2 + 0.01 * e3**2)`).
        stiffness_stages: two stages with the same node, whose difference quotient estimates the
            dominant eigenvalue (Shampine 1977); index `len(c)` means the stage `f(t + h, u1)`.
        stability_radius: length of the stability region on the negative real axis.
    """

    order: int
    error_order: int
    c: Row
    a: tuple[Row, ...]
    b: Row
    b_error: Row
    fsal: bool
    interpolant: Interpolant
    b_error_low: Row | None = None
    stiffness_stages: tuple[int, int] | None = None
    stability_radius: float | None = None

    @property
    def stages(self) -> int:
        """Number of stages, the first-same-as-last one included."""
        return len(self.c)


def hermite(b: Row, fsal: bool) -> Interpolant:
    """Cubic Hermite interpolant through `u, u1, f(u), f(u1)`, in stage-weight form (order 3).

    Args:
        b: the method's weights.
        fsal: whether the method's last stage already is `f(t + h, u1)`; otherwise an extra stage
            is added for it (the next step reuses it).
    """
    stages = len(b) + (0 if fsal else 1)
    # u1 - u = h * sum b_i k_i, so (3 theta^2 - 2 theta^3)(u1 - u) spreads over the stages.
    rows = [[0.0, 3.0 * w, -2.0 * w] for w in b] + ([] if fsal else [[0.0, 0.0, 0.0]])
    for power, first, last in ((0, 1.0, 0.0), (1, -2.0, -1.0), (2, 1.0, 1.0)):
        rows[0][power] += first
        rows[stages - 1][power] += last
    return Interpolant(
        weights=tuple(tuple(row) for row in rows),
        order=3,
        c=() if fsal else (1.0,),
        a=() if fsal else (b,),
    )
