"""Everything that a field uses gets its gradient, once, whatever the adjoint."""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.compat.torchdiffeq import odeint_adjoint

D = torch.float64
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
ADJOINTS = {
    "discrete": psn.DiscreteAdjoint(),
    "direct": psn.DirectAdjoint(),
    "interpolating": psn.InterpolatingAdjoint(),
    "backsolve": psn.BacksolveAdjoint(),
    "gauss": psn.GaussAdjoint(),
}
any_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)

AMPLITUDE: Any = None
HOLDER: Any = SimpleNamespace()


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=D, requires_grad=True)


def by_global(t: Tensor, u: Tensor) -> Tensor:
    return -u + (AMPLITUDE if 0.4 < t < 0.6 else 0.0)


def by_global_attribute(t: Tensor, u: Tensor) -> Tensor:
    return -u + (HOLDER.inner["amplitude"][0] if 0.4 < t < 0.6 else 0.0)


def by_helper(t: Tensor, u: Tensor) -> Tensor:
    return by_global(t, u)


class Slotted:
    """Attributes that are in no dict."""

    __slots__ = ("amplitude",)

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        return -u + (self.amplitude if 0.4 < t < 0.6 else 0.0)


class Plain:
    """An object with a method, which holds others."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def field(self, t: Tensor, u: Tensor) -> Tensor:
        return -u + (self.held[0]["amplitude"] if 0.4 < t < 0.6 else 0.0)


class WithClassAttribute:
    """The tensor belongs to the class."""

    amplitude: Any = None

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        return -u + (self.amplitude if 0.4 < t < 0.6 else 0.0)


class Module(nn.Module):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self, amplitude: Tensor) -> None:
        super().__init__()
        self.amplitude = amplitude

    def forward(self, t: Tensor, u: Tensor, p: Any = None) -> Tensor:
        return -u + (self.amplitude if 0.4 < t < 0.6 else 0.0)


def _slotted(x: Tensor) -> Slotted:
    found = Slotted()
    found.amplitude = x
    return found


def _globally(x: Tensor, field: Callable[..., Tensor]) -> Callable[..., Tensor]:
    global AMPLITUDE
    AMPLITUDE = x
    HOLDER.inner = {"amplitude": (x,)}
    return field


def _on_class(x: Tensor) -> WithClassAttribute:
    WithClassAttribute.amplitude = x
    return WithClassAttribute()


def _default(x: Tensor) -> Callable[..., Tensor]:
    def field(t: Tensor, u: Tensor, amplitude: Tensor = x) -> Tensor:
        return -u + (amplitude if 0.4 < t < 0.6 else 0.0)

    return lambda t, u: field(t, u)


def switched(amplitude: Any, t: Tensor, u: Tensor) -> Tensor:
    return -u + (amplitude if 0.4 < t < 0.6 else 0.0)


def switched_by_name(t: Tensor, u: Tensor, amplitude: Any) -> Tensor:
    return switched(amplitude, t, u)


WAYS: dict[str, Callable[[Tensor], tuple[Any, Any]]] = {
    "closure": lambda x: (lambda t, u: switched(x, t, u), None),
    "nested closure": lambda x: (lambda t, u: (lambda: switched(x, t, u))(), None),
    "global": lambda x: (_globally(x, by_global), None),
    "global of a helper": lambda x: (_globally(x, by_helper), None),
    "attribute of a global": lambda x: (_globally(x, by_global_attribute), None),
    "partial": lambda x: (functools.partial(switched, x), None),
    "keyword of a partial": lambda x: (functools.partial(switched_by_name, amplitude=x), None),
    "default": lambda x: (_default(x), None),
    "bound method": lambda x: (Plain([{"amplitude": x}]).field, None),
    "slot": lambda x: (_slotted(x), None),
    "class attribute": lambda x: (_on_class(x), None),
    "module attribute": lambda x: (Module(x), None),
    "module inside": lambda x: (nn.ModuleList([Module(x)])[0].forward, None),
    "p": lambda x: (lambda t, u, p: switched(p["of"][0], t, u), {"of": (x,)}),
    "module as p": lambda x: (lambda t, u, p: p(t, u), Module(x)),
    "object as p": lambda x: (lambda t, u, p: p.field(t, u), Plain([{"amplitude": x}])),
}
any_way = pytest.mark.parametrize("way", WAYS)


@any_way
@any_adjoint
@pytest.mark.parametrize("computed", [False, True], ids=["leaf", "computed"])
def test_used_in_the_middle_alone(adjoint: psn.DiscreteAdjoint, way: str, computed: bool) -> None:
    """`u' = -u + a` for `.4 < t < .6`, else `u' = -u`: `du1/da = exp(-.4) - exp(-.6)`."""
    source = leaf(2.0)
    upstream = []
    amplitude = source * 3 if computed else source
    if computed:
        assert amplitude.grad_fn is not None
        amplitude.grad_fn.register_hook(lambda *_: upstream.append(1))
    field, p = WAYS[way](amplitude)
    problem = psn.ODEProblem(field, torch.zeros(1, dtype=D), (0.0, 1.0), p=p)
    solution = psn.solve(problem, adjoint=adjoint, tstops=[0.4, 0.6], **TIGHT)
    solution.u1.sum().backward()
    right = (3 if computed else 1) * (math.exp(-0.4) - math.exp(-0.6))
    assert source.grad is not None
    assert source.grad.item() == pytest.approx(right, rel=1e-7)
    # What has computed it is gone through once, and it stands where it stood.
    assert len(upstream) == computed
    assert amplitude.requires_grad
    assert amplitude.is_leaf != computed


FIRST, SECOND = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()


@any_adjoint
def test_a_module_of_one_regime(adjoint: psn.DiscreteAdjoint) -> None:
    """`u' = b(u)` in `(.3, .7)`, `u' = a(u)` elsewhere; the gradient is that of autograd."""

    def run(adjoint: psn.DiscreteAdjoint) -> tuple[Tensor, ...]:
        def field(t: Tensor, u: Tensor) -> Tensor:
            return SECOND(u) if 0.3 < t < 0.7 else FIRST(u)

        problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
        u1 = psn.solve(problem, adjoint=adjoint, tstops=[0.3, 0.7], **TIGHT).u1
        return torch.autograd.grad(u1, [*FIRST.parameters(), *SECOND.parameters()])

    torch.testing.assert_close(run(adjoint), run(psn.DirectAdjoint()), rtol=1e-6, atol=1e-9)


@any_adjoint
def test_left_over_tensors_are_left_alone(adjoint: psn.DiscreteAdjoint) -> None:
    """An attribute whose graph has been freed is no input, and its graph is not gone through."""
    module = Module(leaf(1.0) * 2)
    module.amplitude.backward()
    right = math.exp(-0.4) - math.exp(-0.6)
    weight = leaf(2.0)
    field = Plain([{"amplitude": weight}])
    field.left_over = module.amplitude  # type: ignore[attr-defined]
    problem = psn.ODEProblem(field.field, torch.zeros(1, dtype=D), (0.0, 1.0))
    psn.solve(problem, adjoint=adjoint, tstops=[0.4, 0.6], **TIGHT).u1.sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(right, rel=1e-7)


class Remembering(nn.Module):
    """Keeps what it has computed, as logging code does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=D))
        self.last: Any = None
        self.calls: list[float] = []
        self.count = 0

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        self.count += 1
        self.calls.append(t.item())
        self.time = t.detach().clone().requires_grad_()
        self.last = -self.weight * u + 0 * self.time
        return self.last


