"""Fields made of derivatives, another one's or their own, as one graph of operations."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from typing_extensions import override

from pysciml_node.problems.state import StateSpec, map_tensors
from pysciml_node.steps.derived import DerivedField
from pysciml_node.translation.graph import GraphWalk, Values, draws
from pysciml_node.translation.operations import refuse
from pysciml_node.translation.program import Program

_library: Any = torch.library.Library("pysciml_node", "DEF")  # type: ignore[no-untyped-call]
_library.define("stop(Tensor x) -> Tensor")
_library.impl("stop", Tensor.clone, "CompositeExplicitAutograd")


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Batch normalization by running statistics, which are constants.

    Torch's own makes a buffer for its derivative, which programs do not have.
    """
    if training or running_mean is None or running_var is None:
        raise refuse("batch normalization by the statistics of the batch", "aten.batch_norm")
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = scale * weight
    shape = 1, -1, *[1] * (input.ndim - 2)
    out = (input - running_mean.view(shape)) * scale.view(shape)
    return out if bias is None else out + bias.view(shape)


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What an entry becomes that is assigned; torch has no derivative of this form of its own."""
    return source.to(x).expand_as(x)


_DIFFERENTIABLE = {
    torch.ops.aten.batch_norm.default: _batch_norm,
    torch.ops.aten.copy.default: _copy,
}
"""Operations whose derivatives torch has in another form, or not at all."""


class _Stops(TorchFunctionMode):
    """Marks values through which no gradient goes.

    Autograd detaches what it keeps for its backward pass: in a recording these calls look like
    those of the field, and yet gradients of a higher order go through.
    """

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = _DIFFERENTIABLE.get(func, func)
        out = func(*args, **(kwargs or {}))
        stops = func in (Tensor.detach, torch.detach, torch.ops.aten.detach.default)
        if stops or not torch.is_grad_enabled():
            return map_tensors(lambda x: torch.ops.pysciml_node.stop(x.detach()), out)
        return out


@dataclass(frozen=True)
class Differentiated:
    """One graph of a derived field.

    Attributes:
        graph: takes what the exported one takes, the further parts of the state, and `held`; its
            results are the parts of the derivative.
        held: tensors that the derived field has beside those of the other one, such as probes.
    """

    graph: Graph
    held: list[Tensor]


def differentiated(
    exported: ExportedProgram, field: DerivedField, spec: StateSpec
) -> Differentiated:
    """The graph of a derived field.

    Args:
        exported: the field that it is derived from.
        field: the derived field.
        spec: structure of its state.
    """
    inputs = [node for node in exported.graph.nodes if node.op == "placeholder"]
    names = [node.name for node in inputs]
    items = exported.graph_signature.input_specs
    given = [names.index(item.arg.name) for item in items if item.kind is InputKind.USER_INPUT]
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    count = len(field.spec.shapes)

    def derivative(*arguments: Any) -> list[Tensor]:
        operands = list(arguments[: len(inputs)])
        t, *own = (operands[place] for place in given[: 1 + count])
        # The parts of a state in the order of pytrees, which need not be its own.
        order = pytree.tree_leaves(field.spec.assemble(list(range(count))))  # type: ignore[arg-type]
        own = [own[order.index(i)] for i in range(count)]

        def inner(t: Tensor, u: Any) -> Any:
            leaves = [t, *pytree.tree_leaves(u)]
            filled = list(operands)
            for place, x in zip(given, leaves, strict=False):
                filled[place] = x
            return pytree.tree_unflatten(list(exported.graph_module(*filled)), out_spec)

        state = spec.assemble([*own, *arguments[len(inputs) :]])
        with torch.enable_grad(), _Stops():
            out = field.derive(t, state, inner)
        return list(spec.parts(out))

    examples = [_example(node.meta["val"]) for node in inputs]
    further = [torch.zeros(s, dtype=spec.dtype, device=spec.device) for s in spec.shapes[count:]]
    return Differentiated(*_one_graph(derivative, [*examples, *further]))


def with_derivatives(f: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """A function in whose graph the derivatives that it takes inside are operations like others.

    Such are `torch.autograd.grad` with `create_graph=True`, and the transforms of `torch.func`.

    Args:
        f: the function.
        arguments: what it is called with: trees of tensors and other values.
    """
    leaves, structure = pytree.tree_flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    returned: list[pytree.TreeSpec] = []

    def flat(*tensors: Any) -> list[Any]:
        filled = list(leaves)
        for place, x in zip(places, tensors, strict=True):
            filled[place] = x
        with torch.enable_grad(), _Stops():
            out = f(*pytree.tree_unflatten(filled, structure))
        parts, spec = pytree.tree_flatten(out)
        returned.append(spec)
        return parts

    graph, held = _one_graph(flat, [leaves[i].detach().requires_grad_() for i in places])
    for node in [node for node in graph.nodes if node.target is torch.ops.aten.detach.default]:
        node.replace_all_uses_with(node.args[0])  # autograd's own: the field's are stops
        graph.erase_node(node)
    if any(map(changes_argument, graph.nodes)):
        what = (
            "a field that takes derivatives inside and changes what it holds or is given in place"
        )
        raise refuse(what, "aten.copy_")
    module = GraphModule({}, graph)

    def with_operations(*given: Any) -> Any:
        tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
        return pytree.tree_unflatten(module(*tensors, *held), returned[0])

    return with_operations


def _one_graph(function: Callable[..., Any], examples: list[Any]) -> tuple[Graph, list[Tensor]]:
    """The graph of a function's operations, and the tensors that it takes beside its arguments."""
    # Without a table of its own, torch 2.14 and later write an alias for each detach.
    trace = functools.partial(
        make_fx, decomposition_table={}, tracing_mode="fake", _allow_non_fake_inputs=True
    )
    module = trace(function)(*examples)
    if any(map(_writes_beyond_a_stop, module.graph.nodes)):
        what = "a field that changes in place what a detached tensor shares the memory of"
        raise refuse(what, "aten.copy_")
    held = _lifted(module)
    if any(changes_argument(node) for node in module.graph.nodes):
        # With a generator of the field's own, that ends in a crash of Python, in torch 2.13.
        if any(map(draws, module.graph.nodes)):
            raise refuse("a field that draws random numbers", "aten.randn")
        apart = torch.func.functionalize(module, remove="mutations")
        module = trace(apart)(*map(_example, [*examples, *held]))
    return module.graph, held


