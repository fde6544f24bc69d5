"""What a native solve needs besides its state: checked and made once, and looked up afterwards.

`prepare` finds what it has made by the identities of the field, of the kind of state, of the method
and of the options, which `solve` looks up by their values. It serves again as long as a look at
everything that the field can reach finds nothing changed but the numbers in its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import DiscreteAdjoint
from pysciml_node.algorithms.controllers import (
    FixedStep,
    IController,
    PIController,
    PIDController,
)
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.implicit import DiagonallyImplicitMethod, ImplicitMethod
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.algorithms.switching import OneStepMethod
from pysciml_node.errors import CompileError, UnsupportedModule
from pysciml_node.problems.modes import InModes, foreign_mode
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import StateSpec, moves, tensors_of
from pysciml_node.replay.stages import Method
from pysciml_node.steps.derived import DerivedField
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.tableaus import ImplicitTableau, RosenbrockTableau, Tableau
from pysciml_node.torch_engine.native.implicit import LARGEST, write_implicit
from pysciml_node.torch_engine.native.library import (
    REALS,
    Library,
    library_of,
    write_explicit,
)
from pysciml_node.torch_engine.native.pulled import pulled_program
from pysciml_node.torch_engine.native.run import Departure, departure_of
from pysciml_node.translation.export import TranslatedModule, translate
from pysciml_node.translation.recent import RecentOf
from pysciml_node.translation.surrounded import Walked, surroundings_of, walked_of

See = Callable[[], Surroundings]
_CONTROLS = (PIController, IController, PIDController, FixedStep)
# Fields that are known, and ways to solve each of them.
_MOST_FIELDS, _MOST_WAYS = 64, 16


def refusal(what: str, remedy: str = "compile=False") -> CompileError:
    """The error for something that native code does not have."""
    return CompileError(f"native code does not have {what}.\n  Solve with {remedy}.")


def check(problem: ODEProblem, algorithm: Algorithm, options: SolveOptions) -> None:
    """Refuse what cannot be native whatever the field is, by name.

    Raises:
        CompileError: as said.
    """
    _check_call(problem, algorithm, options)
    check_kind(problem.spec, options, problem.f)


def check_kind(spec: StateSpec, options: SolveOptions, *functions: Any) -> None:
    """Refuse kinds of states, controllers and modes that native code does not have.

    Raises:
        CompileError: as said.
    """
    if spec.device.type != "cpu":
        raise refusal(f"states on {spec.device}")
    if spec.dtype not in REALS:
        raise refusal(f"states of {spec.dtype}", "float32 or float64, or compile=False")
    if type(options.controller) not in _CONTROLS:
        raise refusal(f"{type(options.controller).__name__}", "PIController() or compile=False")
    for f in functions:
        inner = f.inner if isinstance(f, DerivedField) else f
        if isinstance(inner, InModes):
            raise refusal("autocast" if inner.autocast else "a default device")


def _check_call(problem: ODEProblem, algorithm: Algorithm, options: SolveOptions) -> None:
    """Refuse what is not among that by which a prepared solve is found."""
    if not isinstance(algorithm, ExplicitRungeKutta):
        _check_implicit(problem, algorithm)
    if options.events and problem.mass_matrix is not None:
        raise refusal("events with mass_matrix")
    check_surroundings(options)


def check_surroundings(options: SolveOptions) -> None:
    """Refuse ways to take derivatives, and to look at operations, that native code does not have.

    Raises:
        CompileError: as said.
    """
    if torch.is_grad_enabled() and not isinstance(options.adjoint, DiscreteAdjoint):
        name = type(options.adjoint).__name__
        raise refusal(name, "adjoint=DiscreteAdjoint(), or with compile=False")
    if torch._C._are_functorch_transforms_active():
        raise refusal("transforms of torch.func")
    if torch.autograd.forward_ad._current_level >= 0:
        raise refusal("forward-mode derivatives")
    mode = foreign_mode()
    if mode is not None:
        raise refusal(f"operations that {mode} would see")


def _check_implicit(problem: ODEProblem, algorithm: Algorithm) -> None:
    """Refuse what is no method of one tableau, and what is not for an implicit one."""
    if not isinstance(algorithm, ImplicitMethod):
        raise refusal(repr(algorithm), "Tsit5() or another explicit method, or compile=False")
    if isinstance(algorithm, DiagonallyImplicitMethod) and algorithm.linsolve is not None:
        raise refusal("linsolve", f"{type(algorithm).__name__}(), or compile=False")
    for what in ("jac", "jac_sparsity"):
        if getattr(problem, what) is not None:
            raise refusal(what)
    size = sum(problem.spec.sizes)
    if size > LARGEST:
        raise refusal(
            f"{algorithm!r} for more than {LARGEST} entries of a state, and u0 has {size}"
        )


def no_code(error: UnsupportedModule, what: str = "the field") -> CompileError:
    """The error for a field that cannot be translated."""
    return CompileError(
        f"{what} has no native code: {error.message}\n"
        "  Rewrite it with operations that programs have, or solve with compile=False."
    )


@dataclass(frozen=True)
class Prepared:
    """A native solve but for its state.

    Attributes:
        library: native code of the field and the method.
        departure: how it begins.
        tableau: of the method.
        translated: the field.
        parameters: the tensors that the code reads.
        recorded: whether the code has the derivatives of a Rosenbrock method.
        walked: what the field can reach, where it is a module of which all can be seen.
        spec: structure of the state. Like the method and the options it is kept, so that no other
            one is given its identity.
    """

    library: Library
    departure: Departure
    tableau: Tableau
    translated: TranslatedModule
    parameters: list[Tensor]
    recorded: bool
    walked: Walked | None
    spec: StateSpec

    def serves(self, problem: ODEProblem, options: SolveOptions) -> bool:
        """Whether another solve needs nothing else."""
        walked = self.walked
        return (
            walked is not None
            and problem.p is problem.mass_matrix is None
            and self.departure.serves(problem, options)
            and self.recorded == _records(problem, self.tableau, options, self.translated)
            and walked.stands()
            and self.translated.holds(walked.tensors)
        )


_Way = tuple[int, int, int]
_prepared: RecentOf[dict[_Way, Prepared]] = RecentOf(_MOST_FIELDS)
"""Of a field, by the identities of those that `prepare` takes."""


def _keep(f: Any, way: _Way, made: Prepared) -> None:
    """Keep what has been prepared for a field."""
    ways = _prepared.get(f)
    # What has been made for other tensors would keep them alive.
    if ways is None or any(way.walked is not made.walked for way in ways.values()):
        ways = _prepared[f] = {}
    if len(ways) >= _MOST_WAYS:
        ways.clear()
    ways[way] = made


def prepare(
    problem: ODEProblem, algorithm: Algorithm, options: SolveOptions
) -> tuple[Prepared, See]:
    """What a solve needs, and a function that gives the field's surroundings as they are now.

    Raises:
        CompileError: an option or the field has no native code, or there is no compiler.
    """
    way = id(problem.spec), id(getattr(algorithm, "tableau", None)), id(options)
    ways = _prepared.get(problem.f)
    known = None if ways is None else ways.get(way)
    if known is not None and known.serves(problem, options):
        _check_call(problem, algorithm, options)
        assert known.walked is not None
        return known, known.walked.see(problem.f)
    check(problem, algorithm, options)
    assert isinstance(algorithm, OneStepMethod)
    spec, (tableau,) = problem.spec, algorithm.tableaus
    method = Method.of(tableau, spec.dtype, spec.device)
    try:
        translated = translate(problem.f, spec, problem.p)
        recorded = _records(problem, tableau, options, translated)
        watched = bool(options.events)
        library, parameters = _library(problem, translated, method, recorded, watched)
    except UnsupportedModule as error:
        raise no_code(error) from error
    see = surroundings_of(problem.f, problem.p, translated.snapshot)
    walked = walked_of(problem.f, problem.p, translated.snapshot)
    departure = departure_of(library, problem, options, tableau.error_order)
    made = Prepared(library, departure, tableau, translated, parameters, recorded, walked, spec)
    if walked is not None and departure.lasting and problem.mass_matrix is None:
        _keep(problem.f, way, made)
    return made, see


def _records(
    problem: ODEProblem, tableau: Tableau, options: SolveOptions, translated: TranslatedModule
) -> bool:
    """Whether a solve needs the derivatives of a Rosenbrock method, a program of their own."""
    if not (isinstance(tableau, RosenbrockTableau) and torch.is_grad_enabled()):
        return False
    inputs = (*tensors_of(problem.u0), *problem.tspan, options.saveat_tensor)
    return any(map(moves, (*inputs, *translated.parameters)))


def _library(
    problem: ODEProblem,
    translated: TranslatedModule,
    method: Method,
    recorded: bool,
    watched: bool,
) -> tuple[Library, list[Tensor]]:
    """The code of a translated field with a method, and the tensors that it reads."""
    json, program, dtype = translated.json, translated.program, problem.spec.dtype
    if not isinstance(method.tableau, ImplicitTableau):
        library = library_of(json, method.tableau, dtype, lambda: write_explicit(program, method))
        if watched and library.parts is not None:
            whole = json, "whole"
            library = library_of(
                whole, method.tableau, dtype, lambda: write_explicit(program, method, False)
            )
        return library, translated.parameters
    mass = problem.mass
    json += "" if mass is None else repr(mass.tolist())
    if not recorded:
        library = library_of(
            json, method.tableau, dtype, lambda: write_implicit(program, None, method, mass)
        )
        return library, translated.parameters
    pulled = pulled_program(problem.f, problem.spec, problem.p, translated)
    library = library_of(
        json + pulled.json,
        method.tableau,
        dtype,
        lambda: write_implicit(program, pulled.program, method, mass),
    )
    return library, [*translated.parameters, *pulled.parameters(translated.parameters)]
