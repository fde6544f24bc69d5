"""Settings of a training run: those that all variants share, and those of one run."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pysciml_node import checks, schedules
from pysciml_node.regularizers.local import StepSize

Variant = Literal[
    "vanilla",
    "local-unbiased",
    "local-biased",
    "global-error",
    "global-stiffness",
    "steer",
    "taylor",
    "local-stiffness",
    "kinetic",
    "jacobian",
    "rnode",
    "budget-0.6",
]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
# What the paper on local regularization is about; the others are its baselines.
COMPARED: tuple[Variant, ...] = VARIANTS[:3]

OptimizerName = Literal["adam", "adamax"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
DecayName = Literal["constant", "inverse", "cosine"]
DECAYS: tuple[DecayName, ...] = get_args(DecayName)

DtypeName = Literal["float32", "float64"]
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)

AdjointName = Literal["discrete", "direct", "interpolating", "backsolve", "gauss"]
ADJOINTS: tuple[AdjointName, ...] = get_args(AdjointName)
STEP_SIZES: tuple[StepSize, ...] = get_args(StepSize)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that all variants of an experiment share; the defaults are paper D's MNIST run.

    Args:
        steps: optimizer steps.
        batch_size: samples a batch, in training and in evaluation.
        learning_rate: at the first step.
        optimizer: `"adam"` or `"adamax"`.
        decay: of the learning rate: `"constant"`, `"inverse"`, which divides it by
            `1 + 1e-5 step`, or `"cosine"`, to `last_learning_rate` at the last step.
        last_learning_rate: of the cosine decay.
        solver: name of the algorithm, as in the package.
        tolerance: relative and absolute tolerance of the solver.
        dtype: of the parameters and states.
        hidden: width of the field's hidden layer.
        engine: `"auto"`, `"torch"` or `"julia"`.
        adjoint: how gradients pass through the solve.
        step_size: of the penalty's step, `"hairer"` as in the paper's code or `"solver"`; see
            `pysciml_node.LocalError`.
        stop_gradient: keep the penalty's gradient out of the sampled state and the first stage, as
            the paper's code does.
        taylor_order: of the derivative that the Taylor variant penalizes.
        evaluate_every: optimizer steps between evaluations.
        evaluation_batch_size: samples a batch in evaluations and timed predictions; `batch_size`
            when None. A batch shares its steps, so field evaluations and times depend on it.
        validation_samples: training samples that are held out to choose settings on.
        monitor_samples: how many held-out samples these evaluations use; all of them when None.
        train_samples: how many training samples the last evaluation uses; all of them when None.
        test_samples: how many test samples the last evaluation uses; all of them when None.
        timed_predictions: how many predictions are timed; the median is kept.

    Raises:
        ValueError: a number that must be positive is not, or a name is unknown.

    Reference:
        A. Pal, A. Edelman, C. Rackauckas, Locally Regularized Neural Differential Equations,
        arXiv:2303.02262, section 4.1.
    """

    steps: int = 7500
    batch_size: int = 512
    learning_rate: float = 1e-3
    optimizer: OptimizerName = "adam"
    decay: DecayName = "constant"
    last_learning_rate: float = 1e-4
    solver: str = "Tsit5"
    tolerance: float = 1.4e-8
    dtype: DtypeName = "float32"
    hidden: int = 100
    engine: str = "auto"
    adjoint: AdjointName = "discrete"
    step_size: StepSize = "hairer"
    stop_gradient: bool = True
    taylor_order: int = 3
    evaluate_every: int = 250
    evaluation_batch_size: int | None = None
    validation_samples: int = 0
    monitor_samples: int | None = None
    train_samples: int | None = None
    test_samples: int | None = None
    timed_predictions: int = 20

    def __post_init__(self) -> None:
        numbers = (
            "steps",
            "batch_size",
            "learning_rate",
            "last_learning_rate",
            "tolerance",
            "hidden",
            "taylor_order",
            "evaluate_every",
            "timed_predictions",
        )
        for name in numbers:
            checks.number(name, getattr(self, name), above=0, infinite=True)
        checks.whole(
            "validation_samples", self.validation_samples, at_least=0, hint="0 holds none out."
        )
        choices = {
            "dtype": DTYPES,
            "step_size": STEP_SIZES,
            "adjoint": ADJOINTS,
            "optimizer": OPTIMIZERS,
            "decay": DECAYS,
        }
        for name, allowed in choices.items():
            checks.choice(name, getattr(self, name), allowed)

    @property
    def evaluated_at_once(self) -> int:
        """Samples a batch in evaluations and timed predictions."""
        return self.evaluation_batch_size or self.batch_size

    def learning_rates(self) -> schedules.Schedule:
        """The learning rate of each optimizer step."""
        if self.decay == "inverse":
            return schedules.InverseDecay(self.learning_rate, rate=1e-5)
        if self.decay == "cosine":
            return schedules.Cosine(self.learning_rate, self.last_learning_rate, self.steps)
        return schedules.Constant(self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: a variant, a seed and the weight of its penalty.

    The weight goes exponentially from `weight[0]` to `weight[1]` over the run:
    `lambda(k) = lambda_0 (lambda_1 / lambda_0)^(k / steps)`.

    Args:
        variant: which penalty is added to the loss, if any.
        seed: of the initial parameters, the batches and the penalty's random times. Runs of equal
            seed start from the same parameters and see the same batches whatever their variant.
        weight: first and last weight of the penalty; ignored by the vanilla variant. STEER has no
            weight: the first number is the half width of its interval.
        budget: evaluations of the field that a solve may take; the weight is then adjusted to them
            while training. The variant `"budget-0.6"` is the unbiased local error, held to 0.6 of
            what the vanilla run of its seed ended with.

    Raises:
        ValueError: an unknown variant, or a weight or budget that is not positive.
    """

    variant: Variant
    seed: int = 0
    weight: tuple[float, float] = (2.5, 1.0)
    budget: float | None = None

    def __post_init__(self) -> None:
        checks.choice("variant", self.variant, VARIANTS)
        if not min(self.weight) > 0:
            raise ValueError(
                f"weight must be positive, but is {self.weight}.\n"
                '  The run without a penalty is variant="vanilla".'
            )
        if self.budget is not None:
            checks.number("budget", self.budget, above=0)

    @property
    def name(self) -> str:
        """The variant and the seed, fit for a file name."""
        return f"{self.variant}-seed{self.seed}"


def describe(settings: Settings, run: Run) -> dict[str, Any]:
    """Everything that determines a run's numbers, as plain data.

    Args:
        settings: those shared by all variants.
        run: variant, seed and weight.

    Returns:
        A dictionary that JSON and checkpoints can hold; the vanilla variant has no weight.

    Examples:
        >>> describe(Settings(steps=3), Run(variant="vanilla"))["steps"]
        3
    """
    unweighted = run.variant == "vanilla" or run.budget is not None
    own = {
        "variant": run.variant,
        "seed": run.seed,
        "weight": None if unweighted else list(run.weight),
        "budget": run.budget,
    }
    return {**asdict(settings), **own}
