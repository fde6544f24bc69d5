"""Latent ODEs: generative models of irregular time series."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from pysciml_node import checks
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.data.series import IrregularSeries, check_series
from pysciml_node.layers.neural_ode import NeuralODE
from pysciml_node.layers.options import SolverOptions, check_options
from pysciml_node.schedules import Schedule, as_schedule
from pysciml_node.solutions.portable import walkable
from pysciml_node.solutions.solution import Solution

Reduction = Literal["mean", "sum"]


@walkable
@dataclass(frozen=True)
class Posterior:
    """The latent state's distribution given a series: a diagonal Gaussian.

    Args:
        mean: shape `(B, L)`.
        log_variance: shape `(B, L)`.
    """

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw `mean + exp(log_variance / 2) e` with standard normal `e`, `(B, L)`."""
        noise = torch.randn(
            self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device
        )
        return self.mean + torch.exp(self.log_variance / 2) * noise

    def divergence(self) -> Tensor:
        """From the standard normal, `(exp(v) + m^2 - 1 - v) / 2` for each entry, `(B, L)`."""
        return (self.log_variance.exp() + self.mean.square() - 1 - self.log_variance) / 2


@walkable
@dataclass(frozen=True)
class LatentSolution:
    """The result of a `LatentODE` for a batch of series.

    Args:
        mean: of the decoder's Gaussian at the rows asked for, shape `(N, D)`.
        solution: of the latent equation, at the merged times of all samples.
        posterior: of the latent state at the start.
    """

    mean: Tensor
    solution: Solution
    posterior: Posterior


