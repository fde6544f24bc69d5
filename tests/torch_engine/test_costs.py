"""What a solve costs besides the field, in counts that no machine's speed can change."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pysciml_node as psn
from pysciml_node.replay import comparison

# Operations whose result the host must wait for.
HOST_READS = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
)


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by name, except those of the field."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.evaluations = 0
        self.inside_field = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not self.inside_field:
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    def field(self, t: Tensor, u: Tensor) -> Tensor:
        """A slow oscillation; steps of the sizes used here are always accepted."""
        self.inside_field = True
        self.evaluations += 1
        try:
            return 0.1 * torch.sin(u)
        finally:
            self.inside_field = False

    @property
    def host_reads(self) -> int:
        return sum(self.counts[name] for name in HOST_READS)


@pytest.fixture
def lists_read(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tensors that were turned into Python lists: a host read that no dispatcher sees."""
    seen: list[Tensor] = []
    tolist = torch.Tensor.tolist

    def spy(tensor: Tensor) -> Any:
        seen.append(tensor)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", spy)
    return seen


def _solve(calls: Calls, u0: Tensor, steps: int, **options: Any) -> psn.Solution:
    """`steps` accepted adaptive steps: the tolerances are loose and the step size is capped."""
    length = 0.1 * steps
    options = {"rtol": 1e-3, "atol": 1e-3, "dt0": 0.1, "dtmax": 0.1, "saveat": [length], **options}
    with calls:
        solution = psn.solve(
            psn.ODEProblem(calls.field, u0, (0.0, length)), psn.Tsit5(), engine="torch", **options
        )
    assert solution.stats.naccept == steps
    assert solution.stats.nreject == 0
    return solution


def _per_step(size: int, lists_read: list[Tensor]) -> tuple[float, float]:
    """Operations and host reads that one more step costs."""
    operations, reads = [], []
    for steps in (5, 25):
        lists_read.clear()
        calls = Calls()
        _solve(calls, torch.ones(size, dtype=torch.float64), steps)
        operations.append(calls.counts.total())
        reads.append(calls.host_reads + len(lists_read))
    return (operations[1] - operations[0]) / 20, (reads[1] - reads[0]) / 20


def test_a_step_costs_few_operations_and_one_host_read(lists_read: list[Tensor]) -> None:
    operations, reads = _per_step(40, lists_read)
    assert reads <= 1
    assert operations < 45


def test_a_step_of_a_long_state_costs_one_host_read(lists_read: list[Tensor]) -> None:
    _, reads = _per_step(200_000, lists_read)
    assert reads <= 1


def test_an_output_grid_costs_no_host_read(lists_read: list[Tensor]) -> None:
    reads = []
    for count in (1, 100):
        lists_read.clear()
        calls = Calls()
        _solve(calls, torch.ones(40), 10, saveat=torch.linspace(0.0, 1.0, count + 1)[1:].tolist())
        reads.append(calls.host_reads)
    assert reads[0] == reads[1]


def test_an_output_grid_changes_neither_steps_nor_evaluations() -> None:
    solutions, gradients, replays = [], [], []
    for saveat in ([1.0], torch.linspace(0.0, 1.0, 100, dtype=torch.float64).tolist()):
        calls = Calls()
        u0 = torch.full((3,), 40.0, dtype=torch.float64, requires_grad=True)
        solution = psn.solve(
            psn.ODEProblem(calls.field, u0, (0.0, 1.0)),
            psn.Tsit5(),
            rtol=1e-10,
            atol=1e-10,
            saveat=saveat,
            engine="torch",
        )
        assert calls.evaluations == solution.stats.nfe
        solutions.append(solution)
        gradients.append(torch.autograd.grad(solution.u[-1].sum(), u0)[0])
        replays.append(calls.evaluations - solution.stats.nfe)
    plain, grid = (solution.stats for solution in solutions)
    assert plain.naccept == grid.naccept > 1
    assert plain.nfe == grid.nfe
    torch.testing.assert_close(solutions[0].u1, solutions[1].u1, rtol=0, atol=0)
    # The replay needs the last stage of a step only for outputs inside it; nothing restarts.
    assert replays[0] <= replays[1] <= replays[0] + plain.naccept
    assert plain.naccept_backward == grid.naccept_backward == plain.naccept
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_the_replay_reads_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its steps ended where those of the solve did, for all of them together.

    On a device, that is: what is in the host's memory may be asked as often as one likes.
    """
    monkeypatch.setattr(comparison, "_at_hand", lambda x: False)
    calls = Calls()
    u0 = torch.ones(40, dtype=torch.float64, requires_grad=True)
    solution = _solve(calls, u0, 10)
    before = calls.host_reads
    with calls:
        torch.autograd.grad(solution.u.sum(), u0)
    assert calls.host_reads == before + 1


@pytest.mark.parametrize("members", [False, True])
def test_the_last_recorded_rosenbrock_step_takes_as_long_as_the_first(members: bool) -> None:
    """Derivatives by time looked at the graphs of all steps before: ratios of 10 and more."""

    def share(steps: int) -> float:
        u0 = torch.ones(2, 3, requires_grad=True)
        one: Any = psn.ODEProblem(lambda t, u: -torch.sin(t * u), u0[0], (0.0, 1.0))
        begun = time.process_time()
        psn.solve(
            psn.EnsembleProblem(one, u0) if members else one,
            psn.Rosenbrock23(),
            controller=psn.FixedStep(),
            dt0=1 / steps,
            adjoint=psn.DirectAdjoint(),
        )
        return (time.process_time() - begun) / steps

    share(2)
    assert share(256) < 4 * min(share(16) for _ in range(3))
