"""`torch.compile` around a model leaves its solves out; exports are refused clearly."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.compat import torchsde
from pysciml_node.compat.torchdiffeq import odeint

ADJOINTS = [psn.DiscreteAdjoint(), psn.DirectAdjoint(), psn.InterpolatingAdjoint()]


class Model(nn.Module):
    """A layer among others, its solution read in all ways."""

    def __init__(self, node: nn.Module) -> None:
        super().__init__()
        self.encoder, self.node, self.head = nn.Linear(3, 2), node, nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        solution = self.node(torch.tanh(self.encoder(x)))
        middle = solution(0.5) + solution.u[-1]
        out: Tensor = self.head(torch.relu(solution.u1 + middle)) + solution.penalty
        return out


def field() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare(model: nn.Module, backend: str, draw: Callable[[], Any] = lambda: None) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    compiled = torch.compile(model, backend=backend)
    for gradients in (False, True, True):
        with torch.set_grad_enabled(gradients):
            draw()
            expected = model(x)
            draw()
            found = compiled(x)
        torch.testing.assert_close(found, expected)
        if gradients:
            wanted = torch.autograd.grad(expected.sum(), parameters)
            given = torch.autograd.grad(found.sum(), parameters)
            for one, other in zip(given, wanted, strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "adjoint"), [*(("eager", adjoint) for adjoint in ADJOINTS), ("aot_eager", None)]
)
def test_a_layer(backend: str, adjoint: psn.Adjoint | None) -> None:
    regularizers = [psn.KineticEnergy()]
    compare(Model(psn.NeuralODE(field(), adjoint=adjoint, regularizers=regularizers)), backend)


@pytest.mark.slow
def test_a_layer_with_the_default_backend() -> None:
    compare(Model(psn.NeuralODE(field())), "inductor")


@pytest.mark.slow
def test_a_stochastic_layer() -> None:
    generator = torch.Generator()
    node = psn.NeuralSDE(field(), nn.Linear(2, 2), generator=generator)
    compare(Model(node), "eager", lambda: generator.manual_seed(0))


@pytest.mark.slow
def test_functions_and_flows() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.flow = field(), psn.CNF(field(), event_shape=2)

        def forward(self, x: Tensor) -> Tensor:
            u0 = x[:, :2].sin()
            u1 = psn.solve(psn.ODEProblem(lambda t, u: self.f(u), u0, (0.0, 1.0))).u1
            y: Tensor = odeint(lambda t, u: self.f(u), u1, torch.tensor([0.0, 0.5]))[-1]
            density: Tensor = self.flow.log_prob(y.cos())
            return density

    compare(Plain(), "eager")


@pytest.mark.slow
def test_a_layer_that_is_itself_compiled_and_one_that_returns_its_end_state() -> None:
    node = psn.NeuralODE(field())
    x = torch.ones(4, 2)
    expected = node(x).u1
    torch.testing.assert_close(torch.compile(node, backend="eager")(x).u1, expected)
    last = psn.NeuralODE(node.field, output="u1")
    model = nn.Sequential(nn.Linear(3, 2), last, nn.Linear(2, 1))
    compare(model, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DiscreteAdjoint(memory=0)])
def test_a_compiled_step_that_goes_backward_itself(
    native: bool, adjoint: psn.DiscreteAdjoint
) -> None:
    """Torch's compiler looks at what a backward pass calls, too."""

    def trained(compiled: bool) -> Tensor:
        torch.manual_seed(0)
        node = psn.NeuralODE(field(), output="u1", adjoint=adjoint, compile=native)
        optimizer = torch.optim.SGD(node.parameters(), lr=0.1)

        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            node(x).square().mean().backward()
            optimizer.step()

        run = torch.compile(step, backend="eager") if compiled else step
        for _ in range(2):
            run(torch.ones(4, 2))
        return torch.cat([x.detach().flatten() for x in node.parameters()])

    torch.testing.assert_close(trained(True), trained(False))


@pytest.mark.slow
def test_a_compiled_call_of_torchsde_that_makes_its_motion_itself() -> None:
    class Sde(nn.Module):
        noise_type, sde_type = "diagonal", "stratonovich"

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return 0.1 * y

    def end(y0: Tensor) -> Tensor:
        motion = torchsde.BrownianInterval(0.0, 1.0, size=(4, 2), entropy=3)
        times = torch.tensor([0.0, 1.0])
        return torchsde.sdeint(Sde(), y0, times, bm=motion, method="midpoint", dt=0.1)[-1]

    y0 = torch.ones(4, 2)
    torch.testing.assert_close(torch.compile(end, backend="eager")(y0), end(y0))


def test_a_compiled_field() -> None:
    f = field()
    compiled = torch.compile(f, backend="aot_eager")
    x = torch.ones(4, 2)
    expected, found = psn.NeuralODE(f)(x).u1, psn.NeuralODE(lambda t, u: compiled(u))(x).u1
    torch.testing.assert_close(found, expected)
    parameters = list(f.parameters())
    for one, other in zip(
        torch.autograd.grad(found.sum(), parameters),
        torch.autograd.grad(expected.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


class Sequence(nn.Sequential):
    """Two layers, the second a solve."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2), psn.NeuralODE(nn.Linear(2, 2), output="u1"))


@pytest.mark.parametrize(
    "export",
    [
        lambda model, x: torch.export.export(model, (x,)),
        lambda model, x: torch.jit.trace(model, x),
        lambda model, x: torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False),
    ],
    ids=["export", "trace", "onnx"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_exports_are_refused(export: Callable[[nn.Module, Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"cannot be exported or traced[\s\S]*Export the field"):
        export(Sequence(), torch.ones(3, 2))


class Read(nn.Module):
    """What a solution is at a time."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read

    def forward(self, t: Tensor) -> Tensor:
        return self.read(t)


@pytest.mark.parametrize("estimated", [False, True], ids=["dense", "estimate"])
@pytest.mark.parametrize("export", [torch.jit.trace, torch.export.export])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_time_is_not_read_off_the_step_of_an_example(export: Any, estimated: bool) -> None:
    solution = psn.NeuralODE(field())(torch.ones(3, 2))

    def read(t: Tensor) -> Tensor:
        return solution.local_estimate(float(t)).error if estimated else solution(t)

    with pytest.raises(RuntimeError, match=r"cannot be exported or traced|data-dependent"):
        export(Read(read), (torch.tensor(0.3),))


def test_a_full_graph_is_refused_by_the_compiler() -> None:
    compiled = torch.compile(psn.NeuralODE(field()), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="runs uncompiled"):
        compiled(torch.ones(4, 2))
