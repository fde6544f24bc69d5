"""A walk through everything that a field can reach."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable
from typing import Any

from typing_extensions import override

from pysciml_node.steps.behind import held_by, without_graph
from pysciml_node.steps.further import Glance
from pysciml_node.steps.plain import are_plain, may_hook
from pysciml_node.steps.visits import Visit, Visits, visit_of

# Limits of the objects to visit, and of those behind what is not looked into. Whatever lies beyond
# is left to the check of every evaluation.
_MOST_OBJECTS = 20_000
_MOST_BEHIND = 1_000


class Walk(Visits):
    """Modules with their parameters, buffers and other attributes, closures, partials, bound
    methods and their owners, globals named in the code, attributes, slots, and the contents of
    containers, at any depth.

    Args:
        roots: the objects to begin with, by name.
        own: further ones that are not to be kept alive by what is kept of the walk.

    Attributes:
        plain: whether a field that begins here is: see `are_plain`.
        hooks: whether it registers some, likewise: see `may_hook`.
        glance: a quick look at the places but the first, of a walk that is kept.
        memory: what others keep with it, by keys of their own.
    """

    glance: Glance | None = None

    def __init__(self, roots: dict[str, Any], own: Iterable[Any] = ()) -> None:
        super().__init__({*map(id, roots.values()), *map(id, own)})
        self.memory = dict[Any, Any]()
        self._todo: deque[tuple[Visit, Any, str]] = deque()
        self._most = _MOST_OBJECTS
        self._attributes(roots, "")
        self.places.append(self._empty)
        self._go()
        self.plain = self.further.lasts and are_plain(self._visited.values())
        self.hooks = not self.plain and may_hook(self._visited.values())
        self._look_behind()

    def _go(self) -> None:
        """Visit what is in the queue, and all that it leads to."""
        while self._todo:
            visit, value, name = self._todo.popleft()
            visit(self, value, name)

    def _look_behind(self) -> None:
        """Find what is held by objects that are not looked into, to be compared.

        It has no places: it is neither put back nor replaced.
        """
        walk = copy.copy(self)
        walk.tensors, walk.arrays, walk.names = [], [], {}
        walk.modules, walk.scripts, walk.written, walk.places = [], [], [], []
        walk.outside = []
        walk._most = len(self._visited) + _MOST_BEHIND
        while walk._shut:
            value, name = walk._shut.pop()
            for x in held_by(value):
                walk._see(x, name)
            walk._go()
        for x in (*walk.tensors, *walk.arrays):
            self.arrays.append(shared := without_graph(x))
            self.names[id(shared)] = walk.names[id(x)]

    def let_go(self) -> None:
        """Hold nothing but what the attributes say, and no field."""
        self.places, self.modules = [], []
        self._visited, self._roots, self._entered, self._classes = {}, set(), set(), set()

    @override
    def _see(self, value: Any, name: str) -> None:
        if (visit := visit_of(type(value))) is None:
            return
        if id(value) in self._visited or len(self._visited) > self._most:
            # What is kept of a walk must not keep the field alive.
            if id(value) not in self._visited:
                self._pass_over()
            elif id(value) in self._roots:
                self.further.lasts = False
            return
        self._visited[id(value)] = value
        self._todo.append((visit, value, name))
