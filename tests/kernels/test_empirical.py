import pytest
import torch
from kernels.networks import WeightTied, inputs
from torch import nn

import pysciml_node as psn
from pysciml_node.kernels import GradientDescent, empirical_ntk, ntk


def mlp(outputs=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


class Flow(nn.Module):
    """An ODE solved by the package between two linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4).double()
        self.node = psn.NeuralODE(
            lambda t, u: torch.tanh(self.inner(u)), psn.Tsit5(), rtol=1e-8, atol=1e-8
        )
        self.out = nn.Linear(4, 2).double()

    def forward(self, x):
        return self.out(self.node(x).u1)


class Unrolled(nn.Module):
    """The same flow by many classical Runge-Kutta steps in plain torch."""

    def __init__(self, flow):
        super().__init__()
        self.inner, self.out = flow.inner, flow.out

    def forward(self, x):
        steps = 40
        for _ in range(steps):
            k1 = torch.tanh(self.inner(x))
            k2 = torch.tanh(self.inner(x + k1 / (2 * steps)))
            k3 = torch.tanh(self.inner(x + k2 / (2 * steps)))
            k4 = torch.tanh(self.inner(x + k3 / steps))
            x = x + (k1 + 2 * k2 + 2 * k3 + k4) / (6 * steps)
        return self.out(x)


@pytest.mark.parametrize("method", ["auto", "jacobian", "products", "autograd"])
@pytest.mark.parametrize("second", [True, False])
def test_it_is_the_product_of_jacobians(method, second):
    module, x1 = mlp(), inputs(5, 4)
    x2 = inputs(3, 4, seed=1) if second else None

    def jacobian(x):
        rows = []
        for sample in x:
            for value in module(sample):
                grads = torch.autograd.grad(value, list(module.parameters()), retain_graph=True)
                rows.append(torch.cat([grad.flatten() for grad in grads]))
        return torch.stack(rows).reshape(len(x), 3, -1)

    expected = torch.einsum("iap,jbp->ijab", jacobian(x1), jacobian(x1 if x2 is None else x2))
    full = empirical_ntk(module, x1, x2, method=method)
    torch.testing.assert_close(full, expected, rtol=1e-12, atol=1e-12)
    trace = empirical_ntk(module, x1, x2, method=method, outputs="trace")
    torch.testing.assert_close(trace, expected.diagonal(0, 2, 3).sum(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["jacobian", "autograd"])
def test_blocks_do_not_change_the_kernel(method):
    module, x = mlp(), inputs(5, 4)
    whole = empirical_ntk(module, x, method=method)
    blocks = empirical_ntk(module, x, method=method, memory=4000)
    torch.testing.assert_close(blocks, whole, rtol=1e-13, atol=1e-13)
    products = empirical_ntk(module, x, memory=1)  # nothing fits: columns instead
    torch.testing.assert_close(products, whole, rtol=1e-12, atol=1e-12)


def test_frozen_parameters_do_not_count():
    module, x = mlp(), inputs(3, 4)
    module[0].requires_grad_(False)
    hidden = torch.tanh(module[0](x))
    expected = (hidden @ hidden.T + 1)[..., None, None] * torch.eye(3)
    torch.testing.assert_close(empirical_ntk(module, x), expected.detach().double())
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires"):
        empirical_ntk(module, x)


def test_a_module_with_an_ode_inside():
    flow, x = Flow(), inputs(3, 4)
    through_solver = empirical_ntk(flow, x)
    expected = empirical_ntk(Unrolled(flow), x)
    torch.testing.assert_close(through_solver, expected, rtol=1e-6, atol=1e-7)
    flow.node.adjoint, flow.node.algorithm = psn.DirectAdjoint(), psn.RK4()
    flow.node.options = {"controller": psn.FixedStep(), "dt0": 0.02}
    torch.testing.assert_close(empirical_ntk(flow, x), expected, rtol=1e-6, atol=1e-7)


def test_a_layer_registered_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(4, 4).double()
            self.second = nn.Sequential(nn.Tanh(), self.first)

        def forward(self, x):
            return self.second(self.first(x))

    module, x = Twice(), inputs(3, 4)
    reference = empirical_ntk(module, x, method="autograd")
    for method in ("jacobian", "products"):
        torch.testing.assert_close(empirical_ntk(module, x, method=method), reference)
    assert isinstance(module.first.weight, nn.Parameter)


def test_custom_functions_fall_back_to_autograd():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return Double.apply(self.inner(x))

    x = inputs(3, 4)
    torch.testing.assert_close(
        empirical_ntk(Module(), x), 4 * empirical_ntk(mlp(), x), rtol=1e-12, atol=1e-12
    )


def test_arguments_are_checked():
    x = inputs(2, 4)
    with pytest.raises(ValueError, match="outputs must be one of"):
        empirical_ntk(mlp(), x, outputs="diagonal")
    with pytest.raises(ValueError, match="method must be one of"):
        empirical_ntk(mlp(), x, method="fast")
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        empirical_ntk(torch.tanh, x)
    with pytest.raises(ValueError, match="at least one sample"):
        empirical_ntk(mlp(), x[:0])


def test_gradient_descent_follows_the_kernel():
    """Width 1000, loss down to a hundredth: 5 % of the prediction of the network's own kernel.

    The infinite-width kernel differs from it by the fluctuations of one random network; its
    prediction holds to 5 % of the initial loss, here.
    """
    d, samples, steps = 6, 5, 8
    x = inputs(samples, d, seed=4)
    y = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    network = WeightTied(d, 1000, steps, torch.nn.functional.softplus, generator, T=0.5)
    initial = network(x).detach()
    own = GradientDescent(empirical_ntk(network, x, outputs="trace"), y, initial)
    limit = GradientDescent(ntk(x, T=0.5, activation="softplus", steps=steps), y, initial)
    lr = 0.5 * limit.max_learning_rate()
    for step in range(12):
        loss = ((network(x) - y) ** 2).sum() / (2 * samples)
        measured = float(loss.detach())
        assert measured == pytest.approx(own.loss(step, lr), rel=0.05)
        assert measured == pytest.approx(limit.loss(step, lr), abs=0.05 * limit.loss(0))
        grads = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(network.parameters(), grads, strict=True):
                parameter -= lr * grad
    assert measured < 0.01 * limit.loss(0)


class Randomly(nn.Module):
    """Noise from a generator of its own, which torch's own state does not show."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2).double()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.layer(x) + torch.rand(2, generator=self.generator, dtype=x.dtype)


@pytest.mark.parametrize("method", ["auto", "jacobian", "products", "autograd"])
def test_modules_that_draw_random_numbers_are_refused(method):
    dropping = nn.Sequential(mlp(), nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"in train mode.*\n  Call module.eval\(\)"):
        empirical_ntk(dropping, inputs(3, 4), method=method)
    evaluated = empirical_ntk(dropping.eval(), inputs(3, 4), method=method)
    torch.testing.assert_close(evaluated, empirical_ntk(mlp(), inputs(3, 4)))
    with pytest.raises(ValueError, match="draws random numbers"):
        empirical_ntk(Randomly().eval(), inputs(3, 4), method=method)


def test_a_random_end_of_the_interval_is_refused():
    flow = Flow()
    flow.node.regularizers.append(psn.RandomEndTime(0.5))
    with pytest.raises(ValueError, match="draws random numbers in train mode"):
        empirical_ntk(flow.train(), inputs(3, 4))
    assert empirical_ntk(flow.eval(), inputs(3, 4)).shape[:2] == (3, 3)


def test_running_statistics_stay():
    module = nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Flatten()).double()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    empirical_ntk(module, inputs(3, 8).unsqueeze(1))
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


def test_complex_outputs_are_refused():
    class Complex(nn.Linear):
        def forward(self, x):
            return torch.complex(super().forward(x), x[:, :2])

    with pytest.raises(ValueError, match="real numbers"):
        empirical_ntk(Complex(4, 2).double(), inputs(3, 4))
