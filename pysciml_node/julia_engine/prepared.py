"""What a solve in Julia needs besides its state: checked and made once, and looked up afterwards.

A look at everything that the field can reach gives the same watch again as long as nothing has
changed there but the tensors of places, and the numbers in them. `prepare` finds what it has made
by that watch, by the form of `p`, by the ends of the interval, and by the identities of the kind of
state, of the method and of the options, which `solve` looks up by their values.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import DiscreteAdjoint
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.julia_engine import plans
from pysciml_node.julia_engine.departure import Departure, departure_of, is_lasting
from pysciml_node.julia_engine.fields import FieldInJulia, Known, program_of
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.problems.modes import foreign_mode
from pysciml_node.problems.ode import ODEProblem, ends_of
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.translation.leaves import form_for, leaves_of
from pysciml_node.translation.repeated import remember, repeat
from pysciml_node.translation.snapshot import Snapshot
from pysciml_node.translation.surrounded import surroundings_of
from pysciml_node.translation.watch import have_contents
from pysciml_node.translation.ways import keep, known_of

See = Callable[[], Surroundings]
_REAL = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Prepared:
    """A solve in Julia but for its state and its parameters.

    Attributes:
        departure: how it begins.
        field: its translation.
        program: the same in Julia.
        handle: of all this in Julia.
        forms: tensors of the shapes of the parameters, and behind them one of a flat state.
    """

    departure: Departure
    field: Known
    program: Handle
    handle: Handle
    forms: list[Tensor]

    @cached_property
    def length(self) -> int:
        """Numbers of all parameters."""
        return sum(x.numel() for x in self.forms[:-1])

    @cached_property
    def doubles(self) -> int:
        """Numbers in double precision that take as much memory."""
        return -(-self.length * self.field.spec.dtype.itemsize // 8)

    def seen(self, parameters: list[Tensor], packed: array[float]) -> FieldInJulia:
        """The field as a solve has seen it, with its parameters in one piece."""
        spec, wanted = self.field.spec, self.field.wanted(parameters)
        flat = torch.empty(0, dtype=spec.dtype, device="cpu")
        if packed:
            flat = torch.frombuffer(packed, dtype=spec.dtype, count=self.length)
        return FieldInJulia(self.program, parameters, wanted, spec, flat)


class Ready(NamedTuple):
    """What one solve needs.

    Attributes:
        prepared: what it shares with others.
        parameters: the tensors that the program reads.
        see: gives the surroundings of the field as they are now.
    """

    prepared: Prepared
    parameters: list[Tensor]
    see: See


def prepare(problem: ODEProblem, algorithm: Algorithm, options: SolveOptions) -> Ready | None:
    """What a solve needs; `None` where it is not one of explicit steps of a translated field.

    A field that is solved for the first time is not known either.
    """
    f, p, spec = problem.f, problem.p, problem.spec
    found = repeat(problem, algorithm, options)
    if found is not None and found[-1] is p:
        prepared, tensors, see, _ = found
        return Ready(prepared, prepared.field.parameters(tensors), see)
    # First of all, as others are looked at where they are solved.
    if not isinstance(algorithm, ExplicitRungeKutta) or _is_special(problem, options):
        return None
    now = Snapshot.again(f)
    if now is None:
        return None
    leaves = leaves_of(p)
    form = form_for(now, leaves)
    tensors = [*now.tensors, *leaves[0]]
    way = id(spec), id(options), id(algorithm), *ends_of(problem), form
    known = known_of(now.watch, way, Prepared)
    if known is None:
        field = known_of(now.watch, (id(spec), form), Known)
        if field is None or not _serves(problem, options, field, tensors):
            return None
        known = _prepare(problem, algorithm, options, field, field.parameters(tensors))
        keep(now.watch, way, known)
    contents = known.field.contents
    if contents and not have_contents(now.tensors, contents):
        return None
    see = surroundings_of(f, p, now)
    if not contents:
        remember(problem, algorithm, options, known, now, form)
    return Ready(known, known.field.parameters(tensors), see)


def _is_special(problem: ODEProblem, options: SolveOptions) -> bool:
    """Whether this solve is not as others of its options are."""
    t0, t1 = problem.tspan
    moving = torch.is_grad_enabled() and not (
        type(t0) is type(t1) is float and type(options.adjoint) is DiscreteAdjoint
    )
    return (
        moving
        or problem.mass_matrix is not None
        or torch._C._are_functorch_transforms_active()
        or foreign_mode() is not None
    )


def _serves(
    problem: ODEProblem, options: SolveOptions, field: Known, tensors: list[Tensor]
) -> bool:
    """Whether solves of these options can be prepared."""
    spec = problem.spec
    read = field.parameters(tensors)
    return (
        is_lasting(options)
        and not options.progress
        and spec.device.type == "cpu"
        and spec.dtype in _REAL
        and all(x.dtype is spec.dtype and x.device == spec.device for x in read)
    )


def _prepare(
    problem: ODEProblem,
    algorithm: ExplicitRungeKutta,
    options: SolveOptions,
    field: Known,
    parameters: list[Tensor],
) -> Prepared:
    departure, program = departure_of(problem, algorithm, options, False), program_of(field.key)
    given = {name: departure.given[name] for name in ("plan", "n", "nmarks", "marks", "dt0")}
    given |= {name: departure.given[name] for name in ("m", "saveat")}
    number = enter("prepare", field=program, tableau=plans.tableau(algorithm.tableau), **given)
    shapes = [*(x.shape for x in parameters), torch.Size((departure.size,))]
    forms = [torch.empty(()).expand(shape) for shape in shapes]
    return Prepared(departure, field, program, Handle(number), forms)
