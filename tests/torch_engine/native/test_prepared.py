"""What is prepared once for many solves is the same for none that differ."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64


class Scaled(nn.Module):
    """`du/dt = -scale * rate * u`, with a number and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.scale = nn.Parameter(torch.ones(2, dtype=D)), 1.0

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.scale * self.rate * u


def solved(f: nn.Module, **options: object) -> psn.Solution:
    problem = psn.ODEProblem(f, torch.ones(2, dtype=D), (0.0, 1.0))
    return psn.solve(problem, psn.Tsit5(), rtol=1e-9, atol=1e-9, compile=True, **options)  # type: ignore[arg-type]


def decay(t: float, rate: float = 1.0) -> Tensor:
    return torch.full((2,), -rate * t, dtype=D).exp()


def test_dense_output_belongs_to_its_own_solve() -> None:
    f = Scaled()
    first, again = solved(f), solved(f)
    f.scale = 2.0
    later = solved(f)
    with torch.no_grad():
        f.rate = nn.Parameter(torch.full((2,), 3.0, dtype=D))
    last = solved(f)
    for solution, rate in ((first, 1.0), (again, 1.0), (later, 2.0), (last, 6.0)):
        torch.testing.assert_close(solution(0.37), decay(0.37, rate), rtol=1e-7, atol=1e-9)


def test_what_one_solution_settles_is_left_to_the_others() -> None:
    f = Scaled()
    solutions = [solved(f) for _ in range(3)]
    before = [x.error.detach() for x in solutions[2].step_estimates()]
    sum(x.error for x in solutions[1].step_estimates()).backward()
    f.scale = 2.0
    after = [x.error.detach() for x in solutions[2].step_estimates()]
    assert before
    assert all(map(torch.equal, before, after))


def test_a_module_is_not_kept_alive() -> None:
    f = Scaled()
    for _ in range(3):
        solved(f).u1.sum().backward()
    gone = weakref.ref(f)
    del f
    gc.collect()
    assert gone() is None


def test_a_list_of_times_may_change_between_solves() -> None:
    f, times = Scaled(), [0.25, 0.5]
    first = solved(f, saveat=times)
    times[0] = 0.125
    times.append(1.0)
    second = solved(f, saveat=times)
    assert first.t.tolist() == [0.25, 0.5]
    assert second.t.tolist() == [0.125, 0.5, 1.0]
    torch.testing.assert_close(second.u[0], decay(0.125), rtol=1e-8, atol=1e-9)


def test_an_empty_list_is_not_nothing() -> None:
    f = Scaled()
    solved(f)
    with pytest.raises(ValueError, match="saveat"):
        solved(f, saveat=[])
    solved(f, max_steps=1, throw=False)
    with pytest.raises(TypeError, match="max_steps"):
        solved(f, max_steps=True)


@pytest.mark.parametrize("grad", [False, True])
def test_fixed_steps_that_end_in_nan_are_cut_where_they_were_good(grad: bool) -> None:
    class Blowup(nn.Module):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return u * u * u * u

    problem = psn.ODEProblem(Blowup(), torch.full((2,), 5.0, dtype=D), (0.0, 4.0))
    both = []
    for compile in (False, True):
        with torch.set_grad_enabled(grad):
            both.append(
                psn.solve(
                    problem,
                    psn.Euler(),
                    controller=psn.FixedStep(),
                    dt0=0.5,
                    throw=False,
                    compile=compile,
                )
            )
    eager, native = both
    assert native.retcode is eager.retcode
    assert not native.success
    assert torch.equal(native.t, eager.t)
    assert torch.equal(native.u, eager.u)
    assert native.stats.naccept == eager.stats.naccept


@pytest.mark.parametrize("grad", [False, True])
def test_states_that_lie_apart_or_negated(grad: bool) -> None:
    f = nn.Linear(1, 1, bias=False, dtype=D)
    nn.init.constant_(f.weight, -1.0)
    apart = torch.arange(1.0, 5.0, dtype=D).reshape(4, 1)[::2]
    negated = torch.complex(torch.zeros(1, 1, dtype=D), apart[:1]).conj().imag
    assert negated.is_neg()
    for u0 in (apart, negated):
        problem = psn.ODEProblem(lambda t, u: f(u), u0, (0.0, 1.0))
        with torch.set_grad_enabled(grad):
            end = psn.solve(problem, rtol=1e-9, atol=1e-9, compile=True).u1
        torch.testing.assert_close(end.detach(), u0 * decay(1.0)[:1], rtol=1e-7, atol=1e-9)
