"""Invariances of solves, over random fields and states."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pysciml_node as psn

few = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 2**31)
# One of each kind: two stages, four, first same as last, and with extra stages for dense output.
algorithms = st.sampled_from([psn.Heun(), psn.RK4(), psn.Tsit5(), psn.DP8(), psn.Vern7()])
adjoints = st.sampled_from([psn.DiscreteAdjoint(), psn.DirectAdjoint(), psn.GaussAdjoint()])
lengths = st.floats(0.2, 2.0)
TOLERANCE = 1e-4
SOLVE = {"rtol": TOLERANCE, "atol": TOLERANCE}
FIXED = {"controller": psn.FixedStep(), "dt0": 0.13}
# What rounding changes: the states, at fixed steps; else also the steps, and by them the errors.
BOUNDS = {"fixed": 1e-9, "adaptive": 20 * TOLERANCE}
STEPS = {"fixed": FIXED, "adaptive": SOLVE}
steps = st.sampled_from(["fixed", "adaptive"])
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Random:
    """Random numbers of one seed, and a smooth bounded field made of them."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.inner, self.outer = self(3, 5), self(5, 3)
        self.rate = self(5)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def autonomous(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(u @ self.inner) @ self.outer

    def field(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(u @ self.inner + self.rate * t) @ self.outer


@few
@given(seeds, algorithms, lengths, steps)
def test_the_order_of_a_batch_does_not_matter(
    seed: int, algorithm: psn.Tsit5, length: float, step: str
) -> None:
    random = Random(seed)
    u0 = random(4, 3)
    order = torch.randperm(4, generator=random.generator)
    found = [
        psn.solve(psn.ODEProblem(random.field, u, (0.0, length)), algorithm, **STEPS[step])
        for u in (u0, u0[order])
    ]
    bound = BOUNDS[step]
    torch.testing.assert_close(found[0].u1[order], found[1].u1, rtol=bound, atol=bound)


@few
@given(seeds, algorithms, adjoints)
def test_gradients_follow_the_order_of_a_batch(
    seed: int, algorithm: psn.Tsit5, adjoint: psn.DirectAdjoint
) -> None:
    random = Random(seed)
    u0 = random(4, 3)
    order = torch.randperm(4, generator=random.generator)
    gradients = []
    for u in (u0, u0[order]):
        start = u.clone().requires_grad_()
        solution = psn.solve(
            psn.ODEProblem(random.field, start, (0.0, 1.0)), algorithm, adjoint=adjoint, **FIXED
        )
        gradients.append(torch.autograd.grad(solution.u1.square().sum(), start)[0])
    torch.testing.assert_close(gradients[0][order], gradients[1], rtol=1e-9, atol=1e-9)


@few
@given(seeds, algorithms, lengths)
def test_solutions_of_linear_fields_are_linear(
    seed: int, algorithm: psn.Tsit5, length: float
) -> None:
    """Exactly, at fixed steps: `S(a u + b v) = a S(u) + b S(v)`."""
    random = Random(seed)
    matrix, (a, b) = random(3, 3), random(2).tolist()
    u, v = random(2, 3), random(2, 3)

    def end(u0: Tensor) -> Tensor:
        problem = psn.ODEProblem(lambda t, u: u @ matrix * torch.cos(t), u0, (0.0, length))
        return psn.solve(problem, algorithm, controller=psn.FixedStep(), dt0=0.17).u1

    expected = a * end(u) + b * end(v)
    torch.testing.assert_close(end(a * u + b * v), expected, rtol=1e-10, atol=1e-10)


@few
@given(seeds, algorithms, st.floats(-5.0, 5.0), st.sampled_from([1, -1]), steps)
def test_autonomous_fields_do_not_see_the_time(
    seed: int, algorithm: psn.Tsit5, shift: float, direction: int, step: str
) -> None:
    random = Random(seed)
    u0 = random(2, 3)
    found = [
        psn.solve(
            psn.ODEProblem(random.autonomous, u0, (s, s + direction)), algorithm, **STEPS[step]
        )
        for s in (0.0, shift)
    ]
    bound = BOUNDS[step]
    torch.testing.assert_close(found[0].u1, found[1].u1, rtol=bound, atol=bound)


@few
@given(seeds, algorithms, lengths)
def test_reverse_time_is_the_mirrored_field(seed: int, algorithm: psn.Tsit5, length: float) -> None:
    """`v(s) = u(-s)` solves `v' = -f(-s, v)`: same steps, same states."""
    random = Random(seed)
    u0 = random(2, 3)
    backward = psn.solve(psn.ODEProblem(random.field, u0, (0.0, -length)), algorithm, **SOLVE)
    mirrored = psn.solve(
        psn.ODEProblem(lambda s, v: -random.field(-s, v), u0, (0.0, length)), algorithm, **SOLVE
    )
    torch.testing.assert_close(backward.t, -mirrored.t, rtol=1e-12, atol=0)
    torch.testing.assert_close(backward.u, mirrored.u, rtol=1e-10, atol=1e-12)


@few
@given(seeds, lengths)
def test_time_reversal_returns(seed: int, length: float) -> None:
    random = Random(seed)
    u0 = random(2, 3)
    forward = psn.solve(psn.ODEProblem(random.field, u0, (0.0, length)), psn.Vern7(), **EXACT)
    back = psn.solve(psn.ODEProblem(random.field, forward.u1, (length, 0.0)), psn.Vern7(), **EXACT)
    # Errors may grow on the way back like exp(L t), with the field's Lipschitz constant.
    lipschitz = torch.linalg.matrix_norm(random.inner, 2) * torch.linalg.matrix_norm(
        random.outer, 2
    )
    growth = float(torch.exp(lipschitz * length).clamp(max=1e8))
    assert (back.u1 - u0).abs().max().item() < 1e-9 * growth


@few
@given(seeds, lengths, st.floats(0.1, 0.9))
def test_an_interval_may_be_split(seed: int, length: float, share: float) -> None:
    random = Random(seed)
    u0, middle = random(2, 3), share * length
    whole = psn.solve(psn.ODEProblem(random.field, u0, (0.0, length)), psn.Vern7(), **EXACT)
    first = psn.solve(psn.ODEProblem(random.field, u0, (0.0, middle)), psn.Vern7(), **EXACT)
    second = psn.solve(
        psn.ODEProblem(random.field, first.u1, (middle, length)), psn.Vern7(), **EXACT
    )
    torch.testing.assert_close(second.u1, whole.u1, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole(middle), first.u1, rtol=1e-6, atol=1e-6)


@few
@given(seeds, algorithms, lengths)
def test_a_stop_splits_an_interval_exactly(seed: int, algorithm: psn.Tsit5, length: float) -> None:
    """At fixed steps a stop is two solves, one behind the other."""
    random = Random(seed)
    u0, middle = random(2, 3), 0.37 * length
    fixed = {"controller": psn.FixedStep(), "dt0": 0.21}
    whole = psn.solve(
        psn.ODEProblem(random.field, u0, (0.0, length)), algorithm, tstops=[middle], **fixed
    )
    first = psn.solve(psn.ODEProblem(random.field, u0, (0.0, middle)), algorithm, **fixed)
    second = psn.solve(psn.ODEProblem(random.field, first.u1, (middle, length)), algorithm, **fixed)
    torch.testing.assert_close(whole.u1, second.u1, rtol=1e-12, atol=1e-12)


@few
@given(seeds, algorithms, adjoints, st.sampled_from(["tuple", "dict"]))
def test_structures_are_their_tensor(
    seed: int, algorithm: psn.Tsit5, adjoint: psn.DirectAdjoint, kind: str
) -> None:
    random = Random(seed)
    u0 = random(3)

    def build(u: Tensor) -> object:
        x, y = u[:1], u[1:]
        return (x, y) if kind == "tuple" else {"x": x, "y": y}

    def flat(state: object) -> Tensor:
        parts = state.values() if isinstance(state, dict) else state
        return torch.cat(tuple(parts))

    ends, gradients = [], []
    for structured in (False, True):
        start = u0.clone().requires_grad_()
        field = (lambda t, s: build(random.field(t, flat(s)))) if structured else random.field
        problem = psn.ODEProblem(field, build(start) if structured else start, (0.0, 1.0))
        solution = psn.solve(problem, algorithm, adjoint=adjoint, **FIXED)
        end = flat(solution.u1) if structured else solution.u1
        ends.append(end)
        gradients.append(torch.autograd.grad(end.square().sum(), start)[0])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-10)


@few
@given(seeds, algorithms, st.floats(0.1, 10.0), steps)
def test_time_may_be_measured_in_other_units(
    seed: int, algorithm: psn.Tsit5, unit: float, step: str
) -> None:
    """`v(s) = u(c s)` solves `v' = c f(c s, v)`, with steps `1 / c` as long."""
    random = Random(seed)
    u0 = random(2, 3)
    options = STEPS[step] | {"dt0": 0.13}
    plain = psn.solve(psn.ODEProblem(random.field, u0, (0.0, 1.0)), algorithm, **options)
    options["dt0"] = 0.13 / unit
    scaled = psn.solve(
        psn.ODEProblem(lambda s, v: unit * random.field(unit * s, v), u0, (0.0, 1.0 / unit)),
        algorithm,
        **options,
    )
    bound = BOUNDS[step]
    torch.testing.assert_close(plain.u1, scaled.u1, rtol=bound, atol=bound)
