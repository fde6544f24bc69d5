"""Kept graphs of steps in torchsde's functions: their gradients are those of `sdeint`."""

from __future__ import annotations

import pytest
import torch
from stochastic.sde_nets import Counting, D, Nets, start
from torch import Tensor, nn

from pysciml_node.compat import torchsde


class Both(nn.Module):
    """Drift and diffusion in one function."""

    noise_type, sde_type = "general", "stratonovich"

    def __init__(self) -> None:
        super().__init__()
        self.nets, self.counting = Nets("general"), Counting()

    def f_and_g(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.nets.f(t, y) + self.counting.f(t, y), self.nets.g(t, y)


@pytest.mark.parametrize("method", ["midpoint", "heun", "euler_heun", "log_ode"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_both_in_one_function_and_nothing_is_left_behind(method: str, adaptive: bool) -> None:
    sde, found = Both(), []
    for function in (torchsde.sdeint, torchsde.sdeint_adjoint):
        y0 = start()
        bm = torchsde.BrownianInterval(
            0.0, 1.0, (2, 2), D, entropy=5, levy_area_approximation="foster"
        )
        control = {"dt": 0.125, "adaptive": adaptive, "rtol": 0.1, "atol": 0.1}
        ys = function(sde, y0, [0.0, 0.4, 1.0], bm, method=method, **control)
        found.append(list(torch.autograd.grad(ys.square().sum(), [y0, *sde.parameters()])))
        assert sde.counting.alive() == 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("noise", ["diagonal", "additive", "general"])
def test_relative_entropies(noise: str) -> None:
    sde, found = Nets(noise), []
    for function in (torchsde.sdeint, torchsde.sdeint_adjoint):
        y0 = start()
        size = 4 if noise == "diagonal" else 2  # the entropy's entry has one, too
        bm = torchsde.BrownianInterval(0.0, 1.0, (2, size), D, entropy=5)
        ys, entropy = function(sde, y0, [0.0, 0.4, 1.0], bm, method="euler", dt=0.1, logqp=True)
        loss = ys.square().sum() + entropy.sum()
        found.append(list(torch.autograd.grad(loss, [y0, *sde.parameters()])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