@any_adjoint
def test_fields_that_keep_what_they_compute(adjoint: psn.DiscreteAdjoint) -> None:
    """Twice, so that the second solve meets what the first one's backward pass has left."""
    field = Remembering()
    for _ in range(2):
        problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
        solution = psn.solve(problem, adjoint=adjoint, **TIGHT)
        (found,) = torch.autograd.grad(solution.u1, field.weight)
        assert found.item() == pytest.approx(-math.exp(-0.5), rel=1e-6)
        stats = solution.stats
        assert field.count == len(field.calls) == stats.nfe + stats.nfe_backward
        field.count, field.calls = 0, []


HIDDEN = threading.local()


@any_adjoint
def test_hidden_tensors_are_found_at_the_start_or_refused(adjoint: psn.DiscreteAdjoint) -> None:
    """In places that no walk can see into."""
    HIDDEN.early, HIDDEN.late = leaf(1.0), leaf(2.0)

    def field(t: Tensor, u: Tensor) -> Tensor:
        rate = HIDDEN.early * u
        return rate * HIDDEN.late if HIDDEN.switch and t > 0.5 else rate

    def run(switch: bool) -> Tensor:
        HIDDEN.switch = switch
        problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
        u1: Tensor = psn.solve(problem, adjoint=adjoint, tstops=[0.5], **TIGHT).u1
        return u1.sum()

    (found,) = torch.autograd.grad(run(False), HIDDEN.early)
    assert found.item() == pytest.approx(math.e, rel=1e-6)
    end = run(True)
    if isinstance(adjoint, psn.DirectAdjoint):
        (found,) = torch.autograd.grad(end, HIDDEN.late)
        assert found.item() == pytest.approx(0.5 * math.exp(1.5), rel=1e-6)
    else:
        with pytest.raises(RuntimeError, match=r"not seen at t0.*\n.*p="):
            end.backward()