def _lifted(module: GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that a graph holds; returns them."""
    graph, held = module.graph, dict[str, Node]()
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    tensors = []
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        if name not in held:
            tensors.append(getattr(module, name))
            with graph.inserting_after(last):
                last = held[name] = graph.placeholder(name)
            last.meta.update(node.meta)
        node.replace_all_uses_with(held[name])
        graph.erase_node(node)
    module.recompile()
    return tensors


def changes_argument(node: Node) -> bool:
    """Whether an operation writes to what it is given."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _writes_beyond_a_stop(node: Node) -> bool:
    """Whether an operation writes to memory that others read on the far side of a stop.

    In a graph a stop is a copy; the detached tensor of the field was none.
    """
    if not changes_argument(node):
        return False
    taken = node.target._schema.arguments  # type: ignore[union-attr]
    values = [node.kwargs.get(x.name, y) for x, y in zip_longest(taken, node.args)]
    changed = [
        y for x, y in zip(taken, values, strict=True) if x.alias_info and x.alias_info.is_write
    ]
    return any(
        _is_seen_beyond_a_stop(x) for x in pytree.tree_leaves(changed) if isinstance(x, Node)
    )


def _is_seen_beyond_a_stop(node: Node) -> bool:
    """Whether the memory of a value has other readers, behind a stop that leads to it."""
    stopped = False
    while node.op == "call_function" and (stops := _stops(node)) is not None:
        stopped, node = stopped or stops, node.args[0]  # type: ignore[assignment]
        if stopped and len(node.users) > 1:
            return True
    return stopped and node.op != "call_function"


def _stops(node: Node) -> bool | None:
    """Whether a value is a stop; nothing where it has memory of its own."""
    if node.target is torch.ops.pysciml_node.stop.default:
        return True
    schema = getattr(node.target, "_schema", None)
    shares = node.target is operator.getitem or (
        schema and any(x.alias_info for x in schema.returns)
    )
    return False if shares and node.args and isinstance(node.args[0], Node) else None


def _example(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device)


class DerivedWalk(GraphWalk):
    """Goes through the graph of a derived field.

    Args:
        walked: the field that it is derived from, and the further arguments of its walk.
        whole: structure of the derived field's state.
        derived: its graph.
    """

    def __init__(self, *walked: Any, whole: StateSpec, derived: Differentiated) -> None:
        super().__init__(*walked)
        self._whole, self._derived = whole, derived

    @override
    def flat(self, out: Any) -> Tensor:
        return self._whole.flatten(out)

    @override
    def run(self) -> Program:
        self._inputs()
        inputs = [node for node in self.exported.graph.nodes if node.op == "placeholder"]
        further = self._whole.shapes[len(self.spec.shapes) :]
        operands = [
            *(self.values.get(node) for node in inputs),
            *(self.builder.state_part(tuple(shape)) for shape in further),
            *(self._reached(x, f"constant {i}") for i, x in enumerate(self._derived.held)),
        ]
        parts = self._within(self._derived.graph, operands)
        return self.builder.finish([self._trace(part) for part in parts])

    @override
    def _call(self, node: Node, values: Values) -> Any:
        if node.target is torch.ops.aten.detach.default:
            return values[node.args[0]]  # type: ignore[index]
        return super()._call(node, values)
