"""What a native solve of a stochastic equation needs besides its state: made once, and looked up.

Drift and diffusion are looked at as fields are, each by itself (prepared.py).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta
from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.problems.state import StateSpec
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.stochastic.fields import NoiseLayout
from pysciml_node.stochastic.step import SDEMethod
from pysciml_node.torch_engine.native.departure import Departure, departure_of
from pysciml_node.torch_engine.native.library import Library
from pysciml_node.torch_engine.native.prepared import (
    See,
    check_kind,
    check_surroundings,
    no_code,
)
from pysciml_node.torch_engine.native.stochastic_code import Translated
from pysciml_node.translation.export import TranslatedModule
from pysciml_node.translation.leaves import form_for, leaves_of
from pysciml_node.translation.numbers import Compared, ways_to_read
from pysciml_node.translation.snapshot import Snapshot
from pysciml_node.translation.surrounded import surroundings_of
from pysciml_node.translation.watch import Contents, Watch, have_contents
from pysciml_node.translation.ways import keep, known_of


class _Read(NamedTuple):
    """What the code reads of one function.

    Attributes:
        sources: of each tensor its number, the function's before those of `p`, or a constant.
        contents: numbers of tensors whose entries are part of the program, with those entries.
        compared: for which numbers of `p` the program is the function's.
    """

    sources: tuple[int | Tensor, ...]
    contents: Contents
    compared: Compared

    @classmethod
    def of(cls, x: TranslatedModule) -> _Read:
        """What code of a program reads."""
        return cls(x.sources, x.contents, x.compared)

    def holds(self, f: Any, problem: SDEProblem, read: Any, tensors: list[Tensor]) -> bool:
        """Whether the program is the function's for the numbers of this problem's `p`."""
        return self.compared.holds(f, problem.spec, problem.p, read, self.parameters(tensors))

    def parameters(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors that the code reads, of those of the function and of `p`."""
        return [x if isinstance(x, Tensor) else tensors[x] for x in self.sources]


@dataclass(frozen=True)
class PreparedSDE:
    """A native solve of a stochastic equation but for its state, its parameters and its seed.

    Attributes:
        library: native code of both functions and the method.
        departure: how it begins.
        method: the method.
        layout: how the motions act on the state.
        reads_state: whether the diffusion is computed from the state.
        drift: what the code reads of the drift.
        diffusion: of the diffusion.
        watch: a reference to that on the diffusion; the whole is kept with that on the drift.
        spec: structure of the state; kept so that no other one is given its identity.
    """

    library: Library
    departure: Departure
    method: SDEMethod
    layout: NoiseLayout
    reads_state: bool
    drift: _Read
    diffusion: _Read
    watch: weakref.ref[Watch]
    spec: StateSpec

    def tensors(
        self, first: list[Tensor], second: list[Tensor], further: list[Tensor]
    ) -> list[Tensor]:
        """What the code reads, of the tensors of drift, diffusion and `p`; twice where both do."""
        return [
            *self.drift.parameters([*first, *further]),
            *self.diffusion.parameters([*second, *further]),
        ]

    def serves(
        self, problem: SDEProblem, options: SolveOptions, drift: Snapshot, diffusion: Snapshot
    ) -> bool:
        """Whether another solve of functions that look the same needs nothing else."""
        return (
            self.watch() is diffusion.watch
            and self.departure.serves(problem, options)
            and have_contents(drift.tensors, self.drift.contents)
            and have_contents(diffusion.tensors, self.diffusion.contents)
        )


class ReadySDE(NamedTuple):
    """What one solve needs.

    Attributes:
        prepared: what it shares with others.
        parameters: the tensors that the code reads.
        see: gives the surroundings of both functions as they are now.
    """

    prepared: PreparedSDE
    parameters: list[Tensor]
    see: See


def prepare_sde(
    problem: SDEProblem, algorithm: StochasticRungeKutta, options: SolveOptions
) -> ReadySDE:
    """What a solve needs.

    Raises:
        CompileError: an option or a function has no native code, or there is no compiler.
        ValueError: the diffusion has another shape than the noise asks for.
    """
    check_surroundings(options)
    shared = options if options.unseeded is None else options.unseeded
    tableau = algorithm.tableau_for(problem)
    how = id(tableau), algorithm.delta, problem.noise, problem.interpretation
    way = id(problem.spec), id(shared), how
    drift, diffusion = Snapshot.again(problem.drift), Snapshot.again(problem.diffusion)
    if drift is not None and diffusion is not None:
        for read in ways_to_read(problem.p, problem.spec):
            further, _ = leaves = leaves_of(read)
            forms = form_for(drift, leaves), form_for(diffusion, leaves)
            known = known_of(drift.watch, (*way, forms, id(diffusion.watch)), PreparedSDE)
            if (
                known is not None
                and known.serves(problem, shared, drift, diffusion)
                and known.drift.holds(problem.drift, problem, read, [*drift.tensors, *further])
                and known.diffusion.holds(
                    problem.diffusion, problem, read, [*diffusion.tensors, *further]
                )
            ):
                return _ready(known, problem, drift, diffusion, further)
    check_kind(problem.spec, options, problem.drift, problem.diffusion)
    spec = problem.spec
    method = SDEMethod.of(tableau, algorithm.delta, spec.dtype, spec.device)
    try:
        translated = Translated.of(problem)
        library = translated.library(method, spec.dtype)
    except UnsupportedModule as error:
        raise no_code(error, "the drift or the diffusion") from error
    departure = departure_of((library,), problem, shared, (tableau,))
    drift, diffusion = translated.drift.snapshot, translated.diffusion.snapshot
    further, _ = leaves = leaves_of(translated.drift.read)
    made = PreparedSDE(
        library,
        departure,
        method,
        translated.layout,
        translated.reads_state,
        _Read.of(translated.drift),
        _Read.of(translated.diffusion),
        weakref.ref(diffusion.watch),
        spec,
    )
    if departure.lasting:
        forms = form_for(drift, leaves), form_for(diffusion, leaves)
        keep(drift.watch, (*way, forms, id(diffusion.watch)), made)
    return _ready(made, problem, drift, diffusion, further)


def _ready(
    made: PreparedSDE,
    problem: SDEProblem,
    drift: Snapshot,
    diffusion: Snapshot,
    further: list[Tensor],
) -> ReadySDE:
    first = surroundings_of(problem.drift, problem.p, drift)
    second = surroundings_of(problem.diffusion, problem.p, diffusion, "diffusion")

    def see() -> Surroundings:
        return first().beside(second())

    return ReadySDE(made, made.tensors(drift.tensors, diffusion.tensors, further), see)
