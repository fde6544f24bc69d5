"""Rows of a batch as members: each row is solved, and regularized, as it would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

D = torch.float64


class Field(nn.Module):
    """A small network that needs a batch, and the time beside it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 2, generator=generator, dtype=D))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        batch, _ = u.shape
        return torch.tanh(torch.cat([3 * u, t.expand(batch, 1)], dim=1) @ self.weight)


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 2, generator=generator, dtype=D).requires_grad_()


def layer(independent: bool, **options: Any) -> Any:
    return psn.NeuralODE(Field(), tspan=(0.0, 1.0), independent=independent, **options)


def test_rows_are_solved_as_alone() -> None:
    node, u0 = layer(True, saveat=[0.5, 1.0]), rows()
    solution = node(u0)
    assert isinstance(solution, psn.EnsembleSolution)
    alone = [layer(False, saveat=[0.5, 1.0])(row[None]) for row in u0]
    near: dict[str, float] = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(solution.u1, torch.cat([s.u1 for s in alone]), **near)
    torch.testing.assert_close(
        solution.u, torch.cat([s.u for s in alone], dim=1).transpose(0, 1), **near
    )
    assert [s.naccept for s in solution.member_stats] == [s.stats.naccept for s in alone]
    assert len({s.naccept for s in solution.member_stats}) > 1
    assert solution.penalty == 0


def test_the_other_rows_are_nothing_to_a_row() -> None:
    node, u0 = layer(True), rows()
    other = torch.cat([u0[:1], 100 * u0[1:]])
    torch.testing.assert_close(node(u0).u1[0], node(other).u1[0], rtol=1e-12, atol=1e-12)
    shared = layer(False)
    assert not torch.allclose(shared(u0).u1[0], shared(other).u1[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
def test_local_errors_are_those_of_each_row(sampling: Any) -> None:
    def penalty() -> psn.LocalError:
        generator = torch.Generator().manual_seed(3)
        return psn.LocalError(sampling, weight=2.0, generator=generator, step_size="solver")

    node, u0 = layer(True, regularizers=[penalty()]), rows()
    solution = node(u0)
    alone = layer(False, regularizers=[penalty()])
    values = [alone(row[None]) for row in u0]
    expected = torch.stack([s.penalties["LocalError"] for s in values]).mean()
    # The step and its time follow from error estimates, which are differences.
    torch.testing.assert_close(solution.penalties["LocalError"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(solution.penalty, 2 * expected, rtol=1e-5, atol=0)
    found = torch.autograd.grad(solution.penalty, node.field.weight)
    wanted = torch.autograd.grad(2 * expected, alone.field.weight)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()])
def test_global_estimates_are_those_of_each_row(adjoint: psn.Adjoint) -> None:
    terms = [psn.GlobalError(), psn.GlobalStiffness()]
    node, u0 = layer(True, regularizers=terms, adjoint=adjoint), rows()
    solution = node(u0)
    alone = layer(False, regularizers=terms, adjoint=adjoint)
    values = [alone(row[None]) for row in u0]
    for name, value in solution.penalties.items():
        expected = torch.stack([s.penalties[name] for s in values]).mean()
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    inputs = [node.field.weight, u0]
    found = torch.autograd.grad(solution.penalty, inputs)
    total = torch.stack([s.penalty for s in values]).mean()
    wanted = torch.autograd.grad(total, [alone.field.weight, u0])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)


def test_a_layer_in_a_sequential_and_in_eval_mode() -> None:
    node = layer(True, regularizers=[psn.GlobalError()], output="u1")
    model = nn.Sequential(node, nn.Linear(2, 1, dtype=D))
    model(rows()).sum().backward()
    assert node.penalty > 0
    model.eval()
    model(rows())
    assert node.penalty == 0


def test_what_is_solved_as_a_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="solved as a whole"):
        layer(True).integrate(rows())


def test_rates_and_states_without_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"KineticEnergy integrates[\s\S]*LocalError"):
        layer(True, regularizers=[psn.KineticEnergy()])
    with pytest.raises(ValueError, match="without axes"):
        psn.NeuralODE(lambda t, u: -u, independent=True)(torch.tensor(1.0))


def test_native_rows_are_eager_rows_and_translated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    usable, reason = available()
    if not usable:
        pytest.skip(reason)
    exported = []
    plain = torch.export.export

    def export(*arguments: Any, **options: Any) -> Any:
        exported.append(arguments[0])
        return plain(*arguments, **options)

    monkeypatch.setattr(torch.export, "export", export)
    eager, native = layer(True), layer(True, compile=True)
    results = []
    for node in (eager, native, native):
        u0 = rows()
        u1 = node(u0).u1
        results.append((u1, *torch.autograd.grad(u1.square().sum(), (u0, node.field.weight))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-11)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))
    assert len(exported) == 1
