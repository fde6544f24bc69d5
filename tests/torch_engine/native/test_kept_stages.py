"""Stages of native steps that are kept for the sweep give the gradients of those taken again."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pysciml_node as psn
from pysciml_node.problems.state import StateSpec
from pysciml_node.replay.stages import Method
from pysciml_node.torch_engine.native.compiler import available, build
from pysciml_node.torch_engine.native.library import header, write_explicit
from pysciml_node.translation.export import translate

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
AGAIN = psn.DiscreteAdjoint(memory=0)


class Field(nn.Module):
    """Rows that go round, the faster the later it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.first = nn.Parameter(torch.randn(width, 3, dtype=D, generator=generator) / 2)
        self.second = nn.Parameter(torch.randn(3, width, dtype=D, generator=generator) / 2)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(u @ self.first.T + t) @ self.second.T * (1 + t)


def start(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, dtype=D, generator=generator).requires_grad_()


def gradients(
    field: nn.Module, u0: Tensor, algorithm: Any, adjoint: Any, **options: Any
) -> tuple[psn.Solution, list[Tensor]]:
    """A solve and what it gives its inputs, of a loss of all its states."""
    t1 = torch.tensor(1.5, dtype=D, requires_grad=bool(options.pop("moving", False)))
    problem = psn.ODEProblem(field, u0, (0.0, t1))
    options = {"rtol": 1e-5, "atol": 1e-5, "engine": "torch"} | options
    solution = psn.solve(problem, algorithm, adjoint=adjoint, compile=True, **options)
    loss = (solution.u * torch.linspace(-1, 1, len(solution.u), dtype=D).view(-1, 1, 1)).sum()
    inputs = [u0, *field.parameters(), *([t1] if t1.requires_grad else [])]
    return solution, list(torch.autograd.grad(loss + solution.u1.square().sum(), inputs))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """To the last bit: a stage that is taken again is the same."""
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [2, 96])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"saveat": [0.0, 0.1, 0.11, 0.5, 1.2, 1.5]},
        {"tstops": [0.3, 0.9]},
        {"saveat": [0.2, 0.3, 0.31, 1.4], "tstops": [0.3, 0.9], "dt0": 1.5},
        {"moving": True, "saveat": [0.2, 0.9]},
    ],
    ids=["steps", "saveat", "tstops", "all", "times"],
)
@pytest.mark.parametrize("algorithm", [psn.DP5(), psn.Tsit5(), psn.BS3(), psn.Vern7(), psn.RK4()])
def test_kept_stages_give_the_gradients_of_those_taken_again(
    algorithm: Any, options: dict[str, Any], rows: int
) -> None:
    field, u0 = Field(64 if rows > 2 else 4), start(rows)
    again, expected = gradients(field, u0, algorithm, AGAIN, **options)
    for _ in range(2):
        kept, found = gradients(field, u0, algorithm, None, **options)
        assert_same(found, expected)
    assert kept.stats.nfe_backward == 0 < again.stats.nfe_backward
    assert kept.stats.nvjp == again.stats.nvjp == again.stats.nfe_backward
    assert kept.stats.nfe == again.stats.nfe


def test_steps_that_have_no_room_are_taken_again() -> None:
    field, u0 = Field(4), start(2)
    control = {"controller": psn.FixedStep()}
    steps = {n: control | {"dt0": 1.5 / n} for n in (3, 40)}
    gradients(field, u0, psn.RK4(), None, **steps[3])
    kept, found = gradients(field, u0, psn.RK4(), None, **steps[40])
    again, expected = gradients(field, u0, psn.RK4(), AGAIN, **steps[40])
    assert_same(found, expected)
    assert 0 < kept.stats.nfe_backward < again.stats.nfe_backward
    # Room for one step alone.
    for memory in (1, 4_000):
        gradients(field, u0, psn.RK4(), psn.DiscreteAdjoint(memory), **steps[40])
        some, found = gradients(field, u0, psn.RK4(), psn.DiscreteAdjoint(memory), **steps[40])
        assert_same(found, expected)
        assert kept.stats.nfe_backward < some.stats.nfe_backward <= again.stats.nfe_backward


