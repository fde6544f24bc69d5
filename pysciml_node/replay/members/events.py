"""What events see and do, mapped over members."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node.problems.ensemble import Array
from pysciml_node.problems.event import Event
from pysciml_node.problems.state import StateSpec, map_tensors
from pysciml_node.replay.members.field import over_members
from pysciml_node.steps.field import expect_untouched
from pysciml_node.steps.start import versions_of


def condition_of(event: Event, spec: StateSpec, t: Tensor, u: Tensor) -> Tensor:
    """A condition at the times `(L,)` and flat states `(L, N)` of members, `(L,)`.

    Raises:
        TypeError: it is no single real number.
    """

    def one(t: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        value = event.value(t, spec.unflatten(u))
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
            raise TypeError(
                "an event's condition must return one real number as a tensor.\n"
                "  Reduce it, for example with .sum() or .min()."
            )
        return (value.reshape(()),)

    (values,) = over_members(one, t, u)
    return values


def condition_values(events: Sequence[Event], spec: StateSpec, t: Array, u: Tensor) -> Array:
    """All conditions as numbers, `(L, E)`: one host read."""
    times = torch.from_numpy(t).to(spec.device, spec.real_dtype)
    columns, versions = [], versions_of([u])
    with torch.no_grad():
        for event in events:
            value = condition_of(event, spec, times, u.detach())
            expect_untouched([u], versions, "an event's condition")
            # A comparison: false counts as negative.
            signed = 2 * value.double() - 1 if value.dtype == torch.bool else value.double()
            columns.append(signed)
        found: Array = torch.stack(columns, dim=1).cpu().numpy()
    return found


def crossings(events: Sequence[Event], before: Array, after: Array) -> Array:
    """Which conditions cross zero between values `(L, E)`: `Event.crosses` for all of them."""
    direction = np.array([event.direction for event in events])
    rising, falling = (before < 0) & (after >= 0), (before > 0) & (after <= 0)
    crossed: Array = (rising & (direction >= 0)) | (falling & (direction <= 0))
    return crossed


def affected(event: Event, spec: StateSpec, t: Tensor, u: Tensor, p: Any, own: bool) -> Tensor:
    """The flat states that an event leaves, `(L, N)`.

    Args:
        event: has an `affect`.
        spec: of a state.
        t: times, `(L,)`.
        u: flat states that it meets, `(L, N)`.
        p: of the problem, or of these members.
        own: whether it is of these members.

    Raises:
        ValueError: it returns another kind of state.
    """
    affect = event.affect
    assert affect is not None

    def one(inside: Any, t: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        given = map_tensors(torch.clone, spec.unflatten(u))
        extra = inside if own else p
        after = affect(t, given) if extra is None else affect(t, given, extra)
        if StateSpec.of(after) != spec:
            raise ValueError(
                "an affect must return a state like u0, but returns another shape or dtype.\n"
                "  Return the state that it was given, changed."
            )
        return (spec.flatten(after),)

    (after,) = over_members(one, p if own else None, t, u)
    return after
