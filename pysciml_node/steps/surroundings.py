"""The surroundings of a field, recorded so that a replay sees the same as the solve.

A field is a program: besides its arguments it reads attributes, closures, globals and the contents
of lists and dicts. `Surroundings` looks through them once, when a solve begins, without calling
anything. It keeps the content of each place. A backward sweep can put it back for its duration,
with stand-ins for tensors where gradients have to stop. It also names each place for messages, and
notices tensors that have been changed in place since.
"""

from __future__ import annotations

import copy
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from pysciml_node.steps.anatomy import cells_of, parts_of
from pysciml_node.steps.behind import APART
from pysciml_node.steps.known import Known, known_from, made_of, walk_from
from pysciml_node.steps.places import Names, Place, StandIns, Test, holds
from pysciml_node.steps.start import Start, versions_of
from pysciml_node.steps.walk import Walk

# While a sweep has put other values into places, the solves of other threads wait, and so does a
# process that forks: in the child nobody would put them back, or let go of the lock.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


_KINDS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
_HOOKS = attrgetter(*(f"_{kind}" for kind in _KINDS))
_ATTRIBUTES = attrgetter("__dict__")
_HOOKS_OF_ALL = attrgetter(*(f"_global_{kind}" for kind in _KINDS))


def _contains(value: Any, test: Callable[[Tensor], bool]) -> bool:
    """Whether a tensor passes a test, or one in a container does, at any depth."""
    if isinstance(value, list | tuple | deque):
        return any(_contains(item, test) for item in value)
    if isinstance(value, dict):
        return any(_contains(item, test) for item in value.values())
    return isinstance(value, Tensor) and test(value)


def _holds_others(value: Any) -> bool:
    """Whether a value keeps alive what has computed it."""
    return isinstance(value, APART) or (isinstance(value, Tensor) and value.grad_fn is not None)


def all_are_hooked() -> bool:
    """Whether there are hooks of all modules."""
    return any(_HOOKS_OF_ALL(nn.modules.module))


