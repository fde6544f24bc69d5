"""The two graphs of a compiled solve: the adaptive loop, and its replay for gradients.

Both are plain functions of tensors for `torch.compile(fullgraph=True)`. The loops are torch's
`while_loop` operator, so one graph holds all steps; everything that may change from call to call
(times, tolerances, step sizes, controller) is a value in a tensor, never a Python number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop as _untyped_while_loop

from pysciml_node.tableaus.base import Tableau

Field = Callable[[Tensor, Tensor], Tensor]

while_loop: Callable[..., tuple[Tensor, ...]] = _untyped_while_loop

# Entries of `control`, the float64 vector that the loop carries and the host reads once.
TIME, SIZE, ERROR_OLD, ACCEPTED, REJECTED, STATUS = range(6)
CONTROL_LENGTH = 6
# Entries of `settings`, the float64 vector of everything that stays fixed during one call.
(
    END,
    DIRECTION,
    RTOL,
    ATOL,
    DTMIN,
    DTMAX,
    MAX_STEPS,
    OFFSET,
    BETA1,
    BETA2,
    GAMMA,
    QMIN,
    QMAX,
    ERROR_FLOOR,
    FIXED,
) = range(15)
# Columns of `steps`: a row is one accepted step from STEP_START to STEP_END.
STEP_START, STEP_SIZE, STEP_END, STEP_ERROR = range(4)

RUNNING, SUCCESS, OUT_OF_STEPS, SIZE_TOO_SMALL, NON_FINITE = (float(i) for i in range(5))

# A step that ends within this fraction of itself from the end is made to end on it, so that
# rounding never leaves a sliver.
_SLIVER = 1 + 1e-8
# Steps below this multiple of |t| no longer move the time; at t = 0 all do that are not 0.
_TIME_RESOLUTION = 4 * 2.0**-52
_SMALLEST = torch.finfo(torch.float64).tiny


def _combine(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """`sum_i weights_i * tensors_i`, without the terms whose weight is zero."""
    terms = [w * x for w, x in zip(weights, tensors, strict=False) if w != 0]
    return functools.reduce(torch.add, terms)


def _row(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` for a 0-d tensor, without reading it on the host."""
    return x.index_select(0, index.to(torch.int64)[None])[0]


