"""An exported graph, gone through node by node, as a program."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.modes import InModes
from pysciml_node.problems.state import StateSpec
from pysciml_node.steps.derived import DerivedField
from pysciml_node.translation.builder import Builder, Joined, Traced, View
from pysciml_node.translation.decompose import decomposed
from pysciml_node.translation.layers import HANDLERS
from pysciml_node.translation.lookups import LOOKUPS, SEARCHES, look_up
from pysciml_node.translation.moves import (
    ADDITIONS,
    MOVES,
    add,
    depends_on_state,
    fills,
    is_traced,
    move,
)
from pysciml_node.translation.names import (
    CASTS,
    CHECKS,
    UNDEFINED,
    VIEWS,
    arguments_of,
    has_numbers,
    instead_of,
    name_of,
)
from pysciml_node.translation.precision import computed_in, has_cast, in_single, rounded_cast
from pysciml_node.translation.program import Program
from pysciml_node.translation.reductions import Unknown
from pysciml_node.translation.snapshot import Snapshot

_SHORT = frozenset((torch.int8, torch.int16, torch.uint8))
"""Whole numbers that wrap around where those of programs do not."""

Values = dict[Node, Any]
"""What the nodes of a graph stand for."""


def label(f: Callable[..., Any]) -> str:
    """What a field is called in messages."""
    if isinstance(f, InModes):
        return label(f.function)
    if isinstance(f, DerivedField):
        return label(f.inner)
    kind = type(f).__name__
    return kind if isinstance(f, nn.Module) else getattr(f, "__name__", kind)


class GraphWalk:
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
        self.values: Values = {}

    def fix(self, read: list[Tensor]) -> None:
        """Note tensors whose numbers Python has read: they are part of the program."""
        self.fixed |= {self.places[id(x)] for x in read if id(x) in self.places}

    def flat(self, out: Any) -> Tensor:
        """What the field returns, as the program has it: one row of numbers."""
        return self.spec.flatten(out)

    def run(self) -> Program:
        """The program."""
        self._inputs()
        self._expect_dtype()
        return self.builder.finish(self._outputs(self._walk(self.exported.graph, self.values)))

    def _walk(self, graph: Graph, values: Values) -> Any:
        """Go through a graph whose inputs have values; returns what its results stand for."""
        for node in graph.nodes:
            if node.op == "call_function":
                values[node] = self._call(node, values)
            elif node.op == "output":
                return pytree.tree_map(functools.partial(_value, values), node.args[0])
        return None

    def _within(self, graph: Graph, operands: Sequence[Any]) -> Any:
        """Go through a graph inside this one."""
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        return self._walk(graph, dict(zip(inputs, operands, strict=True)))

    def _inputs(self) -> None:
        signature = self.exported.graph_signature
        if signature.user_inputs_to_mutate:
            raise UnsupportedModule(
                f"{self._name} changes its input in place, which is the solver's own: it needs a "
                "copy, for example u.neg() instead of u.neg_()."
            )
        parts = [self.builder.state_part(tuple(shape)) for shape in self.spec.shapes]
        order = pytree.tree_leaves(self.spec.assemble(list(range(len(parts)))))  # type: ignore[arg-type]
        arguments = iter([self.builder.time_view(), *(parts[i] for i in order), *self._further()])
        nodes = {node.name: node for node in self.exported.graph.nodes}
        for item in signature.input_specs:
            node = nodes.get(getattr(item.arg, "name", ""))
            if item.kind is InputKind.USER_INPUT:
                value = next(arguments)
            elif item.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                value = self._tensor(str(item.target), item.kind)
            elif item.kind is InputKind.CONSTANT_TENSOR:
                value = self._constant(str(item.target))
            else:
                continue
            if node is not None:
                self.values[node] = value

    def _further(self) -> Iterator[Any]:
        """The leaves of `p`: tensors are parameters of the program, numbers a part of it."""
        place = len(self.tensors)
        for i, leaf in enumerate([] if self.p is None else pytree.tree_leaves(self.p)):
            if not isinstance(leaf, Tensor):
                yield leaf
                continue
            self._expect_strided(leaf, "a leaf of p")
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
        return label(self.field)

    def _tensor(self, name: str, kind: InputKind) -> View:
        tensor = operator.attrgetter(name)(self.field)
        place = self.places.get(id(tensor))
        if place is None:
            raise UnsupportedModule(
                f"{self._name}.{name} is made anew each time it is looked at, and so cannot be "
                "followed."
            )
        self._expect_strided(tensor, name)
        trained = kind is InputKind.PARAMETER or tensor.requires_grad
        return self.builder.parameter(name, tuple(tensor.shape), place, trained)

    def _constant(self, name: str) -> View | Tensor:
        return self._reached(self.exported.constants[name], name)

    def _reached(self, tensor: Any, name: str) -> View | Tensor:
        """A tensor that the module reaches by other ways than its parameters and buffers."""
        if not isinstance(tensor, Tensor):
            raise UnsupportedModule(f"{self._name} uses {name}, which is not a tensor.")
        self._expect_strided(tensor, name)
        place = self._place(tensor)
        kept = tensor if place is None else self.tensors[place]
        # Of a captured parameter export may hand out one that requires no gradients; and one that
        # is frozen now may be set free.
        trained = kept.requires_grad or isinstance(kept, nn.Parameter)
        if place is not None and tensor.dtype == self.spec.dtype:
            return self.builder.parameter(name, tuple(kept.shape), place, trained)
        if tensor.requires_grad or (trained and not _counts(kept)):
            raise UnsupportedModule(
                f"{self._name} uses a tensor of shape {tuple(tensor.shape)} and dtype "
                f"{tensor.dtype} that can require gradients and "
                + (
                    f"is beside a state of {self.spec.dtype}: make both of one dtype."
                    if place is not None
                    else "is not one of its parameters."
                ),
                captured=True,
            )
        if place is not None:
            self.fixed.add(place)
        return tensor

    def _expect_strided(self, tensor: Tensor, name: str) -> None:
        if tensor.layout is not torch.strided:
            raise UnsupportedModule(
                f"{self._name} uses {name}, a tensor of the layout {tensor.layout}, which programs "
                "do not have."
            )

    def _place(self, tensor: Tensor) -> int | None:
        """The number of a tensor; of a captured parameter export hands out another one."""
        place = self.places.get(id(tensor))
        if place is None:
            same = (i for i, x in enumerate(self.tensors) if _is_alias(tensor, x))
            place = next(same, None)
        return place

    def _call(self, node: Node, values: Values) -> Any:
        value = functools.partial(_value, values)
        if node.target is operator.getitem:
            source, index = node.args
            return value(source)[index]
        if isinstance(node.target, HigherOrderOperator):
            return self._region(node, values)
        name = name_of(node.target)
        if name in CHECKS:
            return None
        given = pytree.tree_map(value, dict(arguments_of(node)))
        leaves = pytree.tree_leaves(given, is_leaf=is_traced)
        if any(isinstance(leaf, Unknown) for leaf in leaves):
            raise self._refusal(node)
        if not any(is_traced(leaf) for leaf in leaves):
            return self._evaluate(node, name, given)
        if name == "resolve_neg":  # all that is left of `x.tolist()`
            looked_at = {self.builder.source_of(x) for x in leaves if is_traced(x)}
            self.fixed |= {place for place in looked_at if place is not None}
        if name == "sym_size":
            return given["self"].shape[given["dim"]]
        numbers = (x for x in node.all_input_nodes if _is_number(x))
        if name != "select" and any(is_traced(values[x]) for x in numbers):
            raise self._refusal(node)
        dtype = computed_in(node, name)
        foreign = dtype not in (None, self.spec.dtype)
        if not _is_known(name) and not foreign:
            return self._taken_apart(node, values)
        if name in CASTS:
            (source, target), x = _dtypes(node), next(iter(given.values()))
            if target in _SHORT or not has_cast(source, target, self.spec.dtype):
                raise self._refusal(node, target)
            return rounded_cast(self.builder, self._trace(x), source, target)
        dtypes = {x.dtype for x in pytree.tree_leaves(node.meta.get("val")) if _is_tensor(x)}
        if name in SEARCHES and not self._reads(node):
            raise self._refusal(node)
        if foreign and (not _is_known(name) or name in ADDITIONS or fills(name, given)):
            raise self._refusal(node, dtype)
        moves = name in MOVES or name in ADDITIONS or name in LOOKUPS
        if moves and depends_on_state(given):
            return self._at_computed_places(node, name, given)
        if name in MOVES:
            return move(self.builder, name, node.target, given)  # type: ignore[arg-type]
        if name in ADDITIONS:
            return add(self.builder, name, given)
        if name in VIEWS:
            return self._view(node, self._traced(given))
        if not has_numbers(name, dtypes) and not isinstance(node.meta.get("val"), tuple):
            raise self._refusal(node)

        def call(given: dict[str, Any]) -> Any:
            return HANDLERS[name](self.builder, **self._traced(given))

        result = in_single(self.builder, node, given, values, call) if foreign else call(given)
        if result is None:
            raise self._refusal(node, dtype)
        return result

    def _at_computed_places(self, node: Node, name: str, given: dict[str, Any]) -> Any:
        """An operation whose places depend on the state, the time or the parameters."""
        whole = getattr(node.meta.get("val"), "dtype", None) != self.spec.dtype
        if name in LOOKUPS and not whole and self._reads(node, torch.int64, torch.int32):
            return look_up(self.builder, name, given)
        if name.endswith("index_put") and self._reads(node, torch.bool):
            return add(self.builder, name, given)
        raise self._refusal(node)

    def _reads(self, node: Node, *others: torch.dtype) -> bool:
        """Whether an operation reads the state's dtype alone, and others."""
        read = [x.meta.get("val") for x in node.all_input_nodes if not _is_number(x)]
        dtypes = {getattr(x, "dtype", None) for x in read}
        return dtypes <= {self.spec.dtype, *others}

    def _taken_apart(self, node: Node, values: Values) -> Any:
        """An operation by the smaller ones that torch makes of it."""
        graph = decomposed(node, _is_known)
        if graph is None:
            raise self._refusal(node)
        operands = [
            values[x] for x in pytree.arg_tree_leaves(*node.args, **node.kwargs) if _is_node(x)
        ]
        try:
            return self._within(graph, operands)
        except UnsupportedModule as error:
            raise self._refusal(node) from error

    def _region(self, node: Node, values: Values) -> Any:
        """Code that runs without gradients, or with them."""
        enabled, body, *operands = node.args
        if node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
            raise self._refusal(node)
        assert isinstance(body, Node)
        module = operator.attrgetter(str(body.target))(self.exported.graph_module)
        if not enabled and any(_is_region(inner) for inner in module.graph.nodes):
            raise self._refusal(node)
        outputs = self._within(module.graph, [_value(values, x) for x in operands])
        return outputs if enabled else pytree.tree_map(self._stopped, outputs, is_leaf=is_traced)

    def _stopped(self, x: Any) -> Any:
        return self.builder.unary("stop", x) if is_traced(x) else x

    def _traced(self, given: dict[str, Any]) -> dict[str, Any]:
        traced: dict[str, Any] = pytree.tree_map(self._trace, given, is_leaf=is_traced)
        return traced

    def _trace(self, argument: Any) -> Any:
        return self.builder.literal(argument) if isinstance(argument, Tensor) else argument

    def _refusal(self, node: Node, dtype: torch.dtype | None = None) -> UnsupportedModule:
        operation = str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        place = next(reversed(list(stack.values())), ("", ""))[0] if stack else ""
        where = f"{self._name}.{place}" if place else self._name
        other = "" if dtype is None else f" in {dtype} beside a state of {self.spec.dtype}"
        return UnsupportedModule(
            f"{where} uses {operation}{other}, which cannot be translated{instead_of(operation)}.",
            operation=operation,
        )

    def _evaluate(self, node: Node, name: str, given: dict[str, Any]) -> Any:
        """What does not depend on the state, time or parameters is computed now."""
        target = node.target
        if draws(node) or name in UNDEFINED or not callable(target):
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
            arguments = pytree.tree_map(_without_memory, given, is_leaf=is_traced)
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

    def _outputs(self, outputs: Sequence[Any]) -> list[Traced]:
        parts = self._parts(outputs)
        for part, shape in zip(parts, self.spec.shapes, strict=True):
            if part.shape != tuple(shape):
                raise ValueError(
                    f"{self._name} must return a derivative of the state's shape {tuple(shape)}, "
                    f"but returned {part.shape}.\n  Return du/dt, one entry for each of u."
                )
        return parts

    def _parts(self, outputs: Sequence[Any]) -> list[Traced]:
        """What is returned, by the parts of the state: tensors of its dtype."""
        structure, spec = self.exported.call_spec.out_spec, self.spec
        assert structure is not None
        if len(outputs) != structure.num_leaves:
            raise UnsupportedModule(
                f"{self._name} has its output changed by a hook of all modules, which meets the "
                "module that it is traced in, too; have the hook look at the class of its module."
            )
        returned = pytree.tree_unflatten([self._trace(x) for x in outputs], structure)
        parts = spec.parts(returned) if spec.matches(returned) else ()
        if not parts or not all(map(is_traced, parts)):
            kind = "a tensor" if spec.keys is None else f"tensors by {spec.keys}, the parts of u0"
            raise TypeError(
                f"{self._name} must return {kind}, but returned {_kind(returned)}.\n"
                "  A constant c is c * torch.ones_like(u)."
            )
        return list(parts)

    def _expect_dtype(self) -> None:
        """Refuse results of another dtype than the state's, in words about the results."""
        for node in pytree.tree_leaves(self.exported.graph.output_node().args):
            dtype = getattr(node.meta.get("val"), "dtype", None) if _is_node(node) else None
            if dtype not in (None, self.spec.dtype):
                raise TypeError(
                    f"{self._name} must return the state's dtype {self.spec.dtype}, but returned "
                    f"{dtype}.\n  Convert its parameters: module.to(u0.dtype)."
                )