class OwnLeaf(nn.Module):
    """Makes a leaf for itself, as FFJORD does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=D))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        with torch.enable_grad():
            own = t.detach().clone().requires_grad_()
            return self.weight * u * torch.cos(own)


@any_adjoint
@pytest.mark.parametrize("recorded", [True, False])
def test_leaves_made_inside_are_nobodys_input(adjoint: psn.DiscreteAdjoint, recorded: bool) -> None:
    """`u' = w u cos t`: `du1/dw = sin(1) exp(w sin 1)`, twice for two entries."""
    field = OwnLeaf()
    problem = psn.ODEProblem(field, torch.ones(2, dtype=D), (0.0, 1.0))
    with torch.set_grad_enabled(recorded):
        end = psn.solve(problem, adjoint=adjoint, **TIGHT).u1.sum()
    assert end.item() == pytest.approx(2 * math.exp(0.5 * math.sin(1)), rel=1e-7)
    if recorded:
        end.backward()
        assert field.weight.grad is not None
        assert field.weight.grad.item() == pytest.approx(2.5632568, rel=1e-6)
    else:
        assert not end.requires_grad


def hamiltonian(stiffness: Tensor) -> Callable[..., Tensor]:
    """Asks whether its argument needs gradients, and differentiates an energy."""

    def field(t: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x if x.requires_grad else x.clone().requires_grad_()
            energy = 0.5 * (stiffness * y[:, 0] ** 2 + y[:, 1] ** 2).sum()
            (g,) = torch.autograd.grad(energy, y, create_graph=True)
        return torch.stack((g[:, 1], -g[:, 0]), 1)

    return field


@any_adjoint
@pytest.mark.parametrize("needs", [False, True])
def test_hamiltonian_fields(adjoint: psn.DiscreteAdjoint, needs: bool) -> None:
    """`q = cos(sqrt(k) t)`: `dq/dk = -sin(2) / 4` at `k = 4`, `t = 1`."""
    k = leaf(4.0)
    u0 = torch.tensor([[1.0, 0.0]], dtype=D, requires_grad=needs)
    problem = psn.ODEProblem(hamiltonian(k), u0, (0.0, 1.0))
    psn.solve(problem, adjoint=adjoint, **TIGHT).u1[0, 0].backward()
    assert k.grad is not None
    assert k.grad.item() == pytest.approx(-math.sin(2) / 4, rel=1e-6)
    with torch.no_grad():
        end = psn.solve(problem, adjoint=adjoint, **TIGHT).u1[0, 0]
    assert end.item() == pytest.approx(math.cos(2), rel=1e-6)


def test_hamiltonian_fields_of_the_drop_in() -> None:
    k = leaf(4.0)
    u0, times = torch.tensor([[1.0, 0.0]], dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    field = hamiltonian(k)
    odeint_adjoint(field, u0, times, adjoint_params=(k,))[-1][0, 0].backward()
    assert k.grad is not None
    assert k.grad.item() == pytest.approx(-math.sin(2) / 4, rel=1e-5)


def test_adjoint_params_that_are_computed() -> None:
    """`u' = -c u`, `c = 2 w`; what made `c` is gone through once."""
    w = torch.ones(2, dtype=D, requires_grad=True)
    c, calls = w * 2, []
    assert c.grad_fn is not None
    c.grad_fn.register_hook(lambda *_: calls.append(1))

    class Decay(nn.Module):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return -c * u

    times = torch.tensor([0.0, 1.0], dtype=D)
    u0 = torch.ones(2, dtype=D)
    end = odeint_adjoint(Decay(), u0, times, rtol=1e-9, atol=1e-9, adjoint_params=(c,))[-1].sum()
    (found,) = torch.autograd.grad(end, c, retain_graph=True)
    torch.testing.assert_close(found, torch.full_like(c, -math.exp(-2)), rtol=1e-6, atol=0)
    end.backward()
    assert len(calls) == 1


REGULARIZERS = {
    "none": None,
    "global": psn.GlobalError(weight=0.1),
    "kinetic": psn.KineticEnergy(weight=0.1),
    "jacobian": psn.JacobianFrobenius(weight=0.1),
    "taylor": psn.TaylorDerivative(2, weight=0.1),
    "local": psn.LocalError(weight=0.1),
}


@pytest.mark.parametrize(
    ("adjoint", "regularizer"),
    [
        pytest.param(adjoint, regularizer, id=f"{name}-{regularizer}")
        for name, adjoint in ADJOINTS.items()
        for regularizer in REGULARIZERS
        if adjoint.discrete or regularizer != "global"
    ],
)
def test_hooks_see_the_whole_gradient_once(adjoint: psn.DiscreteAdjoint, regularizer: str) -> None:
    """A hook that multiplies by ten multiplies by ten; gradients without it are the yardstick."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            out: Tensor = self.net(u)
            return out

    penalty = REGULARIZERS[regularizer]
    node = psn.NeuralODE(
        Field(),
        adjoint=adjoint,
        rtol=1e-6,
        atol=1e-6,
        regularizers=[] if penalty is None else [penalty],
    )
    gradients = []
    for hooked in (False, True):
        net.zero_grad()
        calls: list[Tensor] = []
        accumulated: list[int] = []
        handles = []
        if hooked:
            handles = [
                net[0].weight.register_hook(lambda g, calls=calls: (calls.append(g), 10 * g)[1]),
                net[0].weight.register_post_accumulate_grad_hook(
                    lambda _, accumulated=accumulated: accumulated.append(1)
                ),
            ]
        torch.manual_seed(1)
        solution = node(torch.ones(3, 2, dtype=D))
        (solution.u1.sum() + solution.penalty).backward()
        for handle in handles:
            handle.remove()
        assert net[0].weight.grad is not None
        gradients.append(net[0].weight.grad.clone())
        assert len(calls) == len(accumulated) == hooked
    torch.testing.assert_close(gradients[1], 10 * gradients[0])


