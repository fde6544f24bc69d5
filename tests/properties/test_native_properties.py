"""Native flows of any width are those of the loop in Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
BETWEEN = [
    torch.tanh, torch.sigmoid, functional.silu, functional.gelu, functional.softplus, torch.sin,
    lambda h: torch.softmax(h, -1), lambda h: h / (1 + h * h), lambda h: h.cumsum(-1).cos(),
    lambda h: functional.layer_norm(h, h.shape[-1:]),
]  # fmt: skip


class Field(nn.Module):
    """A layer, a function of its units and the time, and a layer back, over the last axis."""

    def __init__(self, width: int, hidden: int, between: int, bias: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden, bias=bias, dtype=D)
        self.outer = nn.Linear(hidden, width, bias=bias, dtype=D)
        self.between = BETWEEN[between]
        generator = torch.Generator().manual_seed(7)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1.0, 1.0, generator=generator)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = torch.sin(t) * u + self.outer(self.between(self.inner(u) + t)) / 2
        return out


def expect_close(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        scale = float(b.detach().abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * (1.0 + scale))


fields = st.tuples(st.integers(1, 9), st.integers(0, len(BETWEEN) - 1), st.booleans())


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 4), width=st.integers(1, 6), made=fields, exact=st.booleans(),
    penalized=st.booleans(), backward=st.booleans(),
)  # fmt: skip
def test_a_native_flow_is_that_of_the_loop_in_python(
    batch: int, width: int, made: tuple[int, int, bool], exact: bool, penalized: bool,
    backward: bool,
) -> None:  # fmt: skip
    field = Field(width, *made)
    regularizers = [psn.JacobianFrobenius(exact=exact), psn.KineticEnergy()] if penalized else []

    def flown(compile: bool) -> list[Tensor]:
        flow = psn.CNF(
            field, event_shape=width, exact=exact, regularizers=regularizers, compile=compile,
            controller=psn.FixedStep(), dt0=0.25, generator=torch.Generator().manual_seed(2),
        )  # fmt: skip
        torch.manual_seed(3)
        x = torch.randn(batch, width, dtype=D, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        mapped = flow.inverse(x) if backward else flow.transform(x)
        loss = mapped.u.square().sum() + mapped.log_det.sum() + mapped.penalty
        inputs = [x, *field.parameters()]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        return [mapped.u, mapped.log_det, mapped.penalty, *gradients]

    expect_close(flown(True), flown(False))
