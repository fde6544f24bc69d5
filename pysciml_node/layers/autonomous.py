"""Fields that take the state alone, such as an `nn.Sequential`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from pysciml_node.checks import refuse, takes


class Autonomous(nn.Module):
    """A field that does not see the time, `f(t, u) = inner(u)`.

    Args:
        inner: the module that takes the state alone.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, t: Tensor, u: Any, p: Any = None) -> Any:
        """The derivative at `u`.

        Raises:
            ValueError: there is a `p`, which the module could not see.
        """
        return _without_time(self.inner, t, u, p)


def _without_time(inner: Callable[[Any], Any], t: Tensor, u: Any, p: Any = None) -> Any:
    if p is not None:
        raise ValueError(
            "p was given, but the field takes one argument, the state.\n"
            "  Write it as field(t, u, p), or leave p out. Times are saveat=."
        )
    return inner(u)


def check_function(name: str, value: Any, *places: str) -> None:
    """What a layer is given as a field, a drift or a diffusion.

    Args:
        name: of the argument.
        value: what was given.
        places: the names of its arguments, in words.

    Raises:
        TypeError: it is not callable, or a class in place of its instance.
    """
    taken = ", ".join(places)
    hint = f"Give an nn.Module or a function of ({taken})."
    if isinstance(value, type):
        hint = f"Make one: {value.__name__}(...)."
    if isinstance(value, type) or not callable(value):
        refuse(name, f"callable as {name}({taken})", value, hint)


def with_time(field: Callable[..., Any]) -> Callable[..., Any]:
    """A field as a function of time and state, where by its signature it takes the state alone."""
    if takes(field, 2) or not takes(field, 1):
        return field
    return Autonomous(field) if isinstance(field, nn.Module) else partial(_without_time, field)


def used(field: Any) -> list[nn.Module]:
    """The modules with trainable parameters that a function, which owns none, is seen to use."""
    if isinstance(field, nn.Module) or not isinstance(field, FunctionType):
        return []
    names = inspect.getclosurevars(field)
    seen = {**names.globals, **names.nonlocals}.values()
    modules = [value for value in seen if isinstance(value, nn.Module)]
    return [m for m in modules if any(p.requires_grad for p in m.parameters())]


def unregistered(module: nn.Module) -> Iterator[str]:
    """Names of attributes whose parameters torch does not find: modules in lists, plain tensors.

    What begins with an underscore is meant to be out of sight.
    """
    owned = {id(parameter) for parameter in module.parameters()}
    for path, inner in module.named_modules():
        for name, value in vars(inner).items():
            if name.startswith("_"):
                continue
            held = value.values() if isinstance(value, dict) else value
            held = list(held) if isinstance(value, list | tuple | dict) else [value]
            if any(x.requires_grad and id(x) not in owned for x in _trainable(held)):
                yield f"{path}.{name}" if path else name


def _trainable(held: list[Any]) -> Iterator[Tensor]:
    """The leaves among tensors, and the parameters of modules."""
    for x in held:
        if isinstance(x, nn.Module):
            yield from x.parameters()
        elif isinstance(x, Tensor) and x.is_leaf:
            yield x
