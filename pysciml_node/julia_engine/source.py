"""Fields written in Julia."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.julia_engine.evaluation import evaluate
from pysciml_node.julia_engine.process.buffers import (
    CODES,
    integers,
)
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.translation.recent import Recent

_MOST = 16
_EXAMPLE = 'Write a function, such as "(u, p, t) -> -u".'
"""Shapes and dtypes of one source that are kept in Julia."""


class JuliaField:
    """A vector field given as Julia source, with parameters from torch.

    It is a callable like any other, so it can be used on both engines and by every training method;
    on the Julia engine it is never called back. The source is code and runs as such: take it from
    nobody whom you do not trust.

    The source is code: it is compiled and run as it stands, with all that Julia may do on this
    machine, and a pickled field brings its source along. Load none from people, files or web pages
    that you would not take a program from.

    Args:
        source: Julia code that ends in a function `f(u, p, t)` returning `du/dt`, or in SciML's
            form in place, `f(du, u, p, t)`, which writes `du/dt` to `du`. `u` is an array of the
            state's shape reversed: a torch state `(B, D)` is `(D, B)` in Julia, the batch last. `p`
            is the problem's `p` as a vector, `t` a number. `LinearAlgebra` is loaded. Gradients of
            the first form are Zygote's, so it must not change arrays in place; those of the second
            are ForwardDiff's, at a cost that grows with the number of states and parameters.

    Raises:
        TypeError: the source is no text; when the field is first used, the state or `p` is no
            single tensor.
        JuliaError: the source does not parse, or is no function.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> field = psn.JuliaField("(u, p, t) -> -p[1] .* u")
        >>> problem = psn.ODEProblem(field, torch.ones(3), (0.0, 1.0), p=torch.tensor([2.0]))
    """

    def __init__(self, source: str) -> None:
        if not isinstance(source, str):
            checks.refuse("source", "Julia code as text", source, _EXAMPLE)
        checks.text("source", source, hint=_EXAMPLE)
        self.source = source
        self._handles = _handles()

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "_handles": _handles()}

    def __repr__(self) -> str:
        return f"JuliaField({self.source!r})"

    def handle(self, dtype: torch.dtype, shape: torch.Size) -> Handle:
        """The field in Julia for states of one dtype and shape."""
        key = (self.source, dtype, shape)
        handle = self._handles.get(key)
        if handle is None:
            sizes = integers(tuple(reversed(shape)))
            number = enter(
                "make_source", text=self.source, dtype=CODES[dtype], dims=len(sizes), shape=sizes
            )
            handle = self._handles[key] = Handle(number)
        return handle

    def __call__(self, t: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        """The derivative at `(t, u)`; shape and dtype of `u`."""
        if not _is_real(u) or not (p is None or _is_real(p)):
            raise TypeError(
                "a JuliaField takes one real tensor as state and one as p, but was given "
                f"{_described(u)} and {_described(p)}.\n"
                "  Join the parts with torch.cat, and complex numbers with torch.view_as_real."
            )
        parameters = u.new_empty(0) if p is None else p.reshape(-1).to(u)
        time = t if isinstance(t, Tensor) else u.new_tensor(t)
        return evaluate(self.handle(u.dtype, u.shape), time, u, parameters, ("Zygote",))


def _handles() -> Recent[tuple[str, torch.dtype, torch.Size], Handle]:
    return Recent(_MOST)


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_complex()


def _described(x: Any) -> str:
    return f"one of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