def test_a_graph_that_is_kept_gives_its_gradients_again() -> None:
    field, u0 = Field(4), start(2)
    for _ in range(2):
        solution = psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0)), psn.DP5(), compile=True)
    inputs = [u0, *field.parameters()]
    loss = solution.u1.square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    # Another solve in between, which has its own memory.
    other = psn.solve(psn.ODEProblem(field, 2 * u0, (0.0, 1.0)), psn.DP5(), compile=True)
    torch.autograd.grad(other.u1.sum(), inputs)
    second = torch.autograd.grad(loss, inputs)
    assert_same(list(second), list(first))


def in_memory() -> int:
    """Bytes of all tensors, and of the blocks that C reads and writes."""
    gc.collect()
    objects = gc.get_objects()
    found = [x.untyped_storage() for x in objects if type(x) is Tensor]
    blocks = {id(x): len(x) for x in gc.get_referents(*objects) if type(x) is bytearray}
    return sum({x.data_ptr(): x.nbytes() for x in found}.values()) + sum(blocks.values())


def test_kept_stages_go_with_the_graph() -> None:
    field, u0 = Field(64), start(96)
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    solutions = [psn.solve(problem, psn.DP5(), compile=True, saveat=[1.0]) for _ in range(2)]
    stages = solutions[1].stats.nfe * 96 * 64 * 8
    loss = solutions[1].u1.sum()
    before = in_memory()
    torch.autograd.grad(loss, u0, retain_graph=True)
    assert in_memory() > before - stages / 2
    torch.autograd.grad(loss, u0)
    assert in_memory() < before - stages / 2


def test_stages_are_not_kept_where_saved_tensors_go_elsewhere() -> None:
    field, u0 = Field(64), start(96)
    _, expected = gradients(field, u0, psn.DP5(), AGAIN)
    with torch.autograd.graph.save_on_cpu():
        solution, found = gradients(field, u0, psn.DP5(), None)
    assert_same(found, expected)
    assert solution.stats.nfe_backward == solution.stats.nvjp > 0

    def last(u0: Tensor) -> Tensor:
        return psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0)), psn.DP5(), compile=True).u1

    before = in_memory()
    states = [checkpoint(last, u0, use_reentrant=False) for _ in range(3)]
    assert in_memory() - before < solution.stats.nfe * 96 * 64 * 8
    bars = [torch.autograd.grad(x.sum(), [u0, *field.parameters()]) for x in (*states, last(u0))]
    for found in bars:
        assert_same(list(found), list(bars[-1]))


PLACES = """
int64_t end_of_stages(void) {
  Sweep s = {0};
  s.memory = (REAL *)&s;
  return STAGE_OF(&s, ALL_STAGES - 1) + STAGE_MEMORY - s.memory;
}
int64_t slot(void) { return SLOT; }
"""


def test_stages_may_take_more_memory_than_an_int_counts() -> None:
    spec = StateSpec.of(torch.empty(60_000_000))
    program = translate(lambda t, u: u.mean() - torch.sin(u), spec).program
    method = Method.of(psn.Vern9().tableau, spec.dtype, spec.device)
    written = write_explicit(program, method)
    code = build("\n".join((header(spec.dtype), "enum { TURNS = 1 };", written.text, PLACES)))
    code.end_of_stages.restype = code.slot.restype = ctypes.c_int64
    assert code.end_of_stages() == written.sweep_memory > 2**31
    assert code.slot() == written.slot > 2**31


def test_events_cut_steps_whose_stages_are_kept() -> None:
    field, u0 = Field(4), start(2)
    event = psn.Event(lambda t, u: t - 0.77)
    _, expected = gradients(field, u0, psn.Tsit5(), AGAIN, events=event)
    for _ in range(2):
        _, found = gradients(field, u0, psn.Tsit5(), None, events=event)
        assert_same(found, expected)
