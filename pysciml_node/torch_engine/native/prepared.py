"""What a native solve needs besides its state: checked and made once, and looked up afterwards.

A look at everything that the field can reach gives the same watch again as long as nothing has
changed there but the tensors of places, and the numbers in them. `prepare` finds what it has made
by that watch, by the form of `p`, and by the identities of the kind of state, of the method and of
the options, which `solve` looks up by their values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
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
from pysciml_node.algorithms.switching import OneStepMethod, SwitchingMethod
from pysciml_node.errors import CompileError, UnsupportedModule
from pysciml_node.problems.modes import InModes, foreign_mode
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import StateSpec, moves, tensors_of
from pysciml_node.replay.stages import Method
from pysciml_node.steps.derived import DerivedField
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.tableaus import ImplicitTableau, RosenbrockTableau
from pysciml_node.torch_engine.native.crossing import PullBack, TakeSteps
from pysciml_node.torch_engine.native.departure import Departure, departure_of
from pysciml_node.torch_engine.native.fitting import expect_fitting, is_told
from pysciml_node.torch_engine.native.implicit import LARGEST, Derivatives, write_implicit
from pysciml_node.torch_engine.native.library import (
    REALS,
    Library,
    cross_in_c,
    library_of,
    write_explicit,
)
from pysciml_node.torch_engine.native.pulled import pulled_program
from pysciml_node.translation.export import (
    TranslatedModule,
    translate,
    translate_jacobian,
)
from pysciml_node.translation.first import At
from pysciml_node.translation.leaves import class_of_its_own, form_for, leaves_of
from pysciml_node.translation.numbers import Compared, first_to_succeed, ways_to_read
from pysciml_node.translation.program import Program
from pysciml_node.translation.repeated import remember, repeat
from pysciml_node.translation.snapshot import Snapshot
from pysciml_node.translation.surrounded import surroundings_of
from pysciml_node.translation.watch import Contents, have_contents
from pysciml_node.translation.ways import keep, known_of

See = Callable[[], Surroundings]
_CONTROLS = (PIController, IController, PIDController, FixedStep)


def refusal(what: str, remedy: str = "compile=False") -> CompileError:
    """The error for something that native code does not have."""
    return CompileError(f"native code does not have {what}.\n  Solve with {remedy}.")


def foreign_class(given: Any) -> str | None:
    """The name of a class of tensors, in a state, that compute otherwise, if there is one.

    They may have no numbers in memory of their own, and C would read at address 0.
    """
    return None if type(given) is Tensor else class_of_its_own(list(tensors_of(given)))


def check_classes(*given: Any) -> None:
    """Refuse tensors of such classes, in states and extra arguments of a problem or of members.

    Raises:
        CompileError: as said.
    """
    for foreign in map(foreign_class, given):
        if foreign is not None:
            raise refusal(f"tensors of the class {foreign}")


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
    kind = type(options.adjoint)
    discrete = kind is DiscreteAdjoint or issubclass(kind, DiscreteAdjoint)
    if not discrete and torch.is_grad_enabled():
        raise refusal(kind.__name__, "adjoint=DiscreteAdjoint(), or with compile=False")
    if torch._C._are_functorch_transforms_active():
        raise refusal("transforms of torch.func")
    if torch.autograd.forward_ad._current_level >= 0:
        raise refusal("forward-mode derivatives")
    mode = foreign_mode()
    if mode is not None:
        raise refusal(f"operations that {mode} would see")


def _check_implicit(problem: ODEProblem, algorithm: Algorithm) -> None:
    """Refuse what has no native code, and what is not for an implicit method."""
    stiff = algorithm.stiff if isinstance(algorithm, SwitchingMethod) else algorithm
    if not isinstance(stiff, ImplicitMethod):
        raise refusal(repr(algorithm), "Tsit5() or another explicit method, or compile=False")
    if isinstance(stiff, DiagonallyImplicitMethod) and stiff.linsolve is not None:
        raise refusal("linsolve", f"{type(stiff).__name__}(), or compile=False")
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
    """A native solve but for its state and its parameters.

    Attributes:
        departure: how it begins, with native code of the field and the methods.
        program: of the field.
        constants: tensors that the code reads beside those of the field and of `p`.
        places: of each tensor that it reads its number, the field's before those of `p`; constants
            are counted from the end.
        contents: numbers of tensors whose entries are part of the program, with those entries.
        rosenbrock: whether a method is one of Rosenbrock's.
        derivatives: that it has beside the field; of its pullback where gradients need them.
        json: the program as text, which explicit methods have their libraries by.
        compared: for which numbers of `p` the code is the field's.
        algorithm: how it is solved. Like the structure of the state and the options it is kept, so
            that no other one is given its identity.
        spec: structure of the state.
    """

    departure: Departure
    program: Program
    constants: list[Tensor]
    places: list[int]
    contents: Contents
    rosenbrock: bool
    derivatives: Derivatives
    json: str
    compared: Compared
    algorithm: OneStepMethod
    spec: StateSpec

    @cached_property
    def explicit(self) -> bool:
        """Whether the method is an explicit one."""
        return isinstance(self.algorithm, ExplicitRungeKutta)

    @cached_property
    def take_steps(self) -> TakeSteps | None:
        """The loop, if it can run to its end in C."""
        return self.departure.steps_of(self.spec)

    @cached_property
    def pull(self) -> PullBack | None:
        """A sweep of it to its end, if there is one."""
        return self.departure.pull_in(self.spec.sizes)

    @cached_property
    def in_order(self) -> bool:
        """Whether the code reads the tensors of the field, and of `p`, one after the other."""
        return not self.constants and self.places == list(range(len(self.places)))

    @cached_property
    def shape(self) -> torch.Size:
        """That of the state as it is solved: in parts it is flat."""
        spec = self.spec
        return spec.shapes[0] if spec.keys is None else torch.Size((sum(spec.sizes),))

    def parameters(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors that the code reads, of those of the field and of `p`."""
        if self.in_order and len(tensors) == len(self.places):
            return tensors
        every = [*tensors, *self.constants] if self.constants else tensors
        return list(map(every.__getitem__, self.places))

    def fits(self, problem: ODEProblem, options: SolveOptions, parameters: list[Tensor]) -> bool:
        """Whether a Rosenbrock method has the derivatives that a solve needs, and no others."""
        recorded = _records(problem, options, parameters, True)
        return (self.derivatives.pulled is not None) == recorded

    def serves(
        self,
        problem: ODEProblem,
        options: SolveOptions,
        tensors: list[Tensor],
        parameters: list[Tensor],
    ) -> bool:
        """Whether another solve of a field that looks the same needs nothing else."""
        return (
            self.departure.serves(problem, options)
            and (not self.rosenbrock or self.fits(problem, options, parameters))
            and (not self.contents or have_contents(tensors, self.contents))
        )


