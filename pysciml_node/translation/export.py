"""Fields as programs: `torch.export`, then one operation after another."""

from __future__ import annotations

import functools
import logging
import operator
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.state import StateSpec, map_tensors
from pysciml_node.translation.builder import (
    Builder,
    Joined,
    Traced,
    View,
)
from pysciml_node.translation.check import check_program
from pysciml_node.translation.layers import HANDLERS
from pysciml_node.translation.program import Program
from pysciml_node.translation.recent import Recent
from pysciml_node.translation.snapshot import Snapshot, reference

VIEWS = {
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t"),
    *("numpy_T", "mT", "expand", "expand_as", "view_as", "reshape_as", "select", "slice", "narrow"),
    *("unbind", "split", "split_with_sizes", "chunk", "tensor_split", "unsqueeze", "squeeze"),
    *("movedim", "swapaxes", "swapdims", "diagonal", "ravel", "broadcast_to"),
}
"""Operations whose results are views of their first argument, or copies in the same order."""

CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range"}
"""Operations without a result."""

UNDEFINED = {"empty", "empty_like", "new_empty", "empty_strided"}


@dataclass(frozen=True)
class TranslatedModule:
    """A module as other engines evaluate it.

    Attributes:
        json: the program.
        parameters: the module's parameters, buffers and constants in the order of the flat vector
            that the program reads.
        program: the program as data.
    """

    json: str
    parameters: list[Tensor]
    program: Program


@dataclass(frozen=True)
class _Translation:
    """A program, and where the tensors that it reads are found.

    Attributes:
        sources: numbers of tensors in a snapshot, or constants.
    """

    program: Program
    json: str
    sources: tuple[int | Tensor, ...]

    @property
    def places(self) -> list[int]:
        """The numbers among the sources."""
        return [source for source in self.sources if isinstance(source, int)]

    def with_tensors(self, tensors: list[Tensor]) -> TranslatedModule:
        """With the module's tensors as they are now."""
        parameters = [x if isinstance(x, Tensor) else tensors[x] for x in self.sources]
        return TranslatedModule(self.json, parameters, self.program)


@dataclass(frozen=True)
class _Outcome:
    """What became of a field: a translation, or why there is none, and for which state of it.

    Attributes:
        kind: structure of the state and of `p`.
        tokens: of the snapshot that was taken.
        passing: places of the snapshot that an evaluation changes by itself, such as a count.
        contents: numbers of tensors whose entries are part of the program, with those entries.
        result: the translation, or the words of the refusal.
    """

    kind: Any
    tokens: list[Any]
    passing: frozenset[int]
    contents: tuple[tuple[int, Tensor], ...]
    result: _Translation | tuple[str, str | None, bool]

    def holds(self, kind: Any, now: Snapshot) -> bool:
        """Whether the field is still what it was."""
        if kind != self.kind or not self._same(now.tokens):
            return False
        return all(torch.equal(now.tensors[i], x) for i, x in self.contents)

    def _same(self, tokens: list[Any]) -> bool:
        if tokens is self.tokens:  # a second look found nothing new
            return True
        if not self.passing or len(tokens) != len(self.tokens):
            return tokens == self.tokens
        pairs = enumerate(zip(tokens, self.tokens, strict=True))
        return all(i in self.passing or now == before for i, (now, before) in pairs)


_MOST = 64
"""Translations that are kept of a module."""

_SMALL = 1024
"""Entries of a tensor that are looked at though the program does not use them: `item` might."""

_FIELDS = 256
"""Fields whose translations are kept."""

_CACHE: Recent[int, tuple[Any, deque[_Outcome]]] = Recent(_FIELDS)
"""By identity, for equal fields are not the same one; a field is not kept alive."""

# torch.export, and the silence around it, are the process's own: one thread at a time.
_lock = threading.RLock()


