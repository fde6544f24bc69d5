"""The example for several processes: two of them take one's gradients, and one goes on from two."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import join

import pysciml_node as psn

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"
WORKERS = 2
# A local error is no mean over samples, so that of half a batch is another; the budget's weight,
# which starts at 0, leaves it out of the first gradients.
CASES = [
    ("flow", "fsdp", "--weight=0.1"),
    ("classifier", "fsdp", "--budget=30"),
    ("classifier", "ddp", "--budget=30"),
]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distributed_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example: ModuleType, model: str, parallel: str, weight: str) -> Any:
    words = ["--model", model, "--parallel", parallel, "--batch-size", "6", weight]
    # The steps of half a batch are others, and what is left of that is the tolerance.
    words += ["--dtype", "float64", "--tolerance", "1e-7"]
    return example.Run(example.parse(words), torch.device("cpu"))


def gradients(made: Any) -> list[torch.Tensor]:
    made.gradients()
    found = [p.grad for p in made.model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


def schedule(made: Any) -> psn.schedules.Schedule:
    (found,) = (m.weight for m in made.inner.modules() if isinstance(m, psn.Regularizer))
    return found


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    join(folder / "store", rank, WORKERS)
    example, found = load(), []
    for case in CASES:
        made = run(example, *case)
        first = gradients(made)
        made.advance()
        made.save(folder.joinpath(*case))
        state = schedule(made).state_dict()
        found.append((first, gradients(made), schedule(made)(0), state.get("history")))
    torch.save(found, folder / f"found.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_one_process_goes_on_from_two(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=WORKERS)
    ranks = [torch.load(tmp_path / f"found.{rank}") for rank in range(WORKERS)]
    example = load()
    join(tmp_path / "alone", 0, 1)
    try:
        for i, case in enumerate(CASES):
            one = run(example, *case)
            first = gradients(one)
            again = run(example, *case)
            again.resume(tmp_path.joinpath(*case))
            assert again.step == 1
            assert schedule(again).state_dict().get("history") == ranks[0][i][3]
            second = gradients(again)
            for both in ranks:
                torch.testing.assert_close(both[i][0], first, rtol=1e-4, atol=1e-7)
                assert both[i][2:] == ranks[0][i][2:]
                if "--budget=30" not in case:
                    torch.testing.assert_close(both[i][1], second, rtol=1e-4, atol=1e-7)
    finally:
        dist.destroy_process_group()


def test_a_run_ends_with_a_checkpoint_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line, as torchrun starts a single process."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    example = load()
    words = ["--batch-size", "4", "--checkpoint", str(tmp_path), "--steps"]
    for steps in ("1", "2"):
        example.main([*words, steps])
        assert not dist.is_initialized()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]


def test_a_process_that_was_started_alone_says_how_to_start_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=r"started alone\.\n  Start all: torchrun"):
        load().main([])
