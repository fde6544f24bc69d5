"""What those expect of a solution who come from packages where it is a tensor or a pair."""

from typing import Any, NoReturn

ELSEWHERE = {
    "y": "u",
    "ys": "u",
    "x": "u",
    "xs": "u",
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
    "shape": "u1.shape",
    "dtype": "u1.dtype",
    "device": "u1.device",
}
"""The names that other packages have for the parts of a solution."""


class NoTensor:
    """Base of solutions, which says so where a tensor is expected."""

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(
            "a Solution is one object, not a tensor.\n"
            "  Its last state is solution.u1, its states are solution.u."
        )

    @classmethod
    def __torch_function__(cls, function: Any, *rest: Any) -> NoReturn:
        raise TypeError(
            f"{getattr(function, '__name__', 'this function')} takes tensors, but was given "
            f"{'an' if cls.__name__[0] in 'AEIOU' else 'a'} {cls.__name__}.\n"
            '  Give it solution.u1. A layer before others returns that with output="u1".'
        )
