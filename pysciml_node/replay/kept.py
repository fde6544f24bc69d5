"""Steps of a forward solve whose graphs are kept for its backward sweep.

The accepted steps are one graph, from the initial state on: a step begins with the state that the
one before ends in, and with its last stage where that serves both. A rejected attempt leaves
nothing behind. A step whose graph was not kept is taken again by the sweep. Those of stochastic
equations are in `stochastic/kept.py`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence, Set
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.adjoints import Adjoint, DiscreteAdjoint
from pysciml_node.replay.comparison import Comparison
from pysciml_node.replay.stages import FlatFunction, Method, Stages
from pysciml_node.replay.vectors import Real, RecordedVectors, vectors_like
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.apart import WentBack
from pysciml_node.steps.autograd import graph_is_retained, saved_tensors_stay
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.field import DifferentiableField
from pysciml_node.steps.first_graph import FirstGraph, are_of_others, memory_of
from pysciml_node.steps.graph import Grad, edge_of, graph_leaves, nodes_made, nodes_since
from pysciml_node.steps.guard import first_saved
from pysciml_node.steps.inputs import Inputs
from pysciml_node.steps.record import Record


class _Solves(threading.local):
    """Whether a solve of this thread keeps graphs. As a context it is one that does.

    Solves inside of its field keep none: theirs would live in its own, as many times as it
    evaluates the field.
    """

    keeping = False

    def __enter__(self) -> None:
        self.keeping = True

    def __exit__(self, *_: object) -> None:
        self.keeping = False


keeping = _Solves()


def memory_for(adjoint: Adjoint) -> int:
    """The bytes that graphs of steps may take, as far as the adjoint and what is around tell."""
    if isinstance(adjoint, DiscreteAdjoint) and saved_tensors_stay() and not keeping.keeping:
        return adjoint.memory
    return 0


class KeptStep(NamedTuple):
    """An accepted step with its graph.

    Attributes:
        end: the state at its end, of the shape that the steps begin with.
        inner: what outputs inside are made of, likewise: the stages that were evaluated, or these
            outputs themselves.
        joined: whether the first of them is a stage of the step before.
    """

    end: Tensor
    inner: list[Tensor]
    joined: bool = False


class KeptSteps:
    """The first steps of a solve with their graph, as many as there is room for.

    A graph reads tensors outside of it, such as weights, when it is pulled back. Torch does not
    count every change of them: none by `.data`, or by memory that something else shares. So copies
    of all that are within reach are kept too, and take a part of the room.

    Args:
        start: the initial state, `(N,)` or in its own shape, or a leaf where it has no graph.
        read: the tensors that the field can reach.
        memory: how many bytes may be kept.
        each: how many of them the first evaluation of the field, or a step, takes.
        made: how many nodes of graphs the first evaluation has made.
    """

    # Of so many steps one is measured, however many nodes its evaluations have made.
    MEASURED = 8

    def __init__(
        self, start: Tensor, read: list[Tensor], memory: int, each: int, made: int | None = None
    ) -> None:
        # The first graph has shown that no other tensors are saved for backward.
        self.start, self._each = start, each
        # By how many nodes they have made: the bytes of evaluations that were measured.
        self._sizes = {} if made is None else {made: each}
        self._left = memory - sum(x.nbytes for x in read)
        with Grad(False):
            self._contents = {id(x): x.clone() for x in read} if self.room else {}
        self._read = read
        self._steps: list[KeptStep] = []
        self._ends = self._values = 0

    @cached_property
    def _outside(self) -> Set[int | None]:
        """Addresses of the memory that is there without any step."""
        return memory_of(self._read, ()).keys()

    @property
    def room(self) -> int:
        """How many further ones may be kept, if they take no more than those before."""
        return max(self._left, 0) // self._each

    @classmethod
    def of(
        cls, graph: FirstGraph | None, captured: Inputs, u0: Tensor, memory: int, evaluations: int
    ) -> KeptSteps | None:
        """Room for steps; `None` where their graphs are of no use.

        Args:
            graph: that of the first evaluation, if it has been kept.
            captured: what the field can reach.
            u0: the initial state, `(N,)`.
            memory: how many bytes may be kept.
            evaluations: those that the room is counted by.
        """
        wanted = u0.requires_grad or bool(captured.inputs)
        if graph is None or graph.evaluation is None or not wanted:
            return None
        if captured.cut or not captured.steady:
            return None
        (start,) = graph.evaluation[1]
        return cls(start, captured.comparable, memory, graph.bytes * evaluations, graph.made)

    def add(
        self, step: KeptStep, evaluated: Sequence[Tensor], count: int, made: int | None = None
    ) -> None:
        """Keep the next step.

        Args:
            step: the step.
            evaluated: in it, one after the other; the last one is measured, unless one that has
                made as many nodes was, and takes as much as far as that tells.
            count: how many like that one it takes.
            made: how many nodes it has made, where that is known.
        """
        size = None if made is None else self._sizes.get(made)
        if size is None or len(self._steps) % self.MEASURED == self.MEASURED - 1:
            start = self._steps[-1].end if self._steps else self.start
            size = _bytes_of(start, evaluated, self._outside)
            if made is not None:
                self._sizes[made] = size
        self._each = max(self._each, size)
        self._left -= self._each * count
        self._steps.append(step)

    def values(self, record: Record) -> list[Tensor]:
        """What cotangents may arrive at: the ends of the steps, and what is inside of some.

        Args:
            record: of the solve.
        """
        steps = self._steps[: len(record.sizes)]
        ends = [step.end for step in steps]
        inner = [step.inner for n, step in enumerate(steps) if n in record.inside]
        values = [*ends, *chain.from_iterable(inner)]
        self._ends, self._values = len(ends), len(values)
        return values

    def placed(self, ends: list[Tensor | None], inner: list[Tensor | None]) -> list[Tensor | None]:
        """Cotangents in the order of the values; a failed solve may have been cut back since."""
        placed = [*ends, *[None] * (self._ends - len(ends)), *inner]
        if (shape := self.start.shape) != (self.start.numel(),):
            placed = [None if x is None else x.view(shape) for x in placed]
        return placed + [None] * (self._values - len(placed))

    def take(self, captured: Inputs, backward: BackwardPass) -> list[KeptStep]:
        """The steps, where their graph is that of a replay.

        They are let go here, unless the graph of the solve is retained.
        """
        steps = self._steps[: len(backward.record.sizes)]
        if not graph_is_retained():
            self._steps.clear()
        if backward.goes_on and captured.unchanged and self.reads_same(captured.within_reach()):
            return steps
        # Torch goes through the graph all the same, with nothing in hand.
        self._expect_passable(steps, captured)
        return []

    def _expect_passable(self, steps: list[KeptStep], captured: Inputs) -> None:
        """Refuse functions of others in the graph; with one in the first, none is kept.

        And what it has saved, if torch has counted a change of that, even one to equal values.
        """
        nodes = set[Any]()
        values = [x for step in steps for x in (step.end, *step.inner)]
        graph_leaves(values, {edge_of(self.start)}, seen=nodes)
        if (x := first_saved(nodes, captured.changed)) is not None:
            raise RuntimeError(
                f"{captured.name_of(x)} has been changed in place since the solve, be it to equal "
                "values, and the graphs of its steps have been kept: torch goes back through none "
                "of them.\n  Change a copy (x = 3 * x for x.mul_(3)), go backward first, or keep "
                "no graphs: adjoint=DiscreteAdjoint(memory=0)."
            )
        if are_of_others(nodes):
            raise RuntimeError(
                "the field calls a torch.autograd.Function that it had not called at the start of "
                "the solve, and its steps have to be taken again.\n"
                "  Let them all be: adjoint=DiscreteAdjoint(memory=0)."
            )

    def take_all(self, captured: Inputs, backward: BackwardPass) -> list[KeptStep] | None:
        """As `take`, where all steps were kept and nothing has changed; else `None`."""
        count = len(backward.record.sizes)
        if not (count <= len(self._steps) and backward.goes_on):
            return None
        with captured.undisturbed():
            if not (captured.are_known_unchanged() and self.reads_same(captured.within_reach())):
                return None
        steps = self._steps[:count]
        if not graph_is_retained():
            self._steps.clear()
        return steps

    def keep_all(self, ends: Sequence[Tensor]) -> None:
        """Keep all steps of a solve in which no states are asked for inside of them.

        Args:
            ends: the states at their ends.
        """
        self._steps = [KeptStep(end, []) for end in ends]

    def hand_on(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Cotangents of the ends of such steps."""
        if not graph_is_retained():
            self._steps.clear()
        return list(cotangents)

    def reads_same(self, within_reach: Iterable[Tensor]) -> bool:
        """Whether everything within reach of the field has the values that it had."""
        # The solve may have let go of tensors that it has not used.
        for x in within_reach:
            seen = self._contents.get(id(x))
            if seen is not None and not torch.equal(x, seen):
                return False
        return True


