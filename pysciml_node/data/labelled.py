"""Inputs with class labels, and their division into training, validation and test parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from pysciml_node import checks


class Samples(Protocol):
    """Data that can be counted and picked from, sample by sample."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: Tensor | slice) -> Self:
        """The samples at these places, in this order."""


DataT = TypeVar("DataT", bound=Samples)


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """A real floating-point dtype.

    Raises:
        TypeError: `dtype` is something else.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        expected = "a floating-point dtype, such as torch.float32"
        checks.refuse("dtype", expected, dtype, "Write dtype=torch.float32.")
    return dtype


def check_division(validation: float, test: float, seed: int, dtype: torch.dtype) -> int:
    """Check the shares that a data set is divided by, and its dtype; return the seed.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range.
    """
    checks.number("validation", validation)
    checks.number("test", test)
    check_dtype(dtype)
    return checks.whole("seed", seed, at_least=0, at_most=2**63 - 1)


@dataclass(frozen=True)
class LabelledData:
    """Inputs `x` of shape `(N, *D)` and their class labels `y` of shape `(N,)`.

    Args:
        x: inputs, the sample first.
        y: integer labels.

    Raises:
        ValueError: `x` and `y` hold different numbers of samples, or `y` is not a vector.
        TypeError: `y` is not of an integer dtype.

    Examples:
        >>> data = LabelledData(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
        >>> len(data), len(data[torch.tensor([0, 2])])
        (3, 2)
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        checks.settle(self, x=checks.tensor("x", self.x), y=checks.tensor("y", self.y))
        if self.y.ndim != 1 or self.x.ndim < 1 or len(self.x) != len(self.y):
            raise ValueError(
                f"x and y must hold one label a sample: x of shape (N, *D), y of shape (N,); "
                f"got {tuple(self.x.shape)} and {tuple(self.y.shape)}.\n"
                "  Labels in one-hot rows become numbers by y.argmax(1)."
            )
        if self.y.is_floating_point() or self.y.is_complex() or self.y.dtype == torch.bool:
            raise TypeError(
                f"y must be of an integer dtype, but is {self.y.dtype}.\n  Convert it: y.long()."
            )

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor | slice) -> "LabelledData":
        return LabelledData(self.x[index], self.y[index])


@dataclass(frozen=True)
class Splits(Generic[DataT]):
    """The three parts of a data set; choices are made on `validation`, never on `test`.

    Args:
        train: what the parameters are fitted to.
        validation: what settings are chosen on; may be empty.
        test: what is reported.
    """

    train: DataT
    validation: DataT
    test: DataT

    @property
    def monitor(self) -> tuple[str, DataT]:
        """The part to watch while training, with its name: validation, or test without one."""
        if len(self.validation) > 0:
            return "validation", self.validation
        return "test", self.test


def stratified_split(
    labels: Tensor, fractions: Mapping[str, float], *, generator: torch.Generator
) -> dict[str, Tensor]:
    """Divide samples at random so that every part has the classes in the same proportions.

    Of the `n_c` samples of class `c`, part `k` gets those between the rounded cumulative
    shares `n_c (p_1 + ... + p_{k-1})` and `n_c (p_1 + ... + p_k)` of a random order, so each
    class is off its exact share by less than one sample.

    Args:
        labels: integer labels, shape `(N,)`.
        fractions: name and share of each part; positive, and one in total.
        generator: source of the random order.

    Returns:
        For each part the sorted indices of its samples; together they are `0 .. N-1`.

    Raises:
        ValueError: the shares are not positive or do not add up to one.

    Examples:
        >>> g = torch.Generator().manual_seed(0)
        >>> parts = stratified_split(torch.tensor([0, 0, 1, 1]), {"a": 0.5, "b": 0.5}, generator=g)
        >>> sorted(parts["a"].tolist() + parts["b"].tolist())
        [0, 1, 2, 3]
    """
    labels = checks.tensor("labels", labels, axes=1)
    hint = 'Write {"train": 0.8, "test": 0.2}.'
    if not isinstance(fractions, Mapping):
        checks.refuse("fractions", "a dict of names and shares", fractions, hint)
    checks.instance(
        "generator", generator, torch.Generator, example="torch.Generator().manual_seed(0)"
    )
    listed = [checks.number(f"fractions[{name!r}]", x) for name, x in fractions.items()]
    shares = torch.tensor(listed, dtype=torch.float64)
    if bool((shares <= 0).any()) or abs(float(shares.sum()) - 1.0) > 1e-9:
        raise ValueError(
            f"fractions must be positive and add up to one, but are {dict(fractions)}.\n"
            "  Leave out a part that is to be empty, and divide the others by their sum."
        )
    bounds = torch.cat([torch.zeros(1, dtype=torch.float64), shares.cumsum(0)])
    parts: dict[str, list[Tensor]] = {name: [] for name in fractions}
    for label in sorted(set(labels.tolist())):
        members = torch.nonzero(labels == label).squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        cuts = (bounds * len(members)).round().long().tolist()
        for part, start, stop in zip(parts.values(), cuts[:-1], cuts[1:], strict=True):
            part.append(members[start:stop])
    return {name: torch.cat(pieces).sort().values for name, pieces in parts.items()}
