"""Fields that take derivatives inside, or map by `torch.vmap`, as native code."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
SYMPLECTIC = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=D)
START = torch.tensor([[1.0, 0.0], [0.5, -1.0]], dtype=D)


class Hamiltonian(nn.Module):
    """Of oscillators of frequency `w`, `(p^2 + w^2 q^2) / 2` summed over the rows `(q, p)`."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        q, p = x.unbind(-1)
        return (p.square() + (self.w * q).square()).sum() / 2


def recorded(energy: nn.Module, u: Tensor) -> Tensor:
    with torch.enable_grad():
        x = u if u.requires_grad else u.detach().requires_grad_()
        return torch.autograd.grad(energy(x), x, create_graph=True)[0]


def transformed(energy: nn.Module, u: Tensor) -> Tensor:
    return torch.func.grad(energy)(u)


def mapped(energy: nn.Module, u: Tensor) -> Tensor:
    return torch.vmap(torch.func.jacrev(energy))(u)


def solved(f: Callable[..., Any], u0: Any = START, compile: Any = True, **options: Any) -> Any:
    problem = psn.ODEProblem(f, u0, (0.0, 1.0))
    return psn.solve(problem, rtol=1e-10, atol=1e-10, compile=compile, **options)


@pytest.mark.parametrize("algorithm", [psn.Tsit5(), psn.Rodas5P()])
@pytest.mark.parametrize("gradient", [recorded, transformed, mapped])
def test_hamiltonian_fields_have_the_flow_of_the_oscillator(
    gradient: Callable[[nn.Module, Tensor], Tensor], algorithm: Any
) -> None:
    """`q = q0 cos(w t) + p0 sin(w t) / w`, and its derivative in `w` and the start."""
    energy, u0 = Hamiltonian(), START.clone().requires_grad_()
    problem = psn.ODEProblem(lambda t, u: gradient(energy, u) @ SYMPLECTIC, u0, (0.0, 1.0))
    solution = psn.solve(problem, algorithm, rtol=1e-9, atol=1e-9, compile=True)
    w, start = torch.tensor(2.0, dtype=D, requires_grad=True), START.clone().requires_grad_()
    q, p = start.unbind(-1)
    exact = torch.stack((q * w.cos() + p * w.sin() / w, p * w.cos() - q * w * w.sin()), -1)
    torch.testing.assert_close(solution.u1, exact, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(solution.u1.sum(), (energy.w, u0))
    wanted = torch.autograd.grad(exact.sum(), (w, start))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_trace_by_products_is_the_density_of_a_linear_flow() -> None:
    """Of `z' = A z` the logarithm of the density falls by `tr(A) t`, with the identity as slope."""
    net = nn.Linear(2, 2, bias=False, dtype=D)

    def flow(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z, _ = state
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            dz = net(z)
            traces = [
                torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2)
            ]
        return dz, -sum(traces)

    z, density = solved(flow, (START, torch.zeros(2, dtype=D))).u1
    matrix = net.weight.detach()
    torch.testing.assert_close(z, START @ torch.linalg.matrix_exp(matrix).T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(density, -matrix.trace().expand(2), rtol=1e-8, atol=1e-8)
    (slope,) = torch.autograd.grad(density.sum(), net.weight)
    torch.testing.assert_close(slope, -2 * torch.eye(2, dtype=D), rtol=1e-8, atol=1e-8)


def test_rows_that_are_mapped_have_parameters_of_their_own() -> None:
    rates = torch.tensor([0.5, 2.0], dtype=D, requires_grad=True)
    u1 = solved(lambda t, u: torch.vmap(lambda k, x: -k * x)(rates, u)).u1
    exact = START * torch.exp(-rates.detach())[:, None]
    torch.testing.assert_close(u1, exact, rtol=1e-8, atol=1e-8)
    (found,) = torch.autograd.grad(u1.sum(), rates)
    torch.testing.assert_close(found, -exact.sum(1), rtol=1e-8, atol=1e-8)


def test_numbers_and_tensors_beside_derivatives_are_those_of_the_solve() -> None:
    """`u' = -2 a b c u`: a number of a tensor, an entry of a dict, and a tensor, each changed."""
    a, held, c = torch.ones((), dtype=D), {"b": 1.0}, torch.ones(1, dtype=D)

    def field(t: Tensor, u: Tensor) -> Tensor:
        slope = torch.func.grad(lambda x: (x.square() * c).sum())(u)
        return -a.item() * held["b"] * slope

    def change(of: str) -> None:
        a.fill_(2.0 if of == "a" else 1.0)
        c.fill_(2.0 if of == "c" else 1.0)
        held["b"] = 2.0 if of == "b" else 1.0

    for of in ("", "a", "", "b", "c", ""):
        change(of)
        exact = START * math.exp(-4.0 if of else -2.0)
        torch.testing.assert_close(solved(field).u1, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("what", ["random", "once", "statistics"])
def test_what_cannot_be_one_program_is_refused(what: str) -> None:
    energy, norm = Hamiltonian(), nn.BatchNorm1d(2, dtype=D)

    def noisy(t: Tensor, u: Tensor) -> Tensor:
        return transformed(energy, u) * torch.rand_like(u)

    def without_graph(t: Tensor, u: Tensor) -> Tensor:
        with torch.enable_grad():
            x = u if u.requires_grad else u.detach().requires_grad_()
            return torch.autograd.grad(energy(x), x)[0]

    def counting(t: Tensor, u: Tensor) -> Tensor:
        return recorded(nn.Sequential(norm, energy), u)

    field = {"random": noisy, "once": without_graph, "statistics": counting}[what]
    words = {
        "random": "aten.rand",
        "once": "another derivative in torch",
        "statistics": "changes what it holds",
    }[what]
    with pytest.raises(psn.CompileError, match=words):
        solved(field)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, START)])
