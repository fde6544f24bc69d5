"""The private names of torchdiffeq that public code imports, in the modules they have there.

`NAMES` says what is where. Other names raise, and say what to use.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from pysciml_node.compat.torchdiffeq import private
from pysciml_node.compat.torchdiffeq.adjoint import odeint_adjoint
from pysciml_node.compat.torchdiffeq.functions import odeint, odeint_dense, odeint_event
from pysciml_node.compat.torchdiffeq.grid import FixedGridODESolver
from pysciml_node.compat.torchdiffeq.multistep import AdamsBashforth, AdamsBashforthMoulton
from pysciml_node.compat.torchdiffeq.normal import Perturb
from pysciml_node.compat.torchdiffeq.scipy_solver import ScipyWrapperODESolver
from pysciml_node.compat.torchdiffeq.solvers import SOLVERS

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]

_STEPS = {name: getattr(private, name) for name in ("rk4_step_func", "rk4_alt_step_func")}

NAMES: dict[str, dict[str, Any]] = {
    "odeint": {
        "SOLVERS": SOLVERS,
        "odeint": odeint,
        "odeint_dense": odeint_dense,
        "odeint_event": odeint_event,
    },
    "adjoint": {
        "odeint_adjoint": odeint_adjoint,
        "find_parameters": private.find_parameters,
        "SOLVERS": SOLVERS,
    },
    "misc": {
        "Perturb": Perturb,
        "_check_inputs": private.check_inputs,
        "_flat_to_shape": private.flat_to_shape,
        "_rms_norm": private.rms_norm,
        "_linf_norm": private.linf_norm,
        "_mixed_norm": private.mixed_norm,
        "_optimal_step_size": private.optimal_step_size,
    },
    "solvers": {"FixedGridODESolver": FixedGridODESolver},
    "rk_common": {**_STEPS, "_ButcherTableau": private.ButcherTableau},
    "fixed_grid": {
        SOLVERS[name].__name__: SOLVERS[name]
        for name in ("euler", "midpoint", "heun2", "heun3", "rk4")
    },
    "fixed_adams": {
        "AdamsBashforth": AdamsBashforth,
        "AdamsBashforthMoulton": AdamsBashforthMoulton,
    },
    "scipy_wrapper": {"ScipyWrapperODESolver": ScipyWrapperODESolver},
    "interp": {
        "_interp_evaluate": private.interp_evaluate,
        "_interp_fit": private.interp_fit,
    },
    "dopri5": {
        "_DORMAND_PRINCE_SHAMPINE_TABLEAU": private.DORMAND_PRINCE,
        "DPS_C_MID": private.DORMAND_PRINCE_MIDDLE,
        "Dopri5Solver": SOLVERS["dopri5"],
    },
}

# What to use in place of a name that has no counterpart.
INSTEAD = {
    "RKAdaptiveStepsizeODESolver": "A new adaptive method is a table: see the docs on algorithms, "
    "or derive from FixedGridODESolver.",
    "AdaptiveStepsizeODESolver": "A new adaptive method is a table: see the docs on algorithms.",
    "OdeintAdjointMethod": "Call odeint_adjoint; adjoint_* describe its backward pass.",
    "find_event": "Call odeint_event, or solve with pysciml_node.Event.",
}


class _Module(ModuleType):
    """A module of torchdiffeq's, with the names that have a counterpart."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        advice = INSTEAD.get(name, f"It has {', '.join(NAMES[self.__name__.rpartition('.')[2]])}.")
        raise AttributeError(f"{self.__name__} has no {name} here.\n  {advice}")


for _name, _members in NAMES.items():
    _module = _Module(f"{__name__}.{_name}", f"torchdiffeq's `_impl.{_name}`: see `NAMES`.")
    _module.__dict__.update(_members)
    sys.modules[_module.__name__] = _module
    # As there, the name of the function hides that of its module.
    globals().setdefault(_name, _module)
