"""torchsde's `sdeint` and `sdeint_adjoint`: values, gradients, and what is refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pysciml_node.compat import torchsde

ITO = ("euler", "milstein", "srk")
STRATONOVICH = ("midpoint", "heun", "euler_heun", "milstein", "reversible_heun", "log_ode")


class Linear(torchsde.BaseSDE):
    """`dy = a y dt + s y dW`, by the same process in either interpretation."""

    def __init__(self, noise_type: str, sde_type: str) -> None:
        super().__init__(noise_type, sde_type)
        self.rate = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.size = nn.Parameter(torch.tensor([0.4, 0.2], dtype=torch.float64))

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        shift = 0.0 if self.sde_type == "ito" else self.size.square() / 2
        return (self.rate - shift) * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        g = self.size * y
        return g if self.noise_type == "diagonal" else g.unsqueeze(-1)


class Net(nn.Module):
    """Small networks for any noise; with the methods that are asked for."""

    def __init__(self, noise_type: str, sde_type: str = "stratonovich", m: int = 2) -> None:
        super().__init__()
        self.noise_type, self.sde_type = noise_type, sde_type
        self.m = {"diagonal": 3, "scalar": 1}.get(noise_type, m)
        self.drift = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        width = 3 if noise_type == "diagonal" else 3 * self.m
        self.noise = nn.Linear(1 if noise_type == "additive" else 3, width).double()
        self.calls = 0

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.drift(y) * torch.cos(t)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        given = t.expand(len(y), 1) if self.noise_type == "additive" else y
        if self.noise_type == "diagonal":
            return 0.3 * torch.tanh(y * self.noise.bias + 1)
        return 0.3 * torch.tanh(self.noise(given)).view(len(y), 3, self.m)

    def h(self, t: Tensor, y: Tensor) -> Tensor:
        return -y


class Named:
    """An SDE with chosen methods of another one."""

    def __init__(self, sde: Any, **methods: Any) -> None:
        self.noise_type, self.sde_type = sde.noise_type, sde.sde_type
        self.__dict__.update(methods)


def motion(shape: tuple[int, ...] = (4, 3), level: str = "foster") -> torchsde.BrownianInterval:
    return torchsde.BrownianInterval(
        0.0, 1.0, shape, torch.float64, levy_area_approximation=level, entropy=5
    )


@pytest.mark.parametrize("noise", ["diagonal", "scalar"])
@pytest.mark.parametrize(
    ("sde_type", "method"),
    [*(("ito", m) for m in ITO), *(("stratonovich", m) for m in STRATONOVICH)],
)
def test_methods_converge_to_the_exact_path(noise: str, sde_type: str, method: str) -> None:
    """Geometric Brownian motion on a given path: `exp((a - s^2 / 2) t + s W)`, saved inside too."""
    sde, y0 = Linear(noise, sde_type), torch.ones(200, 2, dtype=torch.float64)
    bm = motion((200, 2 if noise == "diagonal" else 1))
    ts, errors = [0.0, 0.33, 1.0], []
    for dt in (1 / 16, 1 / 64):
        with torch.no_grad():
            ys = torchsde.sdeint(sde, y0, ts, bm=bm, method=method, dt=dt)
            exact = [
                torch.exp((sde.rate - sde.size**2 / 2) * t + sde.size * bm(0.0, t)) for t in ts
            ]
        errors.append((ys - torch.stack(exact)).square().mean((1, 2)).sqrt()[1:])
    order = {"euler": 0.5, "srk": 1.5}.get(method, 1.0)
    slopes = (errors[0] / errors[1]).log() / math.log(4)
    assert bool((slopes > order - 0.3).all())
    assert errors[1].max() < 0.05


@pytest.mark.parametrize("noise", ["diagonal", "scalar", "additive", "general"])
@pytest.mark.parametrize("method", ["midpoint", "reversible_heun", "log_ode", "euler", "srk"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_both_gradients_are_those_of_the_steps(noise: str, method: str, adaptive: bool) -> None:
    """`sdeint_adjoint` against autograd through `sdeint`, exact whatever the step is."""
    if (noise, method) == ("general", "srk"):
        return
    torch.manual_seed(0)
    sde = Net(noise, "ito" if method in ITO else "stratonovich")
    y0 = torch.full((4, 3), 0.3, dtype=torch.float64, requires_grad=True)
    inputs = [y0, *sde.drift.parameters(), sde.noise.bias]
    bm, weights = motion((4, sde.m)), torch.randn(3, 4, 3, dtype=torch.float64)
    found = []
    for solve in (torchsde.sdeint, torchsde.sdeint_adjoint):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ys = solve(
                sde, y0, [0.0, 0.3, 1.0], bm=bm, method=method, dt=0.25, adaptive=adaptive,
                rtol=0.1, atol=0.1,
            )  # fmt: skip
        found.append((ys, torch.autograd.grad((ys * weights).sum(), inputs)))
    (one, first), (other, second) = found
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ts", [[0.0, 1.0], [0.0, 0.23, 0.5, 1.0]])
@pytest.mark.parametrize("noise", ["diagonal", "scalar", "additive", "general"])
def test_the_reversible_gradient_is_exact_without_the_states_of_the_steps(
    noise: str, ts: list[float]
) -> None:
    """It is plain backpropagation's; what is kept does not grow with the number of steps."""
    torch.manual_seed(0)
    sde = Net(noise)
    y0 = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    inputs = [y0, *sde.parameters()]

    def solve(function: Any, dt: float) -> tuple[list[Tensor], int]:
        bm = torchsde.BrownianInterval(0.0, 1.0, (4, sde.m), torch.float64, entropy=3)
        sizes: list[int] = []

        def pack(x: Tensor) -> Tensor:
            sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            ys, (_, _, z) = function(sde, y0, ts, bm, method="reversible_heun", dt=dt, extra=True)
            sizes = list(sizes)
            loss = ys.square().sum() + torch.sin(z).sum()
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in gradients], sum(sizes)

    reversed_, few = solve(torchsde.sdeint_adjoint, 0.02)
    recorded, many = solve(torchsde.sdeint, 0.02)
    torch.testing.assert_close(reversed_, recorded, rtol=1e-10, atol=1e-12)
    assert solve(torchsde.sdeint_adjoint, 0.002)[1] == few < many / 20