@any_adjoint
def test_hooks_inside_of_a_field_are_called_with_gradients(adjoint: psn.DiscreteAdjoint) -> None:
    """One that doubles them makes `l' = 2 l` of the adjoint equation `l' = l`.

    The steps behind the saved time have no part in it.
    """
    seen: list[Tensor] = []

    def field(t: Tensor, u: Tensor) -> Tensor:
        rate = -u
        if rate.requires_grad:
            rate.register_hook(lambda g: (seen.append(g), 2 * g)[1])
        return rate

    u0 = torch.ones(1, dtype=D, requires_grad=True)
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    solution = psn.solve(problem, adjoint=adjoint, saveat=[0.25], **TIGHT)
    (slope,) = torch.autograd.grad(solution.u.sum(), u0)
    assert slope.item() == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert seen
    assert all(isinstance(g, Tensor) for g in seen)


@any_adjoint
def test_hooks_that_are_registered_behind_the_solve(adjoint: psn.DiscreteAdjoint) -> None:
    """They run where there is a gradient, and see the sum of all; elsewhere they do not."""
    used, unused, both = leaf(1.0), leaf(2.0), leaf(3.0)
    field = Plain([{"amplitude": used}, {"other": unused, "more": both}])
    problem = psn.ODEProblem(field.field, torch.zeros(1, dtype=D), (0.0, 1.0))
    u1 = psn.solve(problem, adjoint=adjoint, tstops=[0.4, 0.6], **TIGHT).u1.sum()
    (plain,) = torch.autograd.grad(u1, used, retain_graph=True)
    for x in (used, unused, both):
        x.register_hook(lambda g: 10 * g)
    for calls in (1, 2):
        (u1 + 2 * both.sum()).backward(retain_graph=calls == 1)
        assert used.grad is not None
        assert both.grad is not None
        torch.testing.assert_close(used.grad, 10 * calls * plain)
        torch.testing.assert_close(both.grad, torch.full_like(both, 20.0 * calls))
        assert unused.grad is None