class _Called(nn.Module):
    """A callable as the module that torch.export takes."""

    f: Callable[..., Any]

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        # Past `__setattr__`: what it holds are no parts of this module.
        self.__dict__["f"] = f

    def forward(self, *inputs: Any) -> Any:
        """Call it."""
        return self.f(*inputs)


def _anchor(f: Callable[..., Any]) -> Any:
    """What translations are kept with: the code of a function, which may be made many times."""
    return getattr(getattr(f, "__func__", f), "__code__", f)


def kept(f: Callable[..., Any]) -> deque[_Outcome]:
    """What is kept of a field, the newest first; empty for one that is new."""
    anchor = _anchor(f)
    entry = _CACHE.get(id(anchor))
    if entry is None or entry[0]() is not anchor:
        forget = functools.partial(_forget, id(anchor))
        entry = _CACHE[id(anchor)] = (reference(anchor, forget), deque(maxlen=_MOST))
    return entry[1]


def _forget(key: int, gone: object) -> None:
    del gone
    _CACHE.pop(key)


def _label(f: Callable[..., Any]) -> str:
    """What a field is called in messages."""
    return type(f).__name__ if isinstance(f, nn.Module) else getattr(f, "__name__", repr(f))


def _leaves(p: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a field's extra argument, and all else that a program of it depends on."""
    if p is None:
        return [], None
    leaves, structure = pytree.tree_flatten(p)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    return tensors, (
        structure,
        [
            (x.dtype, x.shape, x.device, x.requires_grad) if isinstance(x, Tensor) else (type(x), x)
            for x in leaves
        ],
    )


def translate(module: Callable[..., Any], spec: StateSpec, p: Any = None) -> TranslatedModule:
    r"""A vector field `module(t, u)`, or `module(t, u, p)`, as a program.

    The field is exported once for every structure of the state, and again when anything has
    changed that it can reach: attributes of any kind, globals, closures, hooks, training mode,
    which weights are tied. Parameters, buffers and other tensors of the state's dtype are read at
    each call, so training needs no new translation, and a context may be another tensor each time.

    Args:
        module: called with the time, a 0-d tensor, and the state; gives the derivative. A module,
            or any other callable.
        spec: structure of the state.
        p: extra argument: a tensor, or a tuple, list or dict of tensors and numbers.

    Returns:
        The program, and the tensors that it depends on.

    Raises:
        UnsupportedModule: an operation that programs do not have, control flow that depends on the
            numbers, or a derivative that is not that of the operations.

    Examples:
        >>> import torch
        >>> from pysciml_node.problems.state import StateSpec, map_tensors
        >>> class Field(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(3, 2)
        ...     def forward(self, t, u):
        ...         return torch.tanh(self.layer(torch.cat([u, t.expand(4, 1)], 1)))
        >>> translated = translate(Field(), StateSpec.of(torch.zeros(4, 2)))
        >>> [step.op for step in translated.program.operations]
        ['linear']
        >>> [tuple(x.shape) for x in translated.parameters]
        [(2, 3), (2,)]
    """
    tensors, structure = _leaves(p)
    kind = (spec, structure)
    with _lock:
        outcomes = kept(module)
        now = Snapshot.of(module)
        outcome = next((x for x in outcomes if x.holds(kind, now)), None)
        if outcome is None:
            outcome = _outcome(module, spec, p, kind, now)
            outcomes.appendleft(outcome)
            now = Snapshot.of(module)
    if not isinstance(outcome.result, _Translation):
        message, operation, captured = outcome.result
        raise UnsupportedModule(message, operation, captured)
    return outcome.result.with_tensors([*now.tensors, *tensors])


def _outcome(
    module: Callable[..., Any], spec: StateSpec, p: Any, kind: Any, before: Snapshot
) -> _Outcome:
    result: _Translation | tuple[str, str | None, bool]
    used: set[int] = set()
    try:
        result, used = _translate(module, spec, p, before)
    except UnsupportedModule as error:
        result = (error.message, error.operation, error.captured)
    after = Snapshot.of(module)
    contents = tuple(
        (i, x.detach().clone())
        for i, x in enumerate(after.tensors)
        if i in used or (x.numel() <= _SMALL and not _is_source(i, x, result))
    )
    return _Outcome(kind, after.tokens, before.changes(after), contents, result)


def _is_source(i: int, x: Tensor, result: Any) -> bool:
    if isinstance(x, nn.Parameter):
        return True
    return isinstance(result, _Translation) and i in result.places


def _translate(
    f: Callable[..., Any], spec: StateSpec, p: Any, snapshot: Snapshot
) -> tuple[_Translation, set[int]]:
    """The translation, and the numbers of the tensors whose entries are part of it."""
    if spec.dtype.is_complex:
        raise UnsupportedModule("modules of complex states cannot be translated.")
    with torch.inference_mode(False), _full_precision(spec.device):
        exported = _export(f, spec, p)
        walk = _Walk(f, spec, exported, snapshot, p)
        program = walk.run()
        sources = tuple(walk.builder.tensors)
        translation = _Translation(program, program.to_json(), sources)
        parameters = translation.with_tensors([*snapshot.tensors, *_leaves(p)[0]]).parameters
        further = () if p is None else (p,)
        check_program(lambda t, u: f(t, u, *further), _label(f), spec, program, parameters)
    return translation, walk.fixed


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Without autocast: programs compute in the state's dtype."""
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield


def _export(f: Callable[..., Any], spec: StateSpec, p: Any) -> ExportedProgram:
    parts = [torch.zeros(s, dtype=spec.dtype, device=spec.device) for s in spec.shapes]
    t = torch.zeros((), dtype=spec.dtype, device=spec.device)
    try:
        with _quietly(), torch.enable_grad():
            further = () if p is None else (map_tensors(_leaf, p),)
            module = f if isinstance(f, nn.Module) else _Called(f)
            arguments = (t, spec.assemble(parts), *further)
            exported = torch.export.export(module, arguments, strict=False)
            if any(_changes_argument(node) for node in exported.graph.nodes):
                exported = exported.run_decompositions({})
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise UnsupportedModule(
            f"{_label(f)} cannot be exported by torch.export: {reason}"
        ) from error
    return exported


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch.export prints of a module that it cannot export."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _changes_argument(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


class _Walk:
    """Goes through an exported graph, with what every node stands for."""

    def __init__(
        self,
        field: Callable[..., Any],
        spec: StateSpec,
        exported: ExportedProgram,
        snapshot: Snapshot,
        p: Any,
    ) -> None:
        self.field = field
        self.p = p
        self.spec = spec
        self.exported = exported
        self.builder = Builder(spec.dtype)
        # Tensors by identity: export hands out the very tensors that the module holds.
        self.tensors = snapshot.tensors
        self.places = {id(x): i for i, x in enumerate(snapshot.tensors)}
        self.fixed: set[int] = set()
        # A tensor is known now, whatever the state; other values are traced.
        self.values: dict[str, Any] = {}

    def run(self) -> Program:
        self._inputs()
        for node in self.exported.graph.nodes:
            if node.op == "call_function":
                self.values[node.name] = self._call(node)
        return self.builder.finish(self._outputs())

    def _inputs(self) -> None:
        signature = self.exported.graph_signature
        if signature.buffers_to_mutate:
            names = ", ".join(signature.buffers_to_mutate.values())
            raise UnsupportedModule(
                f"{self._name} changes its buffers ({names}) when it is evaluated."
            )
        parts = [self.builder.state_part(tuple(shape)) for shape in self.spec.shapes]
        order = pytree.tree_leaves(self.spec.assemble(list(range(len(parts)))))  # type: ignore[arg-type]
        arguments = iter([self.builder.time_view(), *(parts[i] for i in order), *self._further()])
        for item in signature.input_specs:
            name = getattr(item.arg, "name", "")
            if item.kind is InputKind.USER_INPUT:
                self.values[name] = next(arguments)
            elif item.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.values[name] = self._tensor(str(item.target), item.kind)
            elif item.kind is InputKind.CONSTANT_TENSOR:
                self.values[name] = self._constant(str(item.target))

    def _further(self) -> Iterator[Any]:
        """The leaves of `p`: tensors are parameters of the program, numbers a part of it."""
        place = len(self.tensors)
        for i, leaf in enumerate([] if self.p is None else pytree.tree_leaves(self.p)):
            if not isinstance(leaf, Tensor):
                yield leaf
                continue
            if leaf.dtype != self.spec.dtype:
                raise UnsupportedModule(
                    f"{self._name} takes a p of dtype {leaf.dtype} beside a state of "
                    f"{self.spec.dtype}, which cannot be translated."
                )
            shape = tuple(leaf.shape)
            yield self.builder.parameter(f"p[{i}]", shape, place, leaf.requires_grad)
            place += 1

    @property
    def _name(self) -> str:
        return _label(self.field)

    def _tensor(self, name: str, kind: InputKind) -> View:
        tensor = operator.attrgetter(name)(self.field)
        place = self.places.get(id(tensor))
        if place is None:
            raise UnsupportedModule(
                f"{self._name}.{name} is made anew each time it is looked at, and so cannot be "
                "followed."
            )
        trained = kind is InputKind.PARAMETER or tensor.requires_grad
        return self.builder.parameter(name, tuple(tensor.shape), place, trained)

    def _constant(self, name: str) -> View | Tensor:
        """A tensor that the module reaches by other ways than its parameters and buffers."""
        tensor = self.exported.constants[name]
        if not isinstance(tensor, Tensor):
            raise UnsupportedModule(f"{self._name} uses {name}, which is not a tensor.")
        place = self._place(tensor)
        if place is not None and tensor.dtype == self.spec.dtype:
            kept = self.tensors[place]
            trained = kept.requires_grad or isinstance(kept, nn.Parameter)
            return self.builder.parameter(name, tuple(kept.shape), place, trained)
        if tensor.requires_grad:
            raise UnsupportedModule(
                f"{self._name} uses a tensor of shape {tuple(tensor.shape)} and dtype "
                f"{tensor.dtype} that requires gradients and is not one of its parameters.",
                captured=True,
            )
        if place is not None:
            self.fixed.add(place)
        return tensor

    def _place(self, tensor: Tensor) -> int | None:
        """The number of a tensor; of a captured parameter export hands out another one."""
        place = self.places.get(id(tensor))
        if place is None:
            same = (i for i, x in enumerate(self.tensors) if _is_alias(tensor, x))
            place = next(same, None)
        return place

    def _call(self, node: Node) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, Node)
            return self.values[source.name][index]
        if isinstance(node.target, HigherOrderOperator):
            raise self._refusal(node)
        name = _operation_name(node)
        if name in CHECKS:
            return None
        given = pytree.tree_map(self._value, dict(_arguments(node)))
        leaves = pytree.tree_leaves(given, is_leaf=_is_traced)
        if not any(_is_traced(leaf) for leaf in leaves):
            return self._evaluate(node, name, given)
        if name in ("detach", "detach_"):
            raise self._refusal(node)
        given = pytree.tree_map(self._trace, given, is_leaf=_is_traced)
        if name in VIEWS:
            return self._view(node, given)
        if name not in HANDLERS or not _is_real(node):
            raise self._refusal(node)
        return HANDLERS[name](self.builder, **given)

    def _value(self, argument: Any) -> Any:
        return self.values[argument.name] if isinstance(argument, Node) else argument

    def _trace(self, argument: Any) -> Any:
        return self.builder.literal(argument) if isinstance(argument, Tensor) else argument

    def _refusal(self, node: Node) -> UnsupportedModule:
        operation = str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        place = next(reversed(list(stack.values())), ("", ""))[0] if stack else ""
        where = f"{self._name}.{place}" if place else self._name
        return UnsupportedModule(
            f"{where} uses {operation}, which cannot be translated.", operation=operation
        )

    def _evaluate(self, node: Node, name: str, given: dict[str, Any]) -> Any:
        """What does not depend on the state, time or parameters is computed now."""
        target = node.target
        random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
        if random or name in UNDEFINED or not callable(target):
            raise self._refusal(node)
        positional = [*given.values()][: len(node.args)]
        named = {key: given[key] for key in node.kwargs}
        return target(*positional, **named)

    def _view(self, node: Node, given: dict[str, Any]) -> Any:
        """Follow a view by doing the same to a tensor without memory."""
        x = next(iter(given.values()))
        view = self.builder.whole(x) if isinstance(x, Joined) else x
        for attempt in (view, None):
            source = attempt if attempt is not None else self.builder.whole(view)
            base = torch.empty(source.offset + _extent(source), device="meta")
            arguments = pytree.tree_map(_without_memory, given, is_leaf=_is_traced)
            own = base.as_strided(source.shape, source.stride, source.offset)
            positional = [own, *list(arguments.values())[1 : len(node.args)]]
            named = {key: arguments[key] for key in node.kwargs}
            target: Callable[..., Any] = node.target  # type: ignore[assignment]
            try:
                results = target(*positional, **named)
            except RuntimeError:
                # Torch's own tensor lies in memory in another way: with a copy it is a view.
                continue
            several: Sequence[Tensor] = [results] if isinstance(results, Tensor) else results
            storage = base.untyped_storage()._cdata
            if all(out.untyped_storage()._cdata == storage for out in several):
                views = [
                    View(
                        source.id, tuple(out.shape), tuple(out.stride()), int(out.storage_offset())
                    )
                    for out in several
                ]
                return views[0] if isinstance(results, Tensor) else views
        raise self._refusal(node)

    def _outputs(self) -> list[Traced]:
        last = next(node for node in self.exported.graph.nodes if node.op == "output")
        results = [self._trace(self._value(argument)) for argument in last.args[0]]
        structure = self.exported.call_spec.out_spec
        assert structure is not None
        derivative = pytree.tree_unflatten(results, structure)
        try:
            parts = self.spec.parts(derivative)
        except (KeyError, IndexError, TypeError) as error:
            raise UnsupportedModule(
                f"{self._name} must return the parts of the state, {self.spec.keys}, but returned "
                f"{type(derivative).__name__}."
            ) from error
        for part, shape in zip(parts, self.spec.shapes, strict=True):
            if not _is_traced(part) or part.shape != tuple(shape):
                raise ValueError(
                    f"{self._name} must return a derivative of the state's shape {tuple(shape)}, "
                    f"but returned {getattr(part, 'shape', part)}."
                )
        return list(parts)


def _is_alias(x: Tensor, of: Tensor) -> bool:
    return (
        isinstance(of, nn.Parameter)
        and x.data_ptr() == of.data_ptr()
        and (x.shape, x.stride(), x.dtype) == (of.shape, of.stride(), of.dtype)
    )


def _is_traced(value: Any) -> bool:
    return isinstance(value, View | Joined)


def _without_memory(value: Any) -> Any:
    return torch.empty(value.shape, device="meta") if _is_traced(value) else value


def _extent(view: View) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))


def _operation_name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.rpartition("::")[2] if schema is not None else str(node.target)


def _arguments(node: Node) -> list[tuple[str, Any]]:
    """The arguments of a call by name, with the defaults of the operation."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        named = [(str(i), value) for i, value in enumerate(node.args)]
        return [*named, *node.kwargs.items()]
    values = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    return [
        (a.name, values.get(a.name, node.kwargs.get(a.name, a.default_value)))
        for a in schema.arguments
    ]


def _is_real(node: Node) -> bool:
    """Whether the results are floating-point tensors."""
    results = node.meta.get("val")
    return all(
        out.is_floating_point() for out in pytree.tree_leaves(results) if isinstance(out, Tensor)
    )