def _compute_if(predicate: Tensor, compute: Callable[[], Tensor], otherwise: Tensor) -> Tensor:
    """`compute()` where a 0-d bool holds: a loop of one round, since `cond` nests less well."""

    def once(todo: Tensor, value: Tensor) -> Tensor:
        return todo > 0

    def run(todo: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return todo - 1, compute().clone()

    return while_loop(once, run, (predicate.to(torch.int64), otherwise.clone()))[1]


def _rms(x: Tensor) -> Tensor:
    return torch.sqrt(torch.mean(x * x))


@dataclass(frozen=True)
class Stepper:
    """One step of a method and its dense output, written out stage by stage."""

    tableau: Tableau

    def first_stage_follows(self) -> bool:
        """Whether the one extra stage of the dense output is the next step's first stage."""
        extra = self.tableau.interpolant
        return not self.tableau.fsal and extra.c == (1.0,)

    def __call__(
        self, field: Field, t: Tensor, h: Tensor, end: Tensor, u: Tensor, k1: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The state at `end = t + h` and the stages; times are 0-d, of the state's dtype."""
        tableau = self.tableau
        stages = [k1]
        argument = u
        for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
            argument = self._argument(u, h, row, stages)
            stages.append(field(end if c == 1.0 else t + c * h, argument))
        if tableau.fsal:
            return argument, stages
        return self._argument(u, h, tableau.b, stages), stages

    def extra_stages(
        self, field: Field, t: Tensor, h: Tensor, end: Tensor, u: Tensor, stages: list[Tensor]
    ) -> list[Tensor]:
        """The stages that only dense output needs."""
        stages = list(stages)
        for c, row in zip(self.tableau.interpolant.c, self.tableau.interpolant.a, strict=True):
            argument = self._argument(u, h, row, stages)
            stages.append(field(end if c == 1.0 else t + c * h, argument))
        return stages[self.tableau.stages :]

    def error(self, h: Tensor, stages: list[Tensor], scale: Tensor) -> Tensor:
        """Root-mean-square of the scaled error estimate, 0-d float64."""
        tableau = self.tableau
        error = _rms(_combine(tableau.b_error, stages) / scale)
        if tableau.b_error_low is not None:
            low = _rms(_combine(tableau.b_error_low, stages) / scale)
            combined = error * error / torch.sqrt(error * error + 0.01 * low * low)
            error = torch.where(error == 0, error, combined)
        return error.double() * h.abs()

    @property
    def dense_stages(self) -> list[int]:
        """The stages that the dense output uses."""
        rows = self.tableau.interpolant.weights
        return [i for i, row in enumerate(rows) if any(row)]

    def basis(self, device: torch.device) -> Tensor:
        """What a saved state asks of a step, as polynomials of `theta`.

        The rows are coefficients in ascending powers: of the step's end (none), of its start (1),
        and of `b_i` for each of `dense_stages`; float64.
        """
        weights = [self.tableau.interpolant.weights[i] for i in self.dense_stages]
        degree = len(weights[0])
        rows = [(0.0,) * (degree + 1), (1.0,) + (0.0,) * degree, *((0.0, *w) for w in weights)]
        return torch.tensor(rows, dtype=torch.float64, device=device)

    def weights(self, theta: Tensor) -> list[Tensor]:
        """`b_i(theta)` for each of `dense_stages`; in float64, because the terms cancel."""
        found = []
        for i in self.dense_stages:
            row = self.tableau.interpolant.weights[i]
            value = torch.full_like(theta, row[-1])
            for coefficient in reversed(row[:-1]):
                value = value * theta + coefficient
            found.append(value * theta)
        return found

    @staticmethod
    def _argument(u: Tensor, h: Tensor, row: Sequence[float], stages: list[Tensor]) -> Tensor:
        return u + h * _combine(row, stages)


def _initial_size(
    field: Field, t0: Tensor, u0: Tensor, f0: Tensor, settings: Tensor, order: int
) -> Tensor:
    """Size of the first step, signed (Hairer, Norsett, Wanner, II.4); NaN if `f0` is not finite."""
    dtype = u0.dtype
    scale = u0.abs() * settings[RTOL].to(dtype) + settings[ATOL].to(dtype)
    span = (settings[END] - t0).abs()
    d0, d1 = _rms(u0 / scale).double(), _rms(f0 / scale).double()
    small = (d0 < 1e-5) | (d1 < 1e-5)
    trial = torch.minimum(torch.where(small, 1e-6, 0.01 * d0 / d1), span)
    signed = trial * settings[DIRECTION]
    f1 = field((t0 + signed).to(dtype), u0 + signed.to(dtype) * f0)
    d2 = _rms((f1 - f0) / scale).double() / trial
    steepest = torch.maximum(d1, d2)
    size = torch.where(
        steepest <= 1e-15,
        torch.clamp(trial * 1e-3, min=1e-6),
        (0.01 / steepest) ** (1.0 / order),
    )
    size = torch.minimum(torch.minimum(100.0 * trial, size), span)
    size = torch.where(torch.isfinite(steepest), size, trial)
    return torch.where(torch.isfinite(d1), size * settings[DIRECTION], torch.nan)


def _limited(settings: Tensor, size: Tensor) -> Tensor:
    """A signed step size, not longer than `dtmax`; NaN stays."""
    return torch.where(size.abs() > settings[DTMAX], settings[DTMAX] * settings[DIRECTION], size)


def _next_size(
    settings: Tensor, control: Tensor, h: Tensor, error: Tensor, accept: Tensor
) -> Tensor:
    """The controller: PI in SciML's form; I with `beta2 = 0`; fixed steps keep their size."""
    gamma, longest = settings[GAMMA], 1.0 / settings[QMIN]
    q11 = error ** settings[BETA1]
    q = q11 / control[ERROR_OLD] ** settings[BETA2] / gamma
    q = torch.minimum(torch.maximum(q, 1.0 / settings[QMAX]), longest)
    rejected = torch.minimum(torch.clamp(q11 / gamma, min=1.0), longest)
    rejected = torch.where(torch.isfinite(error), rejected, longest)
    size = _limited(settings, h / torch.where(accept, q, rejected))
    return torch.where(settings[FIXED] > 0, control[SIZE], size)


def _status(settings: Tensor, control: Sequence[Tensor], error: Tensor) -> Tensor:
    """What stands in the way of another step from `control`."""
    t, size = control[TIME], control[SIZE]
    smallest = torch.maximum(settings[DTMIN], _TIME_RESOLUTION * t.abs() + _SMALLEST)
    lands = (settings[END] - t).abs() <= size.abs() * _SLIVER
    stuck = (size.abs() < smallest) & ~lands & (settings[FIXED] == 0)
    status = torch.where(torch.isfinite(error), SIZE_TOO_SMALL, NON_FINITE)
    status = torch.where(stuck, status, RUNNING)
    full = control[ACCEPTED] + control[REJECTED] >= settings[MAX_STEPS]
    status = torch.where(full, OUT_OF_STEPS, status)
    return torch.where(torch.isfinite(size), status, NON_FINITE).double()


def forward_graph(
    stepper: Stepper,
    field: Field,
    u0: Tensor,
    values: Tensor,
    steps: Tensor,
    states: Tensor,
    saveat: Tensor | None,
    saved: Tensor | None,
    dense: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Step until the end, a failure, or full buffers; returns the control vector and the state.

    Args:
        stepper: the method.
        field: `f(t, u)`.
        u0: the state at `control[TIME]`.
        values: `control`, then `settings`, whose entries the constants name; a size of NaN asks
            for the initial step size.
        steps: `(capacity, 4)` float64, written in place.
        states: `(capacity, *shape)`, the state at the start of each step, written in place.
        saveat: `(T,)` float64 times in the order they are passed, or `None`.
        saved: `(T, *shape)`, written in place where a saved time was passed.
        dense: `(capacity, n, *shape)`, room for the stages that the dense output uses.
    """
    dtype = u0.dtype
    fsal = stepper.tableau.fsal
    capacity = steps.shape[0]
    # Copies: what enters a loop must not share memory.
    control, settings = values[:CONTROL_LENGTH].clone(), values[CONTROL_LENGTH:].clone()
    start = values[TIME].clone()
    k0 = field(start.to(dtype), u0)
    size = _compute_if(
        torch.isnan(control[SIZE]),
        lambda: _initial_size(field, start, u0, k0, settings, stepper.tableau.order),
        control[SIZE],
    )
    size = _limited(settings, size)

    def running(control: Tensor, u: Tensor, k1: Tensor) -> Tensor:
        full = control[ACCEPTED] - settings[OFFSET] >= capacity
        return (control[STATUS] == RUNNING) & ~full

    def attempt(control: Tensor, u: Tensor, k1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, proposed = control[TIME], control[SIZE]
        remaining = settings[END] - t
        last = remaining.abs() <= proposed.abs() * _SLIVER
        size = torch.where(last, remaining, proposed)
        end = torch.where(last, settings[END], t + size)
        times = (t.to(dtype), size.to(dtype), end.to(dtype))
        u1, stages = stepper(field, *times, u, k1)

        scale = torch.maximum(u.abs(), u1.abs()) * settings[RTOL].to(dtype)
        error = stepper.error(size, stages, scale + settings[ATOL].to(dtype))
        accept = (error <= 1.0) | (settings[FIXED] > 0)
        k_end = stages[-1] if fsal else _compute_if(accept, lambda: field(times[2], u1), k1)

        row = (control[ACCEPTED] - settings[OFFSET]).to(torch.int64)[None]
        steps.index_copy_(0, row, torch.stack([t, size, end, error])[None])
        states.index_copy_(0, row, u[None])
        if dense is not None:
            if stepper.first_stage_follows():
                stages.append(k_end)
            else:
                stages += stepper.extra_stages(field, *times, u, stages)
            used = torch.stack([stages[i] for i in stepper.dense_stages])
            dense.index_copy_(0, row, used[None])

        hit = accept.double()
        entries = [
            torch.where(accept, end, t),
            _next_size(settings, control, size, error, accept),
            torch.where(accept, torch.maximum(error, settings[ERROR_FLOOR]), control[ERROR_OLD]),
            control[ACCEPTED] + hit,
            control[REJECTED] + (1.0 - hit),
        ]
        status = torch.where(accept & last, SUCCESS, _status(settings, entries, error))
        control = torch.stack([*entries, status])
        return control, torch.where(accept, u1, u), torch.where(accept, k_end, k1)

    first = torch.cat([control[:SIZE], size[None], control[SIZE + 1 :]])
    control, u, _ = while_loop(running, attempt, (first, u0, k0))
    if saveat is not None and saved is not None and dense is not None:
        _save(stepper, settings, start, control, u, steps, states, saveat, saved, dense)
    return control, u


def _save(
    stepper: Stepper,
    settings: Tensor,
    start: Tensor,
    control: Tensor,
    u_end: Tensor,
    steps: Tensor,
    states: Tensor,
    saveat: Tensor,
    saved: Tensor,
    dense: Tensor,
) -> None:
    """Evaluate the dense output at the saved times that the steps in the buffers passed."""
    direction = settings[DIRECTION]
    count = control[ACCEPTED] - settings[OFFSET]
    index = torch.arange(steps.shape[0], device=steps.device)
    ends = torch.where(index < count, steps[:, STEP_END] * direction, torch.inf)
    times = saveat * direction
    passed = (times <= control[TIME] * direction) & (
        (times > start * direction) | (settings[OFFSET] == 0)
    )
    rows = torch.where(passed, torch.searchsorted(ends, times), 0)
    step, u = steps.index_select(0, rows), states.index_select(0, rows)
    stages = dense.index_select(0, rows)

    column = (-1, *(1,) * (saved.ndim - 1))
    size = step[:, STEP_SIZE]
    weights = stepper.weights((saveat - step[:, STEP_START]) / size)
    value = u
    for i, weight in enumerate(weights):
        value = value + (size * weight).to(u.dtype).reshape(column) * stages[:, i]
    # A saved time that ends a step is that step's own result.
    inner = (rows + 1 < count).reshape(column)
    following = states.index_select(0, torch.clamp(rows + 1, max=states.shape[0] - 1))
    exact = (saveat == step[:, STEP_END]).reshape(column)
    value = torch.where(exact, torch.where(inner, following, u_end), value)
    saved.copy_(torch.where(passed.reshape(column), value, saved))


def backward_graph(
    stepper: Stepper,
    field: Callable[..., Tensor],
    values: Tensor,
    steps: Tensor,
    states: Tensor,
    saveat: Tensor | None,
    basis: Tensor | None,
    cotangent: Tensor,
    cotangent_saved: Tensor | None,
    cotangent_states: Tensor | None,
    inputs: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Replay accepted steps from the last to the first, pulling cotangents back.

    Args:
        stepper: the method.
        field: `f(t, u, *inputs)`.
        values: `(4,)` float64: rows of `steps` that are filled, direction, 1 where row 0 is the
            first step of the solve, number of saved states up to the end of the last row.
        steps: as written by the forward graph.
        states: as written by the forward graph.
        saveat: as given to the forward graph.
        basis: `Stepper.basis` where there is `saveat`.
        cotangent: of the state at the end of the last row.
        cotangent_saved: `(T, *shape)`, of the saved states.
        cotangent_states: `(capacity, *shape)`, of the states at the start of each step.
        inputs: what the field depends on, each receiving a gradient.

    Returns:
        The number of saved states before row 0, the cotangent of the state at its start, and the
        gradients of `inputs`.
    """
    dtype = states.dtype
    direction, first = values[1], values[2] > 0
    used = stepper.dense_stages if saveat is not None else []

    def more(i: Tensor, j: Tensor, cotangent: Tensor, *totals: Tensor) -> Tensor:
        return i > 0

    def pull(i: Tensor, j: Tensor, cotangent: Tensor, *totals: Tensor) -> tuple[Tensor, ...]:
        step, u = _row(steps, i - 1), _row(states, i - 1)
        t, h, end = (step[k].to(dtype) for k in (STEP_START, STEP_SIZE, STEP_END))

        def advance(u: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            def f(t: Tensor, u: Tensor) -> Tensor:
                return field(t, u, *inputs)

            u1, stages = stepper(f, t, h, end, u, f(t, u))
            if used:
                stages += stepper.extra_stages(f, t, h, end, u, stages)
            return u1, *(stages[k] for k in used)

        pulled: tuple[Tensor, ...] = (cotangent,)
        direct: Tensor | None = None
        j = j.clone()
        if saveat is not None and cotangent_saved is not None:
            # A saved time belongs to the step that ends at it; only the first step owns its start.
            after = torch.where(first & (i == 1), -torch.inf, step[STEP_START] * direction)
            j, sums = gather(step, j, after, cotangent_saved)
            at_end, direct, *dense = sums.unbind()
            pulled = (cotangent + at_end, *dense)
        pullback = torch.func.vjp(advance, u, *inputs)[1]
        found = pullback(pulled)
        cotangent = found[0] if direct is None else found[0] + direct
        if cotangent_states is not None:
            cotangent = cotangent + _row(cotangent_states, i - 1)
        added = [total + part for total, part in zip(totals, found[1:], strict=True)]
        return (i - 1, j, cotangent.clone(), *added)

    def gather(step: Tensor, j: Tensor, after: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
        """Sum what the saved states in one step ask of its end, its start and its stages.

        The sums are the rows of one tensor: a loop that makes no round returns what it started
        from, and separate sums would then be the same zeros, overwritten by whoever uses them.
        """
        assert saveat is not None
        assert basis is not None
        column = (-1, *(1,) * (cotangents.ndim - 1))

        def inside(j: Tensor, sums: Tensor) -> Tensor:
            time = _row(saveat, torch.clamp(j - 1.0, min=0.0))
            return (j > 0) & (time * direction > after)

        def add(j: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
            start, size, end, _ = step.unbind()
            time = _row(saveat, j - 1.0)
            theta = (time - start) / size
            weights = basis[:, -1]
            for power in range(basis.shape[1] - 2, -1, -1):
                weights = weights * theta + basis[:, power]
            index = torch.arange(basis.shape[0], device=basis.device)
            weights = torch.where(index >= 2, size * weights, weights)
            # A saved time that ends a step asks for that step's result alone.
            factors = torch.where(time == end, (index == 0).double(), weights).to(dtype)
            return j - 1.0, sums + factors.reshape(column) * _row(cotangents, j - 1.0)

        sums = cotangents.new_zeros((len(used) + 2, *cotangents.shape[1:]))
        j, sums = while_loop(inside, add, (j, sums))
        return j, sums

    totals = tuple(torch.zeros_like(x) for x in inputs)
    _, j, cotangent, *found = while_loop(
        more, pull, (values[0].to(torch.int64), values[3].clone(), cotangent, *totals)
    )
    return j, cotangent, tuple(found)
