"""What is prepared once for many native stochastic solves is the same for none that differ."""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.torch_engine.native.stochastic_code import Translated

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
RATE = 1.0
Way = tuple[Callable[..., Any], Callable[[float], Any]]
ONE_STEP: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 1.0, "compile": True}


def one_step(drift: Any, diffusion: Any, p: Any = None, seed: int = 1) -> psn.Solution:
    """Euler and Maruyama's step from one: `1 + drift + diffusion W`."""
    problem = psn.SDEProblem(drift, diffusion, torch.ones(2, dtype=D), (0.0, 1.0), p=p)
    generator = torch.Generator().manual_seed(seed)
    return psn.solve(problem, psn.EM(), generator=generator, **ONE_STEP)


def rates(drift: Any, diffusion: Any, p: Any = None) -> Any:
    """The drift and the diffusion at one, for two that do not tell entries apart."""
    solution = one_step(drift, diffusion, p)
    w = solution.brownian(0.0, 1.0)
    matrix = torch.stack((torch.ones_like(w), w), 1)
    return torch.linalg.solve(matrix, solution.u1.detach() - 1).tolist()


def near(*values: float) -> Any:
    return pytest.approx(values, abs=1e-12)


class Scaled(nn.Module):
    """A number and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.scale = nn.Parameter(torch.ones(2, dtype=D)), 1.0

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.scale * self.rate * u


class Holder:
    """A plain object."""

    k: Any = 1.0


def by_attribute() -> Way:
    f = Scaled()
    return f, lambda k: setattr(f, "scale", k)


def by_parameter_in_place() -> Way:
    f = Scaled()
    return f, lambda k: nn.init.constant_(f.rate, k)


def by_another_parameter() -> Way:
    f = Scaled()
    return f, lambda k: setattr(f, "rate", nn.Parameter(torch.full((2,), k, dtype=D)))


def by_exchanged_dict() -> Way:
    f = Scaled()
    return f, lambda k: setattr(f, "__dict__", {**f.__dict__, "scale": k})


def by_hook() -> Way:
    f, held = Scaled(), Holder()
    f.register_forward_hook(lambda module, given, out: held.k * out)
    return f, lambda k: setattr(held, "k", k)


def by_cell() -> Way:
    k = 1.0

    def change(value: float) -> None:
        nonlocal k
        k = value

    return lambda t, u: k * u, change


def by_global() -> Way:
    return lambda t, u: RATE * u, lambda k: globals().__setitem__("RATE", k)


def by_list() -> Way:
    held = [1.0]
    return lambda t, u: held[0] * u, lambda k: held.__setitem__(0, k)


def by_tensor_entry() -> Way:
    held = torch.ones(1, dtype=D)
    return lambda t, u: held.tolist()[0] * u, lambda k: held.fill_(k)


def by_default() -> Way:
    def f(t: Tensor, u: Tensor, k: float = 1.0) -> Tensor:
        return k * u

    return f, lambda k: setattr(f, "__defaults__", (k,))


def by_owner_of_a_method() -> Way:
    held = Holder()

    def f(self: Holder, t: Tensor, u: Tensor) -> Tensor:
        return self.k * u  # type: ignore[no-any-return]

    return types.MethodType(f, held), lambda k: setattr(held, "k", k)


def by_keyword_of_a_partial() -> Way:
    f = functools.partial(lambda t, u, k: k * u, k=1.0)
    return f, lambda k: f.keywords.__setitem__("k", k)


def by_class() -> Way:
    return lambda t, u: Holder.k * u, lambda k: setattr(Holder, "k", k)


WAYS = [value for name, value in sorted(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("of", ["drift", "diffusion", "both"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_number_that_has_changed_is_seen(way: Any, of: str) -> None:
    f, change = way()
    functions = {"drift": (f, other), "diffusion": (other, f), "both": (f, f)}[of]

    def expect(k: float) -> None:
        wanted = {"drift": (k, 0.5), "diffusion": (0.5, k), "both": (k, k)}[of]
        for _ in range(2):
            assert rates(*functions) == near(*wanted)

    for k in (1.0, 2.0, 1.0):
        change(k)
        expect(k)


def other(t: Tensor, u: Tensor) -> Tensor:
    return 0.5 * u


def test_a_drift_has_several_diffusions() -> None:
    f, fields = Scaled(), [Scaled() for _ in range(3)]
    for i, g in enumerate(fields):
        g.scale = 1.0 + i
    for _ in range(2):
        for i, g in enumerate(fields):
            assert rates(f, g) == near(1.0, 1.0 + i)
            assert rates(g, f) == near(1.0 + i, 1.0)


def test_a_drift_and_diffusions_that_come_and_go() -> None:
    f = Scaled()
    for k in range(1, 6):
        g = Scaled()
        g.scale = k / 2
        assert rates(f, g) == near(1.0, k / 2)
        reference = weakref.ref(g)
        del g
        gc.collect()
        assert reference() is None


def test_what_both_capture() -> None:
    """The same tensor in both, and another one later, with gradients to each."""

    def made(k: Tensor, x: Tensor) -> tuple[Any, Any]:
        return lambda t, u: k * u, lambda t, u: k * x * u

    for value in (1.0, 2.0):
        k, x = (torch.tensor(v, dtype=D, requires_grad=True) for v in (value, 3.0))
        assert rates(*made(k, x)) == near(value, 3.0 * value)
        solution = one_step(*made(k, x))
        w = solution.brownian(0.0, 1.0)
        found = torch.autograd.grad(solution.u1.sum(), [k, x])
        torch.testing.assert_close(found, ((1 + 3 * w).sum(), (value * w).sum()))


@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"rates": x, "n": 3}])
def test_each_solve_is_of_its_own_parameters(form: Any) -> None:
    def read(p: Any) -> Tensor:
        x: Tensor = p["rates"] if isinstance(p, dict) else p
        return x

    drift, diffusion = lambda t, u, p: read(p)[0] * u, lambda t, u, p: read(p)[1] * u
    for a, b in ((1.0, 2.0), (3.0, 0.5), (1.0, 2.0)):
        assert rates(drift, diffusion, form(torch.tensor([a, b], dtype=D))) == near(a, b)


def test_solves_of_the_same_options_have_their_own_paths() -> None:
    f, g = Scaled(), Scaled()
    ends = [one_step(f, g, seed=seed) for seed in (1, 2, 1)]
    assert torch.equal(ends[0].u1, ends[2].u1)
    for solution in ends:
        torch.testing.assert_close(solution.u1, 2 + solution.brownian(0.0, 1.0))
    assert not torch.allclose(ends[0].u1, ends[1].u1)


def test_one_pair_solved_in_several_ways() -> None:
    """Kinds of noise, methods, their parameters, and options, one after the other, twice."""
    f, g = Scaled(), Scaled()
    spec = psn.SDEProblem(f, g, torch.ones(2, dtype=D), (0.0, 1.0))
    ways: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (psn.EM(), {}, {"dt0": 0.5}),
        (psn.EM(), {}, {"dt0": 0.25}),
        (psn.RKMil(), {}, {"dt0": 0.5}),
        (psn.RKMil(), {"interpretation": "stratonovich"}, {"dt0": 0.5}),
        (psn.EM(), {"noise": "scalar"}, {"dt0": 0.5}),
        (psn.SOSRI(delta=1.0), {}, {"controller": psn.PIController(), "rtol": 0.1}),
        (psn.SOSRI(delta=0.01), {}, {"controller": psn.PIController(), "rtol": 0.1}),
    ]
    found: list[list[Tensor]] = []
    for _ in range(2):
        found.append([])
        for method, kind, options in ways:
            problem = psn.SDEProblem(f, g, spec.u0, (0.0, 1.0), **kind)
            for compile in (True, False):
                how = {**ONE_STEP, **options, "compile": compile}
                generator = torch.Generator().manual_seed(3)
                found[-1].append(psn.solve(problem, method, generator=generator, **how).u1)
    for first, again in zip(*found, strict=True):
        assert torch.equal(first, again)
    for native, eager in zip(found[0][::2], found[0][1::2], strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-12, atol=1e-12)


def test_dense_output_belongs_to_its_own_solve() -> None:
    f, g = Scaled(), Scaled()
    problem = psn.SDEProblem(f, g, torch.ones(2, dtype=D), (0.0, 1.0))
    how: dict[str, Any] = {**ONE_STEP, "dt0": 0.5}
    solutions = []
    for scale in (1.0, 1.0, 2.0):
        g.scale = scale
        solutions.append((psn.solve(problem, psn.EM(), **how), scale))
    for solution, scale in solutions:
        w = solution.brownian(0.0, 0.25)
        torch.testing.assert_close(solution(0.25), 1.25 + scale * w)
    with torch.no_grad():
        g.rate.mul_(2)
    with pytest.raises(RuntimeError, match=r"diffusion\.rate"):
        solutions[-1][0](0.25)


def test_solves_that_look_the_same_are_prepared_once() -> None:
    f, g = Scaled(), Scaled()
    with mock.patch.object(Translated, "of", wraps=Translated.of) as made:
        for scale in (1.0, 1.0, 2.0, 2.0):
            with torch.no_grad():
                f.rate.add_(1.0)
            g.scale = scale
            for seed in (1, 2):
                one_step(f, g, seed=seed)
    assert made.call_count == 2
