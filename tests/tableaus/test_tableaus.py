"""The tables are the methods they claim to be: order conditions, continuity, stability.

A method is of order p when `sum_i b_i phi_i(tree) = 1 / gamma(tree)` for all rooted trees of at
most p nodes; its dense output is of order q when `sum_i b_i(theta) phi_i(tree) =
theta**|tree| / gamma(tree)` for those of at most q (Butcher 1963; Hairer, Norsett, Wanner,
*Solving Ordinary Differential Equations I*, theorems II.2.13 and II.6.1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import fsum, prod

import numpy as np
import pytest
from numpy.typing import NDArray

from pysciml_node import tableaus
from pysciml_node.tableaus import CoupledTableau, ImplicitTableau, Tableau

Array = NDArray[np.float64]
# A rooted tree is the sorted tuple of the subtrees at its root; the single node is ().
Tree = tuple["Tree", ...]

METHODS: dict[str, Tableau] = {
    name: value
    for name, value in vars(tableaus).items()
    if isinstance(value, Tableau)
    and not isinstance(value, ImplicitTableau)
    and name in tableaus.__all__
}
EPS = float(np.finfo(np.float64).eps)
# Coefficients rounded to float64 leave at most this much in an order condition ...
ROUNDING = 1e-13
# ... and where a condition is broken, some tree breaks it by more than this.
BROKEN = 1e-6
# Verner's published order-seven interpolant misses that order's conditions by this much.
INTERPOLANT_DEFECT = {("VERN7", 7): 3e-7}

every_method = pytest.mark.parametrize("tableau", METHODS.values(), ids=METHODS.keys())
every_name = pytest.mark.parametrize("name", METHODS)


@cache
def trees(order: int) -> tuple[Tree, ...]:
    """All rooted trees with `order` nodes: a leaf hung on every node of those one smaller."""
    if order == 1:
        return ((),)

    def grown(tree: Tree) -> set[Tree]:
        at_root: Tree = tuple(sorted((*tree, ())))
        above: set[Tree] = {
            tuple(sorted((*tree[:i], larger, *tree[i + 1 :])))
            for i, subtree in enumerate(tree)
            for larger in grown(subtree)
        }
        return {at_root} | above

    return tuple(sorted({larger for tree in trees(order - 1) for larger in grown(tree)}))


@cache
def size(tree: Tree) -> int:
    return 1 + sum(map(size, tree))


@cache
def density(tree: Tree) -> int:
    """gamma(tree): the product of the sizes of all subtrees."""
    return size(tree) * prod(map(density, tree))


def matrix(tableau: Tableau) -> Array:
    """The stage matrix, the dense output's extra stages included."""
    rows = (*tableau.a, *tableau.interpolant.a)
    full = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        full[i, : len(row)] = row
    return full


def padded(weights: tuple[float, ...], length: int) -> Array:
    return np.array((*weights, *(0.0,) * (length - len(weights))))


def elementary_weights(tableau: Tableau) -> Callable[[int], Array]:
    """phi of an order: one row per tree, one column per stage."""
    a = matrix(tableau)

    @cache
    def subtree(tree: Tree) -> Array:
        return np.asarray(a @ stagewise(tree))

    @cache
    def stagewise(tree: Tree) -> Array:
        return np.asarray(np.prod([np.ones(len(a)), *map(subtree, tree)], axis=0))

    return lambda order: np.array([stagewise(tree) for tree in trees(order)])


def inverse_densities(order: int) -> Array:
    return np.array([1.0 / density(tree) for tree in trees(order)])


def leading_order(tableau: Tableau, weights: tuple[float, ...]) -> int:
    """The power of h with which `h * sum_i weights_i k_i` vanishes."""
    phi = elementary_weights(tableau)
    w = padded(weights, len(matrix(tableau)))
    order = 1
    while (residual := np.abs(phi(order) @ w).max()) < ROUNDING:
        order += 1
    assert residual > BROKEN
    return order


def interpolant_at(tableau: Tableau, theta: float) -> Array:
    weights = np.array(tableau.interpolant.weights)
    return np.asarray(weights @ theta ** np.arange(1, weights.shape[1] + 1))


