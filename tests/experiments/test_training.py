"""The training runner, with a classifier that needs no solver."""

import pytest
import torch
from experiments.stand_in import NoisyLinear, blobs

from pysciml_node.data import LabelledData
from pysciml_node.experiments.trainer.evaluation import evaluate, predict_seconds
from pysciml_node.experiments.trainer.settings import COMPARED, Run, Settings, describe
from pysciml_node.experiments.trainer.training import Trainer, progress_bar

SETTINGS = Settings(steps=23, batch_size=16, learning_rate=0.05, evaluate_every=5)


def trainer(seed: int = 0, settings: Settings = SETTINGS) -> Trainer:
    return Trainer(NoisyLinear(2, 3, seed), blobs(), settings, Run(variant="vanilla", seed=seed))


@pytest.mark.parametrize("stop", [1, 3, 10, 22])
def test_a_continued_run_ends_bit_for_bit_as_one_never_interrupted(tmp_path, stop):
    whole = trainer()
    whole.train()

    interrupted = trainer()
    interrupted.train(until=stop, checkpoint=tmp_path / "run.pt")
    continued = trainer()
    # Other random numbers than at the start of a run: the checkpoint must bring its own.
    continued.model.noise.manual_seed(99)
    continued.resume(tmp_path / "run.pt")
    continued.train()

    assert continued.step == whole.step == SETTINGS.steps
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, continued.model.get_parameter(name))
    assert continued.history == whole.history
    for mine, theirs in zip(
        whole._optimizer.state_dict()["state"].values(),
        continued._optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_resuming_a_finished_run_trains_no_further(tmp_path):
    done = trainer()
    done.train(checkpoint=tmp_path / "run.pt")
    again = trainer()
    again.resume(tmp_path / "run.pt")
    again.train()
    assert again.history == done.history
    assert again.train_seconds == done.train_seconds


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    first = trainer()
    first.train(until=1, checkpoint=tmp_path / "run.pt")
    other = trainer(settings=Settings(steps=23, batch_size=16, learning_rate=0.1, evaluate_every=5))
    with pytest.raises(ValueError, match=r"learning_rate is 0.1, there 0.05"):
        other.resume(tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"seed is 1, there 0"):
        trainer(seed=1).resume(tmp_path / "run.pt")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no checkpoint at all"),
        lambda path: torch.save({"model": {}}, path),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save(torch.nn.Linear(1, 1), path),
    ],
    ids=["cut", "empty", "text", "lacking", "list", "module"],
)
def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path, damage):
    path = tmp_path / "run.pt"
    trainer().train(until=1, checkpoint=path)
    damage(path)
    with pytest.raises(ValueError, match=r"run\.pt is not a whole checkpoint.*\n  Delete it, or"):
        trainer().resume(path)


def test_a_failed_saving_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    run = trainer()
    run.train(until=2, checkpoint=tmp_path / "run.pt")

    def fail(state, stream):
        stream.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        run.train(until=3, checkpoint=tmp_path / "run.pt")
    monkeypatch.undo()
    resumed = trainer()
    resumed.resume(tmp_path / "run.pt")
    assert resumed.step == 2


def test_training_lowers_the_loss_and_history_has_every_step():
    run = trainer()
    run.train()
    history = run.history
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert len(history.loss) == len(history.penalty) == len(history.nfe) == SETTINGS.steps
    assert history.evaluated_at == [5, 10, 15, 20, 23]
    assert len(history.score) == len(history.evaluation_nfe) == 5
    assert set(history.nfe) == {7}
    assert set(history.evaluation_nfe) == {5.0}
    assert history.monitor == "validation"


def test_the_seed_alone_decides_a_run_and_not_the_global_generator():
    torch.manual_seed(1)
    first = trainer()
    first.train()
    torch.manual_seed(2)
    second, other = trainer(), trainer(seed=1)
    second.train()
    other.train()
    assert torch.equal(first.model.weight, second.model.weight)
    assert not torch.equal(first.model.weight, other.model.weight)


def test_a_loss_that_is_not_finite_stops_the_run():
    run = trainer()
    with torch.no_grad():
        run.model.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="at step 1 of vanilla-seed0"):
        run.train()


def test_evaluation_counts_right_answers_and_leaves_the_mode_alone():
    model = NoisyLinear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    data = LabelledData(x, torch.tensor([0, 1, 1, 1, 0]))
    result = evaluate(model, data, batch_size=2)
    assert result.score == pytest.approx(4 / 5)
    assert result.nfe == 5.0
    assert model.training
    assert min(predict_seconds(model, data, 2, repeats=3)) > 0
    with pytest.raises(ValueError, match="fill a batch"):
        predict_seconds(model, data, 6)
    with pytest.raises(ValueError, match="at least one sample"):
        evaluate(model, data[:0], batch_size=2)


def test_the_progress_bar_shows_live_field_evaluations_and_loss(capsys):
    run = trainer()
    with progress_bar(run, "label") as listener:
        run.train(listener=listener)
    shown = capsys.readouterr().err
    assert "label" in shown
    assert "23/23" in shown
    assert "nfe=7" in shown
    assert f"loss={run.history.loss[-1]:.4f}" in shown


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"batch_size": -1}, {"tolerance": 0.0}, {"learning_rate": float("nan")}],
)
def test_settings_must_be_positive(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be positive"):
        Settings(**options)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="adjoint must be one of"):
        Settings(adjoint="quadrature")
    with pytest.raises(ValueError, match="step_size must be one of"):
        Settings(step_size="large")
    with pytest.raises(ValueError, match="dtype must be one of"):
        Settings(dtype="float16")
    with pytest.raises(ValueError, match="variant must be one of"):
        Run(variant="other")
    with pytest.raises(ValueError, match="weight must be positive"):
        Run(variant="vanilla", weight=(1.0, 0.0))


def test_runs_have_file_names_and_the_vanilla_one_has_no_weight():
    assert [Run(variant=variant, seed=2).name for variant in COMPARED] == [
        "vanilla-seed2",
        "local-unbiased-seed2",
        "local-biased-seed2",
    ]
    assert describe(SETTINGS, Run(variant="vanilla"))["weight"] is None
    assert describe(SETTINGS, Run(variant="local-biased"))["weight"] == [2.5, 1.0]
