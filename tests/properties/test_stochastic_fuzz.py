"""Native stochastic solves of random fields are those of the loop in Python, on the same paths.

A few equations are drawn for the tests, the same each time. More of them, and others:

    PSN_FUZZ=1000 pytest tests/properties/test_stochastic_fuzz.py --hypothesis-seed=7
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.native_cases import (
    SHARES,
    SOLVES,
    Case,
    D,
    dtypes,
    examples,
    expect_alike,
    initial,
    of_dtype,
    of_entries,
    stepping,
)
from random_fields import RandomField, fields
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

METHODS = [
    *(psn.EM(), psn.LambaEM(), psn.RKMil(), psn.SRIW1(), psn.SOSRI(), psn.SOSRI2(delta=0.4)),
    *(psn.SRA1(), psn.SOSRA(), psn.SOSRA2(delta=0.0)),
    *(psn.EulerHeun(), psn.StratonovichMidpoint(), psn.ReversibleHeun()),
]
KINDS = [
    (method, noise, interpretation)
    for method in METHODS
    for noise in method.noises
    for interpretation in method.interpretations
]


class Diffusion(nn.Module):
    """A diffusion of a kind of noise, made of a random field.

    Args:
        field: the field, whose parameters it shares.
        noise: the kind.
        columns: motions of a matrix; 0 where it has the state's shape.
    """

    def __init__(self, field: RandomField, noise: str, columns: int) -> None:
        super().__init__()
        self.field, self.noise, self.columns = field, noise, columns
        self.level = nn.Parameter(torch.tensor(0.3, dtype=D))

    def forward(self, t: Tensor, u: Any, p: Any = ()) -> Any:
        """Evaluate it at `u`."""
        if self.noise == "additive":
            found = [self.level * torch.cos(t) * torch.ones_like(x) for x in self.field.parts(u)]
        else:
            values = self.field.parts(self.field(0.7 * t, u, p))
            found = [self.level * torch.cos(x) for x in values]
        if self.columns:
            shares = torch.linspace(-0.5, 1.0, self.columns, dtype=t.dtype)
            found = [torch.sin(x).unsqueeze(-1) * shares for x in found]
        return self.field.assembled(found)


@dataclass
class Equation(Case):
    """One solve of a stochastic equation, whose drift is a field.

    Attributes:
        diffusion: of the equation.
        interpretation: of the integral.
        seed: of the path.
    """

    diffusion: Any = None
    interpretation: Any = "ito"
    seed: int = 0

    @property
    def exact(self) -> float:
        """Paths agree to some units in the last place."""
        return 1e-3 if self.dtype is not D else 1e-10

    def leaves(self) -> list[Tensor]:
        """All that a solve depends on and that receives gradients."""
        return [*super().leaves(), self.diffusion.level]

    def solution(self, compile: bool) -> Any:
        """The solution."""
        u0, p = self.field.assembled(self.u0), tuple(self.p) or None
        diffusion = self.diffusion
        given = self.field, diffusion, u0, self.span, diffusion.noise, self.interpretation, p
        return psn.solve(
            psn.SDEProblem(*given),
            compile=compile,
            engine="torch",
            throw=False,
            generator=torch.Generator().manual_seed(self.seed),
            **self.options,
        )


@st.composite
def equations(draw: st.DrawFn, made: RandomField, kind: Any, diffusion: Diffusion) -> Equation:
    """A solve of an equation of a kind."""
    method, noise, interpretation = kind
    start, length = draw(st.sampled_from([0.0, -0.4, 3.0])), draw(st.sampled_from([0.6, 1.3]))
    options = draw(stepping(method))
    if noise not in method.adapts_to:
        options = {"algorithm": method, "adjoint": options["adjoint"]}
        options |= {"controller": psn.FixedStep(), "dt0": draw(st.sampled_from([0.11, 0.25, 2.0]))}
    elif "rtol" in options and draw(st.booleans()):
        options |= of_entries(draw, made)
    for name in ("saveat", "tstops"):
        shares = sorted(draw(st.lists(st.sampled_from(SHARES), max_size=5)))
        if shares:
            options[name] = [start + share * length for share in shares]
    u0 = initial(draw, made, diffusion.level.dtype)
    graded, seed = draw(st.sampled_from([True, True, False])), draw(st.integers(0, 2**40))
    dense = draw(st.sampled_from([None, 0.0, 0.4, 1.0]))
    return Equation(
        made, u0, (start, start + length), options, graded, dense, list(made.given),
        diffusion, interpretation, seed,
    )  # fmt: skip


@examples(3)
@given(data=st.data(), made=fields())
def test_a_random_equation_is_that_of_the_loop_in_python(
    data: st.DataObject, made: RandomField
) -> None:
    draw = data.draw
    several = bool(made.keys)
    kinds = [kind for kind in KINDS if not (several and kind[1] in ("scalar", "general"))]
    kind, dtype = draw(st.sampled_from(kinds)), draw(dtypes)
    made = of_dtype(made, dtype)
    matrix = kind[1] == "general" or (kind[1] == "additive" and not several and draw(st.booleans()))
    columns = draw(st.integers(1, 5)) if matrix else 0
    diffusion = Diffusion(made, kind[1], columns).to(dtype)
    for _ in range(SOLVES):
        expect_alike(draw(equations(made, kind, diffusion)))
