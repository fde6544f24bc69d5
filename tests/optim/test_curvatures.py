"""Diagonal and full Gauss-Newton curvature: definitions, reductions, invariances, rates."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from optim.flows import linear_closure, normal, paper_loss, scalar, solve_linear

from pysciml_node.optim import VarianceCorrected
from pysciml_node.optim.gauss_newton import (
    GaussNewton,
    ProductSpace,
    flatten,
    hutchinson_diagonal,
    unflatten,
)

TARGET = torch.tensor(-0.7, dtype=torch.float64)
X0 = normal(8, 1, seed=0)
EXACT = {"damping": 0.0, "safeguard": "none"}
REDUCTIONS = [
    pytest.param({"curvature": "diagonal", "probes": 8, "beta": 0.0} | EXACT, 1e-12, id="diagonal"),
    pytest.param(
        {"curvature": "gauss-newton", "jvp": "double-backward"} | EXACT, 1e-12, id="double-backward"
    ),
    pytest.param({"curvature": "gauss-newton"} | EXACT, 1e-7, id="finite-difference"),
]


class Field(torch.nn.Module):
    """A nonlinear map with three outputs and parameters of several shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(normal(3, 2, seed=1))
        self.bias = torch.nn.Parameter(normal(3, seed=2))
        self.gain = scalar(0.5)
        self.unused = scalar(2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * torch.tanh(x @ self.weight.T + self.bias)


@pytest.fixture
def field() -> Field:
    return Field()


INPUTS = normal(5, 2, seed=3)


def jacobian(field: Field) -> torch.Tensor:
    """`J`, one row an output of a sample, one column a parameter."""
    rows = []
    for output in field(INPUTS).reshape(-1):
        grads = torch.autograd.grad(
            output,
            list(field.parameters()),
            materialize_grads=True,
            allow_unused=True,
            retain_graph=True,
        )
        rows.append(flatten(grads))
    return torch.stack(rows)


@pytest.mark.parametrize(("options", "tolerance"), REDUCTIONS)
@pytest.mark.parametrize("u", [-2.0, 0.1, 3.0])
def test_all_curvatures_are_the_papers_rule_in_one_dimension(
    options: dict, tolerance: float, u: float
) -> None:
    horizon, lr = 1.5, 0.3
    a = scalar(TARGET.item() + u / horizon)
    optimizer = VarianceCorrected([a], lr=lr, **options)
    closure = linear_closure(a, X0, TARGET, horizon)
    for _ in range(5):
        optimizer.step(closure)
        u -= lr * -math.expm1(-u)
        assert (a.item() - TARGET.item()) * horizon == pytest.approx(u, abs=tolerance)


@pytest.mark.parametrize("probes", [15, 40])
def test_diagonal_is_exact_with_as_many_probes_as_outputs(field: Field, probes: int) -> None:
    expected = jacobian(field).square().sum(dim=0) / len(INPUTS)
    estimate = hutchinson_diagonal(field(INPUTS), list(field.parameters()), probes)
    torch.testing.assert_close(flatten(estimate), expected, rtol=1e-12, atol=1e-14)


def test_hutchinson_is_unbiased(field: Field) -> None:
    expected = jacobian(field).square().sum(dim=0) / len(INPUTS)
    generator = torch.Generator().manual_seed(0)
    params, outputs = list(field.parameters()), field(INPUTS)
    draws = torch.stack(
        [flatten(hutchinson_diagonal(outputs, params, 1, generator)) for _ in range(2000)]
    )
    error = draws.mean(dim=0) - expected
    assert bool((error.abs() <= 5.0 * draws.std(dim=0) / math.sqrt(len(draws)) + 1e-14).all())


def test_running_average_is_the_unbiased_mean_of_equal_samples() -> None:
    """At a fixed point of the parameters the average equals every sample, from the first step."""
    a = scalar(0.3)
    optimizer = VarianceCorrected([a], lr=0.0, curvature="diagonal", probes=8, damping=0.0)
    closure = linear_closure(a, X0, TARGET, 2.0)
    expected = 4.0 * float(closure()[1].u1.detach().square().mean())
    for count in range(1, 6):
        optimizer.step(closure)
        corrected = optimizer.state[a]["curvature"].item() / (1.0 - 0.95**count)
        assert corrected == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("exact", "tolerance"), [(True, 1e-12), (False, 1e-7)])
