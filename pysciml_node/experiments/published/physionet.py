"""Patients' series explained by a latent ODE: arXiv:2303.02262, section 4.3."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pysciml_node import checks
from pysciml_node import data as datasets
from pysciml_node.data import IrregularSeries, Splits
from pysciml_node.data.physionet import VARIABLES, Outliers
from pysciml_node.experiments.reporting.figures import new_grid, save_figure
from pysciml_node.experiments.trainer.evaluation import evaluation_mode
from pysciml_node.experiments.trainer.experiment import Budget, Experiment
from pysciml_node.experiments.trainer.model import make_adjoint, make_algorithm
from pysciml_node.experiments.trainer.penalties import make_regularizers
from pysciml_node.experiments.trainer.settings import DecayName, OptimizerName, Run, Settings
from pysciml_node.experiments.trainer.streams import streams
from pysciml_node.experiments.trainer.trainable import SQUARED_ERROR, Outcome, Trainable
from pysciml_node.experiments.trainer.training import Trainer
from pysciml_node.layers import GRUEncoder, LatentODE, LatentSolution, ODERNNEncoder
from pysciml_node.layers.recognition import dense
from pysciml_node.schedules import Annealing

EncoderName = Literal["gru", "ode-rnn"]
ENCODERS: tuple[EncoderName, ...] = get_args(EncoderName)
# An ODE-RNN's field is cheap to solve and its states are read to a few digits at most.
_ENCODER_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class SeriesSettings(Settings):
    """Settings that the runs of a latent ODE share; the defaults are paper D's PhysioNet run.

    Args:
        encoder: `"gru"` as in the paper, or `"ode-rnn"`.
        latent: size of the latent state.
        state: size of the encoder's mean, and of its spread.
        noise: standard deviation of the decoder's Gaussian.
        kl_delay: steps before the divergence gets a weight, `1 - 0.99^(step - kl_delay)`.
        quantization: hours that times are rounded to; 0 leaves them as they are.
        outliers: see `pysciml_node.data.physionet`.
        split_seed: of the division into training and test data; all runs share it.
    """

    steps: int = 3000
    learning_rate: float = 0.01
    optimizer: OptimizerName = "adamax"
    decay: DecayName = "inverse"
    hidden: int = 40
    taylor_order: int = 2
    evaluate_every: int = 100
    encoder: EncoderName = "gru"
    latent: int = 20
    state: int = 50
    noise: float = 0.01
    kl_delay: int = 100
    quantization: float = 1.0
    outliers: Outliers = "keep"
    split_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("encoder", self.encoder, ENCODERS)


class LatentField(nn.Module):
    """The field of the latent equation: tanh, then four times `L -> hidden -> L`, all tanh.

    Args:
        latent: `L`.
        hidden: width.
        generator: source of the initial weights.
    """

    def __init__(self, latent: int, hidden: int, *, generator: torch.Generator) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Tanh()]
        for _ in range(4):
            layers += [dense(latent, hidden, generator), nn.Tanh()]
            layers += [dense(hidden, latent, generator), nn.Tanh()]
        self.net = nn.Sequential(*layers)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """The rate of the latent states `(B, L)`; time has no part in it."""
        del t
        rate: Tensor = self.net(z)
        return rate


class SeriesModel(Trainable):
    """A latent ODE that explains what it reads.

    Args:
        variables: of the series.
        settings: sizes, tolerance, engine and adjoint.
        run: variant, seed and weight.
    """

    metric = SQUARED_ERROR

    def __init__(self, variables: int, settings: SeriesSettings, run: Run) -> None:
        super().__init__()
        draws = streams(run.seed)
        initial = draws["parameters"]
        self._generators = {"penalty": draws["penalty"], "latent": draws["training"]}
        solver: dict[str, Any] = {
            "engine": settings.engine,
            "adjoint": make_adjoint(settings.adjoint),
        }
        sizes: dict[str, Any] = {
            "state": settings.state,
            "hidden": settings.hidden,
            "generator": initial,
        }
        encoder: nn.Module
        if settings.encoder == "gru":
            encoder = GRUEncoder(variables, settings.latent, **sizes)
        else:
            field = LatentField(2 * settings.state, settings.hidden, generator=initial)
            encoder = ODERNNEncoder(
                variables,
                settings.latent,
                field,
                rtol=_ENCODER_TOLERANCE,
                atol=_ENCODER_TOLERANCE,
                **solver,
                **sizes,
            )
        self.latent_ode = LatentODE(
            encoder,
            LatentField(settings.latent, settings.hidden, generator=initial),
            dense(settings.latent, variables, initial),
            make_algorithm(settings.solver),
            noise=settings.noise,
            kl_weight=Annealing(0.99, settings.kl_delay),
            rtol=settings.tolerance,
            atol=settings.tolerance,
            regularizers=make_regularizers(settings, run, self._generators["penalty"]),
            generator=self._generators["latent"],
            **solver,
        )
        self.dtype = getattr(torch, settings.dtype)
        # Drawn in float32 whatever the dtype, so that runs of a seed start alike.
        self.to(self.dtype)

    def predict(self, batch: IrregularSeries) -> LatentSolution:
        """Explain each sample at its own times."""
        latent: LatentSolution = self.latent_ode(batch.to(self.dtype))
        return latent

    def outcome(self, batch: IrregularSeries) -> Outcome:
        """The loss, and each sample's mean squared error, summed over the samples."""
        batch = batch.to(self.dtype)
        latent = self.predict(batch)
        loss = self.latent_ode.loss(batch, found=latent)
        errors = batch.per_sample((latent.mean.detach() - batch.values).square())
        score = float((errors / batch.counts().clamp(min=1)).sum())
        solution = latent.solution
        return Outcome(loss, solution.penalty, int(solution.stats.nfe), score, len(batch))

    def step_schedules(self) -> None:
        """Advance the penalty's and the divergence's weights by one optimizer step."""
        self.latent_ode.step_schedules()