class Surroundings:
    """Everything that a field can reach, by one walk.

    Args:
        roots: the objects to begin with, by name. A field that reads its parts from this dict is
            given stand-ins for them too.

    Attributes:
        tensors, arrays, names, generators, lazy, chosen, closed, outside, hooks, memory: as the
            `Walk`'s.
        plain: likewise; a field that has changed what it can reach is not.
        moved: places that the solve has changed, with what they held before.
        began: tensors that it has changed, with what they held at first, as far as it is known.
    """

    def __init__(self, roots: dict[str, Any]) -> None:
        with _lock:
            found = walk_from(roots)
        self._begin(roots, found, versions_of(found.tensors))

    @classmethod
    def of(cls, roots: dict[str, Any], found: Walk, versions: list[int | None]) -> Surroundings:
        """Those that a walk from the roots has found, with the versions of its tensors then."""
        made = cls.__new__(cls)
        made._begin(roots, found, versions)
        return made

    def _begin(self, roots: dict[str, Any], found: Walk, versions: list[int | None]) -> None:
        self.roots, self.memory = roots, found.memory
        self.tensors, self.names, self.generators = found.tensors, found.names, found.generators
        self.lazy, self.chosen, self.arrays = found.lazy, found.chosen, found.arrays
        self.plain, self.hooks, self.closed = found.plain, found.hooks, found.closed
        self.outside = found.outside
        self._modules, self._places = found.modules, found.places
        self._written = found.written.copy()
        self.moved: list[Place] = []
        self.began: list[tuple[Tensor, Tensor]] = []
        self._caches = [(cache, cache.cache_info().misses) for cache in found.caches]
        # Places that later solves look at too are not settled, but copies of them.
        self._glance = found.glance
        self._lent = found.further.lasts
        if found.met_apart:
            # A solution kept in an attribute would hold the one before it, and so on.
            self._forget(lambda value: isinstance(value, APART))
        self._versions = versions

    @property
    def lasts(self) -> bool:
        """Whether a later solve of the field begins with the same walk, and its `memory`."""
        return self._glance is not None

    @property
    def all_open(self) -> bool:
        """Whether everything is looked into, or put back: no tensor has got attributes either."""
        return not (self.closed or self.outside or any(map(_ATTRIBUTES, self.tensors)))

    @property
    def reach(self) -> list[Tensor]:
        """The tensors, and the arrays as tensors that share their memory."""
        return [*self.tensors, *self.arrays]

    def lasting(self) -> Surroundings:
        """What a later solve can begin `again` with: without the field, and what it was given."""
        kept, self._lent = copy.copy(self), True
        f, *_ = self.roots.values()
        cells, own = set(map(id, cells_of(f))), {id(f), *map(id, parts_of(f))}
        # The walk has begun with the roots.
        kept.roots, kept._glance = {}, None
        kept._places = [x for x in self._places[1:] if id(x.cell) not in cells]
        kept._modules = [(name, x) for name, x in self._modules if id(x) not in own]
        kept.tensors = [x for x in self.tensors if id(x) not in own]
        kept.names = {i: name for i, name in self.names.items() if i not in own}
        return kept

    def again(self, start: Start) -> Surroundings:
        """The surroundings of a later solve, in which nothing had changed but what is its own."""
        later = Surroundings.__new__(Surroundings)
        later.__dict__.update(self.__dict__)
        later.roots = roots = {start.name: start.f, "p": start.p}
        later._places = [Names(roots, roots.copy(), ""), *start.places(), *self._places]
        own = [(name, x) for name, x in start.named() if id(x) not in self.names]
        later._modules = [(name, x) for name, x in own if isinstance(x, nn.Module)] + self._modules
        names = {id(x): name for name, x in own if isinstance(x, Tensor)}
        tensors = {id(x): x for _, x in own if isinstance(x, Tensor)}
        later.tensors, later.names = [*tensors.values(), *self.tensors], {**names, **self.names}
        versions = start.versions()
        later._versions = [versions[id(x)] for x in later.tensors]
        later._written = self._written.copy()
        later._lent = True
        return later

    def beside(self, other: Surroundings) -> Surroundings:
        """What two functions of one solve reach; it may be the same in part."""
        both = copy.copy(self)
        both.roots = {**self.roots, **other.roots}
        new = [i for i, x in enumerate(other.tensors) if id(x) not in self.names]
        both.tensors = [*self.tensors, *(other.tensors[i] for i in new)]
        both._versions = [*self._versions, *(other._versions[i] for i in new)]
        both.arrays = [*self.arrays, *other.arrays]
        both.names = {**other.names, **self.names}
        both.generators = list(dict.fromkeys([*self.generators, *other.generators]))
        both.lazy = self.lazy or other.lazy
        both.plain = self.plain and other.plain
        both.hooks, both.closed = self.hooks or other.hooks, self.closed or other.closed
        both.outside = [*self.outside, *other.outside]
        both.chosen = self.chosen if other.chosen is None else other.chosen
        modules = {id(x): (name, x) for name, x in (*other._modules, *self._modules)}
        both._modules = list(modules.values())
        roots = Names(both.roots, both.roots.copy(), "")
        both._places = [roots, *self._places[1:], *other._places[1:]]
        both._written = [*self._written, *other._written]
        both._lent, both._glance = True, None
        return both

    def within(self, f: Any) -> Surroundings:
        """The same for another field, which this one is made of: it reaches no more."""
        inner = copy.copy(self)
        inner.roots = roots = {**self.roots, "f": f}
        inner._places = [Names(roots, roots.copy(), ""), *self._places[1:]]
        self._lent = inner._lent = True
        inner._glance = None
        return inner

    def _own_places(self) -> None:
        """Settle no places that other solves look at too."""
        if self._lent:
            self._places, self._lent = [place.copy() for place in self._places], False
        self._glance = None

    @staticmethod
    def undisturbed() -> AbstractContextManager[object]:
        """A lock under which no sweep of another thread changes shared places."""
        return _lock

    def settle(self) -> list[Place]:
        """Called when the solve has run: the field itself has made the changes up to here.

        A field may count its calls, keep its last output, or update running statistics. Such
        entries are left to it.

        Returns:
            The changes of places, as `changes` has them.
        """
        if changes := self.changes():
            self._own_places()
            self.plain = False
            self.moved = [*changes, *self.moved]
            with _lock:
                for place in self._places:
                    if place.changed():
                        place.settle()
        now = versions_of(self.tensors)
        if now != self._versions:
            for i, x in enumerate(self.tensors):
                if now[i] != self._versions[i]:
                    self._versions[i] = None
                    self._written.append(x)
        return changes

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Let go of tensors that have turned out to be unused."""
        self._own_places()
        ids = {id(x) for x in tensors}
        kept = [i for i, x in enumerate(self.tensors) if id(x) not in ids]
        self.tensors = [self.tensors[i] for i in kept]
        self._versions = [self._versions[i] for i in kept]
        self._forget(lambda value: id(value) in ids)

    def _forget(self, test: Test) -> None:
        tainted: set[int] = set()

        def held(value: Any) -> bool:
            return test(value) or id(value) in tainted

        # Containers of such values are not held either.
        containers = [place for place in self._places if place.container is not None]
        while True:
            more = {
                id(place.container)
                for place in containers
                if any(holds(value, held) for value in place.values())
            }
            if more <= tainted:
                break
            tainted |= more
        self._places = [p for p in self._places if id(p.container) not in tainted]
        for place in self._places:
            place.forget(held)

    def still_hold(self, tensor: Tensor) -> bool:
        """Whether a tensor is still in one of the places."""
        return any(
            holds(value, lambda x: x is tensor)
            for place in self._places
            for value in place.values()
        )

    def keeps(self, tensor: Tensor) -> bool:
        """Whether a walk would reach a tensor now."""
        return id(tensor) in Surroundings(self.roots).names

    def training(self, kind: type[nn.Module]) -> list[str]:
        """The modules of a class that are in train mode, by name and class."""
        return [
            f"{name}: {type(module).__name__}"
            for name, module in self._modules
            if isinstance(module, kind) and module.training
        ]

    @property
    def hooked(self) -> bool:
        """Whether a module has hooks, or all modules have."""
        if self._modules and all_are_hooked():
            return True
        return any(map(any, map(_HOOKS, map(itemgetter(1), self._modules))))

    @property
    def written(self) -> list[Tensor]:
        """The tensors that the solve itself has changed in place, once it is settled."""
        return self._written

    def changed(self) -> bool:
        """Whether places hold other objects now."""
        if self._glance is not None:
            # It has not looked at the first, that of the roots.
            return self._places[0].changed() or not self._glance.stand()
        return any(place.changed() for place in self._places)

    def keeps_mapped(self) -> bool:
        """Whether a place has come to hold a tensor that was made inside of `torch.vmap`.

        Nothing can be done with it outside.
        """
        return self._has_come_to_hold(torch._C._functorch.is_batchedtensor)

    def keeps_graphs(self) -> bool:
        """Whether a place has come to hold a tensor that needs gradients."""
        return self._has_come_to_hold(lambda x: x.requires_grad)

    def _has_come_to_hold(self, test: Callable[[Tensor], bool]) -> bool:
        """Whether a tensor passes a test in a place that has changed, or in a container there."""

        if not self.changed():
            return False
        arrived = chain.from_iterable(place.arrived() for place in self._places)
        return any(_contains(value, test) for value in arrived)

    def changes(self) -> list[Place]:
        """Places that hold other objects now, with what they held: without graphs and solutions."""
        if not self.changed():
            return []
        changes = [place.only_changes() for place in self._places if place.changed()]
        for place in changes:
            place.forget(_holds_others)
        return changes

    def changed_in_place(self) -> list[Tensor]:
        """Tensors whose values have changed since the solve, used or not."""
        now = versions_of(self.tensors)
        if now == self._versions:
            return []
        return [
            x
            for x, version, then in zip(self.tensors, now, self._versions, strict=True)
            if then is not None and then != version
        ]

    @contextmanager
    def as_seen(self, stand_ins: StandIns | None = None) -> Iterator[None]:
        """Everything as the solve saw it, for the duration of a replay.

        Args:
            stand_ins: replacements for tensors, by their ids.
        """
        undo: list[Callable[[], None]] = []
        written = [(x, x.detach().clone()) for x in self._written]
        with _lock:
            try:
                for place in self._places if stand_ins or self.changed() else ():
                    back = place.restore(stand_ins or {})
                    if back is not None:
                        undo.append(back)
                yield
            finally:
                for back in reversed(undo):
                    back()
                if written:
                    with torch.no_grad():
                        for x, value in written:
                            # Not counted as a change: it is what it was.
                            x.data.copy_(value)

    def put_back(self) -> None:
        """Put back what has changed since, for good; functions let go of results they have kept."""
        with _lock:
            for place in self._places:
                place.restore({})
        for cache in self.grown():
            cache.cache_clear()

    def grown(self) -> list[Any]:
        """Functions that have been called and have kept their results since."""
        return [cache for cache, misses in self._caches if cache.cache_info().misses != misses]


class Glimpse:
    """Surroundings that are made when something asks, where they are those of an earlier solve.

    Args:
        roots: as of `Surroundings`.
    """

    __slots__ = ("_known", "_made", "_made_of", "_roots", "_versions")

    def __init__(self, roots: dict[str, Any]) -> None:
        with _lock:
            known = known_from(roots)
        known = None if known is None or known.counts else known
        self._begin(roots, known, Surroundings(roots) if known is None else None)

    @classmethod
    def with_note(cls, roots: dict[str, Any], note: Any) -> tuple[Known, Glimpse] | None:
        """What is known of a field with which an earlier solve has noted something, if there is.

        Args:
            roots: as of `Surroundings`.
            note: the key in its memory.
        """
        with _lock:
            known = known_from(roots, note)
        if known is None or known.counts:
            return None
        made = cls.__new__(cls)
        made._begin(roots, known, None)
        return known, made

    def _begin(self, roots: dict[str, Any], known: Known | None, made: Surroundings | None) -> None:
        self._roots, self._known, self._made = roots, known, made
        if known is not None:
            f, *_ = roots.values()
            # What a function captures may be other things by then.
            self._versions, self._made_of = versions_of(known.tensors), made_of(f)

    @property
    def counted(self) -> bool:
        """Whether torch has counted a change of a tensor, or something is not known."""
        known = self._known
        return known is None or versions_of(known.tensors) != self._versions

    @property
    def changed(self) -> bool:
        """The same, or whether places hold other objects."""
        known = self._known
        return known is None or known.changed(self._roots) or self.counted

    def settle(self) -> None:
        """As of `Surroundings`."""
        if self.changed:
            self.surroundings().settle()

    def surroundings(self) -> Surroundings:
        """The surroundings, as the solve saw them."""
        made, known = self._made, self._known
        if made is None:
            assert known is not None  # or it is made at once
            walk = known.walk(self._roots, self._made_of)
            self._made = made = Surroundings.of(self._roots, walk, self._versions)
        return made
