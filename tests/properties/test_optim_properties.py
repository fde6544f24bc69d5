"""Invariances of the variance-corrected rule, over random problems."""

from __future__ import annotations

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from optim.flows import linear_closure, normal, scalar

from pysciml_node.optim import VarianceCorrected
from pysciml_node.optim.gauss_newton import GaussNewton, flatten

seeds = st.integers(0, 2**31)
horizons = st.floats(0.05, 8.0)
rates = st.floats(1e-4, 1.0)
offsets = st.floats(-4.0, 4.0)
targets = st.floats(-2.0, 2.0)
scales = st.floats(1e-2, 1e2)
quick = settings(max_examples=40, deadline=None)
# Three conjugate gradient steps: more of them amplify rounding in an ill-conditioned system.
GAUSS_NEWTON = {
    "curvature": "gauss-newton",
    "safeguard": "none",
    "jvp": "double-backward",
    "cg_steps": 3,
}
CURVATURES = st.sampled_from(
    [
        {"curvature": "terminal"},
        {"curvature": "diagonal", "probes": 64, "beta": 0.0},
        GAUSS_NEWTON,
    ]
)


def step_scalar(
    u: float, target: float, t: float, x0: torch.Tensor, lr: float, **options: object
) -> tuple[float, float]:
    """Offset after one step in one dimension, and the loss ratio."""
    a = scalar(target + u / t)
    closure = linear_closure(a, x0, torch.tensor(target, dtype=x0.dtype), t)
    before = VarianceCorrected([a], lr=lr, **options).step(closure)
    return (a.item() - target) * t, float(closure()[0].detach() / before)


def step_matrix(
    start: torch.Tensor, target: torch.Tensor, x0: torch.Tensor, t: float, **options: object
) -> torch.Tensor:
    a = torch.nn.Parameter(start.clone())
    VarianceCorrected([a], lr=0.5, **options).step(linear_closure(a, x0, target, t))
    return a.detach() - start


def random_system(seed: int, d: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        0.5 * normal(d, d, seed=seed),
        0.5 * normal(d, d, seed=seed + 1),
        normal(5, d, seed=seed + 2),
    )


@quick
@given(offsets, targets, horizons, scales, rates, seeds)
def test_one_step_is_the_exact_map(
    u: float, target: float, t: float, sigma: float, lr: float, seed: int
) -> None:
    new, _ = step_scalar(u, target, t, sigma * normal(7, 1, seed=seed), lr)
    assert math.isclose(new, u - lr * (1.0 - math.exp(-u)), rel_tol=1e-10, abs_tol=1e-10)


@quick
@given(st.floats(1e-3, 8.0), targets, horizons, rates, seeds)
def test_from_above_the_loss_ratio_lies_in_the_proved_interval(
    u: float, target: float, t: float, lr: float, seed: int
) -> None:
    _, ratio = step_scalar(u, target, t, normal(7, 1, seed=seed), lr)
    assert (1.0 - lr) ** 2 - 1e-9 <= ratio <= math.exp(-2.0 * lr) + 1e-9


@quick
@given(
    st.floats(-6.0, 6.0),
    targets,
    horizons,
    rates,
    seeds,
    st.sampled_from(["bound", "backtracking"]),
)
def test_safeguarded_steps_never_raise_the_loss(
    u: float, target: float, t: float, lr: float, seed: int, safeguard: str
) -> None:
    assume(abs(u) > 1e-6)
    _, ratio = step_scalar(u, target, t, normal(7, 1, seed=seed), lr, safeguard=safeguard)
    assert ratio <= 1.0


@quick
@given(CURVATURES, scales, seeds)
def test_units_of_the_state_do_not_matter(options: dict, scale: float, seed: int) -> None:
    start, target, x0 = random_system(seed)
    step = step_matrix(start, target, x0, 1.0, **options)
    torch.testing.assert_close(
        step_matrix(start, target, scale * x0, 1.0, **options), step, rtol=1e-6, atol=1e-9
    )


