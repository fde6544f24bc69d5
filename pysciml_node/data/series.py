"""Time series observed at times of their own, laid end to end without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.data.labelled import Splits, check_dtype


@dataclass(frozen=True)
class IrregularSeries:
    """Samples whose rows of observations stand end to end.

    Sample `i` has `lengths[i]` rows, in the order of time. An entry of a row that was not observed
    may hold anything: nothing reads it.

    Args:
        times: of the rows, shape `(N,)`.
        values: shape `(N, D)`.
        observed: which of them were observed, bool, shape `(N, D)`.
        lengths: rows of each sample, integers, shape `(B,)`, `N` in total.

    Raises:
        ValueError: shapes that do not fit together, a sample without rows, times that decrease,
            times or observed values that are not finite.
        TypeError: a dtype that does not suit.

    Examples:
        >>> import torch
        >>> series = IrregularSeries(
        ...     times=torch.tensor([0.0, 0.7, 0.2]),
        ...     values=torch.tensor([[1.0], [2.0], [3.0]]),
        ...     observed=torch.ones(3, 1, dtype=torch.bool),
        ...     lengths=torch.tensor([2, 1]),
        ... )
        >>> len(series), series[torch.tensor([1])].values.tolist()
        (2, [[3.0]])
    """

    times: Tensor
    values: Tensor
    observed: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        for name in ("times", "values", "observed", "lengths"):
            checks.settle(self, **{name: checks.tensor(name, getattr(self, name))})
        self._check_dtypes()
        self._check_shapes()
        self._check_entries()
        self._check_order()

    def _check_dtypes(self) -> None:
        if self.lengths.is_floating_point() or self.lengths.dtype == torch.bool:
            hint = "Convert it: lengths.long()."
            checks.refuse("lengths", "a tensor of whole numbers", self.lengths, hint)
        if self.times.is_complex() or self.values.is_complex() or self.lengths.is_complex():
            raise TypeError(
                "times, values and lengths must be real.\n"
                "  Complex values become two variables: torch.view_as_real(values).flatten(1)."
            )
        if self.observed.dtype != torch.bool:
            raise TypeError(
                f"observed must be of dtype bool, but is {self.observed.dtype}.\n"
                "  Convert it: observed.bool()."
            )

    def _check_shapes(self) -> None:
        if self.times.ndim != 1:
            hint = "Join the samples' times: torch.cat(times), or IrregularSeries.join(samples)."
            checks.refuse("times", "a tensor of shape (N,)", self.times, hint, ValueError)
        rows = len(self.times)
        if (
            self.values.ndim != 2
            or self.observed.shape != self.values.shape
            or len(self.values) != rows
            or self.lengths.ndim != 1
            or int(self.lengths.sum()) != rows
        ):
            raise ValueError(
                "times must be of shape (N,), values and observed (N, D), lengths (B,) with sum N; "
                f"got {tuple(self.times.shape)}, {tuple(self.values.shape)}, "
                f"{tuple(self.observed.shape)} and {tuple(self.lengths.shape)} with sum "
                f"{int(self.lengths.sum())}.\n"
                "  IrregularSeries.join([(times, values, observed), ...]) lays samples end to end."
            )

    def _check_entries(self) -> None:
        if bool((self.lengths < 1).any()):
            raise ValueError(
                f"sample {int((self.lengths < 1).nonzero()[0])} has no rows.\n  Leave it out."
            )
        if not bool(torch.isfinite(self.times).all()):
            row = int((~torch.isfinite(self.times)).nonzero()[0])
            raise ValueError(
                f"times must be finite, but row {row} has {float(self.times[row])}.\n"
                "  Leave the row out."
            )
        strange = self.observed & ~torch.isfinite(self.values)
        if bool(strange.any()):
            row, variable = strange.nonzero()[0].tolist()
            raise ValueError(
                f"observed values must be finite, but variable {variable} of row {row} is "
                f"{float(self.values[row, variable])}.\n"
                "  Mark it as not observed: observed=torch.isfinite(values)."
            )

    def _check_order(self) -> None:
        later = (self.times[1:] >= self.times[:-1]) | (self.sample[1:] != self.sample[:-1])
        if not bool(later.all()):
            row = int((~later).nonzero()[0]) + 1
            raise ValueError(
                f"the times of a sample must not decrease, but row {row} of sample "
                f"{int(self.sample[row])} has {float(self.times[row])} after "
                f"{float(self.times[row - 1])}.\n  Sort its rows by time."
            )

    @classmethod
    def join(cls, samples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> IrregularSeries:
        """The series of samples given as `(times (n,), values (n, D), observed (n, D))`."""
        if not isinstance(samples, list | tuple) or not samples:
            hint = "Write [(times, values, observed)] for a single sample."
            checks.refuse("samples", "a list of (times, values, observed)", samples, hint)
        for i, sample in enumerate(samples):
            if not isinstance(sample, tuple | list) or len(sample) != 3:
                hint = "Where all is observed, it is torch.ones_like(values, dtype=torch.bool)."
                checks.refuse(f"samples[{i}]", "(times, values, observed)", sample, hint)
            for part in sample:
                checks.tensor(f"samples[{i}]", part)
        times, values, observed = zip(*samples, strict=True)
        lengths = torch.tensor([len(t) for t in times])
        return cls(torch.cat(times), torch.cat(values), torch.cat(observed), lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Tensor | slice) -> IrregularSeries:
        expected = "a slice, or a tensor of places or of booleans"
        hint = "Write series[i : i + 1] for sample i, or series[torch.tensor(places)]."
        if not isinstance(index, slice | Tensor):
            checks.refuse("index", expected, index, hint)
        if isinstance(index, Tensor):
            checks.tensor("index", index, axes=1)
            if index.is_floating_point() or index.is_complex():
                checks.refuse("index", expected, index, "Convert it: index.long().")
            if index.dtype == torch.bool and len(index) != len(self):
                raise ValueError(
                    f"index must have a boolean for each of the {len(self)} samples, but has "
                    f"{len(index)}.\n  To choose rows of the samples, write series.only(rows)."
                )
            if index.dtype != torch.bool and bool((index.abs() >= len(self)).any()):
                raise ValueError(
                    f"index must lie below the {len(self)} samples, but is {index}.\n"
                    f"  The first sample is 0, the last {len(self) - 1}."
                )
        lengths, first = self.lengths[index], self.first[index]
        # Row k of the result is row k - (rows before its sample here) + (first row there).
        shift = torch.repeat_interleave(first - _starts(lengths), lengths)
        return self.rows(shift + torch.arange(len(shift), device=shift.device), lengths)

    def rows(self, rows: Tensor, lengths: Tensor) -> IrregularSeries:
        """The series of chosen rows.

        Args:
            rows: their places, shape `(M,)`.
            lengths: how many of them each sample has, shape `(B,)`.
        """
        return IrregularSeries(self.times[rows], self.values[rows], self.observed[rows], lengths)

    @property
    def variables(self) -> int:
        """Number of variables, `D`."""
        return self.values.shape[1]

    @cached_property
    def first(self) -> Tensor:
        """Place of each sample's first row, shape `(B,)`."""
        return _starts(self.lengths)

    @cached_property
    def sample(self) -> Tensor:
        """Sample that each row belongs to, shape `(N,)`."""
        count = torch.arange(len(self.lengths), device=self.lengths.device)
        return torch.repeat_interleave(count, self.lengths)

    @cached_property
    def merged(self) -> tuple[Tensor, Tensor]:
        """All different times in order, `(T,)`, and the place of each row's among them, `(N,)`."""
        times, place = torch.unique(self.times, return_inverse=True)
        return times, place

    def per_sample(self, entries: Tensor) -> Tensor:
        """Sums over each sample's observed entries.

        Args:
            entries: shape `(N, D)`; what stands at unobserved places is ignored, NaN too.

        Returns:
            Shape `(B,)`.
        """
        entries = checks.tensor("entries", entries)
        if entries.shape != self.values.shape:
            raise ValueError(
                f"entries must have shape {tuple(self.values.shape)}, one for each value, but has "
                f"{tuple(entries.shape)}.\n  Write entries.expand_as(series.values)."
            )
        rows = torch.where(self.observed, entries, torch.zeros_like(entries)).sum(1)
        return rows.new_zeros(len(self)).index_add(0, self.sample, rows)

    def counts(self) -> Tensor:
        """Number of observed entries of each sample, shape `(B,)`."""
        return self.per_sample(torch.ones_like(self.values))

    def to(self, dtype: torch.dtype) -> IrregularSeries:
        """The series with times and values of another dtype."""
        check_dtype(dtype)
        return IrregularSeries(
            self.times.to(dtype), self.values.to(dtype), self.observed, self.lengths
        )

    def only(self, rows: Tensor) -> IrregularSeries:
        """The same rows, with nothing observed but in those that `rows`, bool `(N,)`, marks."""
        rows = checks.tensor("rows", rows, axes=1)
        if rows.shape != self.times.shape or rows.dtype != torch.bool:
            expected = f"a tensor of booleans of shape {tuple(self.times.shape)}"
            hint = "A condition on the times makes one: series.times < 0.5."
            checks.refuse("rows", expected, rows, hint, ValueError)
        observed = self.observed & rows[:, None]
        return IrregularSeries(self.times, self.values, observed, self.lengths)

    def hide(
        self, share: float, *, generator: torch.Generator | None = None
    ) -> tuple[IrregularSeries, Tensor]:
        """Take rows away from each sample at random.

        Args:
            share: of the rows, in (0, 1), rounded down; so every sample keeps at least one.
            generator: a CPU generator, source of the choice; default torch's own.

        Returns:
            The series of the rows that stay, and which rows are taken away, bool, `(N,)`.

        Raises:
            ValueError: a share out of range.
        """
        share = checks.number("share", share, above=0, below=1)
        checks.generator("generator", generator)
        sample, lengths, first = (x.cpu() for x in (self.sample, self.lengths, self.first))
        order = torch.argsort(
            sample + torch.rand(len(sample), generator=generator, dtype=torch.float64)
        )
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order)) - first[sample]
        count = (share * lengths).floor().long()
        hidden = (rank < count[sample]).to(self.times.device)
        stay = (~hidden).nonzero().squeeze(1)
        return self.rows(stay, self.lengths - count.to(self.lengths.device)), hidden


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def split_at_random(
    series: IrregularSeries, *, validation: float, test: float, seed: int
) -> Splits[IrregularSeries]:
    """Divide samples at random.

    Args:
        series: all samples.
        validation: share of them held out to choose settings on; may be 0.
        test: share held out to report on.
        seed: of the division.

    Returns:
        The parts.

    Raises:
        ValueError: shares out of range, or that leave nothing for training or test.
    """
    count = len(series)
    held = [round(share * count) for share in (validation, test)]
    if min(validation, test) < 0 or held[1] < 1 or sum(held) >= count:
        raise ValueError(
            f"validation={validation} and test={test} must be shares that leave samples for "
            f"training and test; there are {count} samples.\n"
            "  Give smaller shares, or more samples."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    last, middle, first = torch.split(order, [held[1], held[0], count - sum(held)])
    return Splits(series[first], series[middle], series[last])


def check_series(name: str, value: object) -> IrregularSeries:
    """An argument that is a series.

    Raises:
        TypeError: `value` is something else.
    """
    example = "IrregularSeries(times, values, observed, lengths)"
    return checks.instance(name, value, IrregularSeries, example=example)