def make_series_model(
    data: Splits[IrregularSeries], settings: SeriesSettings, run: Run
) -> SeriesModel:
    """The model that fits the data."""
    return SeriesModel(data.train.variables, settings, run)


def load_physionet(
    folder: Path, download: bool, settings: SeriesSettings
) -> Splits[IrregularSeries]:
    """PhysioNet 2012 as the settings want it."""
    return datasets.physionet(
        folder,
        download=download,
        quantization=settings.quantization or None,
        outliers=settings.outliers,
        seed=settings.split_seed,
    )


def load_prices(folder: Path, download: bool, settings: SeriesSettings) -> Splits[IrregularSeries]:
    """The small series that needs no files."""
    del folder, download
    return datasets.prices(validation=0.0, seed=settings.split_seed)


HIDDEN_SHARE = 0.3
_SHOWN = ("HR", "SysABP", "NISysABP", "Temp")


def interpolation_errors(
    model: SeriesModel, series: IrregularSeries, *, seed: int = 0
) -> tuple[float, float]:
    """Squared errors at rows that the encoder did not see, 30 % of each sample's.

    Args:
        model: trained.
        series: held out.
        seed: of the choice of rows.

    Returns:
        The model's error, and that of each variable's mean over the rows that were shown, both
        averaged over the observed entries of the hidden rows.
    """
    series = series.to(model.dtype)
    shown, hidden = series.hide(HIDDEN_SHARE, generator=torch.Generator().manual_seed(seed))
    target = series.only(hidden)
    count = shown.observed.sum(0).clamp(min=1)
    means = torch.where(shown.observed, shown.values, torch.zeros_like(shown.values)).sum(0) / count
    with evaluation_mode(model):
        decoded = model.latent_ode(shown, series).mean
    return tuple(
        float(target.per_sample((guess - series.values).square()).sum() / target.counts().sum())
        for guess in (decoded, means)
    )  # type: ignore[return-value]


