"""Problems as solutions carry them away: with other tensors, or as what can be pickled of them."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from torch import Tensor
from torch.utils._pytree import register_pytree_node

from pysciml_node.problems.state import map_tensors

if TYPE_CHECKING:
    from pysciml_node.problems.ode import Problem

P = TypeVar("P", bound="Problem")
T = TypeVar("T")


def walkable(kind: type[T]) -> type[T]:
    """Let whoever walks through a module's output find the tensors in a dataclass.

    DistributedDataParallel puts a node behind each of them.
    """
    names = tuple(field.name for field in dataclasses.fields(cast(Any, kind)))

    def flatten(value: T) -> tuple[list[Any], None]:
        return [getattr(value, name) for name in names], None

    def unflatten(children: Iterable[Any], _: None) -> T:
        return kind(**dict(zip(names, children, strict=True)))

    register_pytree_node(kind, flatten, unflatten)
    return kind


@dataclass(frozen=True)
class LostField:
    """Stands for a function that could not be pickled with the solution it belongs to."""

    name: str

    def __call__(self, *arguments: Any) -> NoReturn:
        """Refused: the function is not here.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"this solution was pickled, and {self.name} could not be pickled with it, so that "
            "nothing can be computed from it.\n"
            "  Ask for the times by saveat= in the solve, or use an nn.Module or a function of a "
            "module's top level, which can be pickled."
        )


def mapped_problem(problem: P, fn: Callable[[Tensor], Tensor]) -> P:
    """The problem with `fn` applied to the tensors of its state, interval and extra argument."""
    given: Any = problem
    changes = {name: map_tensors(fn, getattr(given, name)) for name in ("u0", "tspan", "p")}
    return cast(P, dataclasses.replace(given, **changes))


def portable_problem(problem: P) -> P:
    """The problem with functions that cannot be pickled replaced by what says so."""
    given: Any = problem
    changes = {
        f.name: LostField(_named(getattr(given, f.name)))
        for f in dataclasses.fields(given)
        if callable(getattr(given, f.name, None)) and not _pickles(getattr(given, f.name))
    }
    return cast(P, dataclasses.replace(given, **changes)) if changes else problem


def _named(function: Any) -> str:
    return f"the field {getattr(function, '__qualname__', type(function).__name__)}"


def _pickles(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        # A class of the user's may raise anything.
        return False
    return True
