"""Encoders of irregular series: recurrent networks that read each sample's own rows, backward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Unpack

import torch
from torch import Tensor, nn

from pysciml_node import checks
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.data.series import IrregularSeries, check_series
from pysciml_node.layers.neural_ode import NeuralODE
from pysciml_node.layers.options import SolverOptions, check_options
from pysciml_node.layers.timed import IgnoreLinear


def dense(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Module:
    """A linear layer with Glorot-uniform weights and zero biases."""
    return IgnoreLinear(inputs, outputs, generator=generator).layer


def visits(series: IrregularSeries) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk through all samples at once, each from its last row to its first.

    Yields:
        At each turn the samples that still have a row, longest first, and these rows' places.
    """
    lengths, order = torch.sort(series.lengths, descending=True, stable=True)
    last = (series.first + series.lengths - 1)[order]
    for turn, active in enumerate(_active(lengths)):
        yield order[:active], last[:active] - turn


def _active(lengths: Tensor) -> list[int]:
    """The number of lengths that exceed 0, 1, 2, ...; the lengths decrease."""
    turns = torch.arange(int(lengths[0]), device=lengths.device)
    ascending = lengths.flip(0).contiguous()
    counts: list[int] = (len(lengths) - torch.searchsorted(ascending, turns, right=True)).tolist()
    return counts


def inputs_of(series: IrregularSeries) -> tuple[Tensor, Tensor]:
    """The inputs of an encoder at each row: values, mask, and the gap to the sample's next row.

    Returns:
        Inputs `(N, 2 D + 1)` with zeros where nothing was observed, and gaps `(N,)`, 0 at a
        sample's last row.
    """
    gaps = torch.zeros_like(series.times)
    inner = series.sample[1:] == series.sample[:-1]
    gaps[:-1] = torch.where(inner, series.times.diff(), gaps[:-1])
    values = torch.where(series.observed, series.values, torch.zeros_like(series.values))
    return torch.cat((values, series.observed.to(values.dtype), gaps[:, None]), 1), gaps


