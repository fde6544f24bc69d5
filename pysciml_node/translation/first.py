"""What a field makes at its first evaluation and keeps: tables, masks, cached properties."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.problems.state import StateSpec, map_tensors, tensors_of
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.translation.saved import numbers_put_back, saved_by, without_graph
from pysciml_node.translation.tracing import Reading, full_precision, quietly


class At(NamedTuple):
    """Where a solve evaluates a field first.

    Attributes:
        t: the time.
        u: the state.
    """

    t: float
    u: Any

    @classmethod
    def start_of(cls, problem: ODEProblem | SDEProblem) -> At:
        """Where a solve of a problem begins."""
        return cls(problem.t0, problem.u0)


def make_what_it_keeps(f: Callable[..., Any], spec: StateSpec, p: Any, at: At) -> None:
    """Evaluate a field before it is traced, and leave it what it has made once and for all.

    A trace has no numbers: a table that it makes would stay with the field, of no use to anybody.
    Nothing is left but what a second evaluation does not change and what depends neither on time
    and state nor, with gradients, on weights. A field that draws random numbers, or reads numbers
    of its arguments, is left as it was, and so is one that writes to what was there.

    What is kept where it cannot be put back, in a class or a weak dict, stays there: it is what a
    solve in Python leaves, whose first evaluation is at the same time and state.

    Args:
        f: called with the time, a 0-d tensor, and the state, and with `p` if there is one.
        spec: structure of the state.
        p: extra argument.
        at: where the solve begins.
    """
    arguments = (*_arguments(spec, at), *(() if p is None else (p,)))
    before = Surroundings({"f": f, "p": p})
    if before.lazy:  # its weights are drawn now, as they are by a solve in Python
        with torch.inference_mode(False), full_precision(spec.device):
            f(*arguments)
        before = Surroundings({"f": f, "p": p})
    if any(isinstance(x, torch.Generator) for x in before.generators) or before.written:
        return
    watch, reading = _Watch(tensors_of(arguments), before.tensors), Reading()
    with ExitStack() as stack:
        for context in (
            *(torch.inference_mode(False), full_precision(spec.device), torch.enable_grad()),
            *(saved_by(without_graph), streams_put_back(), numbers_put_back(before.tensors)),
        ):
            stack.enter_context(context)
        drawn = _streams()
        try:
            with watch, reading:
                f(*arguments)
            # What functions of `functools` keep is in no place that a walk goes to.
            kept = gc.get_referents(*before.grown())
            after = Surroundings({"f": f, "p": p, "kept": kept})
            made = _made(before, after)
            with quietly(), watch, reading:
                f(*arguments)
            if not (
                after.changed()
                or after.grown()
                or watch.reads
                or any(x.requires_grad for x in made)
                or any(map(watch.depends, (*made, *reading.seen)))
                or drawn != _streams()
            ):
                return
        except Exception:  # what it is, the trace says
            pass
        before.put_back()


def _arguments(spec: StateSpec, at: At) -> tuple[Tensor, Any]:
    """The time and the state that a field is called with; it may do with them as it likes."""
    with torch.inference_mode(False), torch.no_grad():
        t = torch.tensor(at.t, dtype=spec.real_dtype, device=spec.device)
        return t, map_tensors(lambda x: x.detach().clone(), at.u)


def _made(before: Surroundings, after: Surroundings) -> list[Tensor]:
    """What there is afterwards that was not there before."""
    tensors, memory = set(map(id, before.tensors)), {x.data_ptr() for x in before.arrays}
    return [
        *(x for x in after.tensors if id(x) not in tensors),
        *(x for x in after.arrays if x.data_ptr() not in memory),
    ]


_DECIDING = frozenset(
    ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
)
"""Operations whose results, or their shapes, Python decides by."""


class _ItWritesError(Exception):
    """The field writes to what was there before."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what is computed from some tensors, and keeps others from being written to.

    Args:
        arguments: the tensors to follow.
        known: those that nothing may be written to.

    Attributes:
        reads: whether Python has decided by numbers of the tensors that are followed.
    """

    def __init__(self, arguments: Iterable[Tensor], known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = False
        # The storages are held: later ones must not take their places.
        self._followed = {x.untyped_storage()._cdata: x.untyped_storage() for x in arguments}
        strided = (x.untyped_storage() for x in known if x.layout is torch.strided)
        self._known = {x._cdata: x for x in strided}

    def depends(self, x: Tensor) -> bool:
        """Whether a tensor has been computed from those that are followed, if that can be told."""
        return x.layout is not torch.strided or x.untyped_storage()._cdata in self._followed

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                if argument.is_write and self._are_known(given):
                    raise _ItWritesError
        depends = any(self.depends(x) for x in pytree.tree_leaves((args, kwargs)) if _is(x))
        self.reads |= depends and func._schema.name.partition("::")[2] in _DECIDING
        result = func(*args, **kwargs)
        for x in pytree.tree_leaves(result) if depends else ():
            if _is(x) and x.layout is torch.strided:
                storage = x.untyped_storage()
                self._followed[storage._cdata] = storage
        return result

    def _are_known(self, given: Any) -> bool:
        leaves = (x for x in pytree.tree_leaves(given) if _is(x) and x.layout is torch.strided)
        return any(x.untyped_storage()._cdata in self._known for x in leaves)


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)


def _streams() -> tuple[Any, ...]:
    """Where the random numbers of torch, NumPy and Python are."""
    _, key, *further = np.random.get_state(legacy=True)  # noqa: NPY002
    return torch.get_rng_state().tolist(), np.asarray(key).tolist(), further, random.getstate()


@contextmanager
def streams_put_back() -> Iterator[None]:
    """Random numbers of torch, NumPy and Python go on afterwards as if none had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
