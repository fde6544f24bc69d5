"""Fields written in Julia."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pysciml_node.julia_engine.evaluation import evaluate
from pysciml_node.julia_engine.process import runtime
from pysciml_node.julia_engine.process.buffers import (
    CODES,
    address,
    integers,
)
from pysciml_node.julia_engine.process.handles import Handle


class JuliaField:
    """A vector field given as Julia source, with parameters from torch.

    It is a callable like any other, so it can be used on both engines and by every training method;
    on the Julia engine it is never called back. Gradients are Zygote's, so the source must not
    change arrays in place.

    Args:
        source: Julia code that ends in a function `f(u, p, t)` returning `du/dt`. `u` is an array
            of the state's shape reversed: a torch state `(B, D)` is `(D, B)` in Julia, the batch
            last. `p` is the problem's `p` as a vector, `t` a number. `LinearAlgebra` is loaded.

    Raises:
        TypeError: the state or `p` is no single tensor (when the field is first used).
        JuliaError: the source does not parse, or is no function.

    Example:
        >>> import torch, pysciml_node as psn
        >>> field = psn.JuliaField("(u, p, t) -> -p[1] .* u")
        >>> problem = psn.ODEProblem(field, torch.ones(3), (0.0, 1.0), p=torch.tensor([2.0]))
    """

    def __init__(self, source: str) -> None:
        if not isinstance(source, str):
            raise TypeError(f"source must be Julia code as text, but is {type(source).__name__}.")
        self.source = source
        self._handles: dict[tuple[torch.dtype, torch.Size], Handle] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "_handles": {}}

    def __repr__(self) -> str:
        return f"JuliaField({self.source!r})"

    def handle(self, dtype: torch.dtype, shape: torch.Size) -> Handle:
        """The field in Julia for states of one dtype and shape."""
        key = (dtype, shape)
        if key not in self._handles:
            sizes = integers(tuple(reversed(shape)))
            self._handles[key] = Handle(
                runtime.call("make_source", self.source, CODES[dtype], len(sizes), address(sizes))
            )
        return self._handles[key]

    def __call__(self, t: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        """The derivative at `(t, u)`; shape and dtype of `u`."""
        if not isinstance(u, Tensor) or not isinstance(p, Tensor | None):
            raise TypeError(
                "a JuliaField takes one tensor as state and one as p, but was given "
                f"{type(u).__name__} and {type(p).__name__}.\n  Join the parts with torch.cat."
            )
        parameters = u.new_empty(0) if p is None else p.reshape(-1).to(u)
        time = t if isinstance(t, Tensor) else u.new_tensor(t)
        return evaluate(self.handle(u.dtype, u.shape), time, u, parameters, ("Zygote",))
