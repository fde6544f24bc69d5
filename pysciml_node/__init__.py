"""Neural differential equations in PyTorch, solved and trained so that they stay cheap to solve.

    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(3), (0.0, 1.0))
    solution = psn.solve(problem, psn.Tsit5(), saveat=[0.0, 0.5, 1.0])

A problem (`ODEProblem`, `SDEProblem`, `EnsembleProblem`) says what is solved, an algorithm
(`Tsit5`, `Rodas5P`, `SOSRI`) how, and an adjoint (`DiscreteAdjoint`, `BacksolveAdjoint`) how
gradients are taken. `solve` returns a `Solution`: states `u` at times `t`, and the last one, `u1`.

`NeuralODE`, `NeuralSDE`, `NeuralCDE`, `LatentODE` and `CNF` are layers; `LocalError` and other
regularizers keep them cheap. `compat.torchdiffeq` and `compat.torchsde` have the functions of these
packages. `help(psn.solve)` says what the options are.
"""

import importlib
from types import ModuleType

from pysciml_node import (
    checks,
    compat,
    init,
    interpolate,
    kernels,
    monitoring,
    optim,
    plot,
    schedules,
)
from pysciml_node.algorithms.adjoints import (
    BacksolveAdjoint,
    DirectAdjoint,
    DiscreteAdjoint,
    ForwardDiffSensitivity,
    GaussAdjoint,
    InterpolatingAdjoint,
    QuadratureAdjoint,
)
from pysciml_node.algorithms.controllers import FixedStep, IController, PIController, PIDController
from pysciml_node.algorithms.explicit import (
    BS3,
    DP5,
    DP8,
    RK4,
    Dopri5,
    Dopri8,
    Euler,
    Heun,
    Midpoint,
    Ralston,
    Tsit5,
    Vern7,
    Vern9,
)
from pysciml_node.algorithms.implicit import TRBDF2, KenCarp4, Rodas5P, Rosenbrock23
from pysciml_node.algorithms.krylov import GMRES
from pysciml_node.algorithms.parallel import Parallel
from pysciml_node.algorithms.sciml import (
    FBDF,
    QNDF,
    VCABM,
    SciMLAlgorithm,
    Vern6,
    Vern8,
)
from pysciml_node.algorithms.stochastic import (
    EM,
    SOSRA,
    SOSRA2,
    SOSRI,
    SOSRI2,
    SRA1,
    SRIW1,
    EulerHeun,
    LambaEM,
    ReversibleHeun,
    RKMil,
    StratonovichMidpoint,
)
from pysciml_node.algorithms.switching import AutoTsit5, AutoVern7
from pysciml_node.budgets import Budget
from pysciml_node.errors import (
    CompileError,
    EngineUnavailable,
    EnsembleFailure,
    JuliaError,
    PsnWarning,
    SolverFailure,
    UnsupportedModule,
)
from pysciml_node.flows import CNF
from pysciml_node.julia_engine.source import JuliaField
from pysciml_node.layers import LatentODE, LatentSDE, NeuralCDE, NeuralODE, NeuralSDE
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.event import Event
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.regularizers import (
    GlobalError,
    GlobalStiffness,
    Integral,
    JacobianFrobenius,
    KineticEnergy,
    LocalError,
    LocalStiffness,
    RandomEndTime,
    Regularizer,
    TaylorDerivative,
)
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import ReturnCode, Solution, Stats, StepEstimate
from pysciml_node.solving.engines import get_engine, set_engine
from pysciml_node.solving.solve import solve
from pysciml_node.tuning import tune

__version__ = "0.1.0.dev0"

__all__ = [
    "BS3",
    "CNF",
    "DP5",
    "DP8",
    "EM",
    "FBDF",
    "GMRES",
    "QNDF",
    "RK4",
    "SOSRA",
    "SOSRA2",
    "SOSRI",
    "SOSRI2",
    "SRA1",
    "SRIW1",
    "TRBDF2",
    "VCABM",
    "AutoTsit5",
    "AutoVern7",
    "BacksolveAdjoint",
    "Budget",
    "CompileError",
    "DirectAdjoint",
    "DiscreteAdjoint",
    "Dopri5",
    "Dopri8",
    "EngineUnavailable",
    "EnsembleFailure",
    "EnsembleProblem",
    "EnsembleSolution",
    "Euler",
    "EulerHeun",
    "Event",
    "FixedStep",
    "ForwardDiffSensitivity",
    "GaussAdjoint",
    "GlobalError",
    "GlobalStiffness",
    "Heun",
    "IController",
    "Integral",
    "InterpolatingAdjoint",
    "JacobianFrobenius",
    "JuliaError",
    "JuliaField",
    "KenCarp4",
    "KineticEnergy",
    "LambaEM",
    "LatentODE",
    "LatentSDE",
    "LocalError",
    "LocalStiffness",
    "Midpoint",
    "NeuralCDE",
    "NeuralODE",
    "NeuralSDE",
    "ODEProblem",
    "PIController",
    "PIDController",
    "Parallel",
    "PsnWarning",
    "QuadratureAdjoint",
    "RKMil",
    "Ralston",
    "RandomEndTime",
    "Regularizer",
    "ReturnCode",
    "ReversibleHeun",
    "Rodas5P",
    "Rosenbrock23",
    "SDEProblem",
    "SciMLAlgorithm",
    "Solution",
    "SolverFailure",
    "Stats",
    "StepEstimate",
    "StratonovichMidpoint",
    "TaylorDerivative",
    "Tsit5",
    "UnsupportedModule",
    "Vern6",
    "Vern7",
    "Vern8",
    "Vern9",
    "compat",
    "get_engine",
    "init",
    "interpolate",
    "kernels",
    "monitoring",
    "optim",
    "plot",
    "schedules",
    "set_engine",
    "solve",
    "tune",
]

# What other packages have at their top.
_ELSEWHERE = {
    "odeint": "compat.torchdiffeq.odeint",
    "odeint_adjoint": "compat.torchdiffeq.odeint_adjoint",
    "sdeint": "compat.torchsde.sdeint",
    "sdeint_adjoint": "compat.torchsde.sdeint_adjoint",
    "diffeqsolve": "solve",
    "solve_ivp": "solve",
    "NeuralDE": "NeuralODE",
}


def __getattr__(name: str) -> ModuleType:
    """The callbacks for Lightning, which is imported for them alone."""
    if name == "lightning":
        return importlib.import_module(f"{__name__}.lightning")
    meant = _ELSEWHERE.get(name) or (not name.startswith("_") and checks.nearest(name, __all__))
    remedy = f"\n  Did you mean {__name__}.{meant}?" if meant else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{remedy}")


def __dir__() -> list[str]:
    """The public names: modules that only hold them are left out."""
    return [*__all__, "data", "flows", "layers", *(x for x in globals() if x.startswith("__"))]
