"""Some members of an ensemble with all that their solve needs, here or in another process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import Array, MemberOptions
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.state import map_tensors
from pysciml_node.solutions.members import ListedMembers, Members
from pysciml_node.solutions.portable import mapped_problem, portable_problem
from pysciml_node.solutions.solution import ReturnCode, Solution, Stats
from pysciml_node.solving import engines
from pysciml_node.solving.engines import Engine
from pysciml_node.solving.jumps import run
from pysciml_node.solving.member_jumps import run_with_events

COUNTS = tuple(f.name for f in dataclasses.fields(Stats))
BACKWARD = tuple(name for name in COUNTS if name == "nvjp" or name.endswith("_backward"))


def run_members(
    ensemble: EnsembleProblem, engine: Engine, algorithm: Algorithm, options: MemberOptions
) -> Members:
    """Run the members in this process."""
    if not options.common.events:
        return engine.solve_members(ensemble, algorithm, options)
    batch = getattr(engine, "solve_in_batch", None)
    joined = None if batch is None else run_with_events(ensemble, batch, algorithm, options)
    if joined is not None:
        return joined
    solutions = (
        run(engine, problem, algorithm, options.of(m))
        for m, problem in enumerate(ensemble.members())
    )
    return ListedMembers(tuple(solutions), options.times)


@dataclass
class ChunkResult:
    """What comes back of a chunk.

    Attributes:
        codes: how each member ended.
        final: the flat states that they got to, `(m, N)`, without a graph.
        saved: flat states at `saveat`, `(m, T, N)`.
        counts: fields of `Stats`, `(m,)` each.
    """

    codes: list[ReturnCode]
    final: Tensor
    saved: Tensor | None
    counts: dict[str, Array]


@dataclass(frozen=True)
class Chunk:
    """A solve of some members, which can be sent elsewhere.

    Args:
        ensemble: these members.
        engine: name of the engine.
        algorithm: how.
        options: of all, and of each.
    """

    ensemble: EnsembleProblem
    engine: str
    algorithm: Algorithm
    options: MemberOptions

    def part(self, members: slice) -> Chunk:
        """The solve of some of them."""
        return dataclasses.replace(
            self, ensemble=self.ensemble.part(members), options=self.options.part(members)
        )

    def single(self, m: int) -> Solution:
        """The solve of one of them, here."""
        return run(
            engines.named(self.engine),
            self.ensemble.member(m),
            self.algorithm,
            self.options.of(m),
        )

    def portable(self) -> Chunk:
        """What can be pickled of it, without the graph."""
        problem = portable_problem(mapped_problem(self.ensemble.problem, Tensor.detach))
        changes = {
            name: map_tensors(Tensor.detach, getattr(self.ensemble, name))
            for name in ("u0", "p", "tspan")
        }
        options = dataclasses.replace(self.options, saveat_tensor=None)
        common = dataclasses.replace(options.common, saveat_tensor=None)
        return dataclasses.replace(
            self,
            ensemble=dataclasses.replace(self.ensemble, problem=problem, **changes),
            options=dataclasses.replace(options, common=common),
        )

    def solve(self) -> ChunkResult:
        """Solve them."""
        return self._result(self._run())

    def _run(self) -> Members:
        engine = engines.named(self.engine)
        return run_members(self.ensemble, engine, self.algorithm, self.options)

    @staticmethod
    def _result(members: Members) -> ChunkResult:
        saved = members.saved()
        return ChunkResult(
            codes=list(members.codes),
            final=members.final().detach(),
            saved=None if saved is None else saved.detach(),
            counts={name: np.asarray(members.count(name)) for name in COUNTS},
        )

    def pull(
        self, leaves: list[Tensor], final: Tensor, saved: Tensor | None
    ) -> tuple[ChunkResult, list[Tensor | None]]:
        """Solve them again and pull cotangents back.

        Args:
            leaves: the tensors that receive gradients.
            final: cotangents of the states that they got to, `(m, N)`.
            saved: of the saved states, `(m, T, N)`.

        Returns:
            What the solve gives, with the counts of the backward pass, and the gradients.
        """
        members = self._run()
        outputs = [(members.final(), final)]
        states = members.saved()
        if states is not None and saved is not None:
            outputs.append((states, saved))
        outputs = [(x, bar) for x, bar in outputs if x.requires_grad]
        gradients: list[Tensor | None] = [None] * len(leaves)
        if outputs:
            values, bars = zip(*outputs, strict=True)
            found = torch.autograd.grad(values, leaves, bars, allow_unused=True)
            gradients = list(found)
        return self._result(members), gradients