class RecognitionCell(nn.Module):
    """A gated recurrent unit whose state is a mean and a spread.

    With `x` the input and `h = (m, s)` the state, each `K` wide,

        z = sigmoid(W_z tanh(V_z [m; s; x])),   r = sigmoid(W_r tanh(V_r [m; s; x])),
        (m', s') = W_n tanh(V_n [r m; r s; x]),
        m <- (1 - z) m' + z m,   s <- (1 - z) s' + z s.

    Args:
        inputs: size of the input.
        state: `K`.
        hidden: width of the gates' hidden layers.
        generator: source of the initial weights; default torch's own.

    Reference: Rubanova, Chen, Duvenaud, Latent ODEs for Irregularly-Sampled Time Series, arXiv
    1907.03907, with the mean updated by the new mean: the code of arXiv 2303.02262 puts the new
    spread there.
    """

    def __init__(
        self, inputs: int, state: int, hidden: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        seen = 2 * state + inputs

        def network(outputs: int, *last: nn.Module) -> nn.Sequential:
            first = dense(seen, hidden, generator)
            return nn.Sequential(first, nn.Tanh(), dense(hidden, outputs, generator), *last)

        self.update = network(state, nn.Sigmoid())
        self.reset = network(state, nn.Sigmoid())
        self.new = network(2 * state)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """The next state `(B, 2 K)` from input `(B, inputs)` and state `(B, 2 K)`."""
        seen = torch.cat((h, x), 1)
        keep = self.update(seen).repeat(1, 2)
        new: Tensor = self.new(torch.cat((self.reset(seen).repeat(1, 2) * h, x), 1))
        out: Tensor = (1 - keep) * new + keep * h
        return out


class _Encoder(nn.Module, ABC):
    """Reads series with a recognition cell and maps its last state to a posterior.

    Attributes:
        start: the interval's start, where the latent state lives that is described.
    """

    def __init__(
        self,
        variables: int,
        latent: int,
        state: int,
        hidden: int,
        start: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        sizes = {"variables": variables, "latent": latent, "state": state, "hidden": hidden}
        for name, size in sizes.items():
            checks.whole(name, size)
        checks.generator("generator", generator)
        self.state, self.start = state, checks.number("start", start)
        self.variables = variables
        self.cell = RecognitionCell(2 * variables + 1, state, hidden, generator=generator)
        self.posterior = nn.Sequential(
            dense(2 * state, state, generator), nn.Tanh(), dense(state, 2 * latent, generator)
        )

    def forward(self, series: IrregularSeries) -> Tensor:
        """Mean and logarithm of the variance, side by side, `(B, 2 latent)`.

        Raises:
            ValueError: a row before the interval's start.
        """
        first = check_series("series", series).times[series.first]
        if bool((first < self.start).any()):
            sample = int((first < self.start).nonzero()[0])
            raise ValueError(
                f"times must not lie before the start of the interval, {self.start}, but sample "
                f"{sample} begins at {float(first[sample])}.\n"
                f"  Make the encoder with start=..., and the LatentODE with the same tspan."
            )
        x, gaps = inputs_of(series)
        h = x.new_zeros(len(series), 2 * self.state)
        for turn, (samples, rows) in enumerate(visits(series)):
            before = h[samples]
            if turn:
                before = self.between(before, series.times[rows] + gaps[rows], gaps[rows])
            h = h.index_copy(0, samples, self.cell(x[rows], before))
        posterior: Tensor = self.posterior(self.finish(h, first))
        return posterior

    def between(self, h: Tensor, t: Tensor, gap: Tensor) -> Tensor:
        """The states after a gap that ends, backward in time, `gap` before `t`; both `(B,)`."""
        del t, gap
        return h

    @abstractmethod
    def finish(self, h: Tensor, t: Tensor) -> Tensor:
        """The states at the interval's start, from `h`, `(B, 2 S)`, at the times `t`, `(B,)`."""


class GRUEncoder(_Encoder):
    """Reads each sample's rows from the last to the first with a `RecognitionCell`.

    The work is one cell a row: samples that have no row left take no part. The interval's start,
    where the latent state lives, is read last, as a row at which nothing was observed.

    Args:
        variables: of the series, `D`.
        latent: size of the latent state.
        state: size of the cell's mean, and of its spread.
        hidden: width of the cell's hidden layers.
        start: the interval's start.
        generator: source of the initial weights; default torch's own.

    Examples:
        >>> from pysciml_node.data import prices
        >>> series = prices().train[:4]
        >>> GRUEncoder(series.variables, 5)(series).shape
        torch.Size([4, 10])

    Reference: Chen et al., Neural Ordinary Differential Equations, arXiv 1806.07366, section 5.
    """

    def __init__(
        self,
        variables: int,
        latent: int,
        *,
        state: int = 50,
        hidden: int = 40,
        start: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(variables, latent, state, hidden, start, generator)

    def finish(self, h: Tensor, t: Tensor) -> Tensor:
        """The states at the start of the interval, from those at the first rows' times `t`."""
        gap = (t - self.start).to(h.dtype)
        unobserved = h.new_zeros(len(h), self.variables)
        state: Tensor = self.cell(torch.cat((unobserved, unobserved, gap[:, None]), 1), h)
        return state


class ODERNNEncoder(_Encoder):
    """An ODE-RNN: between rows the cell's state follows a differential equation.

    Across a gap from `t` back to `t - g` the state obeys `dh/dt = field(t, h)`. One solve over `s`
    from 0 to 1 covers the gaps of all samples, `dh/ds = -g field(t - s g, h)` with each sample's
    `t` and `g`; `field` gets the times as a column `(B, 1)`. After the first row the state goes on
    to the interval's start.

    Args:
        variables: of the series, `D`.
        latent: size of the latent state.
        field: called as `field(t, h)` with `h` of shape `(B, 2 state)`.
        state: size of the cell's mean, and of its spread.
        hidden: width of the cell's hidden layers.
        start: the interval's start.
        generator: source of the initial weights; default torch's own.
        algorithm: default `Tsit5()`.
        options: of the equation, as in `NeuralODE`, except `saveat`.

    Reference: Rubanova, Chen, Duvenaud, arXiv 1907.03907, Algorithm 1.
    """

    def __init__(
        self,
        variables: int,
        latent: int,
        field: Callable[[Tensor, Tensor], Tensor],
        *,
        state: int = 50,
        hidden: int = 40,
        start: float = 0.0,
        generator: torch.Generator | None = None,
        algorithm: Algorithm | None = None,
        **options: Unpack[SolverOptions],
    ) -> None:
        super().__init__(variables, latent, state, hidden, start, generator)
        check_options(type(self), options, without=("saveat",))
        self.node = NeuralODE(
            _OverGaps(checks.function("field", field, "t", "h")), algorithm, **options
        )

    def between(self, h: Tensor, t: Tensor, gap: Tensor) -> Tensor:
        """The states after a gap that ends, backward in time, `gap` before `t`; both `(B,)`."""
        if not bool((gap > 0).any()):
            return h
        after: Tensor = self.node(h, torch.stack((t, gap), 1)).u1
        return after

    def finish(self, h: Tensor, t: Tensor) -> Tensor:
        """The states at the start of the interval, from those at the first rows' times `t`."""
        return self.between(h, t, t - self.start)


class _OverGaps(nn.Module):
    """`dh/ds = -g field(t - s g, h)`, where `p`, `(B, 2)`, has the columns `t` and `g`."""

    def __init__(self, field: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.field = field

    def forward(self, s: Tensor, h: Tensor, p: Tensor) -> Tensor:
        """The rates of all samples."""
        t, gap = p[:, :1], p[:, 1:]
        return -gap * self.field(t - s * gap, h)