def test_the_way_back_of_a_contracting_equation_does_not_drift_away() -> None:
    """In float32 its rounding errors grow by `exp(20)` from the end to the start."""

    class Contracting(torchsde.SDEStratonovich):
        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return -20 * y * self.rate

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return 0.3 * torch.ones_like(y)

    sde = Contracting("diagonal")
    sde.rate = nn.Parameter(torch.tensor(1.0))
    gradients = []
    for function in (torchsde.sdeint_adjoint, torchsde.sdeint):
        torch.manual_seed(1)
        ys = function(sde, torch.ones(8, 2), [0.0, 1.0], method="reversible_heun", dt=2**-9)
        gradients.append(torch.autograd.grad(ys[-1].square().sum(), sde.rate)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=0.0)


def test_a_changed_sde_is_noticed_on_the_way_back() -> None:
    sde = Net("diagonal")
    ys = torchsde.sdeint_adjoint(
        sde, torch.ones(4, 3).double(), [0.0, 1.0], method="reversible_heun", dt=0.05
    )
    with torch.no_grad():
        sde.drift[0].weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="changed"):
        ys.sum().backward()


def test_errors_of_a_solve_speak_of_torchsde() -> None:
    sde, y0 = Net("diagonal"), torch.ones(4, 3).double()
    mask = nn.Dropout(0.5)
    sde.f = lambda t, y: mask(y)  # type: ignore[method-assign]
    for adaptive in (False, True):
        with pytest.raises(ValueError, match=r"sde.eval\(\).*use sdeint with adaptive=False"):
            torchsde.sdeint_adjoint(
                sde, y0, [0.0, 1.0], method="midpoint", dt=0.1, adaptive=adaptive
            )