Ready = tuple[Prepared, list[Tensor], See]
"""What one solve needs: what it shares with others, the tensors that the code reads, and what gives
the surroundings of the field as they are now."""


def prepare(problem: ODEProblem, algorithm: Algorithm, options: SolveOptions) -> Ready:
    """What a solve needs.

    Raises:
        CompileError: an option or the field has no native code, or there is no compiler.
    """
    ready = prepared_again(problem, algorithm, options)
    return _look_up(problem, algorithm, options) if ready is None else ready


def prepared_again(
    problem: ODEProblem, algorithm: Algorithm, options: SolveOptions
) -> Ready | None:
    """The same of a solve that was before but for its state and numbers; `None` of others."""
    found = repeat(problem, algorithm, options)
    if found is None:
        return None
    prepared, tensors, see, read = found
    parameters = prepared.parameters(tensors)
    if read is not problem.p and not prepared.compared.has_held(problem.p):
        return None
    if prepared.rosenbrock and not prepared.fits(problem, options, parameters):
        return None
    return prepared, parameters, see


def _keep_for_repeats(
    problem: ODEProblem, options: SolveOptions, known: Prepared, now: Snapshot, form: Any
) -> None:
    """Have later solves begin at once that differ in states, and in numbers of tensors, alone."""
    told = is_told(problem, known.algorithm)
    if not told and not known.contents and known.departure.lasting:
        cross_in_c()
        remember(problem, known.algorithm, options, known, now, form)


def _look_up(problem: ODEProblem, algorithm: Algorithm, options: SolveOptions) -> Ready:
    """What a solve needs: what is known by the field, `p`, the method and the options, or made."""
    f, p = problem.f, problem.p
    now = Snapshot.again(f) if _looks_whole(problem) else None
    if now is None:
        return _prepare(problem, algorithm, options)
    for read in (p,) if p is None else ways_to_read(p, problem.spec):
        form, tensors = None, now.tensors
        if p is not None:
            leaves = leaves_of(read)
            form, tensors = form_for(now, leaves), [*tensors, *leaves[0]]
        for pulls in (False, True):
            way = id(problem.spec), id(options), id(algorithm), form, pulls
            known = known_of(now.watch, way, Prepared)
            if known is None:
                continue
            parameters = known.parameters(tensors)
            if known.serves(problem, options, tensors, parameters) and (
                read is p or known.compared.holds(f, problem.spec, p, read, parameters)
            ):
                if not known.explicit:
                    _check_implicit(problem, algorithm)
                check_surroundings(options)
                expect_fitting(problem, known.algorithm)
                see = surroundings_of(f, p, now)
                _keep_for_repeats(problem, options, known, now, form)
                return known, parameters, see
    return _prepare(problem, algorithm, options)


