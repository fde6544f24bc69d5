"""Parts of a solution that are made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from pysciml_node.problems.modes import ordinary_modes

T = TypeVar("T", bound="InParts")
Make = Callable[[str], Any]


class InParts:
    """Base of solutions that may lack some of their parts until somebody reads them.

    Every solve leaves a solution, and most are asked for little more than their last state.
    """

    __dataclass_fields__: dict[str, Any]
    problem: Any

    def __dir__(self) -> Iterable[str]:
        """The parts that are not made yet are there for who looks, too."""
        return {*super().__dir__(), *self.__dataclass_fields__}

    def _is_later(self, name: str) -> bool:
        """Whether a part is missing and will be made."""
        held = self.__dict__
        return "_make" in held and name not in held and name in self.__dataclass_fields__

    def _made(self, name: str) -> Any:
        """A part, made as if when the solve ended: whatever the modes are that it is read in."""
        spec, factory = self.problem.spec, self.__dataclass_fields__[name].default_factory
        with ordinary_modes(spec.device), torch._C._DisableFuncTorch():
            if name == "penalty":
                part = torch.zeros((), dtype=spec.real_dtype, device=spec.device)
            else:
                part = factory() if callable(factory) else self.__dict__["_make"](name)
        return self.__dict__.setdefault(name, part)


def in_parts(kind: type[T], make: Make, parts: dict[str, Any]) -> T:
    """A solution some of whose parts are made when they are first asked for.

    Args:
        kind: its class.
        make: makes the part of a name, of those that are not given and have no default. They must
            have no graph, which would depend on where they are asked for. While there is no
            trajectory it is asked for its `states` too, with their graph: `(n + 1, N)`, a copy.
        parts: those that there are, by name.
    """
    solution = kind.__new__(kind)
    solution.__dict__.update(parts, _make=make)
    return solution
