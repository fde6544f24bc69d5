"""What `torch.export` makes of a field, and what is to be said where it makes nothing of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from typing_extensions import override

from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.state import StateSpec, map_tensors
from pysciml_node.translation.derived import changes_argument, with_derivatives
from pysciml_node.translation.graph import label
from pysciml_node.translation.leaves import fickle_class, is_value

_INSIDE = (
    "fake tensor in the exported program constant's list",
    "Cannot access data pointer of Tensor that doesn't have storage",
    "Cannot access storage of TensorWrapper",
    "'Tensor' object has no attribute 'constant'",
    "conversion to view functorch tensor",
    "don't yet support saved tensor hooks",
)
"""What torch.export says of derivatives that are taken while it traces."""

_DERIVATIVES = "it takes derivatives inside (torch.autograd.grad, torch.func)"


_TAKEN = (Tensor, int, float, str, type(None))
"""What torch.export takes as arguments."""

_READING = frozenset(
    (
        *("item", "tolist", "numpy", "equal", "allclose", "is_nonzero"),
        *(f"__{kind}__" for kind in ("float", "int", "bool", "index", "complex", "contains")),
        *("__array__", "__dlpack__", "__format__", "__repr__", "__deepcopy__", "__reduce_ex__"),
    )
)
"""What gives the numbers of tensors to Python."""


class Reading(TorchFunctionMode):
    """Notes of which tensors Python is given the numbers, and whether derivatives are taken.

    Attributes:
        seen: these tensors.
        derives: whether `torch.autograd.grad` was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.derives = False

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) in _READING:
            self.seen += [x for x in args if isinstance(x, Tensor)]
        self.derives |= func is torch.autograd.grad
        return func(*args, **(kwargs or {}))


class Traced(NamedTuple):
    """A field as torch sees it.

    Attributes:
        exported: its graph.
        prints: whether it prints.
        read: tensors whose numbers it has given to Python.
    """

    exported: ExportedProgram
    prints: bool
    read: list[Tensor]


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


@contextmanager
def exporting(f: Callable[..., Any]) -> Iterator[StringIO]:
    """Says of an error that a field cannot be exported; yields what the field prints."""
    try:
        with quietly() as printed, torch.enable_grad(), _uncached():
            yield printed
    except UnsupportedModule:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        reason = _DERIVATIVES if any(words in reason for words in _INSIDE) else reason
        raise UnsupportedModule(
            f"{label(f)} cannot be exported by torch.export: {reason}"
        ) from error


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without autocast: programs compute in the state's dtype."""
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield


def trace(f: Callable[..., Any], spec: StateSpec, p: Any) -> Traced:
    """What torch makes of a field."""
    parts = [torch.zeros(s, dtype=spec.dtype, device=spec.device) for s in spec.shapes]
    t = torch.zeros((), dtype=spec.dtype, device=spec.device)
    with exporting(f) as printed:
        further, f = _exportable(f, p)
        module = f if isinstance(f, nn.Module) and _is_whole(f) else _Called(f)
        arguments = (t, spec.assemble(parts), *further)
        with Reading() as reading:
            exported = _exported(module, arguments)
            if exported is None or reading.derives:
                module = _Called(with_derivatives(f, arguments))
                exported = torch.export.export(module, arguments, strict=False)
        if any(changes_argument(node) for node in exported.graph.nodes):
            exported = exported.run_decompositions({})
    changed = exported.graph_signature.buffers_to_mutate
    if changed:
        names = ", ".join(changed.values())
        raise UnsupportedModule(f"{label(f)} changes its buffers ({names}) when it is evaluated.")
    return Traced(exported, bool(printed.getvalue()), reading.seen)


def _exported(module: nn.Module, arguments: tuple[Any, ...]) -> ExportedProgram | None:
    """What torch.export makes of a module; nothing where it takes derivatives inside."""
    try:
        exported = torch.export.export(module, arguments, strict=False)
    except Exception as error:
        if any(words in str(error) for words in _INSIDE):
            return None
        raise
    return None if _transforms(exported) else exported


def _exportable(f: Callable[..., Any], p: Any) -> tuple[tuple[Any, ...], Callable[..., Any]]:
    """The extra argument as torch.export takes one, and the field that takes it so."""
    if p is None:
        return (), f
    leaves, structure = pytree.tree_flatten(map_tensors(_leaf, p))
    for leaf in leaves:
        if not (isinstance(leaf, Tensor) or is_value(leaf)):
            what = "a module," if isinstance(leaf, nn.Module) else "an object of the class"
            raise UnsupportedModule(
                f"{label(f)} takes a p with {what} {type(leaf).__name__}: it may hold tensors, or "
                "numbers that change."
            )
    fickle = fickle_class(p)
    if fickle is not None:
        name, words = fickle
        raise UnsupportedModule(
            f"{label(f)} takes a p of the class {name}, which {words}, which may differ at each "
            "solve."
        )
    values = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, _TAKEN)}
    if not values:
        return (pytree.tree_unflatten(leaves, structure),), f

    def with_values(t: Tensor, u: Any, taken: list[Any]) -> Any:
        every = [values.get(i, leaf) for i, leaf in enumerate(taken)]
        return f(t, u, pytree.tree_unflatten(every, structure))

    return ([None if i in values else leaf for i, leaf in enumerate(leaves)],), with_values


def _transforms(exported: ExportedProgram) -> bool:
    """Whether there are transforms of `torch.func`, whose ends a graph does not keep.

    They must not be evaluated: one that begins and does not end leaves torch unusable.
    """
    modules = exported.graph_module.modules()
    graphs = [module.graph for module in modules if isinstance(module, GraphModule)]
    targets = (node.target for graph in graphs for node in graph.nodes)
    return any((getattr(x, "__module__", "") or "").startswith("torch._functorch") for x in targets)


def _is_whole(module: nn.Module) -> bool:
    """Whether the parameters are its own, and not those that `functional_call` lends it."""
    return all(isinstance(x, nn.Parameter) for x in module.parameters())


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


@contextmanager
def _uncached() -> Iterator[None]:
    """Parametrized weights by what they are made of, inside torch's `parametrize.cached()` too.

    Its cache would have the weights that a trace has made, and give them to the field afterwards.
    """
    before, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = before


@contextmanager
def quietly() -> Iterator[StringIO]:
    """Without what torch.export prints of a module that it cannot export; yields the output."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before, logger.disabled = logger.disabled, True
    try:
        printed = StringIO()
        with warnings.catch_warnings(), redirect_stdout(printed), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield printed
    finally:
        logger.disabled = before
