"""Native solves of random fields by random methods and options are those of the loop in Python.

A few fields are drawn for the tests, the same each time. More of them, and others:

    PSN_FUZZ=1000 pytest tests/properties/test_native_fuzz.py --hypothesis-seed=7
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.native_cases import (
    DIAGONAL,
    ROSENBROCK,
    SHARES,
    SOLVES,
    SWITCHING,
    Case,
    D,
    Outcome,
    algorithms,
    dtypes,
    events,
    examples,
    expect_alike,
    expect_near,
    initial,
    of_dtype,
    of_entries,
    quick_turns,
    stepping,
    strided,
)
from random_fields import RandomField, fields
from torch import Tensor
from torch_threads import threads

import pysciml_node as psn
from pysciml_node.algorithms.explicit import ExplicitRungeKutta
from pysciml_node.torch_engine.native import emit
from pysciml_node.torch_engine.native import parts as splitting
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.torch_engine.native.library import Code

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])


@pytest.fixture(autouse=True)
def stale() -> Iterator[None]:
    """Memory of a library comes back with anything in it, as after a solve that has failed."""
    take = Code.take_memory

    def filled(code: Code, size: int) -> Tensor:
        return take(code, size).fill_(torch.nan)

    with mock.patch.object(Code, "take_memory", filled):
        yield


@st.composite
def cases(draw: st.DrawFn, made: RandomField, algorithm: Any, dtype: torch.dtype) -> Case:
    """A solve of a field."""
    start, length = (
        draw(st.sampled_from([0.0, -0.4, 3.0])),
        draw(st.sampled_from([0.6, -0.6, 1.3, -1.3])),
    )
    options = draw(stepping(algorithm))
    graded, moving = draw(st.sampled_from([True, True, False])), draw(st.booleans())
    span: tuple[Any, Any] = start, start + length
    if moving:
        span = tuple(torch.tensor(x, dtype=D, requires_grad=True) for x in span)
    if draw(st.booleans()):
        shares = draw(st.lists(st.sampled_from(SHARES), min_size=1, max_size=6))
        at = [start + share * length for share in sorted(shares)]
        options["saveat"] = torch.tensor(at, dtype=D, requires_grad=moving) if moving else at
    if draw(st.booleans()):
        stops = draw(st.lists(st.sampled_from(SHARES), max_size=3))
        options["tstops"] = [start + share * length for share in stops]
    if isinstance(options["controller"], psn.FixedStep) and draw(st.booleans()):
        shares = sorted(draw(st.sets(st.sampled_from(SHARES[2:-2]), min_size=1)))
        options["controller"] = psn.FixedStep([start + share * length for share in shares])
    elif "rtol" in options and draw(st.booleans()):
        options |= of_entries(draw, made)
    options |= draw(events(made, start + 0.37 * length))
    u0 = initial(draw, made, dtype)
    dense = draw(st.sampled_from([None, 0.0, 0.4, 1.0]))
    return Case(made, u0, span, options, graded, dense, list(made.given))


# Times of conditions are numbers, which are told after eight of them.
@pytest.mark.filterwarnings("ignore:<lambda> has been translated")
@examples(4)
@given(data=st.data(), made=fields())
def test_a_random_solve_is_that_of_the_loop_in_python(
    data: st.DataObject, made: RandomField
) -> None:
    draw = data.draw
    algorithm, dtype = draw(algorithms(made, 9, ROSENBROCK + DIAGONAL + SWITCHING)), draw(dtypes)
    made = of_dtype(made, dtype)
    near, most = draw(st.sampled_from([0, emit._NEAR])), draw(st.integers(2, 16))
    work, count = draw(st.sampled_from([1, splitting._LEAST_WORK])), draw(st.integers(1, 3))
    with (
        mock.patch.multiple(emit, _NEAR=near, _FEWEST_ROWS=2, _MOST_ROWS=most),
        mock.patch.object(splitting, "_LEAST_WORK", work),
        threads(count),
        quick_turns(0.03),
    ):
        for _ in range(SOLVES):
            case = draw(cases(made, algorithm, dtype))
            expect_alike(case)


@dataclass
class MembersCase(Case):
    """One solve of an ensemble; `u0` and `p` have a leading `M`, which in `p` may be missing.

    Attributes:
        own: whether `p` is each member's own.
        spans: intervals of their own, `(M, 2)`, or None.
    """

    own: bool = False
    spans: Tensor | None = None

    def outcome(self, compile: bool) -> Outcome:
        """What a solve of all members leaves."""
        made, options = self.field, dict(self.options)
        with torch.set_grad_enabled(self.graded):
            first = made.assembled([x[0].detach() for x in self.u0])
            shared = [x[0].detach() for x in self.p] if self.own else self.p
            problem = psn.ODEProblem(made, first, self.span, p=tuple(shared) or None)
            ensemble = psn.EnsembleProblem(
                problem, made.assembled(self.u0), tuple(self.p) if self.own else None,
                tspan=self.spans,
            )  # fmt: skip
            solution = psn.solve(
                ensemble,
                options.pop("algorithm"),
                compile=compile,
                engine="torch",
                throw=False,
                **options,
            )
            found = made.parts(solution.u1)
            if solution.t is not None:
                found += made.parts(solution.u)
            members = [solution[0], solution[len(solution) - 1]]
            for one in members:
                found += made.parts(one.u)
            bars = self.gradients([x for x in found if x.requires_grad])
        counts = [solution.retcodes, *([s.naccept, s.nreject] for s in solution.member_stats)]
        # The loop in Python forgets the end's derivative where an event is looked for in a step.
        explicit = isinstance(self.options["algorithm"], ExplicitRungeKutta)
        if explicit and "events" not in self.options:
            counts.append(solution.stats.nfe)
        return Outcome(counts, [x.detach() for x in found], bars, [])


@st.composite
def ensembles(
    draw: st.DrawFn, made: RandomField, algorithm: Any, dtype: torch.dtype
) -> MembersCase:
    """A solve of members of a field."""
    count = draw(st.one_of(st.integers(1, 19), st.sampled_from([33, 70, 130])))
    start, length = draw(st.sampled_from([0.0, 3.0])), draw(st.sampled_from([0.6, -0.6, 1.3]))
    options = draw(stepping(algorithm))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def numbers(*shape: int) -> Tensor:
        return torch.randn(count, *shape, dtype=D, generator=generator)

    def small(*shape: int) -> Tensor:
        return 10 ** -(2 + 2 * torch.rand(shape, dtype=D, generator=generator))

    spans = None
    if draw(st.booleans()):
        begin = start + length * torch.rand(count, dtype=D, generator=generator) / 4
        spans = torch.stack([begin, begin + length * (0.3 + begin.sin().abs())], 1)
        if draw(st.booleans()):
            spans = torch.where(numbers(1) > 0, spans, spans.flip(1))  # some go backward
    if draw(st.booleans()):
        shares = torch.tensor(
            sorted(draw(st.lists(st.sampled_from(SHARES), min_size=1, max_size=5))), dtype=D
        )
        if spans is not None or draw(st.booleans()):
            ends = (
                torch.tensor([[start, start + length]], dtype=D).expand(count, 2)
                if spans is None
                else spans
            )
            options["saveat"] = ends[:, :1] + shares * (ends[:, 1:] - ends[:, :1])
        else:
            options["saveat"] = (start + shares * length).tolist()
    if draw(st.booleans()):
        options["tstops"] = [
            start + share * length
            for share in draw(st.lists(st.sampled_from(SHARES[2:-2]), max_size=3))
        ]
    if spans is not None and options.get("tstops"):
        low, high = float(spans.min()), float(spans.max())
        options["tstops"] = [x for x in options["tstops"] if low <= x <= high]
    if "rtol" in options:
        kind = draw(st.sampled_from(["one", "entries", "members", "both"]))
        name = draw(st.sampled_from(["rtol", "atol"]))
        # A tolerance for each of as many entries as there are members could be either's.
        if kind == "entries" and all(shape[:1] != (count,) for shape in made.state):
            options |= of_entries(draw, made)
        elif kind == "members" and not made.keys:
            options[name] = small(count, *(1 for _ in made.state[0]))
        elif kind == "both" and not made.keys:
            options[name] = small(count, *made.state[0])
    options |= draw(events(made, start + 0.37 * length if spans is None else None))
    own = draw(st.booleans())
    p = [x.detach() for x in made.given]
    if own:
        p = [x + 0.1 * numbers(*x.shape).sin() for x in p]
    p = [x.to(dtype).requires_grad_() for x in p]
    u0 = [strided(numbers(*shape), draw).to(dtype).requires_grad_() for shape in made.state]
    graded = draw(st.sampled_from([True, True, False]))
    return MembersCase(made, u0, (start, start + length), options, graded, None, p, own, spans)


@pytest.mark.filterwarnings("ignore:<lambda> has been translated")
@examples(1)
@given(data=st.data(), made=fields(member=True))
def test_random_members_are_those_of_the_loop_in_python(
    data: st.DataObject, made: RandomField
) -> None:
    draw = data.draw
    algorithm, dtype = draw(algorithms(made, 5, ROSENBROCK + DIAGONAL + SWITCHING)), draw(dtypes)
    made = made.to(dtype)
    for _ in range(SOLVES):
        case = draw(ensembles(made, algorithm, dtype))
        with threads(draw(st.integers(1, 3))), quick_turns(0.03):
            native = case.outcome(True)
        with quick_turns(0.03):
            eager = case.outcome(False)
        if dtype is D or case.fixed:
            assert native.counts == eager.counts
            bound = case.exact if case.fixed else 1e-6
            expect_near(native.states, eager.states, bound)
            expect_near(native.bars, eager.bars, bound)
        with quick_turns(0.03):
            one = case.outcome(True)
        assert one.counts == native.counts
        expect_near(one.states, native.states, 0.0)
        expect_near(one.bars, native.bars, 0.0)
