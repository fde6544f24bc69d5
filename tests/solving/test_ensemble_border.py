"""What an ensemble is given: own intervals, times and tolerances of the members, or an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pysciml_node as psn

D = torch.float64


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


def problem(size: int = 2) -> psn.ODEProblem:
    return psn.ODEProblem(decay, torch.ones(size, dtype=D), (0.0, 1.0))


def ends() -> Tensor:
    """The same length from other starts, and one backward."""
    return torch.tensor([[0.0, 1.0], [3.0, 3.5], [1.0, -1.0]], dtype=D)


def test_members_have_intervals_of_their_own() -> None:
    solution = psn.solve(psn.EnsembleProblem(problem(), tspan=ends()), rtol=1e-9, atol=1e-9)
    lengths = (ends()[:, 1] - ends()[:, 0]).unsqueeze(1)
    torch.testing.assert_close(solution.u1, torch.exp(-lengths).expand(3, 2), rtol=1e-8, atol=0)
    assert solution[2].t[-1] == -1.0
    assert solution[-1] is solution[2]


@pytest.mark.parametrize("given", [ends().tolist(), ends().numpy(), ends().float()])
def test_intervals_as_lists_and_arrays(given: Any) -> None:
    solution = psn.solve(psn.EnsembleProblem(problem(), tspan=given))
    assert [s.t[-1].item() for s in solution] == [1.0, 3.5, -1.0]


def test_intervals_receive_gradients() -> None:
    spans = ends().requires_grad_()
    ensemble = psn.EnsembleProblem(problem(), tspan=spans)
    psn.solve(ensemble, rtol=1e-9, atol=1e-9).u1[:, 0].sum().backward()
    slope = torch.exp(-(ends()[:, 1] - ends()[:, 0]))
    torch.testing.assert_close(spans.grad, torch.stack((slope, -slope), 1), rtol=1e-6, atol=1e-7)


def test_times_of_each_member() -> None:
    share = torch.tensor([0.0, 0.5, 1.0], dtype=D)
    times = ends()[:, :1] + share * (ends()[:, 1:] - ends()[:, :1])
    ensemble = psn.EnsembleProblem(problem(), tspan=ends())
    for given in (times, times.tolist(), times.numpy()):
        solution = psn.solve(ensemble, saveat=given, rtol=1e-9, atol=1e-9)
        assert solution.t is not None
        torch.testing.assert_close(solution.t, times)
        exact = torch.exp(ends()[:, :1] - times)
        torch.testing.assert_close(solution.u[..., 0], exact, rtol=1e-7, atol=1e-8)


def test_tolerances_of_each_member() -> None:
    tolerances = torch.tensor([1e-3, 1e-6, 1e-9], dtype=D)
    u0 = torch.ones(3, 2, dtype=D)
    solution = psn.solve(psn.EnsembleProblem(problem(), u0), rtol=tolerances, atol=tolerances)
    for m, tolerance in enumerate(tolerances.tolist()):
        alone = psn.solve(problem(), rtol=tolerance, atol=tolerance)
        assert solution.member_stats[m].naccept == alone.stats.naccept
        torch.testing.assert_close(solution.u1[m], alone.u1, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tspan": torch.tensor([0.0, 1.0])}, r"\(M, 2\)"),
        ({"tspan": torch.tensor([[0.0, 1.0], [2.0, 2.0]])}, r"tspan\[1\] is \(2.0, 2.0\)"),
        ({"tspan": torch.tensor([[0.0, torch.inf]])}, "finite"),
        ({"tspan": "now"}, "tspan must be a tensor"),
        ({"tspan": torch.rand(3, 2), "u0": torch.ones(2, 2, dtype=D)}, r"\[2, 3\]"),
        ({"u0": torch.ones(3, 2, dtype=D), "batched": 1}, "batched"),
    ],
)
def test_what_is_wrong_with_an_ensemble_is_said(given: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        psn.EnsembleProblem(problem(), **given)


def test_a_function_that_does_not_take_the_parameters_of_members_is_refused() -> None:
    """Also where it takes what its problem gives it."""
    ensemble = psn.EnsembleProblem(problem(), p=torch.tensor([1.0, 2.0], dtype=D))
    for members in (None, psn.Parallel()):
        with pytest.raises(TypeError, match=r"callable as f\(t, u, p\)[\s\S]*leave p out"):
            psn.solve(ensemble, members=members)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"saveat": [0.5, 3.2]}, r"inside the interval of each member[\s\S]*\(M, T\)"),
        ({"saveat": torch.rand(2, 3)}, r"M = 3, but has \(2, 3\)"),
        ({"saveat": [[0.5], [3.1], [2.0]]}, "time 0 of member 2 is 2.0"),
        ({"saveat": [[0.5, 0.6], [3.2, 3.1], [0.0, -0.5]]}, r"saveat\[1, 1\]=3.1 follows 3.2"),
        ({"saveat": [[0.5, 0.6], [3.2], [0.0, -0.5]]}, "as many times"),
        ({"rtol": torch.tensor([1e-3, -1.0, 1e-3])}, "at least 0 for each member"),
        ({"rtol": torch.rand(3, 5)}, "does not broadcast"),
    ],
)
def test_what_is_wrong_with_its_options_is_said(given: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        psn.solve(psn.EnsembleProblem(problem(), tspan=ends()), **given)


def test_tolerances_that_may_be_for_members_or_entries_are_refused() -> None:
    ensemble = psn.EnsembleProblem(problem(3), torch.ones(3, 3, dtype=D))
    with pytest.raises(ValueError, match=r"rtol.reshape\(3, 1\)"):
        psn.solve(ensemble, rtol=torch.full((3,), 1e-6, dtype=D))
    for shape in ((3, 1), (1, 3)):
        psn.solve(ensemble, rtol=torch.full(shape, 1e-6, dtype=D))


def test_a_field_of_batches_is_called_with_them() -> None:
    shapes = []

    def field(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        shapes.append((t.shape[1:], u.shape[1:], p.shape[1:]))
        return -p * u * (1 + 0 * t)

    p = torch.tensor([[0.5], [1.0], [2.0]], dtype=D)
    shared = psn.ODEProblem(field, torch.ones(2, dtype=D), (0.0, 1.0))
    ensemble = psn.EnsembleProblem(shared, p=p, batched=True)
    for algorithm in (psn.Tsit5(), psn.Rodas5P()):
        solution = psn.solve(ensemble, algorithm, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(solution.u1, torch.exp(-p).expand(3, 2), rtol=1e-6, atol=0)
    assert set(shapes) == {((1,), (2,), (1,))}
    parts = psn.ODEProblem(decay, (torch.ones(2), torch.ones(2)), (0.0, 1.0))
    with pytest.raises(ValueError, match="one tensor"):
        psn.EnsembleProblem(parts, p=p, batched=True)


def test_members_are_made_when_they_are_asked_for() -> None:
    u0 = torch.tensor(np.linspace(0.1, 1.0, 50)).reshape(50, 1)
    solution = psn.solve(psn.EnsembleProblem(problem(1), u0), saveat=[0.5, 1.0])
    assert solution.u.shape == (50, 2, 1)
    assert solution.u1.shape == (50, 1)
    assert solution[3] is solution[3]
    assert len(solution.solutions) == len(solution) == 50
    with pytest.raises(IndexError, match="50 members"):
        solution[50]


@pytest.mark.parametrize("compiled", [False, "auto"])
def test_arrays_in_the_extra_argument_become_tensors(compiled: Any) -> None:
    """Alone, in containers, and stacked for members."""
    rates = np.array([1.0, 2.0])
    start, how = torch.ones(2, dtype=D), {"rtol": 1e-9, "atol": 1e-9, "compile": compiled}
    expected = torch.exp(-torch.tensor(rates))
    given: list[tuple[Any, Any]] = [
        (lambda t, u, p: -p * u, rates),
        (lambda t, u, p: -p["rates"][0] * u * p["one"], {"rates": (rates,), "one": 1.0}),
    ]
    for f, p in given:
        solution = psn.solve(psn.ODEProblem(f, start, (0.0, 1.0), p=p), **how)
        torch.testing.assert_close(solution.u1, expected, rtol=1e-8, atol=0)
    one = psn.ODEProblem(given[0][0], start, (0.0, 1.0), p=rates)
    many = psn.solve(psn.EnsembleProblem(one, p=np.stack([rates, 2 * rates])), **how)
    torch.testing.assert_close(many.u1, torch.stack([expected, expected**2]), rtol=1e-8, atol=0)
    held: list[Any] = [rates]
    held.append(held)
    with pytest.raises(ValueError, match="must not contain itself"):
        psn.ODEProblem(lambda t, u, p: -u, start, (0.0, 1.0), p=held)


def test_members_that_end_before_all_output_times_have_no_states_there() -> None:
    many = psn.EnsembleProblem(problem(), torch.ones(3, 2, dtype=D))
    # Reads the time as a number, so that members are solved one by one.
    end = psn.Event(lambda t, u: torch.as_tensor(float(t) - 0.25))
    solution = psn.solve(many, events=end, saveat=[0.5, 1.0], engine="torch")
    assert solution.u.shape == (3, 2, 2)
    assert solution.u.isnan().all()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("u0", r"must be one number of members, at least 1, but are \[2, 4\]"),
        ("p", r"must be one number of members, at least 1, but are \[2, 4\]"),
        ("tspan", r"must be one number of members, at least 1, but are \[2, 4\]"),
        ("all", "the leading size that they had when the ensemble was made, 4, but have 2"),
    ],
)
def test_members_that_have_become_fewer_are_refused(name: str, words: str, compiled: bool) -> None:
    """Native code would read beyond them."""
    u0, p, tspan = torch.ones(4, 3).double(), torch.ones(4, 1).double(), torch.ones(4, 2).double()
    tspan[:, 0] = 0.0
    one = psn.ODEProblem(lambda t, u, p: -p * u, u0[0].clone(), (0.0, 1.0), p[0].clone())
    ensemble = psn.EnsembleProblem(one, u0, p, tspan)
    psn.solve(ensemble, compile=compiled)
    for key, x in {"u0": u0, "p": p, "tspan": tspan}.items():
        if name in (key, "all"):
            x.data = x[:2].clone()
    with pytest.raises(ValueError, match=words):
        psn.solve(ensemble, compile=compiled)