class LatentODE(nn.Module):
    """A latent state that flows from the encoded start, decoded where values are wanted.

        z(t0) ~ q(z | series),   dz/dt = field(t, z),   x_i ~ N(decoder(z(t_i)), noise^2).

    The times of all samples in a batch are merged into one axis and solved for at once; each row
    then takes its own sample at its own time, so that nothing is padded, and the decoder sees the
    rows alone.

    Args:
        encoder: maps an `IrregularSeries` of `B` samples to `(B, 2 L)`, mean and logarithm of the
            variance; such as `GRUEncoder` or `ODERNNEncoder`.
        field: of the latent equation, `field(t, z)`.
        decoder: maps `(N, L)` to `(N, D)`.
        algorithm: default `Tsit5()`.
        tspan: the interval that holds all times; the latent state starts at its start.
        noise: standard deviation of the decoder's Gaussian.
        kl_weight: weight of the divergence in the loss, or a schedule of it such as
            `schedules.Annealing()`.
        reduction: `"mean"` divides each sample's log-likelihood by its number of observed entries
            and the divergence by `L`, as the published experiments do; `"sum"` is the evidence
            lower bound itself.
        generator: draws the latent states in training; of the state's device. Default torch's
            own.
        options: of the latent equation, as in `NeuralODE`, but `saveat`: the times are those of the
            series. The regularizer `RandomEndTime` moves each of the merged times inside its own
            interval.

    Raises:
        TypeError: an unknown option.
        ValueError: an argument out of range.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> from pysciml_node.layers import GRUEncoder, LatentODE
        >>> from pysciml_node.data import prices
        >>> series = prices().train[:4]
        >>> model = LatentODE(
        ...     GRUEncoder(series.variables, 5), lambda t, z: -z, torch.nn.Linear(5, 3), noise=0.5
        ... )
        >>> model(series).mean.shape == series.values.shape
        True
        >>> bool(torch.isfinite(model.loss(series)))
        True

    Reference: Rubanova, Chen, Duvenaud, Latent ODEs for Irregularly-Sampled Time Series, arXiv
    1907.03907.
    """

    def __init__(
        self,
        encoder: nn.Module,
        field: Callable[..., Any],
        decoder: nn.Module,
        algorithm: Algorithm | None = None,
        tspan: tuple[float, float] = (0.0, 1.0),
        *,
        noise: float = 0.01,
        kl_weight: float | Schedule = 1.0,
        reduction: Reduction = "mean",
        generator: torch.Generator | None = None,
        **options: Unpack[SolverOptions],
    ) -> None:
        super().__init__()
        check_options(type(self), options, without=("saveat",))
        noise = checks.number("noise", noise, above=0)
        checks.choice("reduction", reduction, get_args(Reduction))
        checks.generator("generator", generator)
        checks.function("encoder", encoder, "series")
        checks.function("decoder", decoder, "z")
        if not isinstance(tspan, tuple | list) or len(tspan) != 2:
            checks.refuse("tspan", "a pair (t0, t1)", tspan, "Write tspan=(0.0, 1.0).")
        read_to, start = getattr(encoder, "start", None), _number(tspan[0])
        if isinstance(read_to, float) and not math.isclose(read_to, start, abs_tol=1e-6):
            raise ValueError(
                f"the encoder reads back to time {read_to}, but the latent state starts at {start}."
                f"\n  Make the encoder with start={start}, or give tspan={(read_to, tspan[1])}."
            )
        self.encoder, self.decoder = encoder, decoder
        self.node = NeuralODE(field, algorithm, tspan, **options)
        self.noise, self.reduction = noise, reduction
        self.kl_weight = as_schedule(kl_weight, "kl_weight")
        self.generator = generator
        self.steps = 0

    def encode(self, series: IrregularSeries) -> Posterior:
        """The distribution of the latent state at the start.

        Raises:
            ValueError: the encoder's output is of another shape.
        """
        both = self.encoder(series)
        hint = "Return torch.cat([mean, log_variance], dim=1)."
        if not isinstance(both, Tensor):
            checks.refuse("the encoder's output", "a tensor", both, hint)
        if both.ndim != 2 or len(both) != len(series) or both.shape[1] % 2:
            raise ValueError(
                f"the encoder must return mean and log-variance side by side, of shape "
                f"({len(series)}, 2 L), but returned {tuple(both.shape)}.\n  {hint}"
            )
        mean, log_variance = both.chunk(2, dim=1)
        return Posterior(mean, log_variance)

    def forward(
        self, series: IrregularSeries, wanted: IrregularSeries | None = None
    ) -> LatentSolution:
        """Encode series and decode them where they, or others of the same samples, have rows.

        In training mode the latent start is drawn from the posterior; in eval mode it is its mean.

        Args:
            series: what the encoder reads, `B` samples.
            wanted: the same samples with the rows to decode; only its times and lengths are read.
                Default `series`.

        Raises:
            ValueError: `wanted` has another number of samples, or times outside the interval.
        """
        check_series("series", series)
        wanted = series if wanted is None else check_series("wanted", wanted)
        if len(wanted) != len(series):
            raise ValueError(
                f"wanted must have the {len(series)} samples of series, but has {len(wanted)}.\n"
                "  Index both alike: series[index], wanted[index]."
            )
        posterior = self.encode(series)
        start = posterior.sample(self.generator) if self.training else posterior.mean
        return self.decode(start, wanted, posterior)

    def decode(
        self, start: Tensor, wanted: IrregularSeries, posterior: Posterior
    ) -> LatentSolution:
        """Let latent starts `(B, L)` flow and decode them at the rows of `wanted`."""
        times, place = wanted.merged
        solution = self.node(start, saveat=times)
        mean: Tensor = self.decoder(solution.u[place, wanted.sample])
        return LatentSolution(mean, solution, posterior)

    def log_likelihood(self, mean: Tensor, target: IrregularSeries) -> Tensor:
        """Log-likelihood of each sample's observed entries under `N(mean, noise^2)`, `(B,)`.

        Args:
            mean: shape `(N, D)`.
            target: what was observed; unobserved entries have no influence.
        """
        error = torch.where(target.observed, mean - target.values, torch.zeros_like(mean))
        constant = math.log(self.noise) + 0.5 * math.log(2 * math.pi)
        total = target.per_sample(-0.5 * (error / self.noise).square() - constant)
        return total / target.counts().clamp(min=1) if self.reduction == "mean" else total

    def loss(
        self,
        series: IrregularSeries,
        target: IrregularSeries | None = None,
        found: LatentSolution | None = None,
    ) -> Tensor:
        """Mean over the samples of `-log p(target | z) + kl_weight KL(q(z | series) | N(0, 1))`.

        The penalty is not in it: it is `solution.penalty` of what `forward` returns.

        Args:
            series: what the encoder reads.
            target: the same samples with the rows to explain; default `series`.
            found: what `forward(series, target)` returned, if it has been called.

        Returns:
            A 0-d tensor.
        """
        target = series if target is None else check_series("target", target)
        found = self(series, target) if found is None else found
        divergence = found.posterior.divergence()
        divergence = divergence.mean(1) if self.reduction == "mean" else divergence.sum(1)
        likelihood = self.log_likelihood(found.mean, target)
        return (self.kl_weight(self.steps) * divergence - likelihood).mean()

    def step_schedules(self) -> None:
        """Count one training step of the divergence's weight and the regularizers'."""
        self.steps += 1
        self.node.step_schedules()

    def get_extra_state(self) -> Any:
        """The schedule's position, for `state_dict`."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Any) -> None:
        """Put the schedule back, from `state_dict`."""
        self.steps = int(state)


def _number(time: float | Tensor) -> float:
    return checks.number("tspan[0]", time)
