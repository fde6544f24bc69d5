"""Values whose memory is written to again, in no way that torch counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.compat import torchsde

D = torch.float64


BUFFERS = (torch.zeros(2, 3, dtype=D), torch.zeros(2, 3, dtype=D))


@pytest.mark.parametrize("algorithm", [psn.EM(), psn.SOSRI(), psn.SRIW1()])
@pytest.mark.parametrize(
    "adjoint",
    [psn.DiscreteAdjoint(), psn.DiscreteAdjoint(memory=0), psn.DirectAdjoint(), None],
)
def test_values_whose_memory_is_used_again(algorithm: Any, adjoint: Any) -> None:
    """Both are written into tensors that the next evaluation writes to, in no way torch counts."""

    def into(place: int, value: Tensor) -> Tensor:
        BUFFERS[place].numpy()[...] = value.detach().numpy()
        return BUFFERS[place]

    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.cos(u.detach() + t)

    def g(t: Tensor, u: Tensor) -> Tensor:
        return torch.sin(2 * u.detach() + t)

    found = []
    for written in (False, True):
        u0 = torch.linspace(-1, 1, 6, dtype=D).reshape(2, 3).requires_grad_()
        with torch.set_grad_enabled(adjoint is not None):
            problem = psn.SDEProblem(
                (lambda t, u: into(0, f(t, u))) if written else f,
                (lambda t, u: into(1, g(t, u))) if written else g,
                u0,
                (0.0, 1.0),
            )
            solution = psn.solve(
                problem,
                algorithm,
                adjoint=adjoint or psn.DiscreteAdjoint(),
                controller=psn.FixedStep(),
                dt0=0.11,
                engine="torch",
                generator=torch.Generator().manual_seed(3),
            )
        found.append(solution.u1.detach())
        if adjoint is not None:
            # None of the values depends on the state, as torch sees it.
            (slope,) = torch.autograd.grad(solution.u1.sum(), u0)
            torch.testing.assert_close(slope, torch.ones_like(u0), rtol=0, atol=0)
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-14)


class Reused(torchsde.BaseBrownian):
    """A motion that gives out one piece of memory, again and again."""

    dtype, device, shape = D, torch.device("cpu"), torch.Size((2, 3))
    levy_area_approximation = "none"

    def __init__(self) -> None:
        self.found = torch.zeros(2, 3, dtype=D)

    def __call__(
        self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False
    ) -> Any:
        self.found.numpy()[...] = math.sin(9 * float(tb)) - math.sin(9 * float(ta))
        return self.found


def test_a_motion_that_gives_out_the_same_memory() -> None:
    """`dy = s y o sin(9 t)'` in Stratonovich's reading: `y = exp(s sin 9)`."""
    s = nn.Parameter(torch.tensor(0.3, dtype=D))

    class Driven:
        noise_type, sde_type = "diagonal", "stratonovich"

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return 0 * y

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return s * y

    for function in (torchsde.sdeint, torchsde.sdeint_adjoint):
        y0 = torch.ones(2, 3, dtype=D)
        ys = function(Driven(), y0, [0.0, 1.0], Reused(), method="heun", dt=1e-2)
        (found,) = torch.autograd.grad(ys[-1].mean(), s)
        expected = math.exp(0.3 * math.sin(9))
        assert ys[-1].mean().item() == pytest.approx(expected, rel=1e-3)
        assert found.item() == pytest.approx(math.sin(9) * expected, rel=1e-3)