def draw_interpolation(trainer: Trainer, data: Splits[IrregularSeries], path: Path) -> None:
    """Draw what the model makes of held-out samples whose rows it has seen in part.

    Args:
        trainer: its model is a `SeriesModel`.
        data: the test part is drawn: the three samples with the most observations.
        path: the file to write.
    """
    model = checks.instance(
        "the trainer's model",
        trainer.model,
        SeriesModel,
        example="SeriesModel(variables, settings, run)",
    )
    places, names = _drawn_variables(data.test)
    index = data.test.counts().argsort(descending=True)[:3]
    series = data.test[index].to(model.dtype)
    shown, hidden = series.hide(HIDDEN_SHARE, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(0.0, 1.0, 200, dtype=model.dtype)
    with evaluation_mode(model):
        posterior = model.latent_ode.encode(shown)
        draws = torch.Generator().manual_seed(0)
        starts = [posterior.mean, *(posterior.sample(draws) for _ in range(20))]
        curves = torch.stack(
            [model.latent_ode.decoder(model.latent_ode.node(z, saveat=grid).u) for z in starts]
        )
    errors = interpolation_errors(model, data.test)
    figure, axes = new_grid(len(places), len(index))
    for column in range(len(index)):
        mine = series.sample == column
        for row, (place, name) in enumerate(zip(places, names, strict=True)):
            panel = axes[row][column]
            seen = series.observed[:, place] & mine
            band = curves[1:, :, column, place]
            panel.fill_between(
                grid, band.quantile(0.05, 0), band.quantile(0.95, 0), color="#0072b2", alpha=0.2
            )
            panel.plot(grid, curves[0, :, column, place], color="#0072b2")
            for rows, face, text in ((~hidden, "#444444", "shown"), (hidden, "none", "hidden")):
                at = seen & rows
                panel.scatter(
                    series.times[at],
                    series.values[at, place],
                    s=12,
                    facecolors=face,
                    edgecolors="#444444" if face != "none" else "#d55e00",
                    label=text,
                    zorder=3,
                )
            panel.set(ylabel=name if column == 0 else None)
            panel.margins(x=0.02)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(
        f"hidden rows of all test samples: squared error {errors[0]:.5f}, "
        f"of the variables' means {errors[1]:.5f}"
    )
    save_figure(figure, path)


def _drawn_variables(series: IrregularSeries) -> tuple[Sequence[int], Sequence[str]]:
    if series.variables == len(VARIABLES):
        return [VARIABLES.index(name) for name in _SHOWN], _SHOWN
    places = range(min(series.variables, len(_SHOWN)))
    return places, [f"variable {place}" for place in places]


PHYSIONET = Experiment(
    name="physionet",
    title="PhysioNet 2012, latent ODE",
    settings=SeriesSettings(),
    # Those of the other variants are of the code of arXiv:2105.03918; STEER moves each time by up
    # to half its gap.
    weights={
        "local-unbiased": (100.0, 10.0),
        "local-biased": (100.0, 10.0),
        "global-error": (1000.0, 100.0),
        "global-stiffness": (2.85, 2.85),
        "steer": (1.0, 1.0),
        "taylor": (0.01, 0.01),
    },
    # Many batches of 64 learn more in the same time than few of 512. Weights go with the step size
    # and gradient of the penalty; these were chosen on the patients held out for validation.
    reduced=Budget(
        {
            "steps": 800,
            "batch_size": 64,
            "dtype": "float64",
            "step_size": "solver",
            "stop_gradient": False,
            "evaluate_every": 200,
            "evaluation_batch_size": 512,
            "validation_samples": 400,
            "train_samples": 800,
        },
        {"local-unbiased": (1000.0, 100.0), "local-biased": (1000.0, 100.0)},
    ),
    quick=Budget(
        {
            "timed_predictions": 2,
            "steps": 6,
            "batch_size": 8,
            "tolerance": 1e-3,
            "evaluate_every": 3,
            "noise": 0.5,
            "hidden": 8,
            "state": 10,
            "latent": 5,
        }
    ),
    data_dir=Path("data/physionet"),
    load=load_physionet,
    load_quick=load_prices,
    build=make_series_model,
    options={
        "encoder": "gru, or ode-rnn",
        "latent": "size of the latent state",
        "noise": "standard deviation of the decoder's Gaussian",
        "quantization": "hours that times are rounded to; 0 leaves them as they are",
        "outliers": "keep, drop or clip values outside plausible ranges",
    },
    picture=draw_interpolation,
)