def test_modules_of_jit_are_named_where_they_are_refused(make: Callable[..., Any]) -> None:
    inner = make(nn.Sequential(nn.Linear(2, 2, dtype=D), nn.Tanh()))
    with pytest.raises(psn.CompileError, match=r"calls inner, whose operations torch\.jit"):
        solved(lambda t, u: inner(u))


def test_a_parameter_of_another_dtype_is_refused_by_both_dtypes() -> None:
    rate = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(psn.CompileError, match=r"float32 .* beside a state of torch\.float64"):
        solved(lambda t, u: -rate * u)


class Counting(nn.Module):
    """`u' = n` at its evaluation `n`, which it counts in a buffer through a detached tensor."""

    def __init__(self, change: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros((), dtype=D))
        self.change = change

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        with torch.no_grad():
            following = self.n + 1
            self.change(self.n, following)
        return following.expand_as(u)


CHANGES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copied": lambda n, following: n.data.copy_(following),
    "added": lambda n, following: n.detach().add_(1),
    "through a view": lambda n, following: n.data.view(1).add_(1),
    "out": lambda n, following: torch.add(n.data, 1, out=n.data),
    "many": lambda n, following: torch._foreach_add_([n.data], 1.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_through_a_detached_tensor_is_no_constant(
    change: Callable[[Tensor, Tensor], object],
) -> None:
    """Four steps of Euler's method find `u(1) = (1 + 2 + 3 + 4) / 4`; a program has no `n`."""
    start = torch.zeros(1, dtype=D)

    def end(compile: bool) -> float:
        problem = psn.ODEProblem(Counting(change), start, (0.0, 1.0))
        options: Any = {"controller": psn.FixedStep(), "dt0": 0.25, "compile": compile}
        with torch.no_grad():
            return float(psn.solve(problem, psn.Euler(), **options).u1)

    assert end(compile=False) == 2.5
    with pytest.raises(psn.CompileError):
        end(compile=True)


def test_what_is_its_own_may_change_without_gradients() -> None:
    """A factor of 0.7, written in place into a tensor that the field has made."""

    def field(t: Tensor, u: Tensor) -> Tensor:
        slope = torch.func.grad(lambda x: x.square().sum() / 2)(u)
        with torch.no_grad():
            factor = slope.clone()
            factor[:] = 0 * factor + 0.7
            factor.clamp_(max=0.7)
        return -factor * u

    torch.testing.assert_close(
        solved(field, torch.ones(2, dtype=D)).u1,
        torch.full((2,), math.exp(-0.7), dtype=D),
        rtol=1e-8,
        atol=0,
    )


class Noisy(nn.Module):
    """Counts its calls, and keeps numbers of a generator of its own for a trace inside."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.noise = Hamiltonian(), None
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        self.calls += 1
        if self.noise is None:
            self.noise = torch.randn(u.shape, dtype=D, generator=torch.Generator().manual_seed(3))
        return recorded(self.energy, u)


def test_fields_that_count_and_draw_are_refused_and_leave_python_whole() -> None:
    """The collector met what torch had let go of, and Python ended."""
    for _ in range(3):
        with pytest.raises(psn.CompileError, match="draws random numbers"):
            solved(Noisy())
        gc.collect()
    assert solved(field := Noisy(), compile=False).retcode is psn.ReturnCode.Success
    assert field.calls > 0
