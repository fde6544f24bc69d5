"""Native loops over members: each as alone, whatever neighbours, threads and field are."""

from __future__ import annotations

import math
import pickle
import signal
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_threads import threads

import pysciml_node as psn
from pysciml_node.torch_engine.native import member_code, member_library, member_run
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
M = 11  # more than go abreast, and no multiple of it


class Net(nn.Module):
    """Shared weights, a gain of each member's own, and the time."""

    def __init__(self, size: int = 3, hidden: int = 5, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Linear(size + 1, hidden), nn.Linear(hidden, size)
        for x in self.parameters():
            x.data = torch.randn(x.shape, dtype=D, generator=generator) * 0.7

    def forward(self, t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
        """Evaluate the derivative at `u`, shape `(size,)`."""
        wide = torch.cat([u, t.reshape(1)])
        out: Tensor = self.second(torch.tanh(self.first(wide))) * p["gain"] - 0.1 * u * p["decay"]
        return out


NET = Net()


def net_problem(m: int = M, seed: int = 1, own: bool = True) -> psn.EnsembleProblem:
    """Members with states and parameters of their own, all of which take gradients."""
    generator = torch.Generator().manual_seed(seed)
    p = {
        "gain": (1 + torch.rand(m, 3, dtype=D, generator=generator) * 3).requires_grad_(),
        "decay": torch.rand(m, dtype=D, generator=generator).requires_grad_(),
    }
    u0 = torch.randn(m, 3, dtype=D, generator=generator).requires_grad_()
    first = {name: x[0].detach() for name, x in p.items()}
    shared = {name: x.clone().requires_grad_() for name, x in first.items()}
    problem = psn.ODEProblem(NET, u0[0].detach(), (0.0, 2.0), p=first if own else shared)
    return psn.EnsembleProblem(problem, u0, p if own else None)


def leaves(ensemble: psn.EnsembleProblem) -> list[Tensor]:
    p = ensemble.problem.p if ensemble.p is None else ensemble.p
    inputs = [ensemble.u0, *p.values(), *ensemble.problem.f.parameters()]
    return [x for x in inputs if x is not None and x.requires_grad]


def solve(ensemble: psn.EnsembleProblem, compile: bool = True, **options: Any) -> Any:
    options = {"rtol": 1e-6, "atol": 1e-8, "engine": "torch"} | options
    return psn.solve(ensemble, options.pop("algorithm", psn.Tsit5()), compile=compile, **options)


def loss_of(solution: Any) -> Tensor:
    loss = (solution.u1**3).sum()
    if solution.t is not None:
        weights = torch.linspace(-1, 2, solution.u.numel(), dtype=D).reshape(solution.u.shape)
        loss = loss + (solution.u * weights).sum()
    return loss


def assert_like_eager(ensemble: psn.EnsembleProblem, tight: float = 1e-12, **options: Any) -> Any:
    native, eager = (solve(ensemble, compile, **options) for compile in (True, False))
    assert native.retcodes == eager.retcodes
    assert [s.naccept for s in native.member_stats] == [s.naccept for s in eager.member_stats]
    assert native.stats.nfe == eager.stats.nfe
    torch.testing.assert_close(native.u1, eager.u1, rtol=tight, atol=tight)
    if native.t is not None:
        torch.testing.assert_close(native.u, eager.u, rtol=tight, atol=tight)
    wanted = leaves(ensemble)
    if wanted:
        bars, others = (torch.autograd.grad(loss_of(s), wanted) for s in (native, eager))
        for bar, other in zip(bars, others, strict=True):
            torch.testing.assert_close(bar, other, rtol=10 * tight, atol=10 * tight)
    return native


TIMES = [0.0, 0.3, 0.31, 1.7, 2.0]
# Error estimates are small differences of large numbers: steps that follow them differ a little.
ADAPTIVE = 1e-10
OPTIONS: dict[str, tuple[float, dict[str, Any]]] = {
    "fixed": (1e-12, {"controller": psn.FixedStep(), "dt0": 0.11, "saveat": TIMES}),
    "fixed, stops": (1e-12, {"controller": psn.FixedStep(), "dt0": 0.3, "tstops": [0.5, 1.3]}),
    "adaptive": (ADAPTIVE, {"saveat": TIMES}),
    "integral": (ADAPTIVE, {"controller": psn.IController(), "tstops": [0.5, 1.3]}),
    "derivative": (ADAPTIVE, {"controller": psn.PIDController(), "saveat": TIMES}),
    "limits": (ADAPTIVE, {"dtmax": 0.05, "dt0": 0.01}),
    "by entries": (
        ADAPTIVE,
        {"rtol": torch.tensor([1e-6, 1e-4, 1e-5]), "atol": torch.tensor([1e-8, 1e-6, math.inf])},
    ),
    "of members": (ADAPTIVE, {"rtol": torch.logspace(-8, -3, M, dtype=D), "saveat": TIMES}),
    "of members, by entries": (
        ADAPTIVE, {"atol": torch.logspace(-8, -3, M * 3, dtype=D).reshape(M, 3)},
    ),
    "own times": (ADAPTIVE, {"saveat": torch.linspace(0, 2, M * 2, dtype=D).reshape(M, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_members_are_those_of_the_loop_in_python(name: str) -> None:
    tight, options = OPTIONS[name]
    assert_like_eager(net_problem(), tight, **options)


@pytest.mark.parametrize("algorithm", [psn.RK4(), psn.BS3(), psn.DP8(), psn.Vern7()], ids=repr)
def test_every_method(algorithm: Any) -> None:
    fixed = {"controller": psn.FixedStep(), "dt0": 0.21, "saveat": TIMES}
    assert_like_eager(net_problem(5), algorithm=algorithm, **fixed)
    if not isinstance(algorithm, psn.RK4):
        assert_like_eager(net_problem(5), 1e-7, algorithm=algorithm, rtol=1e-4, atol=1e-4)


def test_shared_parameters_take_the_sum_of_all_members() -> None:
    assert_like_eager(net_problem(own=False), ADAPTIVE, saveat=TIMES)


def test_intervals_of_their_own() -> None:
    ensemble = net_problem()
    start = torch.linspace(0, 1, M, dtype=D)
    tspan = torch.stack([start, 2.5 - 2 * start], 1)  # some go backward
    own = psn.EnsembleProblem(ensemble.problem, ensemble.u0, ensemble.p, tspan=tspan)
    assert_like_eager(own, ADAPTIVE, tstops=[0.7, 0.9])


class Parts(nn.Module):
    """A state of two parts, of which one is a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3, -1.0], [1.2, 0.1]], dtype=D))

    def forward(self, t: Tensor, u: dict[str, Tensor], p: dict[str, Tensor]) -> dict[str, Tensor]:
        """Evaluate the derivatives."""
        x, y = u["x"], u["y"]
        return {"x": self.weight @ x - x * y.mean(), "y": p["rate"] * torch.sin(t) * y.softmax(0)}


def test_states_with_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    u0 = {"x": torch.randn(M, 2, 2, dtype=D, generator=generator), "y": torch.ones(M, 3, dtype=D)}
    rate = torch.linspace(0.5, 2, M, dtype=D).requires_grad_()
    one = {name: x[0] for name, x in u0.items()}
    field = Parts()
    field.forward = lambda t, u, p: {  # type: ignore[method-assign]
        "x": field.weight @ u["x"] - u["x"] * u["y"].mean(),
        "y": p["rate"] * torch.sin(t) * u["y"] * u["x"].sum(),
    }
    problem = psn.ODEProblem(field, one, (0.0, 1.0), p={"rate": rate[0].detach()})
    ensemble = psn.EnsembleProblem(problem, u0, {"rate": rate})
    native, eager = (solve(ensemble, compile) for compile in (True, False))
    wanted = [rate, field.weight]
    results = []
    for solution in (native, eager):
        loss = (solution.u1["x"] ** 2).sum() + solution.u1["y"].sum()
        results.append([*solution.u1.values(), *torch.autograd.grad(loss, wanted)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=ADAPTIVE, atol=ADAPTIVE)


def test_networks_of_their_own() -> None:
    """Weights of each member's own, and a product of two states."""
    generator = torch.Generator().manual_seed(0)
    p = [torch.randn(M, *s, dtype=D, generator=generator) for s in ((4, 2), (4,), (2, 4), (2, 2))]
    p = [x.requires_grad_() for x in p]

    def f(t: Tensor, u: Tensor, p: list[Tensor]) -> Tensor:
        hidden = torch.tanh(u @ p[0].T + p[1])
        return (hidden @ p[2].T) @ p[3] * 0.3 - u @ (u.T @ u) * 0.01

    u0 = torch.randn(M, 3, 2, dtype=D, generator=generator).requires_grad_()
    problem = psn.ODEProblem(f, u0[0].detach(), (0.0, 1.0), p=[x[0].detach() for x in p])
    ensemble = psn.EnsembleProblem(problem, u0, p)
    native, eager = (solve(ensemble, compile) for compile in (True, False))
    torch.testing.assert_close(native.u1, eager.u1, rtol=ADAPTIVE, atol=ADAPTIVE)
    bars, others = (torch.autograd.grad((s.u1**2).sum(), [u0, *p]) for s in (native, eager))
    for bar, other in zip(bars, others, strict=True):
        torch.testing.assert_close(bar, other, rtol=1e-9, atol=1e-9)


def test_fields_without_a_state() -> None:
    """What depends on shared parameters alone, in the derivative and in a part of it."""
    weight = torch.linspace(-1, 1, 2, dtype=D).requires_grad_()
    u0 = torch.linspace(-1, 1, 2 * M, dtype=D).reshape(M, 2)

    def joined(t: Tensor, u: Tensor) -> Tensor:
        return torch.cat([torch.exp(weight[:1]), u[:1] * torch.exp(weight[1:])])

    fields = [lambda t, u: torch.exp(weight), joined, lambda t, u: weight]
    for f in fields:
        ensemble = psn.EnsembleProblem(psn.ODEProblem(f, u0[0], (0.0, 1.0)), u0)
        native, eager = (solve(ensemble, compile) for compile in (True, False))
        torch.testing.assert_close(native.u1, eager.u1, rtol=ADAPTIVE, atol=ADAPTIVE)
        bars, others = (torch.autograd.grad(s.u1.sum(), weight) for s in (native, eager))
        torch.testing.assert_close(bars, others, rtol=ADAPTIVE, atol=ADAPTIVE)


def test_fields_that_cannot_go_abreast_go_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv1d(1, 2, 3, padding=1).double()
    norm = nn.GroupNorm(1, 2).double()

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv, norm

        def forward(self, t: Tensor, u: Tensor, p: Tensor) -> Tensor:
            return (self.norm(self.conv(u.reshape(1, 1, 6))) * p).sum(1).reshape(6) - u

    u0 = torch.randn(M, 6, dtype=D, generator=generator).requires_grad_()
    p = torch.rand(M, 1, dtype=D, generator=generator).requires_grad_()
    field = Field()
    problem = psn.ODEProblem(field, u0[0].detach(), (0.0, 1.0), p=p[0].detach())
    ensemble = psn.EnsembleProblem(problem, u0, p)
    native, eager = (solve(ensemble, compile) for compile in (True, False))
    assert native.members.solve.library.abreast == 1
    torch.testing.assert_close(native.u1, eager.u1, rtol=ADAPTIVE, atol=ADAPTIVE)
    wanted = [u0, p, *field.parameters()]
    bars, others = (torch.autograd.grad((s.u1**2).sum(), wanted) for s in (native, eager))
    for bar, other in zip(bars, others, strict=True):
        torch.testing.assert_close(bar, other, rtol=1e-8, atol=1e-8)


def test_single_precision() -> None:
    rates = torch.linspace(0.5, 2, 40).requires_grad_()
    problem = psn.ODEProblem(lambda t, u, p: -p * u, torch.ones(2), (0.0, 1.0), p=torch.tensor(1.0))
    solution = solve(psn.EnsembleProblem(problem, p=rates), rtol=1e-5, atol=1e-5)
    expected = torch.exp(-rates.detach())
    torch.testing.assert_close(solution.u1[:, 0].detach(), expected, rtol=1e-5, atol=1e-5)
    (bar,) = torch.autograd.grad(solution.u1.sum(), rates)
    torch.testing.assert_close(bar, -2 * expected, rtol=1e-4, atol=1e-4)


def test_closed_form_and_finite_differences() -> None:
    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return p[0] * u + p[1] * torch.cos(t)

    def final(u0: Tensor, p: Tensor, *, tight: float = 1e-11) -> Tensor:
        problem = psn.ODEProblem(f, u0[0].detach(), (0.0, 1.0), p=p[0].detach())
        ensemble = psn.EnsembleProblem(problem, u0, p)
        out: Tensor = solve(ensemble, rtol=tight, atol=tight, saveat=[0.4, 1.0]).u
        return out

    u0 = torch.linspace(-1, 1, 3, dtype=D).reshape(3, 1).requires_grad_()
    p = torch.tensor([[-1.0, 0.0], [0.5, 0.0], [0.2, 0.0]], dtype=D).requires_grad_()
    found = final(u0, p)[:, :, 0]
    expected = u0.detach() * torch.exp(p.detach()[:, :1] * torch.tensor([0.4, 1.0], dtype=D))
    torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(final, (u0, p), eps=1e-5, atol=1e-5)


# Each as alone --------------------------------------------------------------------------------


def test_a_member_is_as_alone_to_the_last_bit() -> None:
    ensemble = net_problem()
    together = solve(ensemble, saveat=TIMES)
    wanted = [ensemble.u0, *ensemble.p.values()]
    bars = torch.autograd.grad(loss_of_members(together).sum(), wanted)
    for m in range(M):
        own = {name: x[m : m + 1].detach().requires_grad_() for name, x in ensemble.p.items()}
        u0 = ensemble.u0[m : m + 1].detach().requires_grad_()
        alone = solve(psn.EnsembleProblem(ensemble.problem, u0, own), saveat=TIMES)
        assert torch.equal(alone.u[0], together.u[m])
        assert alone.member_stats[0].nfe == together.member_stats[m].nfe
        others = torch.autograd.grad(loss_of_members(alone).sum(), [u0, *own.values()])
        for bar, other in zip(bars, others, strict=True):
            assert torch.equal(bar[m], other[0])


def loss_of_members(solution: Any) -> Tensor:
    return (solution.u1**3).sum(1) + solution.u.sum((1, 2))


def test_a_member_is_that_of_a_single_native_solve() -> None:
    ensemble = net_problem()
    together = solve(ensemble, saveat=TIMES)
    for m in range(0, M, 3):
        single = psn.solve(
            ensemble.member(m), psn.Tsit5(), compile=True, rtol=1e-6, atol=1e-8, saveat=TIMES
        )
        assert single.stats.nfe == together.member_stats[m].nfe
        torch.testing.assert_close(together.u[m], single.u, rtol=1e-12, atol=1e-12)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    results = []
    for count in (1, 2, 5):
        ensemble = net_problem(300)
        with threads(count):
            solution = solve(ensemble, saveat=TIMES)
            bars = torch.autograd.grad(loss_of(solution), leaves(ensemble))
        results.append([solution.u, solution.members.tensors[1], *bars])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def blow_up(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return p * u * u


@pytest.mark.parametrize("fixed", [False, True])
def test_a_member_that_fails_leaves_its_neighbours_alone(fixed: bool) -> None:
    options: dict[str, Any] = {"throw": False, "saveat": [0.5, 1.0, 2.0], "max_steps": 100_000}
    if fixed:
        options |= {"controller": psn.FixedStep(), "dt0": 0.01}
    rates = torch.linspace(-1, 0.4, 20, dtype=D)
    rates[[3, 12]] = torch.tensor([3.0, 0.8], dtype=D)  # to infinity at t = 1/3 and 5/4
    rates.requires_grad_()
    problem = psn.ODEProblem(blow_up, torch.ones(1, dtype=D), (0.0, 2.0), p=rates[0].detach())
    found = solve(psn.EnsembleProblem(problem, p=rates), **options)
    failed = [m for m, code in enumerate(found.retcodes) if not code.successful]
    assert failed == [3, 12]
    assert torch.isnan(found.u[3]).all()
    assert torch.isfinite(found.u[12, :2]).all()
    assert torch.isnan(found.u[12, 2])
    assert torch.isnan(found.u1[failed]).all()
    good = [m for m in range(20) if m not in failed]
    calm = rates.detach()[good].requires_grad_()
    others = solve(psn.EnsembleProblem(problem, p=calm), **options)
    assert torch.equal(found.u[good], others.u)
    (bar,) = torch.autograd.grad(found.u[good].sum(), rates)
    (other,) = torch.autograd.grad(others.u.sum(), calm)
    assert torch.equal(bar[good], other)
    assert not bar[failed].any()
    with pytest.raises(psn.EnsembleFailure, match="2 of 20 members failed: 3, 12"):
        solve(psn.EnsembleProblem(problem, p=rates), **options | {"throw": True})


def estimate(solution: Any) -> Tensor:
    error: Tensor = solution.local_estimate(0.5).error
    return error.sum()


@pytest.mark.parametrize("odd", [1e7, math.inf, math.nan])
def test_odd_neighbours_change_nothing(odd: float) -> None:
    """Sines of large angles are computed in another way, and only theirs."""
    rates = torch.linspace(1, 2, 8, dtype=D)
    problem = psn.ODEProblem(
        lambda t, u, p: torch.sin(p * u) + torch.cos(p + t), torch.ones(1, dtype=D), (0.0, 1.0),
        p=rates[0],
    )  # fmt: skip
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.1, "throw": False}
    beside = rates.clone()
    beside[3] = odd
    results = [solve(psn.EnsembleProblem(problem, p=p), **options).u1 for p in (rates, beside)]
    others = [m for m in range(8) if m != 3]
    assert torch.equal(results[0][others], results[1][others])


def test_a_member_is_a_solution() -> None:
    ensemble = net_problem()
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.15}
    native, eager = (solve(ensemble, compile, **options) for compile in (True, False))
    for m in (0, 7):
        one, other = native[m], eager[m]
        assert one.engine == "torch"
        assert one is native[m]
        torch.testing.assert_close(one.t, other.t, rtol=ADAPTIVE, atol=ADAPTIVE)
        torch.testing.assert_close(one(0.77), other(0.77), rtol=ADAPTIVE, atol=ADAPTIVE)
        # An error is a small difference of large numbers, and its gradient more so.
        for value, tight in ((lambda s: s(0.77).sum(), 1e-9), (estimate, 1e-3)):
            bars, others = (
                torch.autograd.grad(
                    value(s), leaves(ensemble), retain_graph=True, materialize_grads=True
                )
                for s in (one, other)
            )
            for bar, good in zip(bars, others, strict=True):
                torch.testing.assert_close(bar, good, rtol=tight, atol=tight)
    again = pickle.loads(pickle.dumps(native))
    torch.testing.assert_close(again[3].u1, native[3].u1.detach())
    assert not native.detach()[3].u1.requires_grad


# Borders --------------------------------------------------------------------------------------


def test_what_members_do_not_have_is_refused_by_name() -> None:
    ensemble = net_problem()
    with pytest.raises(psn.CompileError, match="DirectAdjoint"):
        solve(ensemble, adjoint=psn.DirectAdjoint())
    with pytest.raises(psn.CompileError, match="gradients of times"):
        solve(ensemble, saveat=torch.tensor([0.5, 1.0], dtype=D, requires_grad=True))
    with pytest.raises(psn.CompileError, match="progress"):
        solve(ensemble, progress=True)
    batched = psn.EnsembleProblem(
        psn.ODEProblem(lambda t, u: -u, torch.ones(1, dtype=D), (0.0, 1.0)),
        torch.ones(3, 1, dtype=D),
        batched=True,
    )
    with pytest.raises(psn.CompileError, match="batch of members"):
        solve(batched)
    second = solve(ensemble).u1.sum()
    (bar,) = torch.autograd.grad(second, ensemble.u0, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(bar.sum(), ensemble.u0)


def test_parameters_changed_in_place_are_noticed() -> None:
    ensemble = net_problem()
    solution = solve(ensemble)
    with torch.no_grad():
        ensemble.p["gain"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution.u1.sum().backward()


def test_an_interrupt_stops_a_solve() -> None:
    problem = psn.ODEProblem(lambda t, u, p: p * torch.sin(u), torch.ones(1, dtype=D), (0.0, 1e6),
                             p=torch.tensor(1.0, dtype=D))  # fmt: skip
    rates = torch.linspace(1, 2, 64, dtype=D)
    options = {"controller": psn.FixedStep(), "dt0": 1e-3, "max_steps": 10**10}
    solve(psn.EnsembleProblem(problem, p=rates), controller=psn.FixedStep(), dt0=1e5)  # compiled
    timer = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT))
    start = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt), threads(2):
        solve(psn.EnsembleProblem(problem, p=rates), **options)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("seed", range(4))
def test_shapes_at_random(seed: int) -> None:
    """Sizes of states, members and hidden layers, with and without gradients of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    size, hidden, m, rows = (
        int(torch.randint(1, n, (), generator=generator)) for n in (9, 20, 30, 4)
    )
    net = nn.Sequential(nn.Linear(size, hidden), nn.SiLU(), nn.Linear(hidden, size)).double()
    net.requires_grad_(seed % 3 != 0)

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor, u: Tensor, p: Tensor) -> Tensor:
            """Evaluate the derivative at `u`, shape `(rows, size)`."""
            return self.net(u) * torch.exp(-p) - u.mean(0) * t + p.sum() * torch.cat([u[1:], u[:1]])

    u0 = torch.randn(m, rows, size, dtype=D, generator=generator).requires_grad_(seed % 2 == 0)
    p = torch.randn(m, rows, 1, dtype=D, generator=generator).requires_grad_()
    problem = psn.ODEProblem(Field(), u0[0].detach(), (0.0, 0.5), p=p[0].detach())
    ensemble = psn.EnsembleProblem(problem, u0, p)
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.1, "saveat": [0.25, 0.5]}
    native, eager = (solve(ensemble, compile, **options) for compile in (True, False))
    torch.testing.assert_close(native.u, eager.u, rtol=1e-11, atol=1e-11)
    wanted = [x for x in (u0, p, *net.parameters()) if x.requires_grad]
    bars, others = (torch.autograd.grad((s.u**2).sum(), wanted) for s in (native, eager))
    for bar, other in zip(bars, others, strict=True):
        torch.testing.assert_close(bar, other, rtol=1e-10, atol=1e-10)


def test_memory_runs_out_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_run, "OUT_OF_MEMORY", 2)  # as if success were that
    with pytest.raises(MemoryError, match="steps of 11 members"):
        solve(net_problem())


def test_widths_follow_the_memory_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large fields go one by one; the results are the same."""
    wide = solve(net_problem(), controller=psn.FixedStep(), dt0=0.1)
    monkeypatch.setattr(member_code, "_MOST_MEMORY", 1)
    member_library._library.cache_clear()
    narrow = solve(net_problem(), controller=psn.FixedStep(), dt0=0.1)
    member_library._library.cache_clear()
    assert narrow.members.solve.library.abreast == 1
    torch.testing.assert_close(wide.u1, narrow.u1, rtol=1e-12, atol=1e-12)


def test_products_without_columns() -> None:
    """`u' = -u` beside a part without entries, which has a weight of each member's own."""
    start, weight = torch.rand(M, 3, dtype=D), torch.zeros(M, 3, 0, dtype=D)
    state = start, torch.zeros(M, 0, dtype=D)
    one = psn.ODEProblem(
        lambda t, u, p: (-u[0], u[0] @ p), (start[0], state[1][0]), (0.0, 1.0), p=weight[0]
    )
    end = solve(psn.EnsembleProblem(one, state, weight), rtol=1e-9, atol=1e-9).u1[0]
    torch.testing.assert_close(end, start / math.e, rtol=1e-8, atol=0)
