"""The comparison of budgets with weights by hand, on a task whose outcomes are known."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / "train_to_budget.py"))


def known_task(example: dict[str, Any], trained: list[str]) -> Any:
    """100 evaluations without a penalty; the score is their share of 100, and budgets are met."""

    def train(plan: Any, target: float | None, native: bool) -> Any:
        trained.append(plan.name)
        nfe = 100.0 / (1.0 + (plan.weight or 0.0)) if target is None else target
        return example["Outcome"](
            nfe, nfe / 100, 1.0, target=target, weights=[1.0, 2.0], costs=[nfe, nfe]
        )

    return example["Task"]("accuracy (%)", 100.0, (1.0, 4.0), train)


def test_a_budget_that_is_met_scores_as_the_weight_of_its_evaluations(
    example: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    trained: list[str] = []
    task = known_task(example, trained)
    for _ in range(2):
        results = example["Results"](tmp_path / "known.json")
        table = example["compare_weights"](task, results, [0, 1])
    mean = [[cell.split(" ± ")[0] for cell in row] for row in table.rows[2:]]
    for share, asked, reached, ratio, score, hand in mean:
        assert float(asked) == float(reached) == float(score) == 100 * float(share)
        assert float(ratio) == 1.0
        assert float(hand) == pytest.approx(float(score))
        assert table.reached[share] == [1.0, 1.0]
    assert len(mean) == 3
    # Six runs a seed, each once.
    assert len(trained) == len(set(trained)) == 12
    assert (tmp_path / "known.png").stat().st_size > 0