def _prepare(problem: ODEProblem, algorithm: Algorithm, options: SolveOptions) -> Ready:
    """The same, made from the beginning, and kept."""
    check(problem, algorithm, options)
    assert isinstance(algorithm, OneStepMethod)
    expect_fitting(problem, algorithm)
    f, p, spec, tableaus = problem.f, problem.p, problem.spec, algorithm.tableaus
    rosenbrock = any(isinstance(x, RosenbrockTableau) for x in tableaus)
    # Events are looked for in the whole state, and methods take turns with it.
    whole = bool(options.events) or len(tableaus) > 1
    try:
        translated = first_to_succeed(
            p, spec, partial(translate, f, spec, p, at=At.start_of(problem))
        )
        recorded = _records(problem, options, translated.parameters, rosenbrock)
        pulled = pulled_program(f, spec, translated) if recorded else None
        # As in Python, steps that are differentiated take the field's own Jacobian, of which they
        # have the derivatives.
        given = None if recorded else given_jacobian(problem, algorithm, p, translated.read)
        derivatives = Derivatives(pulled, given)
        methods = [Method.of(tableau, spec.dtype, spec.device) for tableau in tableaus]
        libraries = [_library(problem, translated, derivatives, x, whole) for x in methods]
    except UnsupportedModule as error:
        raise no_code(error) from error
    leaves = leaves_of(translated.read)
    now, program = translated.snapshot, translated.program
    departure = departure_of(libraries, problem, options, tableaus)
    # An implicit method reads what an explicit one does, and perhaps more behind it.
    sources = translated.sources
    if pulled is not None:
        sources = (*sources, *pulled.parameters(sources))
    if derivatives.given is not None:
        # No gradients flow through what steps are solved with.
        sources = (*sources, *(x.detach() for x in derivatives.given.parameters))
    constants = [x for x in sources if isinstance(x, Tensor)]
    behind = iter(range(-len(constants), 0))
    places = [next(behind) if isinstance(x, Tensor) else x for x in sources]
    made = Prepared(
        departure, program, constants, places, translated.contents, rosenbrock, derivatives,
        translated.json, translated.compared, algorithm, spec,
    )  # fmt: skip
    form = form_for(now, leaves)
    if departure.lasting and _looks_whole(problem):
        keep(now.watch, (id(spec), id(options), id(algorithm), form, pulled is not None), made)
    tensors, see = [*now.tensors, *leaves[0]], surroundings_of(f, p, now)
    if _looks_whole(problem):
        _keep_for_repeats(problem, options, made, now, form)
    return made, made.parameters(tensors), see


def _looks_whole(problem: ODEProblem) -> bool:
    """Whether all that the code is made of is looked at through the field and `p`."""
    return problem.mass_matrix is None and problem.jac is None


def given_jacobian(
    problem: ODEProblem, algorithm: OneStepMethod, p: Any, read: Any
) -> TranslatedModule | None:
    """The Jacobian that a problem brings, where steps read it.

    Rosenbrock methods need it exactly, at every state, and would lose their order without a word:
    they take the field's own.

    Args:
        problem: brings it.
        algorithm: how it is solved.
        p: of the problem, or of its first member.
        read: the same as the field's program reads it.

    Raises:
        CompileError: it has no native code.
    """
    rosenbrock = any(isinstance(x, RosenbrockTableau) for x in algorithm.tableaus)
    if problem.jac is None or rosenbrock or not is_told(problem, algorithm):
        return None
    try:
        return translate_jacobian(problem.jac, problem.spec, p, read, At.start_of(problem))
    except UnsupportedModule as error:
        raise no_code(error, "jac") from error


def _records(
    problem: ODEProblem, options: SolveOptions, parameters: list[Tensor], rosenbrock: bool
) -> bool:
    """Whether a solve needs the derivatives of a Rosenbrock method, a program of their own."""
    if not (rosenbrock and torch.is_grad_enabled()):
        return False
    inputs = (*tensors_of(problem.u0), *problem.tspan, options.saveat_tensor)
    return any(map(moves, (*inputs, *parameters)))


def explicit_library(json: str, program: Program, method: Method) -> Library:
    """The code of a field, with its program as text, and of an explicit method."""
    dtype = method.nodes.dtype
    return library_of(json, method.tableau, dtype, lambda: write_explicit(program, method))


def implicit_library(
    json: str, program: Program, derivatives: Derivatives, method: Method, mass: Tensor | None
) -> Library:
    """The same with an implicit method; arguments else as of `write_implicit`."""
    made_of = json, "" if mass is None else repr(mass.tolist()), *derivatives.texts
    return library_of(
        made_of,
        method.tableau,
        method.nodes.dtype,
        lambda: write_implicit(program, derivatives, method, mass),
    )


def _library(
    problem: ODEProblem,
    translated: TranslatedModule,
    derivatives: Derivatives,
    method: Method,
    whole: bool,
) -> Library:
    """The code of a translated field with a method."""
    json, program = translated.json, translated.program
    if isinstance(method.tableau, ImplicitTableau):
        return implicit_library(json, program, derivatives, method, problem.mass)
    library = explicit_library(json, program, method)
    if whole and library.parts is not None:
        return library_of(
            (json, "whole"),
            method.tableau,
            method.nodes.dtype,
            lambda: write_explicit(program, method, False),
        )
    return library