def test_gradients_of_a_path_by_finite_differences() -> None:
    sde, bm = Linear("diagonal", "ito"), motion((2, 2))

    def end(y0: Tensor, size: Tensor) -> Tensor:
        names = {"diffusion": "scaled"}
        scaled = Named(sde, f=sde.f, scaled=lambda t, y: size * torch.sin(y))
        return torchsde.sdeint_adjoint(scaled, y0, [0.0, 1.0], bm=bm, dt=0.25, names=names)[-1]

    given = torch.rand(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(end, tuple(x.requires_grad_() for x in given))


@pytest.mark.parametrize("method", ["midpoint", "reversible_heun", "heun"])
def test_every_way_to_write_an_sde_gives_the_same_path(method: str) -> None:
    sde = Net("general")

    def product(t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return (sde.g(t, y) @ v.unsqueeze(-1)).squeeze(-1)

    ways = [
        {"f": sde.f, "g": sde.g},
        {"f_and_g": lambda t, y: (sde.f(t, y), sde.g(t, y))},
        {"f": sde.f, "g_prod": product},
        {"f_and_g_prod": lambda t, y, v: (sde.f(t, y), product(t, y, v))},
    ]
    y0, ends, calls = torch.full((4, 3), 0.3, dtype=torch.float64), [], []
    for way in ways:
        sde.calls = 0
        ys = torchsde.sdeint(
            Named(sde, **way), y0, [0, 1], bm=motion((4, 2)), method=method, dt=0.1
        )
        ends.append(ys[-1])
        calls.append(sde.calls)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-12, atol=1e-12)
    # One evaluation serves drift and diffusion; a few more look at the shapes.
    assert calls[1] <= calls[0] + 2


def test_levy_areas_give_noise_that_does_not_commute_its_order() -> None:
    """`dx = dW1, dy = dW2, dz = x dW2 - y dW1`: `z = 2 A`, which the midpoint rule cannot see."""

    class Area(torchsde.SDEStratonovich):
        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.zeros_like(y)

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            x, y, _ = y.unbind(-1)
            one, none = torch.ones_like(x), torch.zeros_like(x)
            return torch.stack((one, none, none, one, -y, x), -1).view(-1, 3, 2)

    bm, y0 = motion((50, 2)), torch.zeros(50, 3, dtype=torch.float64)
    ys = torchsde.sdeint(Area("general"), y0, [0.0, 1.0], bm=bm, dt=1.0, method="log_ode")
    _, area = bm(0.0, 1.0, return_A=True)
    torch.testing.assert_close(ys[-1, :, 2], 2 * area[:, 0, 1], rtol=1e-12, atol=1e-12)


def test_the_reversible_method_goes_back_where_it_came_from() -> None:
    sde = Net("general")
    minus = Named(sde, f=lambda t, y: -sde.f(-t, y), g=lambda t, y: -sde.g(-t, y))
    bm, ts = motion((4, 2)), torch.linspace(0, 1, 5, dtype=torch.float64)
    y0 = torch.full((4, 3), 0.1, dtype=torch.float64)
    options = {"method": "reversible_heun", "dt": 0.25}
    ys, (f, g, z) = torchsde.sdeint(sde, y0, ts, bm=bm, extra=True, **options)
    back = torchsde.sdeint(
        minus, ys[-1], -ts.flip(0), bm=torchsde.ReverseBrownian(bm),
        extra_solver_state=(-f, -g, z), **options,
    )  # fmt: skip
    torch.testing.assert_close(back.flip(0), ys, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="they are others"):
        torchsde.sdeint(sde, y0, ts, extra_solver_state=(f + 1, g, z), **options)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_solve_goes_on_from_the_state_of_the_one_before(adaptive: bool) -> None:
    """By the same steps, and its gradient is the same, however that is taken."""
    sde = Net("diagonal")
    y0 = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3).requires_grad_()
    bm = torchsde.BrownianInterval(0.0, 1.0, (4, 3), torch.float64, entropy=3)
    control = {"dt": 0.125, "adaptive": adaptive, "rtol": 1e-2, "atol": 1e-2}
    given = {"bm": bm, "method": "reversible_heun", **control}
    with torch.no_grad():
        ys, extra = torchsde.sdeint(sde, y0, [0.0, 0.5], extra=True, **given)
        assert (ys[-1] - extra[2]).abs().max() > 1e-3
        states = []
        for going_on in (False, True):
            with torch.set_grad_enabled(going_on):
                states.append(
                    torchsde.sdeint(sde, ys[-1], [0.5, 1.0], extra_solver_state=extra, **given)[-1]
                )
    torch.testing.assert_close(*states, rtol=1e-13, atol=1e-14)
    if not adaptive:
        whole = torchsde.sdeint(sde, y0, [0.0, 0.5, 1.0], **given)
        torch.testing.assert_close(states[1], whole[-1], rtol=1e-12, atol=1e-13)
    found = []
    for function, way in (
        (torchsde.sdeint, {}),
        (torchsde.sdeint_adjoint, {}),
        (torchsde.sdeint_adjoint, {"adjoint_method": "reversible_heun"}),
    ):
        ys, extra = function(sde, y0, [0.0, 0.5], extra=True, **given, **way)
        ys = function(sde, ys[-1], [0.5, 1.0], extra_solver_state=extra, **given, **way)
        loss = ys[-1].square().sum()
        inputs = [y0, *sde.parameters()]
        slopes = torch.autograd.grad(loss, inputs, materialize_grads=True)
        found.append((loss.detach(), *slopes))
    for other in found[1:]:
        for one, also in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, also, rtol=1e-9, atol=1e-11)


