"""Members of an ensemble solved by joblib's workers: what is sent, what comes back, gradients.

A chunk of members is sent as bytes, with a placeholder for each tensor that requires gradients.
Their values are sent beside it. So a backward pass knows what to differentiate, and what it sees is
what the solve saw, whatever has happened to the field since.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from typing_extensions import override

from pysciml_node._optional import require
from pysciml_node.algorithms.adjoints import DirectAdjoint
from pysciml_node.algorithms.options import Array
from pysciml_node.algorithms.parallel import Parallel
from pysciml_node.problems.modes import uncompiled
from pysciml_node.problems.state import map_tensors
from pysciml_node.replay.comparison import expect_reproduced, rounding
from pysciml_node.solutions.solution import ReturnCode, Solution
from pysciml_node.solving.chunks import BACKWARD, COUNTS, Chunk, ChunkResult
from pysciml_node.steps.autograd import pulled
from pysciml_node.steps.surroundings import Surroundings


@dataclass(frozen=True)
class Packed:
    """A chunk as it is sent.

    Attributes:
        content: the chunk, with placeholders.
        inputs: the tensors that these stand for.
        seen: ids of all tensors that are sent.
    """

    content: bytes
    inputs: list[Tensor]
    seen: set[int]


def pack(chunk: Chunk) -> Packed:
    """Write a chunk, with placeholders for the tensors that require gradients."""
    cloudpickle = require("cloudpickle", extra="parallel", purpose="send members to workers")
    inputs: dict[int, tuple[int, Tensor]] = {}
    seen: set[int] = set()

    class Pickler(cloudpickle.Pickler):  # type: ignore[name-defined, misc]
        def persistent_id(self, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return None
            seen.add(id(value))
            if not value.requires_grad:
                return None
            return inputs.setdefault(id(value), (len(inputs), value))[0]

    target = io.BytesIO()
    Pickler(target, protocol=pickle.HIGHEST_PROTOCOL).dump(chunk)
    return Packed(target.getvalue(), [x for _, x in inputs.values()], seen)


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, leaves: list[Tensor]) -> None:
        super().__init__(io.BytesIO(content))
        self._leaves = leaves

    @override
    def persistent_load(self, pid: Any) -> Tensor:
        leaf: Tensor = self._leaves[pid]
        return leaf


@dataclass(frozen=True)
class _Job:
    """One call of a worker.

    Attributes:
        content: the chunk, with placeholders.
        values: of the inputs, pickled.
        dtype: torch's default in the process that asks.
        recording: whether gradients are on there.
        cotangents: of final and saved states, pickled; `None` for a forward solve.
    """

    content: bytes
    values: bytes
    dtype: torch.dtype
    recording: bool
    cotangents: bytes | None = None


def work(job: _Job) -> bytes:
    """Do one job, in whatever process this is."""
    values, parameters = pickle.loads(job.values)
    with torch.inference_mode(False), torch.set_grad_enabled(job.recording):
        leaves = [
            nn.Parameter(x) if parameter else x.requires_grad_()
            for x, parameter in zip(values, parameters, strict=True)
        ]
        default = torch.get_default_dtype()
        torch.set_default_dtype(job.dtype)
        try:
            chunk: Chunk = _Unpickler(job.content, leaves).load()
            if job.cotangents is None:
                return pickle.dumps(chunk.solve())
            return pickle.dumps(chunk.pull(leaves, *pickle.loads(job.cotangents)))
        finally:
            torch.set_default_dtype(default)


def _written(inputs: Sequence[Tensor]) -> bytes:
    """Values of tensors, and which are parameters."""
    values = [x.detach().clone() for x in inputs]
    return pickle.dumps((values, [isinstance(x, nn.Parameter) for x in inputs]))


def run_in_parallel(parallel: Parallel, whole: Chunk) -> ParallelMembers:
    """Have members solved by joblib's workers.

    Args:
        parallel: how many, and in which chunks.
        whole: the solve of all members.

    Raises:
        ImportError: joblib or cloudpickle is not installed.
        ValueError: an option that does not go together with workers.
        RuntimeError: gradients that do not, or a field that another process would see otherwise.
    """
    _refuse(whole)
    dispatch = _Dispatch(parallel)
    surroundings = _surroundings_of(whole)
    slices = parallel.slices(len(whole.ensemble), dispatch.workers)
    parts = [pack(whole.part(members)) for members in slices]
    _expect_sent(surroundings, set().union(*(part.seen for part in parts)))
    sent = _Sent(dispatch, parts, slices)
    results = sent.solve()
    saved = None
    if results[0].saved is not None:
        saved = torch.cat([result.saved for result in results if result.saved is not None])
    final = torch.cat([result.final for result in results])
    counts = {name: np.concatenate([result.counts[name] for result in results]) for name in COUNTS}
    if torch.is_grad_enabled() and sent.inputs:
        final, saved = _Node.apply(  # type: ignore[no-untyped-call]
            lambda *given: _pull(sent, counts, *given), (final, saved), *sent.inputs
        )
    codes = [code for result in results for code in result.codes]
    return ParallelMembers(whole, codes, final, saved, counts, surroundings)


def _refuse(whole: Chunk) -> None:
    """What cannot be sent, or not be differentiated from afar."""
    common = whole.options.common
    if common.progress:
        raise ValueError("progress=True does not go with members=Parallel().\n  Leave it out.")
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(
            "members=Parallel() was called inside of a transform of torch.func, or of forward-mode "
            "derivatives, which end at the border of this process.\n  Leave members= out there."
        )
    if torch.is_grad_enabled() and isinstance(common.adjoint, DirectAdjoint):
        raise ValueError(
            "DirectAdjoint keeps the graph of every operation, and members=Parallel() computes "
            "elsewhere.\n  Use adjoint=DiscreteAdjoint(), or leave members= out."
        )


def _surroundings_of(whole: Chunk) -> Surroundings:
    """What the functions of a solve can reach."""
    problem = whole.ensemble.problem
    functions = {name: getattr(problem, name) for name in problem.functions}
    found = Surroundings({**functions, "events": whole.options.common.events})
    if found.lazy:
        raise ValueError(
            "the field has parameters that its first evaluation will make.\n"
            "  Evaluate it once before: field(t, u0)."
        )
    return found


def _expect_sent(surroundings: Surroundings, sent: set[int]) -> None:
    """Refuse tensors that workers would make for themselves, by importing a module."""
    for x in surroundings.tensors:
        if id(x) not in sent:
            raise RuntimeError(
                f"the field uses {surroundings.names[id(x)]}, a tensor of an imported module, and "
                "workers import that module anew: they might see another value.\n"
                "  Pass it as p=, make the field an nn.Module that holds it, or send the module "
                "too: cloudpickle.register_pickle_by_value(module)."
            )


class _Dispatch:
    """Calls of workers through joblib."""

    def __init__(self, parallel: Parallel) -> None:
        self._joblib = require("joblib", extra="parallel", purpose="solve members in parallel")
        _, configured = self._joblib.parallel.get_active_backend()
        self._jobs = parallel.workers
        if self._jobs is None and configured is None:
            self._jobs = -1
        self.workers: int = self._joblib.effective_n_jobs(self._jobs)

    def __call__(self, jobs: list[_Job]) -> list[Any]:
        call = self._joblib.delayed(work)
        found = self._joblib.Parallel(n_jobs=self._jobs)(call(job) for job in jobs)
        return [pickle.loads(result) for result in found]


class _Sent:
    """The chunks of a solve, kept as they were sent.

    Args:
        dispatch: calls workers.
        parts: the chunks.
        slices: their members.

    Attributes:
        inputs: the tensors that any of them gives gradients to.
    """

    def __init__(self, dispatch: _Dispatch, parts: list[Packed], slices: list[slice]) -> None:
        self._dispatch, self.slices = dispatch, slices
        # Slices of one tensor are made for each chunk anew; parameters are the same in all.
        places: dict[int, int] = {}
        self.inputs: list[Tensor] = []
        self.places: list[list[int]] = []
        for part in parts:
            for x in part.inputs:
                if id(x) not in places:
                    places[id(x)] = len(self.inputs)
                    self.inputs.append(x)
            self.places.append([places[id(x)] for x in part.inputs])
        self._contents = [part.content for part in parts]
        self._dtype, self._recording = torch.get_default_dtype(), torch.is_grad_enabled()

    def _jobs(self, inputs: Sequence[Tensor]) -> list[_Job]:
        return [
            _Job(content, _written([inputs[i] for i in places]), self._dtype, self._recording)
            for content, places in zip(self._contents, self.places, strict=True)
        ]

    def solve(self) -> list[ChunkResult]:
        """Solve all chunks."""
        found: list[ChunkResult] = self._dispatch(self._jobs(self.inputs))
        return found

    def pull(
        self, inputs: Sequence[Tensor], final: Tensor, saved: Tensor | None
    ) -> list[tuple[ChunkResult, list[Tensor | None]]]:
        """Solve all chunks again, and pull cotangents back."""
        jobs = [
            dataclasses.replace(job, cotangents=pickle.dumps(_parts(members, final, saved)))
            for job, members in zip(self._jobs(inputs), self.slices, strict=True)
        ]
        found: list[tuple[ChunkResult, list[Tensor | None]]] = self._dispatch(jobs)
        return found


def _parts(members: slice, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Their rows, copied: a slice is pickled with all that it is a slice of."""
    return tuple(None if x is None else x[members].clone() for x in tensors)