def _bytes_of(start: Tensor, stages: Sequence[Tensor], outside: Set[int | None]) -> int:
    """What the last evaluation of a step takes: by now the field may go another way.

    To measure it takes a fifth of the time of a small field.

    Args:
        start: of the step.
        stages: that were evaluated.
        outside: addresses of the memory that is there without them.
    """
    *before, last = stages
    nodes = set[Any]()
    ends = {edge_of(x) for x in (start, *before) if x.requires_grad}
    graph_leaves((last,), ends, seen=nodes)
    sizes = memory_of((last,), nodes)
    return sum(sizes[x] for x in sizes.keys() - outside) + FirstGraph.NODE * len(nodes)


class KeptStages(Stages):
    """The stages of explicit steps, which are kept with their graph while there is room.

    Args:
        method: the method.
        field: the derivative.
        recorded: the same in a graph, of states in the shape of the first.
        marks: start, stops and end of the solve.
        first: the derivative at the start, with its graph.
        made: how many nodes of graphs that has made.
        kept: receives the accepted steps.
    """

    def __init__(
        self,
        method: Method,
        field: FlatFunction,
        recorded: FlatFunction,
        marks: tuple[float, ...],
        first: Tensor,
        made: int | None,
        kept: KeptSteps,
    ) -> None:
        # Whether a derivative inside of the field has let go of the graph of the steps before: it
        # is then taken again without them, and from this step on nothing is kept.
        went_back: list[None] = []

        # How many nodes of graphs the last evaluation has made.
        lately = [made]

        def evaluated(t: Tensor, u: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # of a flat state, for the first step size
                return field(t, u)
            if not went_back:
                before = nodes_made()
                try:
                    k = recorded(t, u)
                except WentBack:
                    went_back.append(None)
                else:
                    lately[0] = nodes_since(before)
                    return k
            with torch.no_grad():
                return field(t, u.reshape(-1)).view(u.shape).clone()

        super().__init__(method, evaluated, marks, RecordedVectors())
        self._went_back, self._made = went_back, lately
        self._plain, self._kept = field, kept
        # What the next step begins with, in the graph; the latter where it is known.
        self._state = kept.start
        self._first: Tensor | None = first
        self._joined = False  # whether it is a stage of the step before
        self._end: Tensor | None = None
        self._recording = True
        self._expect_room()

    def _expect_room(self) -> None:
        """Take the next step without its graph, if there is no room for it."""
        if self._recording and (self._went_back or self._kept.room < self.method.all_stages):
            self._recording = False
            self.field = self._plain
            self.vectors = vectors_like(self._kept.start.detach(), self.method.all_stages)

    @override
    def start(self, t: Real, h: Real, u: Tensor) -> Tensor:
        if not self._recording:
            return super().start(t, h, u)
        with Grad(True):
            k1 = self.field(self.times(t, h)[0], self._state)
        self._joined = False
        super().begin(k1)
        return k1

    @override
    def begin(self, k1: Tensor) -> None:
        if self._recording:
            assert self._first is not None
            k1 = self._first
        super().begin(k1)

    @override
    def evaluate(self, t: Real, h: Real, u: Tensor, upto: int) -> Tensor | None:
        # Of a solution it is asked in the graph.
        if not self._recording or u is self._state:
            return super().evaluate(t, h, u, upto)
        with Grad(True):
            return super().evaluate(t, h, self._state, upto)

    @override
    def solution(self, t: Real, h: Real, u: Tensor, with_error: bool) -> Tensor:
        if not self._recording:
            return super().solution(t, h, u, with_error)
        with Grad(True):
            self._end = super().solution(t, h, self._state, with_error)
        return self._end.detach().reshape(-1)

    @override
    def leave(self, goes_on: bool) -> Tensor | None:
        if not self._recording:
            return super().leave(goes_on)
        assert self._end is not None
        if not self._went_back:
            stages = [self.vectors.get(i) for i in range(self.count)]
            step = KeptStep(self._end, stages, self._joined)
            self._kept.add(step, stages, len(stages), *self._made)
        self._first = super().leave(goes_on)
        self._state, self._joined = self._end, self._first is not None
        k = None if self._first is None else self._first.detach().reshape(-1)
        self._expect_room()
        return k


class Arriving(NamedTuple):
    """The cotangents of steps whose graph was kept, for torch to pull back.

    Attributes:
        start: of the initial state, beside what comes through the graph.
        ends: of the ends of the steps.
        stages: of the stages of steps with outputs.
        taken: how many steps have a part in it.
        products: how many evaluations of the field are pulled back, each once.
    """

    start: Tensor | None
    ends: list[Tensor | None]
    stages: list[Tensor | None]
    taken: int
    products: int


def arriving_at(
    steps: list[KeptStep], method: Method, backward: BackwardPass, behind: Tensor | None = None
) -> Arriving:
    """What arrives at the ends of the first steps of a solve, and inside of them.

    Args:
        steps: the steps.
        method: of the solve.
        backward: the solve, and the cotangents that arrive at it.
        behind: the cotangent of the last one's end, from the steps behind it, where it is not zero.
    """
    record = backward.record
    bars: list[Tensor | None] = [None]  # of the states at `record.times`
    stages: list[Tensor | None] = []
    count = 0
    for n, step in enumerate(steps):
        arriving, inside = backward.entering(n + 1), backward.inside(n)
        if behind is not None and n + 1 == len(steps):
            arriving.append(behind)
        bars.append(functools.reduce(torch.add, arriving) if arriving else None)
        if inside is not None:
            theta = torch.tensor(record.fractions(n), dtype=torch.float64)
            weights = record.sizes[n] * method.dense_weights(theta)
            start, upon = bars[n], inside.sum(0)
            bars[n] = upon if start is None else start + upon
            stages += (weights.T @ inside).unbind()
        elif n in record.inside:
            stages += [None] * len(step.inner)
        if arriving or inside is not None:
            count = n + 1
    products = _products(steps[:count], method, backward)
    return Arriving(bars[0], bars[1 : count + 1], stages, count, products)


def _products(steps: list[KeptStep], method: Method, backward: BackwardPass) -> int:
    used = method.stages - method.tableau.fsal
    products = 0
    for n, step in enumerate(steps):
        behind = n + 1 < len(steps) and steps[n + 1].joined
        inside = backward.saved is not None and n in backward.record.inside
        products += (len(step.inner) if inside else used + behind) - step.joined
    return products


def compare_kept(
    field: DifferentiableField,
    steps: list[KeptStep],
    method: Method,
    backward: BackwardPass,
    comparison: Comparison,
) -> None:
    """Evaluate the field at the start again: it must be as it was.

    And at the last step, where it may depend on more. What it adds to the state there is compared,
    as of a step that is replayed.

    Args:
        field: the field prepared for gradients.
        steps: those that cotangents are pulled back through.
        method: of the solve.
        backward: the solve.
        comparison: is told.
    """
    record, states, n = backward.record, backward.states, len(steps) - 1
    t, h, u, end = record.times[n], record.sizes[n], states[n], method.end_stage
    i, at = (0, u) if end is None or end >= len(steps[n].inner) else (end, states[n + 1])
    with torch.no_grad():
        if i or n:
            stages = Stages(method, field.field, record.marks, RecordedVectors())
            again = field.field(stages.times(t, h)[i], at)
            comparison.add(u + h * again, u + h * steps[n].inner[i].reshape(-1), u)
        again = field.field(method.nodes.new_tensor(record.times[0]), states[0])
        comparison.add_value(again, field.k0)


def kept_sweep(
    field: DifferentiableField,
    method: Method,
    backward: BackwardPass,
    stats: Stats,
    kept: KeptSteps,
) -> Gradients | None:
    """The sweep of a plain field all of whose steps were kept: torch goes through their graph.

    Args:
        field: the field prepared for gradients.
        method: of the forward solve.
        backward: its steps, and the cotangents.
        stats: its backward fields are filled.
        kept: the steps, which are let go.

    Returns:
        The cotangents; `None` where steps have to be taken again, or to be compared.
    """
    steps = kept.take_all(field.captured, backward)
    if steps is None:
        return None
    u0, ends, stages, taken, products = arriving_at(steps, method, backward)
    for extra in backward.entering(0):
        u0 = extra if u0 is None else u0 + extra
    stats.nvjp += products
    stats.naccept_backward += taken
    inputs: list[Tensor | None] = [None] * len(field.leaves)
    return Gradients(u0=u0, inputs=inputs, kept=kept.placed(ends, stages))
