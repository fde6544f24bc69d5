"""Whether a program is its module: both are evaluated and differentiated by torch at one point."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.state import StateSpec
from pysciml_node.translation.program import Program

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative; far above rounding, far below any other difference."""


def check_program(module: nn.Module, spec: StateSpec, program: Program, p: list[Tensor]) -> None:
    """Compare value and derivatives at a random state.

    What they find is a `forward` whose derivative in torch is not that of its operations:
    functions with a `backward` of their own, derivatives taken inside without `create_graph`.

    Args:
        module: the vector field.
        spec: structure of the state.
        program: what it was translated to.
        p: the tensors that make up the program's parameter vector.

    Raises:
        UnsupportedModule: they differ, or torch cannot differentiate the module.
    """
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn((2, sum(spec.sizes)), generator=generator, dtype=spec.dtype).to(spec.device)
    t = torch.tensor(0.6180339887, dtype=spec.dtype, device=spec.device)
    with torch.enable_grad():
        inputs = [u.requires_grad_(), t.requires_grad_(), *(x for x in p if x.requires_grad)]
        flat = torch.cat([u.new_empty(0), *(x.reshape(-1) for x in p)])
        expected = spec.flatten(module(t, spec.unflatten(u)))
        state = list(spec.parts(spec.unflatten(u)))
        found = torch.cat([part.reshape(-1) for part in program.evaluate(t, state, flat)])
        try:
            pulled = [_pull(x, inputs, v) for x in (found, expected)]
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UnsupportedModule(
                f"{type(module).__name__} cannot be differentiated by torch: {reason}"
            ) from error
    for one, other in zip([found, *pulled[0]], [expected, *pulled[1]], strict=True):
        bound = _TOLERANCE.get(spec.dtype, 1e-1)
        size = float(other.detach().nan_to_num(posinf=0, neginf=0).abs().max()) if len(other) else 0
        if not torch.allclose(one, other, rtol=bound, atol=bound * size, equal_nan=True):
            what = "another value" if other is expected else "another derivative"
            raise UnsupportedModule(
                f"{type(module).__name__} has {what} in torch than its operations have; functions "
                "with a backward of their own and derivatives taken inside without create_graph "
                "cannot be translated for Julia."
            )


def _pull(out: Tensor, inputs: list[Tensor], v: Tensor) -> list[Tensor]:
    if not out.requires_grad:
        return [torch.zeros_like(x).reshape(-1) for x in inputs]
    gradients = torch.autograd.grad(
        out, inputs, v, allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return [gradient.reshape(-1) for gradient in gradients]
