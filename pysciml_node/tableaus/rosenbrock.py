"""Rosenbrock methods.

References:
    Rosenbrock23: L. F. Shampine, M. W. Reichelt, "The MATLAB ODE Suite", SIAM J. Sci. Comput. 18
    (1997) 1-22, the formulas of `ode23s` and its interpolant.
    Rodas5P: G. Steinebach, "Construction of Rosenbrock-Wanner method Rodas5P and numerical
    benchmarks within the Julia Differential Equations package", BIT 63 (2023) 27; the digits are
    those of OrdinaryDiffEq.jl `lib/OrdinaryDiffEqRosenbrock/src/rosenbrock_tableaus.jl`.
"""

from __future__ import annotations

import math

import numpy as np

from pysciml_node.tableaus.base import Interpolant, Row
from pysciml_node.tableaus.implicit import RosenbrockTableau


def _rows(matrix: np.ndarray) -> tuple[Row, ...]:
    """The strictly lower part of a matrix."""
    return tuple(tuple(float(x) for x in row[:i]) for i, row in enumerate(matrix))


def _transformed(
    alpha: tuple[Row, ...], gamma: tuple[Row, ...], b: Row, b_error: Row, dense: tuple[Row, ...]
) -> RosenbrockTableau:
    """A method that is published in terms of `k`, in terms of `sum_j gamma_ij k_j`.

    Args:
        alpha: rows of the arguments' weights.
        gamma: rows of the Jacobian's weights, with the diagonal.
        b: weights of the solution.
        b_error: weights of the error estimate.
        dense: for each `k` its polynomial in `theta`.
    """
    stages = len(b)
    full = np.zeros((stages, stages))
    weights = np.zeros((stages, stages))
    for i in range(stages):
        full[i, : i + 1] = gamma[i]
        weights[i, :i] = alpha[i]
    inverse = np.linalg.inv(full)
    return RosenbrockTableau(
        order=2,
        error_order=2,
        c=tuple(float(x) for x in weights.sum(1)),
        a=_rows(weights @ inverse),
        b=tuple(float(x) for x in np.asarray(b) @ inverse),
        b_error=tuple(float(x) for x in np.asarray(b_error) @ inverse),
        fsal=False,
        interpolant=Interpolant(
            weights=tuple(tuple(float(x) for x in row) for row in inverse.T @ np.asarray(dense)),
            order=2,
        ),
        gamma=float(full[0, 0]),
        couplings=_rows(np.diag(1 / np.diag(full)) - inverse),
        time_weights=tuple(float(x) for x in full.sum(1)),
    )


_D = 1 / (2 + math.sqrt(2))
_E = 6 + math.sqrt(2)
ROSENBROCK23 = _transformed(
    alpha=((), (1 / 2,), (0.0, 1.0)),
    gamma=((_D,), (-_D, _D), (_D * (_E - 2), -_D * _E, _D)),
    b=(0.0, 1.0, 0.0),
    b_error=(1 / 6, -1 / 3, 1 / 6),
    dense=(
        (1 / (1 - 2 * _D), -1 / (1 - 2 * _D)),
        (-2 * _D / (1 - 2 * _D), 1 / (1 - 2 * _D)),
        (0, 0),
    ),
)

_RODAS5P_A = (
    (),
    (3.0,),
    (2.849394379747939, 0.45842242204463923),
    (
        -6.954028509809101,
        2.489845061869568,
        -10.358996098473584,
    ),
    (
        2.8029986275628964,
        0.5072464736228206,
        -0.3988312541770524,
        -0.04721187230404641,
    ),
    (
        -7.502846399306121,
        2.561846144803919,
        -11.627539656261098,
        -0.18268767659942256,
        0.030198172008377946,
    ),
    (
        -7.502846399306121,
        2.561846144803919,
        -11.627539656261098,
        -0.18268767659942256,
        0.030198172008377946,
        1.0,
    ),
    (
        -7.502846399306121,
        2.561846144803919,
        -11.627539656261098,
        -0.18268767659942256,
        0.030198172008377946,
        1.0,
        1.0,
    ),
)

_RODAS5P_C = (
    (),
    (-14.155112264123755,),
    (-17.97296035885952, -2.859693295451294),
    (
        147.12150275711716,
        -1.41221402718213,
        71.68940251302358,
    ),
    (
        165.43517024871676,
        -0.4592823456491126,
        42.90938336958603,
        -5.961986721573306,
    ),
    (
        24.854864614690072,
        -3.0009227002832186,
        47.4931110020768,
        5.5814197821558125,
        -0.6610691825249471,
    ),
    (
        30.91273214028599,
        -3.1208243349937974,
        77.79954646070892,
        34.28646028294783,
        -19.097331116725623,
        -28.087943162872662,
    ),
    (
        37.80277123390563,
        -3.2571969029072276,
        112.26918849496327,
        66.9347231244047,
        -40.06618937091002,
        -54.66780262877968,
        -9.48861652309627,
    ),
)

# Row `j` weighs the slopes in the coefficient of `theta (1 - theta) theta**j`.
_RODAS5P_DENSE = (
    (
        25.948786856663858,
        -2.5579724845846235,
        10.433815404888879,
        -2.3679251022685204,
        0.524948541321073,
        1.1241088310450404,
        0.4272876194431874,
        -0.17202221070155493,
    ),
    (
        -9.91568850695171,
        -0.9689944594115154,
        3.0438037242978453,
        -24.495224566215796,
        20.176138334709044,
        15.98066361424651,
        -6.789040303419874,
        -6.710236069923372,
    ),
    (
        11.419903575922262,
        2.8879645146136994,
        72.92137995996029,
        80.12511834622643,
        -52.072871366152654,
        -59.78993625266729,
        -0.15582684282751913,
        4.883087185713722,
    ),
)

_RODAS5P_B = (*_RODAS5P_A[-1], 1.0)


def _rodas_interpolant(b: Row, rows: tuple[Row, ...]) -> Interpolant:
    """`theta b + theta (1 - theta) sum_j theta**j h_j` as polynomials of the slopes."""
    weights = []
    for i, weight in enumerate(b):
        polynomial = [weight, *[0.0] * len(rows)]
        for power, row in enumerate(rows):
            polynomial[power] += row[i]
            polynomial[power + 1] -= row[i]
        weights.append(tuple(polynomial))
    return Interpolant(weights=tuple(weights), order=4)


RODAS5P = RosenbrockTableau(
    order=5,
    error_order=4,
    c=(
        0.0,
        0.6358126895828704,
        0.4095798393397535,
        0.9769306725060716,
        0.4288403609558664,
        1.0,
        1.0,
        1.0,
    ),
    a=_RODAS5P_A,
    b=_RODAS5P_B,
    b_error=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    fsal=False,
    interpolant=_rodas_interpolant(_RODAS5P_B, _RODAS5P_DENSE),
    gamma=0.21193756319429014,
    couplings=_RODAS5P_C,
    time_weights=(
        0.21193756319429014,
        -0.42387512638858027,
        -0.3384627126235924,
        1.8046452872882734,
        2.325825639765069,
        0.0,
        0.0,
        0.0,
    ),
)
