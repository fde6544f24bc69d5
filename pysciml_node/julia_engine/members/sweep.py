"""Backward sweeps over many members by one call into Julia, over its threads."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import ForwardDiffSensitivity
from pysciml_node.algorithms.explicit import ExplicitRungeKutta
from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.julia_engine import plans
from pysciml_node.julia_engine.forward import Ends, place
from pysciml_node.julia_engine.members.field import MembersField
from pysciml_node.julia_engine.members.forward import Flown
from pysciml_node.julia_engine.process import runtime
from pysciml_node.julia_engine.process.buffers import CODES, device_code, from_real, to_real
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.solve import ODESolve
from pysciml_node.julia_engine.sweeps import KeptSolutions, complete_times, continuous_sweeps
from pysciml_node.problems.ensemble import Array
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.record import Record


def record_of(flown: Flown, m: int, options: MemberOptions, ends: Ends | None) -> Record:
    """The steps of one member, and where its saved times lie in them.

    Args:
        flown: the solves.
        m: which.
        options: of all, and of each.
        ends: whether the ends of the interval receive gradients, where saved times do.
    """
    steps, own, stops = flown.steps, flown.steps.of(m), flown.marks.stops[m]
    t0 = float(options.spans[0][m])
    record = Record(
        times=[t0, *steps.ends[own].tolist()],
        sizes=steps.sizes[own].tolist(),
        stops=[None if stop < 0 else stop for stop in steps.stops[own].tolist()],
        marks=(t0, *stops),
        t1_stop=len(stops) - 1,
    )
    saveat = options.common.saveat if options.saveat is None else options.saveat[m].tolist()
    place(record, (saveat or ())[: int(flown.reached[m])], ends)
    return record


def ends_of(times: dict[str, Tensor]) -> Ends | None:
    """What `record_of` is told of the times that receive gradients."""
    if "saveat" not in times:
        return None
    return ("tspan" in times or "t0" in times, "tspan" in times or "t1" in times)


class MembersSweep:
    """Pulls the cotangents of all members back to what they depend on.

    Args:
        flown: the solves.
        options: of all, and of each.
        first: the solve of the first member, for what they share.
        field: of all.
        times: those that receive gradients: `tspan`, or `t0` and `t1`, and `saveat`.
        count: is told of the fields of `Stats` and of what each member adds to them.
    """

    def __init__(
        self,
        flown: Flown,
        options: MemberOptions,
        first: ODESolve,
        field: MembersField,
        times: dict[str, Tensor],
        count: Callable[[str, Array], None],
    ) -> None:
        # Without the outputs, which hold on to this sweep.
        nothing = flown.start.new_empty(0)
        self._flown = dataclasses.replace(flown, states=nothing, saved=nothing)
        self._options, self._first, self._field = options, first, field
        self._times = {name: t.detach() for name, t in times.items()}
        self._count = weakref.WeakMethod(count)

    def __call__(
        self, u0: Tensor, states: Tensor, saved: Tensor | None, at_steps: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the starts, of times and of the field's inputs.

        Args:
            u0: flat starts, `(M, N)`.
            states: at the ends of the steps, `(P, N)`.
            saved: cotangents of the states at `saveat`, `(M, T, N)`.
            at_steps: of `states`.
        """
        pull = self._replay if self._first.replayed else self._along
        bars, times, inputs = pull(states, saved, at_steps)
        return (from_real(bars, u0.dtype), *self._of_times(times), *inputs)

    def _replay(
        self, states: Tensor, saved: Tensor | None, at_steps: Tensor | None
    ) -> tuple[Tensor, list[Gradients], list[Tensor | None]]:
        """The discrete adjoint."""
        first, field, flown = self._first, self._field, self._flown
        assert isinstance(first.algorithm, ExplicitRungeKutta)
        forward = isinstance(first.options.adjoint, ForwardDiffSensitivity)
        if forward:
            runtime.require("ForwardDiff")
        passes = self._passes(states, saved, None) if saved is not None or self._times else []
        spots, theta = _spots(passes, len(flown.codes), self._options.times or 0)
        (count, size), total, asked = flown.start.shape, len(flown.steps.ends), spots.shape[1]
        bars = torch.zeros(2 * total + count * asked, dtype=torch.float64)
        u0_bar, own_bar = torch.empty_like(flown.start), torch.empty_like(field.own)
        p_bar, report = torch.zeros_like(field.shared), torch.zeros((count, 2), dtype=torch.int64)
        enter(
            "pullback_many!",
            field=field.handle,
            tableau=plans.tableau(first.algorithm.tableau),
            forward=forward,
            dtype=CODES[flown.start.dtype],
            device=device_code(flown.start.device),
            members=count,
            n=size,
            u0=flown.start,
            np=len(field.shared),
            p=field.shared,
            k=len(field.places),
            places=field.places,
            own=field.own,
            mark_ends=flown.marks.ends,
            marks=flown.marks.times,
            step_ends=torch.from_numpy(flown.steps.offsets[1:].copy()),
            ends=torch.from_numpy(flown.steps.ends),
            sizes=torch.from_numpy(flown.steps.sizes),
            states=to_real(states.detach()),
            at_steps=None if at_steps is None else to_real(at_steps),
            m=asked,
            saved=None if saved is None else to_real(saved),
            spots=spots,
            theta=theta,
            u0bar=u0_bar,
            pbar=p_bar,
            ownbar=own_bar,
            bars=bars if self._times else None,
            report=report,
        )
        self._add(*report.numpy().T)
        gradients = []
        for m, backward in enumerate(passes if self._times else ()):
            found = Gradients(u0=u0_bar[m], inputs=[])
            block = bars[2 * int(flown.steps.offsets[m]) + asked * m :].to(u0_bar)
            inside = sum(len(indices) for indices, _ in backward.record.inside.values())
            known = 2 * len(backward.record.sizes) + (inside if backward.saved_count else 0)
            complete_times(found, backward, block[:known])
            gradients.append(found)
        return u0_bar, gradients, field.split(p_bar, own_bar)

    def _along(
        self, states: Tensor, saved: Tensor | None, at_steps: Tensor | None
    ) -> tuple[Tensor, list[Gradients], list[Tensor | None]]:
        """A continuous adjoint along the kept solutions."""
        first, field, flown = self._first, self._field, self._flown
        passes = self._passes(states, saved, at_steps)
        kept = KeptSolutions(
            first.departure.plan,
            flown.solutions,
            first.options,
            first.problem.mass_matrix,
            len(field.shared),
        )
        gradients, p_bars, evaluations = continuous_sweeps(kept, passes)
        counts = np.array(evaluations)
        self._add(np.where(counts > 0, flown.steps.counts, 0), counts)
        p_bars = p_bars.to(field.shared)
        bars = torch.stack([to_real(x.u0) for x in gradients if x.u0 is not None])
        inputs = field.split(p_bars.sum(0), p_bars[:, field.places - 1])
        return bars, gradients, inputs

    def _add(self, steps: Array, evaluations: Array) -> None:
        """Count what a sweep has cost, while somebody can ask."""
        count = self._count()
        if count is not None:
            count("naccept_backward", steps)
            count("nfe_backward", evaluations)
            count("nvjp", evaluations)

    def _passes(
        self, states: Tensor, saved: Tensor | None, at_steps: Tensor | None
    ) -> list[BackwardPass]:
        """The steps of each member and the cotangents that arrive at it; zeros are none."""
        flown, dtype = self._flown, states.dtype
        arriving: list[Tensor | None] = [None] * len(states)
        if at_steps is not None:
            some = at_steps.ne(0).any(1).tolist()
            arriving = [x if any_ else None for x, any_ in zip(at_steps, some, strict=True)]
        passes = []
        for m, reached in enumerate(flown.reached.tolist()):
            own = None if saved is None else saved[m, :reached]
            part = flown.steps.of(m)
            passes.append(
                BackwardPass(
                    record=record_of(flown, m, self._options, ends_of(self._times)),
                    states=(from_real(flown.start[m], dtype), *states[part]),
                    saved=own if own is not None and own.any() else None,
                    at_steps=[None, *arriving[part]],
                    with_times=bool(self._times),
                )
            )
        return passes

    def _of_times(self, found: list[Gradients]) -> list[Tensor | None]:
        """The gradients of times from those of each member."""
        gradients: list[Tensor | None] = []
        for name, like in self._times.items():
            if name == "tspan":
                rows = [torch.stack((_number(x.t0, like), _number(x.t1, like))) for x in found]
            elif name == "saveat":
                rows = [_padded(x.saveat, like) for x in found]
            else:
                rows = [_number(getattr(x, name), like) for x in found]
            stacked = torch.stack(rows)
            own = stacked.ndim == like.ndim
            gradients.append((stacked if own else stacked.sum(0)).reshape(like.shape))
        return gradients


def _number(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(()) if x is None else x.to(like).reshape(())


def _padded(x: Tensor | None, like: Tensor) -> Tensor:
    """Gradients of the times that were reached, with zeros for the others."""
    row = like.new_zeros(like.shape[-1])
    if x is not None:
        row[: len(x)] = x.to(like)
    return row


def _spots(passes: list[BackwardPass], count: int, times: int) -> tuple[Tensor, Tensor]:
    """Where saved states with cotangents lie, each `(M, T)`.

    The number of the state, or of the step and the place in it; -1 where there is none.
    """
    spots = np.full((count, times), -1, dtype=np.int64)
    theta = np.full((count, times), np.nan)
    for m, backward in enumerate(passes):
        if backward.saved is None:
            continue
        for n, (indices, _) in backward.record.inside.items():
            spots[m, indices], theta[m, indices] = n + 1, backward.record.fractions(n)
        for n, indices in backward.record.at_end.items():
            spots[m, indices] = n
    return torch.from_numpy(spots), torch.from_numpy(theta)