def test_derivatives_of_later_evaluations_are_refused_on_the_way_back() -> None:
    class Late(torchsde.SDEStratonovich):
        """Grows at a rate of one, by a graph that says another at each evaluation behind 0.5."""

        def __init__(self) -> None:
            super().__init__("diagonal")
            self.count = 0

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            self.count += 1
            return self.count * y - (self.count - 1) * y.detach() if t > 0.5 else y

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return 0.1 * torch.ones_like(y)

    y0 = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    ys = torchsde.sdeint_adjoint(Late(), y0, [0.0, 1.0], dt=0.125, method="reversible_heun")
    with pytest.raises(RuntimeError, match="depend on what earlier evaluations have"):
        ys[-1].sum().backward()


@pytest.mark.parametrize("noise", ["diagonal", "general"])
def test_relative_entropy_of_a_shifted_drift(noise: str) -> None:
    """`f - h = g c` with a constant `c`: the rate is `|c|^2 / 2`, for every path."""
    shift = torch.tensor([0.5, -0.2], dtype=torch.float64)

    class Shifted(torchsde.SDEIto):
        def h(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            size = 0.5 + y.cos().square()
            return size if noise == "diagonal" else torch.diag_embed(size)

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return self.h(t, y) + (0.5 + y.cos().square()) * shift

    y0, ts = torch.ones(4, 2, dtype=torch.float64), [0.0, 0.5, 2.0]
    ys, entropy = torchsde.sdeint(Shifted(noise), y0, ts, dt=0.125, logqp=True, method="euler")
    assert ys.shape == (3, 4, 2)
    rate = shift.square().sum() / 2
    expected = torch.stack((0.5 * rate.expand(4), 1.5 * rate.expand(4)))
    torch.testing.assert_close(entropy, expected, rtol=1e-10, atol=1e-12)


def test_adaptive_steps_go_on_at_dt_min_with_a_warning() -> None:
    sde, y0 = Linear("diagonal", "ito"), torch.ones(2, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match="reached dt_min=0.02"):
        ys = torchsde.sdeint(
            sde, y0, [0.0, 1.0], method="milstein", adaptive=True, rtol=1e-7, atol=1e-7, dt_min=0.02
        )
    assert bool(ys.isfinite().all())
    with pytest.warns(UserWarning, match="another solution"):
        torchsde.sdeint(sde, y0, [0.0, 1.0], method="euler", adaptive=True, rtol=0.1, atol=0.1)


def test_only_chosen_tensors_receive_gradients() -> None:
    sde = Net("diagonal")
    ys = torchsde.sdeint_adjoint(
        sde, torch.ones(2, 3).double(), [0.0, 1.0], dt=0.5, adjoint_params=(sde.noise.bias,)
    )
    ys.sum().backward()
    assert sde.noise.bias.grad is not None
    assert sde.drift[0].weight.grad is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "blah"}, "method must be one of"),
        ({"method": "euler"}, 'method "euler" is not for stratonovich SDEs with diagonal noise'),
        ({"ts": [0.0, 0.0]}, r"ts must increase, but ts\[1\] = 0.0 follows 0.0"),
        ({"ts": [0.0]}, "at least two times"),
        ({"bm": motion((4, 2))}, r"bm must have shape \(4, 3\) for the sde's diffusion"),
        ({"bm": motion((5, 3))}, r"bm must have shape \(4, m\)"),
        ({"bm": motion(), "ts": [0.0, 1.5]}, r"bm must cover ts, \[0.0, 1.5\]"),
        ({"bm": motion(level="none"), "method": "log_ode"}, "levy_area_approximation for method"),
        ({"bm": math.sin}, "bm must be a Brownian motion"),
        ({"y0": torch.ones(4, 3), "bm": motion()}, "bm must have the dtype of y0, torch.float32"),
        ({"y0": torch.ones(3)}, "y0 must be a tensor with 2 axes"),
        ({"dt": -1.0}, "dt must be"),
        ({"names": {"drift": "w"}}, "must have a drift"),
        ({"extra_solver_state": (torch.ones(4, 3),)}, "extra_solver_state must be"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    given = {"y0": torch.ones(4, 3).double(), "ts": [0.0, 1.0], **changes}
    with pytest.raises((TypeError, ValueError), match=message):
        torchsde.sdeint(Net("diagonal"), **given)
