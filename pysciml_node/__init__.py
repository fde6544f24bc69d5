"""Neural differential equations in PyTorch, solved and trained so that they stay cheap to solve."""

from pysciml_node import compat, init, kernels, optim, schedules
from pysciml_node.adjoints import (
    BacksolveAdjoint,
    DirectAdjoint,
    DiscreteAdjoint,
    GaussAdjoint,
    InterpolatingAdjoint,
)
from pysciml_node.algorithms import (
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
from pysciml_node.controllers import FixedStep, IController, PIController, PIDController
from pysciml_node.engines import get_engine, set_engine
from pysciml_node.errors import EngineUnavailable, PsnWarning, SolverFailure
from pysciml_node.events import Event
from pysciml_node.layers import NeuralODE, NeuralSDE
from pysciml_node.problem import ODEProblem
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
from pysciml_node.sde_algorithms import (
    EM,
    SOSRA,
    SOSRA2,
    SOSRI,
    SOSRI2,
    SRA1,
    SRIW1,
    EulerHeun,
    ReversibleHeun,
    RKMil,
)
from pysciml_node.sde_problem import SDEProblem
from pysciml_node.solution import ReturnCode, Solution, Stats, StepEstimate
from pysciml_node.solve import solve
from pysciml_node.torch_engine.compiled import CompileError

__version__ = "0.1.0.dev0"

__all__ = [
    "BS3",
    "DP5",
    "DP8",
    "EM",
    "RK4",
    "SOSRA",
    "SOSRA2",
    "SOSRI",
    "SOSRI2",
    "SRA1",
    "SRIW1",
    "BacksolveAdjoint",
    "CompileError",
    "DirectAdjoint",
    "DiscreteAdjoint",
    "Dopri5",
    "Dopri8",
    "EngineUnavailable",
    "Euler",
    "EulerHeun",
    "Event",
    "FixedStep",
    "GaussAdjoint",
    "GlobalError",
    "GlobalStiffness",
    "Heun",
    "IController",
    "Integral",
    "InterpolatingAdjoint",
    "JacobianFrobenius",
    "KineticEnergy",
    "LocalError",
    "LocalStiffness",
    "Midpoint",
    "NeuralODE",
    "NeuralSDE",
    "ODEProblem",
    "PIController",
    "PIDController",
    "PsnWarning",
    "RKMil",
    "Ralston",
    "RandomEndTime",
    "Regularizer",
    "ReturnCode",
    "ReversibleHeun",
    "SDEProblem",
    "Solution",
    "SolverFailure",
    "Stats",
    "StepEstimate",
    "TaylorDerivative",
    "Tsit5",
    "Vern7",
    "Vern9",
    "compat",
    "get_engine",
    "init",
    "kernels",
    "optim",
    "schedules",
    "set_engine",
    "solve",
]
