"""The distribution at the end of a flow: fixed, with parameters of its own, or made by a module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pysciml_node.checks import refuse
from pysciml_node.steps.graph import graph_leaves

_REMEDY = "Give base=a module whose forward() makes the distribution of its parameters."


@dataclass(frozen=True)
class Leaf:
    """A parameter that a distribution was made with.

    Attributes:
        name: where the distribution holds it.
        parameter: what is trained.
        view: what the distribution has made of it, which shares its memory.
    """

    name: str
    parameter: nn.Parameter
    view: Tensor

    def check(self) -> None:
        """Refuse a parameter that was moved: the distribution would stay with the old values."""
        if _memory(self.view) != _memory(self.parameter):
            raise ValueError(
                f"base no longer shares its {self.name} with the flow's parameter, which was moved "
                f"or converted.\n  {_REMEDY}"
            )


def check_base(base: Any) -> Distribution:
    """The distribution of one transformed sample, as it is now.

    Args:
        base: the distribution, or a module that makes it when it is called.

    Raises:
        TypeError: neither.
        ValueError: a batch of distributions.
    """
    distribution = base() if isinstance(base, nn.Module) else base
    if not isinstance(distribution, Distribution):
        expected = "a torch.distributions.Distribution, or a module that makes one"
        hint = "Leave it out for a standard normal one, or return a distribution from forward()."
        refuse("base", expected, distribution, hint)
    if distribution.batch_shape:
        raise ValueError(
            f"base must be one distribution, but is a batch of them, of shape "
            f"{tuple(distribution.batch_shape)}.\n"
            "  Wrap it: torch.distributions.Independent(base, len(base.batch_shape))."
        )
    return distribution


def leaves_of(base: Distribution) -> list[Leaf]:
    """The parameters that a distribution was made with.

    Raises:
        ValueError: it holds tensors that were computed from parameters once, and would not follow
            them.
    """
    leaves = []
    for name, held in _tensors(base, "", set()):
        if not held.requires_grad:
            continue
        sources = graph_leaves((held,))
        source = sources[0] if len(sources) == 1 else None
        if not isinstance(source, nn.Parameter) or _memory(source) != _memory(held):
            raise ValueError(
                f"base holds a {name} that was computed from trainable tensors when it was made, "
                f"and would not follow them.\n  {_REMEDY}"
            )
        leaves.append(Leaf(name, source, held))
    return leaves


def _memory(tensor: Tensor) -> tuple[int, torch.device]:
    return tensor.untyped_storage().data_ptr(), tensor.device


def _tensors(held: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a distribution holds, with the names of the attributes on the way."""
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        yield name, held
    elif isinstance(held, list | tuple):
        for place, entry in enumerate(held):
            yield from _tensors(entry, f"{name}_{place}", seen)
    elif isinstance(held, nn.Module):
        for key, parameter in held.named_parameters():
            yield f"{name}_{key.replace('.', '_')}", parameter
    elif isinstance(held, Distribution | Transform):
        for key, entry in vars(held).items():
            inner = name if key in ("base_dist", "_inv") else f"{name}_{key}".lstrip("_")
            yield from _tensors(entry, inner, seen)