def _pull(
    sent: _Sent,
    columns: dict[str, Array],
    inputs: Sequence[Tensor],
    outputs: tuple[Tensor, Tensor | None],
    final: Tensor | None,
    saved: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs from cotangents of final and saved states; `columns` are added to."""
    bars = torch.zeros_like(outputs[0]) if final is None else final
    sums: list[Tensor | None] = [None] * len(inputs)
    found = sent.pull(inputs, bars, saved)
    for part, places, (result, gradients) in zip(sent.slices, sent.places, found, strict=True):
        _expect_same(result.final, outputs[0][part])
        for name in BACKWARD:
            columns[name][part] += result.counts[name]
        for place, gradient in zip(places, gradients, strict=True):
            total = sums[place]
            if gradient is not None:
                sums[place] = gradient if total is None else total + gradient
    return tuple(sums)


def _expect_same(again: Tensor, then: Tensor) -> None:
    """The second solve of a chunk has to end where the first one did."""
    off = (again - then).abs() / then.abs().amax(1, keepdim=True).clamp_min(rounding(then.dtype))
    expect_reproduced(torch.nan_to_num(off, nan=0.0).max(), ())


class _Node(torch.autograd.Function):
    """Gives final and saved states; its backward has workers pull cotangents back."""

    @staticmethod
    @override
    def forward(
        ctx: Any, pull: Callable[..., Any], solved: tuple[Tensor, Tensor | None], *inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        ctx.pull = pull
        ctx.save_for_backward(*solved, *inputs)
        ctx.set_materialize_grads(False)
        return solved

    @staticmethod
    @override
    @uncompiled
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        final, saved, *inputs = ctx.saved_tensors

        def pull(*bars: Tensor | None) -> tuple[Tensor | None, ...]:
            gradients: tuple[Tensor | None, ...] = ctx.pull(inputs, (final, saved), *bars)
            return gradients

        return (None, None, *pulled(pull, tuple(inputs), *cotangents))


@dataclass
class ParallelMembers:
    """The results of members that workers have solved.

    Attributes:
        whole: the solve of all members.
        codes: how each ended.
        ends: flat states that they got to, `(M, N)`.
        at_times: flat states at `saveat`, `(M, T, N)`, or `None`.
        columns: the fields of `Stats`, `(M,)` each.
        surroundings: what the field could reach; `None` in another process.
        detached: whether gradients have been left behind.
    """

    whole: Chunk
    codes: Sequence[ReturnCode]
    ends: Tensor
    at_times: Tensor | None
    columns: dict[str, Array]
    surroundings: Surroundings | None
    detached: bool = False
    _made: dict[int, Solution] = field(default_factory=dict, init=False)

    def final(self) -> Tensor:
        """The states that they got to, `(M, N)`."""
        return self.ends

    def saved(self) -> Tensor | None:
        """The states at `saveat`, `(M, T, N)`; NaN where a member did not get to."""
        return self.at_times

    def count(self, name: str) -> Array:
        """A field of `Stats` for each member, `(M,)`, as it stands now."""
        return self.columns[name]

    def solution(self, m: int) -> Solution:
        """The solution of one member, computed here when it is asked for, and kept."""
        if m not in self._made:
            self._made[m] = self._make(m)
        return self._made[m]

    def _make(self, m: int) -> Solution:
        if self.surroundings is None:
            solution = self.whole.single(m)
        else:
            self._expect_unchanged(self.surroundings)
            with self.surroundings.as_seen():
                solution = self.whole.single(m)
        return solution.detach() if self.detached else solution

    @staticmethod
    def _expect_unchanged(surroundings: Surroundings) -> None:
        changed = surroundings.changed_in_place()
        if changed:
            raise RuntimeError(
                "the solution of a member is computed when it is asked for, but "
                f"{surroundings.names[id(changed[0])]} has been changed in place since the solve.\n"
                "  Ask for it before, or solve without members=."
            )

    def children(self) -> list[Any]:
        """The tensors."""
        return [self.ends, self.at_times]

    def replaced(self, children: list[Any]) -> ParallelMembers:
        """The same with other tensors."""
        ends, at_times = children
        return dataclasses.replace(self, ends=ends, at_times=at_times)

    def detach(self) -> ParallelMembers:
        """The same without the graph."""
        copy = self.replaced([map_tensors(Tensor.detach, x) for x in self.children()])
        return dataclasses.replace(copy, detached=True)

    def __getstate__(self) -> dict[str, Any]:
        ends, at_times = self.detach().children()
        return {
            **self.__dict__,
            "whole": self.whole.portable(),
            "ends": ends,
            "at_times": at_times,
            "surroundings": None,
            "detached": True,
            "_made": {},
        }
