"""A continuous flow of two moons whose trace has a closed form, and so costs little.

`pysciml_node.CNF` differentiates the field for its trace, by a product for each dimension. For a
field with one hidden layer the trace is a sum over its units,

    f(t, u) = W2 tanh(W1 u + t w + b) + c,    tr(df/du) = sum_k (1 - h_k^2) (W1 W2)_kk,

so that points and log-determinant are one equation of elementary operations. `CNF` of the same
field is the same flow.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.data import LabelledData
from pysciml_node.experiments.trainer.penalties import make_regularizers
from pysciml_node.experiments.trainer.settings import Run, Settings
from pysciml_node.experiments.trainer.streams import streams
from pysciml_node.experiments.trainer.trainable import NATS, Metric, Outcome, Trainable


class PlaneField(nn.Module):
    """A field in the plane with one hidden layer.

    Args:
        hidden: units of the layer.
        generator: source of the initial weights.
    """

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(hidden, 2, generator=generator))
        self.time = nn.Parameter(torch.randn(hidden, generator=generator))
        self.bias = nn.Parameter(torch.randn(hidden, generator=generator))
        self.outer = nn.Parameter(torch.randn(2, hidden, generator=generator) / hidden)
        self.shift = nn.Parameter(torch.zeros(2))

    def units(self, t: Tensor, u: Tensor) -> Tensor:
        """The hidden layer, `(B, hidden)`."""
        return torch.tanh(u @ self.inner.T + t * self.time + self.bias)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The field at points `(B, 2)`."""
        return self.units(t, u) @ self.outer.T + self.shift


class WithTrace(nn.Module):
    """The field, and beside it its trace: states `(B, 3)`."""

    def __init__(self, field: PlaneField) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        """Points and log-determinants."""
        field = self.field
        h = field.units(t, state[:, :2])
        slopes = (field.inner * field.outer.T).sum(1, keepdim=True)
        return torch.cat((h @ field.outer.T + field.shift, (1.0 - h * h) @ slopes), 1)


class MoonsFlow(Trainable):
    """The flow, trained on the negative log-likelihood of points.

    Args:
        settings: width, tolerance and the length of the weight's schedule.
        run: variant, seed and weight.

    Attributes:
        node: points and log-determinants as one equation, solved where its options ask for native
            code.
        flow: the same by `CNF`, solved otherwise.
    """

    metric: ClassVar[Metric] = NATS

    def __init__(self, settings: Settings, run: Run) -> None:
        super().__init__()
        draws = streams(run.seed)
        self._generators = {"penalty": draws["penalty"]}
        options: Any = {
            "rtol": settings.tolerance,
            "atol": settings.tolerance,
            "regularizers": make_regularizers(settings, run, draws["penalty"]),
        }
        field = PlaneField(settings.hidden, draws["parameters"])
        self.node = psn.NeuralODE(WithTrace(field), psn.Tsit5(), **options)
        self.flow = psn.CNF(field, psn.Tsit5(), event_shape=2, **options)
        self.to(getattr(torch, settings.dtype))

    def density(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Log-densities of points `(B, 2)`, the penalty and the evaluations."""
        points = x.to(self.node.field.field.outer.dtype)
        if not self.node.options.get("compile"):
            density = self.flow(points)
            return density.log_prob, density.penalty, int(density.nfe)
        solution = self.node(torch.cat((points, torch.zeros_like(points[:, :1])), 1))
        end, log_det = solution.u1[:, :2], solution.u1[:, 2]
        log_prob = log_det - end.square().sum(1) / 2 - math.log(2 * math.pi)
        return log_prob, solution.penalty, int(solution.stats.nfe)

    def outcome(self, batch: LabelledData) -> Outcome:
        """Negative log-likelihood of a batch, which is the loss too."""
        log_prob, penalty, nfe = self.density(batch.x)
        total = -float(log_prob.detach().sum())
        return Outcome(-log_prob.mean(), penalty, nfe, total, len(batch))

    def predict(self, batch: LabelledData) -> Tensor:
        """Log-densities of a batch."""
        return self.density(batch.x)[0]

    def step_schedules(self) -> None:
        """Advance the penalty's weight by one optimizer step."""
        self.node.step_schedules()