def interpolant_slope(tableau: Tableau, theta: float) -> Array:
    weights = np.array(tableau.interpolant.weights)
    powers = np.arange(weights.shape[1])
    return np.asarray(weights @ ((powers + 1) * theta**powers))


def interpolant_rounding(tableau: Tableau) -> float:
    """What rounding the polynomials' coefficients can change in a sum over stages."""
    return ROUNDING + EPS * float(np.abs(np.array(tableau.interpolant.weights)).sum())


def stability_function(tableau: Tableau, z: Array) -> Array:
    """R(z) = 1 + z b^T (I - z A)^-1 1, a polynomial since A is strictly lower triangular."""
    a = matrix(tableau)[: tableau.stages, : tableau.stages]
    power = np.ones(tableau.stages)
    coefficients = [1.0]
    for _ in range(tableau.stages):
        coefficients.append(float(np.array(tableau.b) @ power))
        power = a @ power
    return np.asarray(np.polynomial.polynomial.polyval(z, coefficients))


def test_the_methods_are_all_here() -> None:
    assert set(METHODS) == {
        *("EULER", "MIDPOINT", "HEUN", "RALSTON", "BS3", "RK4"),
        *("TSIT5", "DP5", "DP8", "VERN7", "VERN9"),
    }


def test_number_of_rooted_trees() -> None:
    """Cayley's sequence."""
    assert [len(trees(n)) for n in range(1, 11)] == [1, 1, 2, 4, 9, 20, 48, 115, 286, 719]


@every_method
def test_shapes(tableau: Tableau) -> None:
    stages, dense = tableau.stages, tableau.interpolant
    assert [len(row) for row in (*tableau.a, *dense.a)] == list(range(stages + len(dense.c)))
    assert len(tableau.b) == len(tableau.b_error) == stages
    assert tableau.b_error_low is None or len(tableau.b_error_low) == stages
    assert len(dense.weights) == stages + len(dense.c)
    assert len({len(row) for row in dense.weights}) == 1


@every_method
def test_rows_sum_to_nodes(tableau: Tableau) -> None:
    dense = tableau.interpolant
    for node, row in zip((*tableau.c, *dense.c), (*tableau.a, *dense.a), strict=True):
        # Half an ulp per coefficient: 1e-14 but for the rows with entries in the hundreds.
        assert abs(fsum(row) - node) <= max(1e-14, EPS / 2 * fsum(map(abs, row)))


@every_method
def test_weights_sum_to_one_and_errors_to_zero(tableau: Tableau) -> None:
    assert abs(fsum(tableau.b) - 1.0) < 1e-14
    assert abs(fsum(tableau.b_error)) < 1e-14
    assert abs(fsum(tableau.b_error_low or ())) < 1e-14


@every_method
def test_order_is_met_and_exact(tableau: Tableau) -> None:
    phi = elementary_weights(tableau)
    b = padded(tableau.b, len(matrix(tableau)))
    for order in range(1, tableau.order + 1):
        np.testing.assert_allclose(phi(order) @ b, inverse_densities(order), rtol=0, atol=ROUNDING)
    order = tableau.order + 1
    assert np.abs(phi(order) @ b - inverse_densities(order)).max() > BROKEN


@every_method
def test_order_of_the_error_estimate(tableau: Tableau) -> None:
    """The estimate, combined from two where there are two, is O(h**(error_order + 1))."""
    order = leading_order(tableau, tableau.b_error)
    if tableau.b_error_low is not None:
        # e**2 / sqrt(e**2 + 0.01 e_low**2) behaves as e**2 / e_low when h is small.
        order = 2 * order - leading_order(tableau, tableau.b_error_low)
    assert order == tableau.error_order + 1


@every_method
def test_embedded_solution_meets_its_conditions(tableau: Tableau) -> None:
    """Orders 5 and 3 for Dormand-Prince 8, whose `error_order` is that of the combination."""
    embedded = (
        {tableau.error_order: tableau.b_error}
        if tableau.b_error_low is None
        else {5: tableau.b_error, 3: tableau.b_error_low}
    )
    phi = elementary_weights(tableau)
    for last, error in embedded.items():
        b_hat = padded(tableau.b, len(matrix(tableau))) - padded(error, len(matrix(tableau)))
        for order in range(1, last + 1):
            np.testing.assert_allclose(
                phi(order) @ b_hat, inverse_densities(order), rtol=0, atol=ROUNDING
            )