@any_adjoint
def test_hooks_of_what_is_not_used_do_not_run(adjoint: psn.DiscreteAdjoint) -> None:
    used, unused = leaf(1.0), leaf(2.0)
    unused.register_hook(lambda g: 10 * g)
    field = Plain([{"amplitude": used}, {"other": unused}])
    problem = psn.ODEProblem(field.field, torch.zeros(1, dtype=D), (0.0, 1.0))
    psn.solve(problem, adjoint=adjoint, tstops=[0.4, 0.6], **TIGHT).u1.sum().backward()
    assert used.grad is not None
    assert unused.grad is None


@any_adjoint
def test_an_encoder_is_gone_through_once(adjoint: psn.DiscreteAdjoint) -> None:
    """Its output is captured, and so is one of its weights: the two ways add up."""
    encoder = nn.Linear(2, 2).double()
    torch.manual_seed(0)
    x = torch.randn(3, 2, dtype=D)

    def run(adjoint: psn.DiscreteAdjoint) -> tuple[tuple[Tensor, ...], int]:
        calls: list[int] = []
        context = encoder(x).tanh()
        context.grad_fn.register_hook(lambda *_: calls.append(1))

        def field(t: Tensor, u: Tensor) -> Tensor:
            return u @ encoder.weight.T * context

        problem = psn.ODEProblem(field, torch.ones(3, 2, dtype=D), (0.0, 1.0))
        end = psn.solve(problem, adjoint=adjoint, **TIGHT).u1
        return torch.autograd.grad(end.sum(), list(encoder.parameters())), len(calls)

    found, calls = run(adjoint)
    right, _ = run(psn.DirectAdjoint())
    assert calls == 1
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-9)


def test_the_walk_is_bounded_and_touches_nothing() -> None:
    """Properties are not read, large containers are not copied, and cycles end."""

    class Dangerous:
        def __init__(self) -> None:
            self.me, self.many, self.root = self, [0.0] * 100_000, sys.modules
            self.weight = leaf(0.5)

        @property
        def trap(self) -> Tensor:
            raise AssertionError("a property was read")

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"asked for {name}")

        def __call__(self, t: Tensor, u: Tensor) -> Tensor:
            return -self.weight * u

    field = Dangerous()
    solution = psn.solve(psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0)), **TIGHT)
    (found,) = torch.autograd.grad(solution.u1, field.weight)
    assert found.item() == pytest.approx(-math.exp(-0.5), rel=1e-6)


@pytest.mark.parametrize("chosen", ["none", "one", "all"])
def test_adjoint_params_restrict(chosen: str) -> None:
    """Gradients go to what is named alone; `u' = -a b u`."""
    a, b = leaf(0.5), leaf(2.0)
    u0 = torch.ones(1, dtype=D, requires_grad=True)
    named = {"none": (), "one": (a,), "all": (a, b)}[chosen]
    times = torch.tensor([0.0, 1.0], dtype=D)
    options: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9, "adjoint_params": named}
    odeint_adjoint(lambda t, u: -a * b * u, u0, times, **options)[-1].sum().backward()
    right = {id(u0): math.exp(-1), id(a): -2 * math.exp(-1), id(b): -0.5 * math.exp(-1)}
    for x in (u0, a, b):
        if x is u0 or any(x is y for y in named):
            assert x.grad is not None
            assert x.grad.item() == pytest.approx(right[id(x)], rel=1e-6)
        else:
            assert x.grad is None


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.GaussAdjoint()])
def test_sparse_tensors_that_receive_gradients_are_made_in_the_field(adjoint: Any) -> None:
    """Made outside they are refused in words; made inside of the field, as dense ones do."""
    places, u0 = torch.tensor([[0, 1, 0], [1, 0, 0]]), torch.tensor([[1.0], [-0.5]]).double()
    weights = torch.tensor([0.1, 0.4, -0.3], dtype=torch.float64, requires_grad=True)

    def matrix() -> Tensor:
        return torch.sparse_coo_tensor(places, weights, (2, 2), check_invariants=True)

    def gradient(matrix: Callable[[], Tensor]) -> Tensor:
        problem = psn.ODEProblem(lambda t, u: matrix() @ u, u0, (0.0, 1.0))
        loss = psn.solve(problem, rtol=1e-9, atol=1e-9, adjoint=adjoint).u1.sum()
        return torch.autograd.grad(loss, weights)[0]

    outside = matrix()
    with pytest.raises(TypeError, match=r"sparse_coo[\s\S]*inside of the field"):
        gradient(lambda: outside)
    dense = gradient(lambda: matrix().to_dense())
    torch.testing.assert_close(gradient(matrix), dense, rtol=1e-10, atol=1e-10)