@quick
@given(CURVATURES, scales, seeds)
def test_units_of_time_do_not_matter(options: dict, scale: float, seed: int) -> None:
    start, target, x0 = random_system(seed)
    step = step_matrix(start, target, x0, 1.0, **options)
    rescaled = scale * step_matrix(start / scale, target / scale, x0, scale, **options)
    torch.testing.assert_close(rescaled, step, rtol=1e-6, atol=1e-9)


@quick
@given(CURVATURES, st.permutations(range(5)), seeds)
def test_order_and_copies_of_the_samples_do_not_matter(
    options: dict, order: list[int], seed: int
) -> None:
    start, target, x0 = random_system(seed)
    step = step_matrix(start, target, x0, 1.0, **options)
    for batch in (x0[order], torch.cat([x0, x0])):
        torch.testing.assert_close(
            step_matrix(start, target, batch, 1.0, **options), step, rtol=1e-6, atol=1e-9
        )


@quick
@given(
    st.sampled_from([{"curvature": "terminal"}, GAUSS_NEWTON]),
    seeds,
)
def test_terminal_and_gauss_newton_do_not_see_the_axes_of_the_state(
    options: dict, seed: int
) -> None:
    """`A -> Q A Q^T` for a rotation `Q` of the state; a diagonal cannot be equivariant."""
    start, target, x0 = random_system(seed)
    q = torch.linalg.qr(normal(3, 3, seed=seed + 3)).Q
    turned = step_matrix(q @ start @ q.T, q @ target @ q.T, x0 @ q.T, 1.0, **options)
    step = step_matrix(start, target, x0, 1.0, **options)
    torch.testing.assert_close(q.T @ turned @ q, step, rtol=1e-6, atol=1e-9)


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 4))
def test_the_gauss_newton_operator_is_symmetric_and_positive(
    seed: int, batch: int, width: int
) -> None:
    weight = torch.nn.Parameter(normal(width, 3, seed=seed))
    x = normal(batch, 3, seed=seed + 1)
    operator = GaussNewton(torch.tanh(x @ weight.T), [weight], None, fd_step=1e-4)
    v, w = (normal(weight.numel(), seed=seed + k) for k in (2, 3))
    image_v, image_w = (operator.pull_back(operator.push_forward(vector)) for vector in (v, w))
    assert math.isclose(float(w @ image_v), float(v @ image_w), rel_tol=1e-9, abs_tol=1e-12)
    assert float(v @ image_v) >= 0.0


@quick
@given(seeds, st.floats(0.01, 2.0), st.floats(0.1, 1.0))
def test_gain_ratio_steps_never_raise_the_loss(seed: int, t: float, lr: float) -> None:
    start, target, x0 = random_system(seed)
    a = torch.nn.Parameter(3.0 * start)
    closure = linear_closure(a, x0, target, t)
    optimizer = VarianceCorrected([a], lr=lr, curvature="gauss-newton", damping=0.0)
    before = float(optimizer.step(closure))
    assert float(closure()[0].detach()) <= before


@quick
@given(CURVATURES, seeds, st.integers(0, 4))
def test_a_state_dict_taken_anywhere_continues_bit_for_bit(
    options: dict, seed: int, split: int
) -> None:
    options = options | ({"probes": 2} if options["curvature"] == "diagonal" else {})
    start, target, x0 = random_system(seed)
    runs = []
    for interrupted in (False, True):
        a = torch.nn.Parameter(start.clone())
        closure = linear_closure(a, x0, target, 1.0)
        generator = torch.Generator().manual_seed(seed)
        optimizer = VarianceCorrected([a], lr=0.1, generator=generator, **options)
        for index in range(5):
            if interrupted and index == split:
                state = optimizer.state_dict()
                optimizer = VarianceCorrected([a], lr=0.9, **options)
                optimizer.load_state_dict(state)
            optimizer.step(closure)
        runs.append(flatten([a]).detach())
    assert torch.equal(*runs)