@every_method
def test_stage_at_the_end_of_the_step(tableau: Tableau) -> None:
    """f(t + h, u1) is the last stage or the first extra one."""
    if tableau.fsal:
        assert tableau.c[-1] == 1.0
        assert tableau.a[-1] == tableau.b[:-1]
        assert tableau.b[-1] == 0.0
    else:
        assert tableau.interpolant.c[0] == 1.0
        assert tableau.interpolant.a[0] == tableau.b


@every_method
def test_interpolant_ends_where_the_step_ends(tableau: Tableau) -> None:
    b = padded(tableau.b, len(matrix(tableau)))
    np.testing.assert_allclose(
        interpolant_at(tableau, 1.0), b, rtol=0, atol=interpolant_rounding(tableau)
    )


@every_name
@pytest.mark.parametrize("theta", [0.05, 0.3, 0.5, 0.77, 0.95, 1.0])
def test_order_of_the_interpolant(name: str, theta: float) -> None:
    tableau = METHODS[name]
    phi, weights = elementary_weights(tableau), interpolant_at(tableau, theta)
    # A cubic through the ends of a second-order step is no better than the step.
    for order in range(1, min(tableau.interpolant.order, tableau.order) + 1):
        bound = max(interpolant_rounding(tableau), INTERPOLANT_DEFECT.get((name, order), 0.0))
        np.testing.assert_allclose(
            phi(order) @ weights, theta**order * inverse_densities(order), rtol=0, atol=bound
        )


@every_method
def test_dense_output_is_continuously_differentiable(tableau: Tableau) -> None:
    """Its slope is f(t, u) at the start and f(t + h, u1) at the end; Euler's is linear."""
    unit = np.eye(len(matrix(tableau)))
    bound = 10 * interpolant_rounding(tableau)
    np.testing.assert_array_equal(interpolant_slope(tableau, 0.0), unit[0])
    if tableau.interpolant.order > 1:
        end = tableau.stages - 1 if tableau.fsal else tableau.stages
        np.testing.assert_allclose(interpolant_slope(tableau, 1.0), unit[end], rtol=0, atol=bound)


@every_method
def test_stiffness_stages_share_a_node(tableau: Tableau) -> None:
    nodes = (*tableau.c, 1.0)
    if tableau.stiffness_stages is None:
        # An FSAL stage is itself f(t + h, u1): no pair with that.
        ends = tableau.c if tableau.fsal else nodes
        assert len(set(ends)) == len(ends)
    else:
        first, second = tableau.stiffness_stages
        assert first != second
        assert nodes[first] == nodes[second]


@every_method
def test_stability_radius(tableau: Tableau) -> None:
    """|R(-z)| <= 1 up to the stated radius, given to five digits, and no further."""
    assert tableau.stability_radius is not None
    inside = np.linspace(0.0, tableau.stability_radius - 1e-4, 10_001)
    assert np.abs(stability_function(tableau, -inside)).max() <= 1.0 + ROUNDING
    outside = np.array([tableau.stability_radius + 1e-4])
    assert np.abs(stability_function(tableau, -outside)).item() > 1.0


def test_stability_radius_of_tsit5_is_the_published_one() -> None:
    assert METHODS["TSIT5"].stability_radius == 3.5068


COUPLED = {
    name: value for name, value in vars(tableaus).items() if isinstance(value, CoupledTableau)
}


@pytest.mark.parametrize("tableau", COUPLED.values(), ids=COUPLED.keys())
def test_coupled_methods_have_their_order_and_no_more(tableau):
    w = padded(tableau.b, len(matrix(tableau)))
    phi = elementary_weights(tableau)
    for order in range(1, tableau.order + 1):
        np.testing.assert_allclose(phi(order) @ w, inverse_densities(order), atol=ROUNDING)
    beyond = tableau.order + 1
    assert np.abs(phi(beyond) @ w - inverse_densities(beyond)).max() > BROKEN
    np.testing.assert_allclose([sum(row) for row in tableau.a[1:]], tableau.c[1:], atol=ROUNDING)
