"""Modules as programs for Julia: `torch.export`, then one operation after another."""

from __future__ import annotations

import logging
import operator
import warnings
import weakref
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
from pysciml_node.problems.state import StateSpec
from pysciml_node.translation.builder import (
    Builder,
    Joined,
    Traced,
    View,
)
from pysciml_node.translation.check import check_program
from pysciml_node.translation.layers import HANDLERS
from pysciml_node.translation.program import Program

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
    """A module as Julia evaluates it.

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
    program: Program
    json: str
    sources: tuple[Tensor | str, ...]

    def of(self, module: nn.Module) -> TranslatedModule:
        """With the module's tensors as they are now."""
        tensors = [
            _attribute(module, source) if isinstance(source, str) else source
            for source in self.sources
        ]
        return TranslatedModule(self.json, tensors, self.program)


def _attribute(module: nn.Module, path: str) -> Tensor:
    """A tensor by its dotted name; past `__getattr__`, as this happens at every solve."""
    *parts, name = path.split(".")
    owner: Any = module
    for part in parts:
        owner = owner._modules.get(part) or getattr(owner, part)
    tensor: Tensor | None = owner._parameters.get(name)
    return operator.attrgetter(path)(module) if tensor is None else tensor


def _modes(module: nn.Module) -> list[bool]:
    """Whether the module and its parts are in training mode."""
    modes = [module.training]
    for part in module._modules.values():
        if part is not None:
            modes += _modes(part)
    return modes


_CACHE: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Translation]] = weakref.WeakKeyDictionary()


def translate(module: nn.Module, spec: StateSpec) -> TranslatedModule:
    r"""A vector field `module(t, u)` as a program for Julia.

    The module is exported once for every structure of the state and training mode, and then kept.
    Parameters are read at each call, so training needs no new translation; other attributes that
    the module's `forward` uses are read at the first.

    Args:
        module: called with the time, a 0-d tensor, and the state; gives the derivative.
        spec: structure of the state.

    Returns:
        The program, and the tensors that it depends on.

    Raises:
        UnsupportedModule: an operation that programs do not have, control flow that depends on the
            numbers, or a derivative that is not that of the operations.

    Example:
        >>> import torch
        >>> from pysciml_node.problems.state import StateSpec
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
    translations = _CACHE.setdefault(module, {})
    key = (spec, *_modes(module))
    translation = translations.get(key)
    if translation is None:
        translation = translations[key] = _translate(module, spec)
    return translation.of(module)


def _translate(module: nn.Module, spec: StateSpec) -> _Translation:
    if spec.dtype.is_complex:
        raise UnsupportedModule("modules of complex states cannot be translated for Julia.")
    exported = _export(module, spec)
    walk = _Walk(module, spec, exported)
    program = walk.run()
    translation = _Translation(program, program.to_json(), tuple(walk.builder.tensors))
    check_program(module, spec, program, translation.of(module).parameters)
    return translation


def _export(module: nn.Module, spec: StateSpec) -> ExportedProgram:
    parts = [torch.zeros(s, dtype=spec.dtype, device=spec.device) for s in spec.shapes]
    t = torch.zeros((), dtype=spec.dtype, device=spec.device)
    try:
        with _quietly(), torch.enable_grad():
            exported = torch.export.export(module, (t, spec.assemble(parts)), strict=False)
            if any(_changes_argument(node) for node in exported.graph.nodes):
                exported = exported.run_decompositions({})
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise UnsupportedModule(
            f"{type(module).__name__} cannot be exported by torch.export: {reason}"
        ) from error
    return exported


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

    def __init__(self, module: nn.Module, spec: StateSpec, exported: ExportedProgram) -> None:
        self.module = module
        self.spec = spec
        self.exported = exported
        self.builder = Builder(spec.dtype)
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
        arguments = iter([self.builder.time_view(), *(parts[i] for i in order)])
        for item in signature.input_specs:
            name = getattr(item.arg, "name", "")
            if item.kind is InputKind.USER_INPUT:
                self.values[name] = next(arguments)
            elif item.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.values[name] = self._tensor(str(item.target), item.kind)
            elif item.kind is InputKind.CONSTANT_TENSOR:
                self.values[name] = self._constant(str(item.target))

    @property
    def _name(self) -> str:
        return type(self.module).__name__

    def _tensor(self, name: str, kind: InputKind) -> View:
        tensor = operator.attrgetter(name)(self.module)
        trained = kind is InputKind.PARAMETER
        return self.builder.parameter(name, tuple(tensor.shape), name, trained)

    def _constant(self, name: str) -> View | Tensor:
        tensor = self.exported.constants[name]
        if not isinstance(tensor, Tensor):
            raise UnsupportedModule(f"{self._name} uses {name}, which is not a tensor.")
        if tensor.requires_grad:
            raise UnsupportedModule(
                f"{self._name} uses a tensor of shape {tuple(tensor.shape)} that requires "
                "gradients and is not one of its parameters; make it an nn.Parameter of the "
                "module.",
                captured=True,
            )
        try:
            own = operator.attrgetter(name)(self.module)
        except AttributeError:
            return tensor
        if isinstance(own, Tensor) and own.dtype == self.spec.dtype:
            return self.builder.parameter(name, tuple(own.shape), name, trained=False)
        return tensor

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
            f"{where} uses {operation}, which cannot be translated for Julia.", operation=operation
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
            results = target(*positional, **named)
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
