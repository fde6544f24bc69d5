"""What those expect of a solution who come from packages where it is a tensor or a pair."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from pysciml_node import checks

ELSEWHERE = {
    "y": "u",
    "ys": "u",
    "x": "u",
    "xs": "u",
    "values": "u",
    "states": "u",
    "y1": "u1",
    "final": "u1",
    "ts": "t",
    "times": "t",
    "y0": "problem.u0",
    "u0": "problem.u0",
    "nfev": "stats.nfe",
    "nfe": "stats.nfe",
    "status": "retcode",
    "result": "retcode",
    "message": "retcode",
}
"""The names that other packages have for the parts of a solution."""

COUNTS = {
    "nfev": "nfe",
    "nf": "nfe",
    "steps": "naccept",
    "num_steps": "naccept",
    "num_accepted_steps": "naccept",
    "num_rejected_steps": "nreject",
}
"""The names that other packages have for the counts of a solve."""


def remedy(
    whole: str,
    name: str,
    known: Iterable[str],
    elsewhere: Mapping[str, str],
    *,
    tensor: bool = False,
) -> str:
    """The line that says which part was probably meant; empty where none is near.

    Args:
        whole: what has the parts, as it is written.
        name: of the part that was asked for.
        known: the names of its parts.
        elsewhere: names of other packages, and ours.
        tensor: whether the attributes of a tensor are those of the end state.
    """
    if name.startswith("_"):
        return ""
    meant = elsewhere.get(name)
    if meant is None and tensor and hasattr(Tensor, name):
        meant = f"u1.{name}"
    meant = meant or checks.nearest(name, (x for x in known if x[0] != "_"))
    return f"\n  Did you mean {whole}.{meant}?" if meant else ""


class Counted:
    """Base of the counts of a solve, which answers the names of other packages with ours."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            meant = remedy("solution.stats", name, dir(self), COUNTS)
            raise AttributeError(f"Stats has no attribute {name!r}.{meant}")


def _named(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def _refuses(operator: str, instead: str = "solution.u1") -> Callable[..., NoReturn]:
    """An operation on tensors that says what to write."""

    def refuse(self: object, *rest: Any) -> NoReturn:
        raise TypeError(
            f"{operator} takes tensors, but was given {_named(type(self))}.\n  Give it {instead}."
        )

    return refuse


class NoTensor:
    """Base of solutions, which says so where a tensor is expected."""

    __add__ = __radd__ = _refuses("+")
    __sub__ = __rsub__ = _refuses("-")
    __mul__ = __rmul__ = _refuses("*")
    __truediv__ = __rtruediv__ = _refuses("/")
    __matmul__ = __rmatmul__ = _refuses("@")
    __pow__ = _refuses("**")
    __neg__ = _refuses("-")
    __array__ = _refuses("numpy.asarray", "solution.u1.numpy(force=True)")

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(
            "a Solution is one object, not a tensor.\n"
            "  Its last state is solution.u1, its states are solution.u."
        )

    @classmethod
    def __torch_function__(cls, function: Any, *rest: Any) -> NoReturn:
        raise TypeError(
            f"{getattr(function, '__name__', 'this function')} takes tensors, but was given "
            f"{_named(cls)}.\n"
            '  Give it solution.u1. A layer before others returns that with output="u1".'
        )