def test_products_are_those_of_the_gauss_newton_matrix(
    field: Field, exact: bool, tolerance: float
) -> None:
    params = list(field.parameters())
    before = [p.detach().clone() for p in params]
    evaluate = None if exact else lambda: field(INPUTS).detach()
    operator = GaussNewton(field(INPUTS), params, evaluate, fd_step=1e-4)
    full = jacobian(field)
    for seed in range(3):
        v = normal(full.shape[1], seed=seed)
        expected = full.T @ (full @ v) / len(INPUTS)
        torch.testing.assert_close(
            operator.pull_back(operator.push_forward(v)), expected, rtol=tolerance, atol=tolerance
        )
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert float(operator.push_forward(torch.zeros_like(v)).abs().max()) == 0.0


def test_parameters_are_put_back_when_an_evaluation_fails(field: Field) -> None:
    params = list(field.parameters())
    before = flatten(params).detach().clone()

    def fail() -> torch.Tensor:
        raise RuntimeError("no solution")

    operator = GaussNewton(field(INPUTS), params, fail, fd_step=1e-4)
    with pytest.raises(RuntimeError, match="no solution"):
        operator.push_forward(torch.ones_like(before))
    assert torch.equal(flatten(params), before)


class LinearOperator(GaussNewton):
    """`C = J^T J / B` of outputs `theta J^T` of one sample, counting its products."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.theta = torch.zeros(matrix.shape[1], dtype=matrix.dtype, requires_grad=True)
        super().__init__((matrix @ self.theta)[None], [self.theta], None, fd_step=1e-4)
        self.count = 0

    def push_forward(self, vector: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().push_forward(vector)


def damped(matrix: torch.Tensor, g: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """`(C + diag(damping) c)^-1 g`, `c` the curvature along `g`."""
    shift = damping * (g @ matrix @ g) / (g @ g)
    return torch.linalg.solve(matrix + shift.diag(), g)


def test_one_space_solves_for_every_damping() -> None:
    root, g = normal(9, 6, seed=5), normal(6, seed=6)
    operator = LinearOperator(root)
    space = ProductSpace(operator, g)
    matrix = root.T @ root
    for damping in (torch.zeros_like(g), torch.full_like(g, 0.1), torch.linspace(0, 3, 6).double()):
        solved = space.solve(damping, max_steps=50, rtol=1e-13)
        expected = damped(matrix, g, damping)
        torch.testing.assert_close(solved.step, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(solved.image, matrix @ expected, rtol=1e-9, atol=1e-11)
    assert operator.count == 6


def test_the_space_holds_the_solution_of_an_ill_conditioned_system() -> None:
    """Condition 1e12 of `C`: orthogonality is kept, so six products do."""
    left, right = (torch.linalg.qr(normal(6, 6, seed=seed)).Q for seed in (15, 16))
    root = left * torch.logspace(0, -6, 6).double() @ right.T
    expected = normal(6, seed=17)
    operator = LinearOperator(root)
    solved = ProductSpace(operator, root.T @ (root @ expected)).solve(
        torch.zeros_like(expected), max_steps=50, rtol=1e-16
    )
    assert operator.count <= 6
    assert float((root @ (solved.step - expected)).norm()) < 1e-9


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_are_those_of_conjugate_gradients(steps: int) -> None:
    """The minimizer of the quadratic model over the Krylov space."""
    root, g = normal(9, 6, seed=5), normal(6, seed=6)
    matrix = root.T @ root + 0.2 * (g @ root.T @ root @ g) / (g @ g) * torch.eye(6).double()
    krylov = torch.stack([torch.linalg.matrix_power(matrix, k) @ g for k in range(steps)], dim=1)
    expected = krylov @ torch.linalg.solve(krylov.T @ matrix @ krylov, krylov.T @ g)
    operator = LinearOperator(root)
    solved = ProductSpace(operator, g).solve(torch.full_like(g, 0.2), max_steps=steps, rtol=1e-13)
    assert operator.count == steps
    torch.testing.assert_close(solved.step, expected, rtol=1e-9, atol=1e-11)


def test_the_shortest_solution_of_a_singular_system() -> None:
    root = normal(3, 6, seed=7)
    matrix = root.T @ root
    g = matrix @ normal(6, seed=8)
    solved = ProductSpace(LinearOperator(root), g).solve(
        torch.zeros_like(g), max_steps=50, rtol=1e-12
    )
    torch.testing.assert_close(solved.step, torch.linalg.pinv(matrix) @ g)


def test_no_step_at_a_stationary_point() -> None:
    operator = LinearOperator(normal(4, 3, seed=9))
    zero = torch.zeros(3, dtype=torch.float64)
    solved = ProductSpace(operator, zero).solve(zero, max_steps=5, rtol=1e-3)
    assert float(solved.step.norm()) == operator.count == 0


def test_flatten_and_unflatten_are_inverse(field: Field) -> None:
    params = list(field.parameters())
    for piece, param in zip(unflatten(flatten(params), params), params, strict=True):
        assert torch.equal(piece, param)


@pytest.mark.parametrize("jvp", ["finite-difference", "double-backward"])
def test_one_full_gauss_newton_step_solves_linear_least_squares(jvp: str) -> None:
    design, y = normal(20, 4, seed=9), normal(20, 1, seed=10)
    theta = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.float64))
    optimizer = VarianceCorrected(
        [theta], lr=1.0, curvature="gauss-newton", damping=0.0, jvp=jvp, cg_rtol=1e-12
    )

    def closure() -> tuple[torch.Tensor, torch.Tensor]:
        x = design @ theta
        return paper_loss(x, y), x

    optimizer.step(closure)
    torch.testing.assert_close(theta.detach(), torch.linalg.lstsq(design, y).solution)


def run_linear(
    d: int, t: float, scale: float, lr: float, steps: int, **options: object
) -> list[float]:
    """Losses of gauss-newton on a random linear system, `|A0 - A*| ~ scale / t`."""
    target = normal(d, d, seed=11) / (math.sqrt(d) * t)
    start = target + scale / t * normal(d, d, seed=12) / math.sqrt(d)
    a = torch.nn.Parameter(start)
    closure = linear_closure(a, normal(4 * d, d, seed=13), target, t)
    optimizer = VarianceCorrected([a], lr=lr, curvature="gauss-newton", **options)
    return [float(optimizer.step(closure)) for _ in range(steps)]


@pytest.mark.parametrize("t", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0])
def test_gauss_newton_is_linear_at_the_predicted_rate_for_every_horizon(
    t: float, scale: float
) -> None:
    losses = run_linear(3, t, scale, lr=0.5, steps=20, cg_rtol=1e-6)
    rates = [math.log(old / new) for old, new in itertools.pairwise(losses)]
    assert all(rate > 0.0 for rate in rates)
    assert sum(rates[-8:]) / 8 == pytest.approx(-2.0 * math.log(0.5), rel=0.1)


def test_gauss_newton_does_not_see_the_units_of_time() -> None:
    short, long = (run_linear(3, t, 1.0, lr=0.5, steps=12) for t in (0.5, 8.0))
    assert short == pytest.approx(long, rel=1e-4)


def test_damping_falls_where_the_model_is_right_and_rises_where_it_is_not() -> None:
    a = scalar(-0.69)
    options = {"curvature": "gauss-newton", "damping": 1e-3}
    optimizer = VarianceCorrected([a], lr=0.5, **options)
    optimizer.step(linear_closure(a, X0, TARGET, 1.0))
    assert optimizer.state[a]["damping"].item() == pytest.approx(1e-4, rel=1e-2)
    b = scalar(-5.0)
    optimizer = VarianceCorrected([b], lr=1.0, **options)
    closure = linear_closure(b, X0, TARGET, 1.0)
    before = float(optimizer.step(closure))
    assert optimizer.state[b]["damping"].item() > 1.0
    assert float(closure()[0].detach()) < before


def test_a_failing_solve_counts_as_a_rejected_step() -> None:
    from pysciml_node.errors import SolverFailure

    a = scalar(-3.0)
    good = linear_closure(a, X0, TARGET, 1.0)

    def closure() -> tuple[torch.Tensor, object]:
        if a.item() > 0.0:
            raise SolverFailure("blew up", solution=None)
        return good()

    optimizer = VarianceCorrected([a], lr=1.0, curvature="gauss-newton", damping=0.0)
    before = float(optimizer.step(closure))
    assert -3.0 < a.item() <= 0.0
    assert float(closure()[0].detach()) < before


def test_double_backward_names_the_remedy_where_the_adjoint_forbids_it() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return a.square().reshape(1, 1)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            (a,) = ctx.saved_tensors
            return (2.0 * a * grad).reshape(())

    a = scalar(1.0)

    def closure() -> tuple[torch.Tensor, torch.Tensor]:
        x = Once.apply(a)
        return paper_loss(x, torch.zeros_like(x)), x

    options = {"curvature": "gauss-newton", "damping": 0.0, "lr": 1.0}
    with pytest.raises(ValueError, match=r"DirectAdjoint.*finite-difference"):
        VarianceCorrected([a], jvp="double-backward", **options).step(closure)
    VarianceCorrected([a], **options).step(closure)
    assert a.item() == pytest.approx(0.5, abs=1e-6)


def test_diagonal_after_an_ordinary_backward_needs_the_graph() -> None:
    a = scalar(0.2)
    optimizer = VarianceCorrected([a], curvature="diagonal")
    loss, sol = linear_closure(a, X0, TARGET, 1.0)()
    loss.backward(retain_graph=True)
    optimizer.step(solution=sol)
    loss, sol = linear_closure(a, X0, TARGET, 1.0)()
    loss.backward()
    with pytest.raises(ValueError, match="retain_graph=True"):
        optimizer.step(solution=sol)
    with pytest.raises(ValueError, match="not detached"):
        optimizer.step(solution=solve_linear(TARGET, X0, 1.0))
    with pytest.raises(ValueError, match="solution=sol"):
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [{"curvature": "gauss-newton"}, {"safeguard": "backtracking"}],
    ids=["gauss-newton", "backtracking"],
)
def test_options_that_try_several_points_ask_for_a_closure(options: dict) -> None:
    a = scalar(0.2)
    optimizer = VarianceCorrected([a], **options)
    loss, sol = linear_closure(a, X0, TARGET, 1.0)()
    loss.backward()
    with pytest.raises(ValueError, match=r"\(loss, solution\)"):
        optimizer.step(solution=sol)


def test_a_full_step_beyond_the_models_minimum_is_damped_not_taken() -> None:
    """At `lr > 2` the quadratic model itself rises; damping shortens the step until it falls."""
    a = scalar(-0.6)
    optimizer = VarianceCorrected([a], lr=3.0, curvature="gauss-newton")
    closure = linear_closure(a, X0, TARGET, 1.0)
    losses = [float(optimizer.step(closure)) for _ in range(10)]
    assert all(new < old for old, new in itertools.pairwise(losses))


def test_a_graph_built_before_the_step_is_stale_after_it() -> None:
    """Trial moves hide from autograd's version counters; the accepted move must not."""
    a = scalar(0.5)
    product = a * a
    optimizer = VarianceCorrected([a], curvature="gauss-newton")
    optimizer.step(linear_closure(a, X0, TARGET, 1.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
