"""An exported graph, gone through node by node, as a program."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.state import StateSpec
from pysciml_node.translation.builder import (
    Builder,
    Joined,
    Traced,
    View,
)
from pysciml_node.translation.layers import HANDLERS
from pysciml_node.translation.program import Program
from pysciml_node.translation.snapshot import Snapshot

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


def label(f: Callable[..., Any]) -> str:
    """What a field is called in messages."""
    return type(f).__name__ if isinstance(f, nn.Module) else getattr(f, "__name__", repr(f))


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
        self.values: dict[str, Any] = {}

    def run(self) -> Program:
        """The program."""
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
        return label(self.field)

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
                    f"but returned {getattr(part, 'shape', part)}.\n"
                    "  Return du/dt, one entry for each of u."
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
