"""Every public callable, with a call that works and what kind each of its arguments is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from properties.malformed import (
    ADJOINT,
    ALGORITHM,
    ANY,
    CONTROLLER,
    ENGINE,
    FLAG,
    GENERATOR,
    MAYBE_FLAG,
    MAYBE_POSITIVE,
    MAYBE_TIMES,
    NAME,
    NOT_NEGATIVE,
    NUMBER,
    POSITIVE,
    REGULARIZERS,
    SHAPE,
    SHARE,
    TIMES,
    TOLERANCE,
    WEIGHT,
    WORDS,
    Kind,
    callables,
    choice,
    count,
    made,
    real,
    tensors,
)
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node import data, flows, kernels, layers, optim, schedules
from pysciml_node.compat import torchdiffeq
from pysciml_node.data.idx import parse_idx
from pysciml_node.data.physionet import parse_record
from pysciml_node.data.plane import plane
from pysciml_node.layers import timed
from pysciml_node.problems.ode import Problem


@dataclass(frozen=True)
class Border:
    """One callable.

    Args:
        call: it, with all arguments by name.
        good: arguments that work, made anew for each call.
        kinds: of the arguments that are tried, those in `good` and others.
        words: other words than its name that an argument has in messages.
    """

    call: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    kinds: Mapping[str, Kind]
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def decay(t: Tensor, u: Any) -> Any:
    return -u


def ones(*shape: int) -> Tensor:
    return torch.ones(shape or (2, 3), dtype=torch.float64)


def nothing() -> dict[str, Any]:
    return {}


BORDERS: dict[str, Border] = {}


def border(
    name: str,
    call: Callable[..., Any],
    good: Callable[[], dict[str, Any]] = nothing,
    words: Mapping[str, tuple[str, ...]] | None = None,
    /,
    **kinds: Kind,
) -> None:
    BORDERS[name] = Border(call, good, kinds, words or {})


# Problems.
STATE = tensors(floating=True)
SPAN = Kind(
    lambda x: (
        isinstance(x, list | tuple | Tensor) and len(x) == 2
        if not isinstance(x, Tensor) or x.ndim
        else False
    )
)
border(
    "ODEProblem",
    lambda **k: psn.solve(psn.ODEProblem(**k), max_steps=50),
    lambda: {"f": decay, "u0": ones(), "tspan": (0.0, 1.0)},
    f=callables(2),
    u0=STATE,
    tspan=SPAN,
    p=ANY,
    mass_matrix=tensors(none=True),
)
border(
    "ODEProblem with p",
    lambda **k: psn.solve(psn.ODEProblem(**k), max_steps=50),
    lambda: {"f": lambda t, u, p: -u, "u0": ones(), "tspan": (0.0, 1.0), "p": ones(1)},
    f=callables(3),
    p=ANY,
)
border(
    "SDEProblem",
    lambda **k: psn.solve(psn.SDEProblem(**k), max_steps=20, throw=False),
    lambda: {"drift": decay, "diffusion": decay, "u0": ones(), "tspan": (0.0, 0.1)},
    {"diffusion": ("noise",)},
    drift=callables(2),
    diffusion=callables(2),
    u0=STATE,
    tspan=SPAN,
    noise=choice("diagonal", "scalar", "additive", "general"),
    interpretation=choice("ito", "stratonovich"),
    p=ANY,
)


def ordinary() -> psn.ODEProblem:
    return psn.ODEProblem(decay, ones(), (0.0, 1.0))


def stochastic() -> psn.SDEProblem:
    return psn.SDEProblem(decay, decay, ones(), (0.0, 0.1))


border(
    "EnsembleProblem",
    lambda **k: psn.solve(psn.EnsembleProblem(**k), max_steps=50),
    lambda: {"problem": ordinary(), "u0": ones(2, 2, 3)},
    problem=made(Problem),
    u0=tensors(none=True, floating=True),
    p=ANY,
)
border(
    "Event",
    lambda **k: psn.solve(ordinary(), events=psn.Event(**k), max_steps=50),
    lambda: {"condition": lambda t, u: u.sum() - 4.0},
    condition=callables(2),
    direction=choice(-1, 0, 1),
    xtol=real(lambda x: x >= 0, none=True),
)

# Solves.
SOLVE = {
    "algorithm": ALGORITHM,
    "rtol": TOLERANCE,
    "atol": TOLERANCE,
    "saveat": MAYBE_TIMES,
    "engine": ENGINE,
    "adjoint": ADJOINT,
    "dt0": MAYBE_POSITIVE,
    "dtmin": MAYBE_POSITIVE,
    "dtmax": real(lambda x: x > 0, none=True, finite=False),
    "tstops": TIMES,
    "max_steps": count(),
    "controller": CONTROLLER,
    "events": Kind(lambda x: isinstance(x, psn.Event) or (isinstance(x, list | tuple) and not x)),
    "progress": FLAG,
    "throw": FLAG,
    "generator": GENERATOR,
}
border(
    "solve",
    lambda **k: psn.solve(**{"max_steps": 50, **k}),
    lambda: {"problem": ordinary()},
    problem=made(Problem),
    **SOLVE,
    compile=Kind(FLAG.takes, ("True", "bool_")),
)
border(
    "solve with a class",
    lambda **k: psn.solve(**{"max_steps": 50, **k}),
    lambda: {"problem": ordinary()},
    algorithm=ALGORITHM,
    adjoint=ADJOINT,
    controller=CONTROLLER,
    events=SOLVE["events"],
    saveat=MAYBE_TIMES,
)
border(
    "solve of stochastic equations",
    lambda **k: psn.solve(**{"max_steps": 20, "throw": False, **k}),
    lambda: {"problem": stochastic()},
    problem=made(Problem),
    **{**SOLVE, "algorithm": made(type(None)), "adjoint": made(type(None))},
    compile=Kind(FLAG.takes, ("True", "bool_")),
)
border(
    "solve of ensembles",
    lambda **k: psn.solve(**{"max_steps": 50, **k}),
    lambda: {"problem": psn.EnsembleProblem(ordinary(), ones(2, 2, 3))},
    **SOLVE,
)


def solved() -> psn.Solution:
    return psn.solve(ordinary(), rtol=1e-3, atol=1e-3)


INSIDE = real(lambda x: 0 <= x <= 1)
border(
    "Solution()",
    lambda **k: solved()(**k),
    lambda: {"t": 0.5},
    t=Kind(lambda x: INSIDE.takes(x) or TIMES.takes(x)),
)
border(
    "Solution.local_estimate",
    lambda **k: solved().local_estimate(**k),
    lambda: {"t": 0.5},
    t=INSIDE,
    algorithm=ALGORITHM,
    dt=MAYBE_POSITIVE,
    stop_gradient=choice(True, False, "state"),
)
border("Solution.step_size", lambda **k: solved().step_size(**k), lambda: {"t": 0.5}, t=INSIDE)
border(
    "Solution.brownian",
    lambda **k: psn.solve(stochastic()).brownian(**k),
    lambda: {"start": 0.0, "end": 0.1},
    start=INSIDE,
    end=INSIDE,
)
border("set_engine", psn.set_engine, lambda: {"name": None}, {"name": ("engine",)}, name=ENGINE)

# Algorithms, controllers and adjoints.
for name in (
    "EM",
    "LambaEM",
    "RKMil",
    "EulerHeun",
    "ReversibleHeun",
    "SRA1",
    "SRIW1",
    "StratonovichMidpoint",
):
    border(name, getattr(psn, name), delta=NOT_NEGATIVE)
for name in ("SOSRA", "SOSRA2", "SOSRI", "SOSRI2"):
    border(name, getattr(psn, name), delta=NOT_NEGATIVE)
border(
    "SciMLAlgorithm",
    psn.SciMLAlgorithm,
    lambda: {"expression": "ROCK4()", "packages": ("OrdinaryDiffEqStabilizedRK",)},
    expression=choice("ROCK4()"),
    packages=Kind(
        lambda x: isinstance(x, list | tuple | str) and all(isinstance(y, str) for y in x)
    ),
)
for name in ("AutoTsit5", "AutoVern7"):
    make = getattr(psn, name)
    border(name, make, lambda: {"stiff": psn.Rodas5P()}, stiff=made(psn.SciMLAlgorithm))
for name in ("InterpolatingAdjoint", "GaussAdjoint", "BacksolveAdjoint", "QuadratureAdjoint"):
    border(
        name,
        getattr(psn, name),
        rtol=MAYBE_POSITIVE,
        atol=MAYBE_POSITIVE,
        max_steps=count(none=True, costly=False),
    )


def controlled(kind: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **k: psn.solve(ordinary(), controller=kind(**k), max_steps=200, throw=False)


LIMITS = {
    "gamma": real(lambda x: 0 < x <= 1),
    "qmin": SHARE,
    "qmax": real(lambda x: x > 1),
}
BETA = real(lambda x: -2 <= x <= 2)
border("IController", controlled(psn.IController), **LIMITS)
border(
    "PIController",
    controlled(psn.PIController),
    beta1=real(lambda x: 0 < x <= 1, none=True),
    beta2=real(lambda x: -1 < x <= 1, none=True),
    **LIMITS,
)
border(
    "PIDController",
    controlled(psn.PIDController),
    beta1=BETA,
    beta2=BETA,
    beta3=BETA,
    safety=real(lambda x: 0 < x <= 1),
)

# Schedules, each called as well.
for name, kinds in {
    "Constant": {"value": NUMBER},
    "Exponential": {"start": POSITIVE, "end": POSITIVE, "steps": POSITIVE},
    "InverseDecay": {"start": NUMBER, "rate": NOT_NEGATIVE},
    "Cosine": {"start": NUMBER, "end": NUMBER, "steps": POSITIVE},
    "Annealing": {"rate": SHARE, "delay": count(0)},
}.items():
    usual = {"value": 1.0, "start": 1.0, "end": 0.5, "steps": 10, "rate": 0.5, "delay": 0}
    kind = getattr(schedules, name)
    border(
        f"schedules.{name}",
        lambda kind=kind, **k: kind(**k)(3),
        lambda kinds=kinds, usual=usual: {key: usual[key] for key in kinds},
        **kinds,
    )
    border(
        f"schedules.{name}()",
        lambda kind=kind, kinds=kinds, usual=usual, **k: kind(**{x: usual[x] for x in kinds})(**k),
        lambda: {"step": 3},
        step=real(lambda x: True),
    )

# Regularizers, each read off a solution.
REDUCTION = choice("mean", "sum")


def regularized(kind: Callable[..., Any]) -> Callable[..., Any]:
    def call(**k: Any) -> Any:
        node = psn.NeuralODE(decay, regularizers=[kind(**k)], rtol=1e-2, atol=1e-2)
        node(ones())
        return node.step_schedules()

    return call


LOCAL = {
    "sampling": choice("unbiased", "biased"),
    "weight": WEIGHT,
    "step_size": choice("hairer", "solver"),
    "stop_gradient": choice(True, False, "state"),
    "include_start": FLAG,
    "algorithm": ALGORITHM,
    "generator": GENERATOR,
    "name": NAME,
}
AGGREGATE = choice("sum", "mean", "max")
border("LocalError", regularized(psn.LocalError), **LOCAL)
border("LocalStiffness", regularized(psn.LocalStiffness), **LOCAL)
for name in ("GlobalError", "GlobalStiffness"):
    kind = regularized(getattr(psn, name))
    border(name, kind, weight=WEIGHT, aggregate=AGGREGATE, name=NAME)
border(
    "KineticEnergy", regularized(psn.KineticEnergy), weight=WEIGHT, reduction=REDUCTION, name=NAME
)
border(
    "JacobianFrobenius",
    regularized(psn.JacobianFrobenius),
    weight=WEIGHT,
    exact=MAYBE_FLAG,
    reduction=REDUCTION,
    distribution=choice("rademacher", "gaussian"),
    generator=GENERATOR,
    name=NAME,
)
border(
    "TaylorDerivative",
    regularized(psn.TaylorDerivative),
    lambda: {"order": 2},
    order=count(),
    weight=WEIGHT,
    reduction=REDUCTION,
    name=NAME,
)
border(
    "RandomEndTime",
    regularized(psn.RandomEndTime),
    lambda: {"b": 0.5},
    b=SHARE,
    generator=GENERATOR,
)
border(
    "Integral",
    regularized(psn.Integral),
    lambda: {"fn": lambda t, u, f: f.square().sum(1), "name": "energy"},
    fn=callables(3),
    name=WORDS,
    weight=WEIGHT,
)

# Layers, which take fields of the state alone too.
FIELD = Kind(lambda x: callables(2).takes(x) or callables(1).takes(x))
LAYER = {
    "algorithm": ALGORITHM,
    "tspan": SPAN,
    "rtol": TOLERANCE,
    "atol": TOLERANCE,
    "regularizers": REGULARIZERS,
    "adjoint": ADJOINT,
    "engine": ENGINE,
    "dt0": MAYBE_POSITIVE,
    "max_steps": count(),
    "controller": CONTROLLER,
    "throw": FLAG,
}
border(
    "NeuralODE",
    lambda **k: psn.NeuralODE(**{"max_steps": 50, **k})(ones()),
    lambda: {"field": decay},
    {"field": ("f",)},
    field=FIELD,
    saveat=MAYBE_TIMES,
    **LAYER,
)
border(
    "NeuralODE()",
    lambda **k: psn.NeuralODE(decay)(**k),
    lambda: {"u0": ones()},
    u0=STATE,
    tspan=Kind(lambda x: x is None or SPAN.takes(x)),
    saveat=MAYBE_TIMES,
)
border(
    "NeuralSDE",
    lambda **k: psn.NeuralSDE(**{"max_steps": 20, "throw": False, "tspan": (0.0, 0.1), **k})(
        ones()
    ),
    lambda: {"drift": decay, "diffusion": decay},
    drift=callables(2),
    diffusion=callables(2),
    saveat=MAYBE_TIMES,
    noise=choice("diagonal", "scalar", "additive", "general"),
    interpretation=choice("ito", "stratonovich"),
    generator=GENERATOR,
    **{**LAYER, "algorithm": made(type(None)), "adjoint": made(type(None))},
)


def series() -> data.IrregularSeries:
    return data.IrregularSeries(**rows())


def rows() -> dict[str, Any]:
    return {
        "times": torch.tensor([0.0, 0.7, 0.2]),
        "values": torch.tensor([[1.0], [2.0], [3.0]]),
        "observed": torch.ones(3, 1, dtype=torch.bool),
        "lengths": torch.tensor([2, 1]),
    }


def latent(**k: Any) -> Any:
    model = layers.LatentODE(**{"max_steps": 50, "rtol": 1e-2, "atol": 1e-2, **k})
    return model.loss(series())


def encoder() -> nn.Module:
    return layers.GRUEncoder(1, 2, state=3, hidden=3)


border(
    "LatentODE",
    latent,
    lambda: {"encoder": encoder(), "field": decay, "decoder": nn.Linear(2, 1)},
    {"field": ("f",)},
    encoder=callables(1),
    field=FIELD,
    decoder=callables(1),
    noise=POSITIVE,
    kl_weight=WEIGHT,
    reduction=REDUCTION,
    generator=GENERATOR,
    **LAYER,
)


def latent_model() -> layers.LatentODE:
    return layers.LatentODE(encoder(), decay, nn.Linear(2, 1), rtol=1e-2, atol=1e-2)


SERIES = made(data.IrregularSeries)
MAYBE_SERIES = made(data.IrregularSeries, none=True)
border(
    "LatentODE()",
    lambda **k: latent_model()(**k),
    lambda: {"series": series()},
    series=SERIES,
    wanted=MAYBE_SERIES,
)
border(
    "LatentODE.loss",
    lambda **k: latent_model().loss(**k),
    lambda: {"series": series()},
    series=SERIES,
    target=MAYBE_SERIES,
)
SIZES = {"variables": count(), "latent": count(), "state": count(), "hidden": count()}
border(
    "GRUEncoder",
    lambda **k: layers.GRUEncoder(**k)(series()),
    lambda: {"variables": 1, "latent": 2},
    generator=GENERATOR,
    **SIZES,
)
border("GRUEncoder()", lambda **k: encoder()(**k), lambda: {"series": series()}, series=SERIES)
border(
    "ODERNNEncoder",
    lambda **k: layers.ODERNNEncoder(**{"rtol": 1e-2, "atol": 1e-2, **k})(series()),
    lambda: {"variables": 1, "latent": 2, "field": decay},
    field=callables(2),
    start=NUMBER,
    generator=GENERATOR,
    rtol=TOLERANCE,
    algorithm=ALGORITHM,
    **SIZES,
)
WIDTHS = Kind(lambda x: isinstance(x, list | tuple | range) and all(isinstance(y, int) for y in x))
TIMED = {
    "hidden": WIDTHS,
    "time": choice("ignore", "concat", "concatsquash"),
    "activation": callables(1),
    "start_at_rest": FLAG,
    "generator": GENERATOR,
}
border(
    "TimedField.mlp",
    lambda **k: timed.TimedField.mlp(**k)(torch.tensor(0.5), torch.ones(2, 3)),
    lambda: {"features": 3, "hidden": (4,)},
    features=count(),
    **TIMED,
)
border(
    "TimedField.conv",
    lambda **k: timed.TimedField.conv(**k)(torch.tensor(0.5), torch.ones(2, 3, 4, 4)),
    lambda: {"channels": 3, "hidden": (4,)},
    channels=count(),
    kernel_size=count(),
    **TIMED,
)

# Flows.
DISTRIBUTION = made(torch.distributions.Distribution, none=True)
EVENT_SHAPE = Kind(lambda x: x is None or SHAPE.takes(x), SHAPE.skip)
border(
    "CNF",
    lambda **k: flows.CNF(**{"max_steps": 50, **k}).log_prob(torch.ones(2, 3)),
    lambda: {"field": decay},
    {"field": ("f",)},
    field=FIELD,
    event_shape=EVENT_SHAPE,
    base=DISTRIBUTION,
    exact=MAYBE_FLAG,
    distribution=choice("rademacher", "gaussian"),
    generator=GENERATOR,
    **LAYER,
)


def flow() -> flows.CNF:
    return flows.CNF(decay, event_shape=3, rtol=1e-2, atol=1e-2)


for name, call in (
    ("log_prob", lambda **k: flow().log_prob(**k)),
    ("forward", lambda **k: flow()(**k)),
):
    border(f"CNF.{name}", call, lambda: {"x": ones()}, {"x": ("u0",)}, x=tensors(floating=True))
for name in ("sample", "rsample"):
    border(
        f"CNF.{name}",
        lambda name=name, **k: getattr(flow(), name)(**k),
        lambda: {"sample_shape": (2,)},
        {"sample_shape": ("u0",)},
        sample_shape=SHAPE,
        generator=GENERATOR,
    )
border(
    "Chain",
    lambda **k: flows.Chain(**k).log_prob(torch.full((2, 3), 0.5)),
    lambda: {"transforms": [flows.Logit()]},
    transforms=Kind(lambda x: isinstance(x, list | tuple) and not x),
    event_shape=EVENT_SHAPE,
    base=DISTRIBUTION,
)
border(
    "Logit",
    lambda **k: flows.Logit(**k).transform(torch.full((2, 3), 0.5)),
    alpha=real(lambda x: 0 < x < 0.5),
)
border(
    "Logit.transform",
    lambda **k: flows.Logit().transform(**k),
    lambda: {"x": torch.full((2, 3), 0.5)},
    x=tensors(floating=True),
)
for name, good in (("transform", (1, 1, 4, 4)), ("inverse", (1, 4, 2, 2))):
    border(
        f"Squeeze.{name}",
        lambda name=name, **k: getattr(flows.Squeeze(), name)(**k),
        lambda name=name, good=good: {"x" if name == "transform" else "z": torch.ones(good)},
        **{"x" if name == "transform" else "z": tensors()},
    )


def field_of(channels: int) -> nn.Module:
    return timed.TimedField.conv(channels, (2,))


border(
    "MultiScale",
    lambda **k: flows.MultiScale(**k),
    lambda: {"image_shape": (1, 8, 8), "make_field": field_of},
    image_shape=Kind(lambda x: len(x) == 3 if isinstance(x, list | tuple | range) else False),
    make_field=callables(1),
    scales=count(none=True),
    blocks=count(),
    alpha=real(lambda x: 0 < x < 0.5, none=True),
    base=DISTRIBUTION,
    rtol=TOLERANCE,
)
border(
    "bits_per_dimension",
    flows.bits_per_dimension,
    lambda: {"log_prob": torch.zeros(2), "dimensions": 64},
    log_prob=Kind(lambda x: tensors().takes(x) or real(lambda y: True, finite=False).takes(x)),
    dimensions=count(costly=False),
    levels=count(costly=False),
)
border(
    "dequantize",
    flows.dequantize,
    lambda: {"x": torch.ones(2, 3)},
    x=tensors(floating=True),
    levels=count(costly=False),
    generator=GENERATOR,
    noise=FLAG,
)


# Optimizers and initialisations.
def parameters() -> list[nn.Parameter]:
    found = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, 2))]
    for one in found:
        one.grad = torch.ones_like(one)
    return found


PARAMS = Kind(lambda x: isinstance(x, Tensor | list))
FIT = {
    "params": PARAMS,
    "lr": NOT_NEGATIVE,
    "curvature": choice("terminal", "diagonal", "gauss-newton"),
    "safeguard": choice("none", "bound", "backtracking", "gain-ratio", none=True),
    "damping": real(lambda x: x >= 0, none=True),
    "beta": real(lambda x: 0 <= x < 1),
    "probes": count(),
    "jvp": choice("finite-difference", "double-backward"),
    "fd_step": real(lambda x: 0 < x < 1, none=True),
    "cg_steps": count(),
    "cg_rtol": SHARE,
    "max_trials": count(),
    "foreach": MAYBE_FLAG,
    "maximize": FLAG,
    "generator": GENERATOR,
}
border(
    "VarianceCorrected",
    lambda **k: optim.VarianceCorrected(**k).step(solution=ones(), horizon=1.0),
    lambda: {"params": parameters()},
    {"curvature": ("solution",)},
    **FIT,
)
border(
    "VarianceCorrected, diagonal",
    lambda **k: optim.VarianceCorrected(**k),
    lambda: {"params": parameters(), "curvature": "diagonal"},
    **FIT,
)
border(
    "VarianceCorrected.step",
    lambda **k: optim.VarianceCorrected(parameters()).step(**k),
    lambda: {"solution": ones(), "horizon": 1.0},
    {"solution": ("second_moment",)},
    closure=callables(0, none=True),
    solution=ANY,
    horizon=MAYBE_POSITIVE,
    second_moment=MAYBE_POSITIVE,
)
border(
    "scale_by_terminal_variance_",
    optim.scale_by_terminal_variance_,
    lambda: {"params": parameters(), "solution": ones(), "horizon": 1.0},
    {"solution": ("second_moment",)},
    params=PARAMS,
    solution=ANY,
    horizon=MAYBE_POSITIVE,
    second_moment=MAYBE_POSITIVE,
)
border(
    "scale_for_horizon_",
    psn.init.scale_for_horizon_,
    lambda: {"module": nn.Linear(3, 3), "T": 2.0},
    module=made(nn.Module),
    T=POSITIVE,
    previous=MAYBE_POSITIVE,
)

# Kernels.
ACTIVATION = Kind(lambda x: callable(x) or (isinstance(x, str) and x != "tsit5"))
SIGMAS = dict.fromkeys(("T", "sigma_u", "sigma_w", "sigma_v"), real(lambda x: 0 <= x <= 1e6))
for name in ("nngp", "ntk"):
    border(
        f"kernels.{name}",
        getattr(kernels, name),
        lambda: {"x1": ones(), "activation": "relu", "T": 0.5, "rtol": 1e-2},
        x1=tensors(floating=True),
        x2=tensors(none=True, floating=True),
        activation=ACTIVATION,
        readout=choice("activation", "linear"),
        steps=count(none=True),
        rtol=real(lambda x: 1e-12 <= x < 1),
        **SIGMAS,
    )
border(
    "empirical_ntk",
    kernels.empirical_ntk,
    lambda: {"module": nn.Linear(3, 2), "x1": torch.ones(2, 3)},
    module=made(nn.Module),
    x1=tensors(),
    x2=tensors(none=True),
    outputs=choice("full", "trace"),
    method=choice("auto", "jacobian", "products", "autograd"),
    memory=count(costly=False),
)
border("activation_report", kernels.activation_report, lambda: {"act": "relu"}, act=ACTIVATION)
MATRIX = tensors(floating=True)
for name in ("spectrum", "condition_number", "rank", "max_learning_rate"):
    border(
        f"kernels.{name}", getattr(kernels, name), lambda: {"kernel": torch.eye(3)}, kernel=MATRIX
    )
border(
    "kernels.rank with rtol",
    kernels.rank,
    lambda: {"kernel": torch.eye(3)},
    rtol=real(lambda x: x >= 0, none=True),
)
border(
    "kernels.posterior",
    kernels.posterior,
    lambda: {
        "kernel": torch.eye(3),
        "cross": torch.ones(2, 3),
        "prior": torch.ones(2),
        "targets": torch.ones(3),
    },
    kernel=MATRIX,
    cross=MATRIX,
    prior=MATRIX,
    targets=MATRIX,
    noise=NOT_NEGATIVE,
)
border(
    "GradientDescent",
    lambda **k: kernels.GradientDescent(**k).outputs(1, 0.1),
    lambda: {"kernel": torch.eye(3), "targets": torch.ones(3)},
    kernel=MATRIX,
    targets=MATRIX,
    initial=tensors(none=True, floating=True),
)


def dynamics() -> kernels.GradientDescent:
    return kernels.GradientDescent(torch.eye(3), torch.ones(3))


WHEN = real(lambda x: x >= 0, finite=False)
for name in ("outputs", "loss"):
    border(
        f"GradientDescent.{name}",
        lambda name=name, **k: getattr(dynamics(), name)(**k),
        lambda: {"when": 1.0},
        when=WHEN,
        lr=MAYBE_POSITIVE,
    )
border(
    "GradientDescent.predict",
    lambda **k: dynamics().predict(**k),
    lambda: {"cross": torch.ones(2, 3), "when": 1.0},
    cross=MATRIX,
    when=WHEN,
    lr=MAYBE_POSITIVE,
    initial=tensors(none=True, floating=True),
)
border(
    "GradientDescent.ensemble_variance",
    lambda **k: dynamics().ensemble_variance(**k),
    lambda: {
        "cross": torch.ones(2, 3),
        "nngp": (torch.eye(3), torch.ones(2, 3), torch.ones(2)),
        "when": 1.0,
    },
    cross=MATRIX,
    nngp=Kind(lambda x: isinstance(x, tuple | list) and len(x) == 3),
    when=WHEN,
    lr=MAYBE_POSITIVE,
)


MODERATE = real(lambda x: abs(x) <= 1e6)


def kernel_of(activation: Any) -> Tensor:
    return kernels.nngp(torch.eye(2), activation=activation, rtol=1e-2)


border("LeakyReLU", lambda **k: kernel_of(kernels.LeakyReLU(**k)), negative_slope=MODERATE)
border("Sinusoid", lambda **k: kernel_of(kernels.Sinusoid(**k)), frequency=MODERATE, phase=MODERATE)
border(
    "Polynomial",
    lambda **k: kernel_of(kernels.Polynomial(**k)),
    lambda: {"coefficients": (0.0, 1.0)},
    coefficients=TIMES,
)

# Data.
border(
    "IrregularSeries",
    data.IrregularSeries,
    rows,
    times=tensors(),
    values=tensors(),
    observed=tensors(),
    lengths=tensors(),
)
border(
    "IrregularSeries.join",
    data.IrregularSeries.join,
    lambda: {"samples": [(torch.zeros(1), torch.ones(1, 1), torch.ones(1, 1) > 0)]},
    samples=made(list),
)
border(
    "IrregularSeries.hide",
    lambda **k: series().hide(**k),
    lambda: {"share": 0.5},
    share=SHARE,
    generator=GENERATOR,
)
border(
    "IrregularSeries.to",
    lambda **k: series().to(**k),
    lambda: {"dtype": torch.float64},
    dtype=made(torch.dtype),
)
border(
    "IrregularSeries.only",
    lambda **k: series().only(**k),
    lambda: {"rows": torch.ones(3) > 0},
    rows=tensors(),
)
border(
    "IrregularSeries.per_sample",
    lambda **k: series().per_sample(**k),
    lambda: {"entries": torch.ones(3, 1)},
    entries=tensors(),
)
border(
    "IrregularSeries[]",
    lambda **k: series().__getitem__(**k),
    lambda: {"index": slice(0, 1)},
    index=Kind(lambda x: isinstance(x, slice | Tensor)),
)


def labelled() -> data.LabelledData:
    return data.LabelledData(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))


border(
    "LabelledData",
    data.LabelledData,
    lambda: {"x": torch.ones(3, 2), "y": torch.tensor([0, 1, 1])},
    x=tensors(),
    y=tensors(),
)
DATA = Kind(lambda x: isinstance(x, data.LabelledData | data.IrregularSeries) or tensors().takes(x))
border(
    "ShuffledBatches",
    lambda **k: next(data.ShuffledBatches(**k)),
    lambda: {"data": labelled(), "batch_size": 2, "generator": torch.Generator()},
    data=DATA,
    batch_size=count(),
    generator=made(torch.Generator),
)
border(
    "ordered_batches",
    lambda **k: list(data.ordered_batches(**k)),
    lambda: {"data": labelled(), "batch_size": 2},
    data=DATA,
    batch_size=count(),
)
border(
    "stratified_split",
    data.stratified_split,
    lambda: {
        "labels": torch.tensor([0, 0, 1, 1]),
        "fractions": {"a": 0.5, "b": 0.5},
        "generator": torch.Generator(),
    },
    labels=tensors(),
    fractions=made(dict),
    generator=made(torch.Generator),
)
border("read_idx", data.read_idx, lambda: {"path": "/nowhere/file"}, path=made(str, Path))
border(
    "parse_idx",
    parse_idx,
    lambda: {"content": bytes([0, 0, 8, 1, 0, 0, 0, 1, 7])},
    content=made(bytes),
    name=WORDS,
)
border(
    "parse_record",
    parse_record,
    lambda: {"text": "Time,Parameter,Value\n01:30,HR,73\n"},
    {"text": ("record",)},
    text=made(str),
)
DTYPE = made(torch.dtype)
FOLDER = made(str, Path)
for name in ("mnist", "cifar10"):
    border(
        f"data.{name}",
        getattr(data, name),
        lambda: {"data_dir": "/nowhere", "download": False},
        data_dir=FOLDER,
        validation=count(0),
        dtype=DTYPE,
    )
border(
    "data.physionet",
    data.physionet,
    lambda: {"data_dir": "/nowhere", "download": False},
    data_dir=FOLDER,
    quantization=real(lambda x: 0 < x <= 48, none=True),
    outliers=choice("keep", "drop", "clip"),
    validation=real(lambda x: 0 <= x < 1),
    test=SHARE,
    seed=count(0, costly=False),
    dtype=DTYPE,
)
for name in ("digits", "prices"):
    border(
        f"data.{name}",
        getattr(data, name),
        validation=real(lambda x: 0 <= x < 1),
        test=SHARE,
        seed=count(0, costly=False),
        dtype=DTYPE,
    )
border(
    "data.plane",
    plane,
    lambda: {"shape": "pinwheel", "n": 5, "generator": torch.Generator()},
    shape=choice("eight-gaussians", "checkerboard", "pinwheel", "two-spirals"),
    n=count(0),
    generator=made(torch.Generator),
)

# torchdiffeq's functions.
ODEINT = {
    "func": callables(2),
    "y0": STATE,
    "rtol": TOLERANCE,
    "atol": TOLERANCE,
    "method": choice("dopri5", none=True),
    "options": made(dict, type(None)),
}
TENSOR_TIMES = Kind(lambda x: isinstance(x, Tensor) and x.ndim == 1)


def times() -> Tensor:
    return torch.tensor([0.0, 1.0], dtype=torch.float64)


border(
    "odeint",
    torchdiffeq.odeint,
    lambda: {"func": decay, "y0": ones(), "t": times(), "options": {"max_num_steps": 50}},
    t=TENSOR_TIMES,
    event_fn=callables(2, none=True),
    **ODEINT,
)
border(
    "odeint_adjoint",
    torchdiffeq.odeint_adjoint,
    lambda: {"func": decay, "y0": ones(), "t": times(), "options": {"max_num_steps": 50}},
    t=TENSOR_TIMES,
    event_fn=callables(2, none=True),
    adjoint_rtol=MAYBE_POSITIVE,
    adjoint_atol=MAYBE_POSITIVE,
    adjoint_method=choice("dopri5", none=True),
    adjoint_options=made(dict, type(None)),
    adjoint_params=Kind(lambda x: x is None or isinstance(x, list | tuple | Tensor)),
    **ODEINT,
)
border(
    "odeint_event",
    torchdiffeq.odeint_event,
    lambda: {
        "func": decay,
        "y0": ones(),
        "t0": 0.0,
        "event_fn": lambda t, y: torch.as_tensor(y).sum() - 5,
        "options": {"max_num_steps": 50},
    },
    t0=NUMBER,
    event_fn=callables(2),
    reverse_time=FLAG,
    odeint_interface=callables(3),
    **{key: ODEINT[key] for key in ("func", "y0", "rtol", "method")},
)
border(
    "odeint_dense",
    torchdiffeq.odeint_dense,
    lambda: {"func": decay, "y0": ones(), "t0": 0.0, "t1": 1.0},
    t0=NUMBER,
    t1=NUMBER,
    **ODEINT,
)
for name in ("safety", "ifactor", "dfactor", "first_step", "max_step", "max_num_steps", "step_t"):
    border(
        f"odeint's {name}",
        lambda **k: torchdiffeq.odeint(decay, ones(), times(), options={"max_num_steps": 50, **k}),
        nothing,
        {"safety": ("gamma",), "ifactor": ("qmax",), "dfactor": ("qmin",)},
        **{name: ANY},
    )
border("JuliaField", psn.JuliaField, lambda: {"source": "(u, p, t) -> -u"}, source=WORDS)
