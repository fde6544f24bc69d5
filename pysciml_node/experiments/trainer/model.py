"""The classifier of the local-regularization paper: flatten, neural ODE, linear head."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pysciml_node import checks
from pysciml_node.algorithms import adjoints
from pysciml_node.algorithms import explicit as algorithms
from pysciml_node.algorithms import stochastic as sde_algorithms
from pysciml_node.data import LabelledData, Splits
from pysciml_node.experiments.trainer.penalties import make_regularizers
from pysciml_node.experiments.trainer.settings import AdjointName, Run, Settings
from pysciml_node.experiments.trainer.streams import streams
from pysciml_node.experiments.trainer.trainable import Classifier, Prediction
from pysciml_node.layers import NeuralODE
from pysciml_node.layers.timed import ConcatLinear, glorot_linear


class TimeDependentMLP(nn.Module):
    """The field `f(t, u) = W_2 [tanh(W_1 [u; t] + b_1); t] + b_2`.

    Args:
        features: size of the state.
        hidden: width of the hidden layer.
        generator: source of the initial weights.

    Reference:
        arXiv:2303.02262, section 4.1, after J. Kelly et al., arXiv:2007.04504, appendix B.
    """

    def __init__(self, features: int, hidden: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = ConcatLinear(features, hidden, generator=generator)
        self.outer = ConcatLinear(hidden, features, generator=generator)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """Evaluate the field at time `t` and states `u` of shape `(B, features)`."""
        hidden: Tensor = torch.tanh(self.inner(t, u))
        out: Tensor = self.outer(t, hidden)
        return out


def make_adjoint(name: AdjointName) -> adjoints.Adjoint:
    """The adjoint that a setting names, with its defaults."""
    classes: dict[AdjointName, type[adjoints.Adjoint]] = {
        "discrete": adjoints.DiscreteAdjoint,
        "direct": adjoints.DirectAdjoint,
        "interpolating": adjoints.InterpolatingAdjoint,
        "backsolve": adjoints.BacksolveAdjoint,
        "gauss": adjoints.GaussAdjoint,
    }
    return classes[name]()


def make_algorithm(name: str) -> algorithms.Algorithm:
    """The algorithm that a setting names.

    Raises:
        ValueError: no algorithm has this name.
    """
    kind = getattr(algorithms, name, None) or getattr(sde_algorithms, name, None)
    if not (isinstance(kind, type) and issubclass(kind, algorithms.Algorithm)):
        known = (*vars(algorithms), *vars(sde_algorithms))
        raise ValueError(
            f"solver must name an algorithm, such as Tsit5 or BS3, but is {name!r}.\n"
            f"  {checks.did_you_mean(name, known) or 'Write it as the package does: Tsit5.'}"
        )
    return kind()


def node_options(settings: Settings, run: Run, penalties: torch.Generator) -> dict[str, Any]:
    """The options by which a classifier's equation is solved and regularized, from t = 0 to 1.

    Args:
        settings: solver, tolerance, engine and adjoint.
        run: variant and weights.
        penalties: draws the regularizers' random numbers.
    """
    return {
        "algorithm": make_algorithm(settings.solver),
        "tspan": (0.0, 1.0),
        "rtol": settings.tolerance,
        "atol": settings.tolerance,
        "engine": settings.engine,
        "adjoint": make_adjoint(settings.adjoint),
        "regularizers": make_regularizers(settings, run, penalties),
    }


class ODEClassifier(Classifier):
    """Flatten the input, let it flow from t = 0 to 1 along a field, read the classes off linearly.

    Args:
        features: size of the flattened input, which is the state.
        classes: number of classes.
        settings: width, tolerance, engine, adjoint and the length of the weight's schedule.
        run: variant, seed and weight.

    Examples:
        >>> model = ODEClassifier(4, 3, Settings(steps=1, tolerance=1e-3), Run(variant="vanilla"))
        >>> tuple(model(torch.zeros(2, 2, 2)).logits.shape)
        (2, 3)
    """

    def __init__(self, features: int, classes: int, settings: Settings, run: Run) -> None:
        super().__init__()
        draws = streams(run.seed)
        initial = draws["parameters"]
        self._generators = {"penalty": draws["penalty"]}
        self.node = NeuralODE(
            TimeDependentMLP(features, settings.hidden, generator=initial),
            **node_options(settings, run, self._generators["penalty"]),
        )
        weight_matrix, bias = glorot_linear(features, classes, initial)
        self.head_weight = nn.Parameter(weight_matrix)
        self.head_bias = nn.Parameter(bias)
        # Drawn in float32 whatever the dtype, so that runs of a seed start alike.
        self.to(getattr(torch, settings.dtype))

    def forward(self, x: Tensor) -> Prediction:
        """Predict for a batch `x` of shape `(B, *D)`, converted to the parameters' dtype."""
        solution = self.node(x.flatten(1).to(self.head_weight.dtype))
        logits = functional.linear(solution.u1, self.head_weight, self.head_bias)
        return Prediction(logits, solution.penalty, int(solution.stats.nfe))


def make_classifier(data: Splits[LabelledData], settings: Settings, run: Run) -> ODEClassifier:
    """The classifier that fits the data.

    Args:
        data: the state's size and the number of classes follow from `data.train`.
        settings: those shared by all variants.
        run: variant, seed and weight.
    """
    features = math.prod(data.train.x.shape[1:])
    classes = int(data.train.y.max()) + 1
    return ODEClassifier(features, classes, settings, run)