def draws(node: Node) -> bool:
    """Whether an operation gives random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _kind(returned: Any) -> str:
    """What a field has returned, in messages."""
    if isinstance(returned, dict):
        return f"a dict of {list(returned)}"
    return "a tensor" if is_traced(returned) else type(returned).__name__


def _counts(x: Tensor) -> bool:
    """Whether its numbers are whole, and so never receive gradients."""
    return not (x.is_floating_point() or x.is_complex())


def _is_alias(x: Tensor, of: Tensor) -> bool:
    return (
        isinstance(of, nn.Parameter)
        and x.data_ptr() == of.data_ptr()
        and (x.shape, x.stride(), x.dtype) == (of.shape, of.stride(), of.dtype)
    )


def _value(values: Values, argument: Any) -> Any:
    return values[argument] if isinstance(argument, Node) else argument


def _is_node(x: Any) -> bool:
    return isinstance(x, Node)


def _is_number(node: Node) -> bool:
    """Whether a value is a number that was a tensor's, as in `x[i]`."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _is_region(node: Node) -> bool:
    return isinstance(node.target, HigherOrderOperator)


def _is_known(name: str) -> bool:
    """Whether an operation has a form of its own in programs."""
    return any(name in names for names in (HANDLERS, VIEWS, CHECKS, CASTS, MOVES, ADDITIONS))


def _dtypes(node: Node) -> tuple[torch.dtype, torch.dtype]:
    """Of the first argument of an operation, and of its result."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source.meta["val"].dtype, node.meta["val"].dtype


def _without_memory(value: Any) -> Any:
    return torch.empty(value.shape, device="meta") if is_traced(value) else value


def _extent(view: View) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))
