"""What a field leaves for its next evaluation: counts, vectors of spectral normalization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pysciml_node.steps.contents import is_comparable
from pysciml_node.steps.first_graph import Evaluation
from pysciml_node.steps.overwritten import Large, may_be_written, refuse_read
from pysciml_node.steps.places import Place
from pysciml_node.steps.surroundings import Surroundings

Evaluate = Callable[[], Evaluation]
T = TypeVar("T")

LATER = 4
"""Places beside the start at which derivatives are compared: the last step, and others as far from
one another as they can be."""


def later_steps(count: int) -> list[int]:
    """Some of the steps of a solve, at equal distances, the last one among them.

    The first one is not: it begins at the start of the solve.
    """
    parts = (n * count // LATER for n in range(1, LATER))
    return sorted({*parts, count - 1} - {0, -1})


def some_of(items: Sequence[T]) -> list[T]:
    """The first of what there is for each step, and that of `later_steps`."""
    return [*items[:1], *(items[n] for n in later_steps(len(items)))]


class Left(NamedTuple):
    """What evaluations have left behind: contents of tensors, and of places."""

    tensors: Sequence[Tensor]
    contents: Sequence[Tensor]
    places: Sequence[Place]

    def as_now(self) -> Left:
        """What is there now."""
        return Left(self.tensors, copies(self.tensors), [x.as_now() for x in self.places])

    @torch.no_grad()
    def put(self) -> None:
        """Put it there again."""
        for x, value in zip(self.tensors, self.contents, strict=True):
            # Not counted as a change: what was there is put back.
            x.data.copy_(value)
        for place in self.places:
            place.restore({})

    def changed(self, now: Left, surroundings: Surroundings) -> str | None:
        """What has changed from here to another, in words that follow "the field"."""
        for x, then, value in zip(self.tensors, self.contents, now.contents, strict=True):
            if not torch.equal(then, value):
                return f"has written to {surroundings.names[id(x)]}"
        names = (name for place in self.places for name in place.changes())
        if (name := next(names, None)) is not None:
            return f"changes {name}"
        if written := surroundings.written:
            return f"has written to {surroundings.names[id(written[0])]}"
        return None


class Change(NamedTuple):
    """What evaluations of a field have changed, which derivatives may depend on.

    Attributes:
        first: what the first one has left.
        last: what the last one has left, which is there now.
        what: has changed between, in words that follow "the field", and what derivatives then
            depend on.
    """

    first: Left
    last: Left
    what: str

    @classmethod
    def since(cls, first: Left, surroundings: Surroundings) -> Change:
        """What has changed up to now."""
        last = first.as_now()
        done = first.changed(last, surroundings)
        depends = "and its derivatives depend on what earlier evaluations have left there"
        if surroundings.outside:
            asked = " or ".join(dict.fromkeys(surroundings.outside))
            done = f"asks {asked}" if done is None else f"{done} and asks {asked}"
            depends = "and its derivatives are others at each evaluation"
        return cls(first, last, f"{done or 'reaches what cannot be looked into'}, {depends}")

    def expect_unseen(
        self,
        evaluate: Evaluate,
        leaves: Sequence[Tensor],
        *,
        why: str = "",
        instead: str = "use adjoint=DirectAdjoint()",
    ) -> None:
        """Check that derivatives do not depend on it; it is there again in the end.

        Args:
            evaluate: an evaluation.
            leaves: what stands for the inputs of the field.
            why: they must not, for the message.
            instead: what else can be done, likewise.

        Raises:
            RuntimeError: they do.
        """
        if gap := self._gap(evaluate, leaves):
            raise RuntimeError(
                f"the field {self.what}: they differ by up to {gap:.2g} (relative).{why}\n"
                "  Call eval() on it, as for spectral normalization; make it a function of its "
                f"arguments; or {instead}."
            )

    def _gap(self, evaluate: Evaluate, leaves: Sequence[Tensor]) -> float:
        """Compare derivatives by what the first evaluation, the last and the next have left.

        Returns:
            The greatest relative difference; zero for one of rounding.
        """
        with torch.enable_grad():
            now, following = (derivatives(evaluate(), leaves) for _ in range(2))
            self.first.put()
            then = derivatives(evaluate(), leaves)
        self.last.put()
        return max(relative_gap(now, then), relative_gap(now, following))


def evaluations(
    functions: Sequence[Callable[[Tensor, Tensor], Tensor]], places: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[Evaluate]:
    """Evaluations of the functions of an equation at times and states, with graphs from there."""
    for t, u in places:
        yield partial(_evaluation, functions, t, u)


def _evaluation(
    functions: Sequence[Callable[[Tensor, Tensor], Tensor]], t: Tensor, u: Tensor
) -> Evaluation:
    state = u.detach().requires_grad_()
    return [f(t, state) for f in functions], (state,)


class Memory:
    """What the evaluations of a solve have changed, as the first one has left it.

    A replay begins with what the last evaluation has left there. Values may hardly tell: where an
    iteration has almost found a maximum they are stationary, and their derivatives are not.

    Args:
        evaluate: the first evaluation, which has just been made.
        written: tensors that it has written to.
        surroundings: of the field. Places there, such as counts, may hold other objects now.
    """

    def __init__(
        self, evaluate: Evaluate, written: Sequence[Tensor], surroundings: Surroundings
    ) -> None:
        self._evaluate: Evaluate | None = evaluate
        self._idle = False
        comparable = filter(is_comparable, written)
        found = {id(x): x for x in (*comparable, *may_be_written(surroundings))}
        self._written = [*found.values()]
        self._first = copies(self._written)
        self._surroundings, self._large = surroundings, Large(surroundings)
        self._replaced = [place.as_now() for place in surroundings.changes()]
        # What evaluations have written to since, and torch has not counted it.
        self._overwritten: list[Tensor] = []

    @classmethod
    def idle(cls, surroundings: Surroundings) -> Memory:
        """That of evaluations which have changed nothing."""
        made = cls.__new__(cls)
        made._evaluate, made._idle, made._surroundings = None, True, surroundings
        return made

    @property
    def is_idle(self) -> bool:
        """Whether nothing has changed that evaluations may depend on, once it is settled."""
        return self._idle and self._surroundings.all_open

    @property
    def replaces(self) -> bool:
        """Whether places hold other objects since the first evaluation."""
        return bool(self._replaced)

    def settle(self) -> None:
        """Called when the solve has run, of what later evaluations may have replaced.

        The surroundings are settled, too.
        """
        # Before what the first one has left, which is then put there last.
        self._replaced = [*self._surroundings.settle(), *self._replaced]
        written = set(map(id, self._surroundings.written))
        pairs = [*zip(self._written, self._first, strict=True)]
        seen = [(x, y) for x, y in pairs if id(x) in written]
        others = [(x, y) for x, y in pairs if id(x) not in written]
        overwritten = [(x, y) for x, y in others if not torch.equal(x, y)]
        self._overwritten = [*(x for x, _ in overwritten), *self._large.overwritten()]
        self._surroundings.began = [*seen, *overwritten] or self._surroundings.began
        self._written, self._first = [x for x, _ in seen], [y for _, y in seen]
        self._idle = not (written or self._replaced or self._overwritten)

    def expect_idle(
        self, leaves: Sequence[Tensor], later: Iterable[Evaluate] = (), several: bool = True
    ) -> None:
        """Compare derivatives: by what the first evaluation, the last and the next have left.

        Args:
            leaves: what stands for the inputs of the field.
            later: evaluations at later times, where other parts of the field may be used.
            several: whether graphs of several evaluations are there at once, in a step.

        Raises:
            RuntimeError: they differ by more than rounding; or graphs of several evaluations read
                what is overwritten at each.
        """
        if (evaluate := self._evaluate) is None or self.is_idle:
            return
        before = Left(self._written, self._first, self._replaced)
        change = Change.since(before, self._surroundings)
        for there in (evaluate, *later):
            if several and self._overwritten:
                with torch.enable_grad():
                    refuse_read(there()[0], self._overwritten, self._surroundings.names)
            change.expect_unseen(there, leaves)


def derivatives(evaluation: Evaluation, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of all values of an evaluation at once, in the state and in inputs that they depend on."""
    values, fresh = [x for x in evaluation[0] if x.requires_grad], evaluation[1]
    if not values:
        return []
    cotangents = [torch.linspace(0.5, 1.5, x.numel()).to(x).view_as(x) for x in values]
    found = torch.autograd.grad(
        values, [*fresh, *leaves], cotangents, retain_graph=True, allow_unused=True
    )
    nothing = values[0].detach().new_zeros(())
    return [nothing if x is None or not x.numel() else x.detach() for x in found]


def relative_gap(now: Sequence[Tensor], then: Sequence[Tensor]) -> float:
    """The greatest relative difference between derivatives; zero for one of rounding."""
    if len(now) != len(then):
        return 1.0
    # Small derivatives may be what is left of great ones that cancel.
    floor = 0.01 * max(map(_size, (*now, *then)), default=0.0)
    gaps = [_size(x - y) / max(_size(x), floor) for x, y in zip(now, then, strict=True) if floor]
    gap = max(gaps, default=0.0)
    return gap if gap > max((torch.finfo(x.dtype).eps for x in now), default=0.0) ** 0.5 else 0.0


def _size(x: Tensor) -> float:
    """The size of the greatest entry."""
    return float(x.abs().max().nan_to_num(nan=0.0))


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What tensors hold now."""
    return [x.detach().clone() for x in tensors]
