"""Fields as programs: `torch.export`, then one operation after another."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.modes import InModes, foreign_mode
from pysciml_node.problems.state import StateSpec
from pysciml_node.steps.anatomy import anchor_of
from pysciml_node.steps.derived import DerivedField
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.steps.walk import Walk
from pysciml_node.translation.check import check_program
from pysciml_node.translation.derived import DerivedWalk, differentiated
from pysciml_node.translation.first import At, make_what_it_keeps, streams_put_back
from pysciml_node.translation.graph import GraphWalk, label
from pysciml_node.translation.leaves import class_of_its_own, form_for, leaves_of
from pysciml_node.translation.numbers import Compared, tell_of_numbers
from pysciml_node.translation.program import Program
from pysciml_node.translation.recent import RecentOf
from pysciml_node.translation.saved import as_it_is, numbers_put_back, saved_by, without_graph
from pysciml_node.translation.snapshot import Snapshot
from pysciml_node.translation.tracing import exporting, full_precision, trace
from pysciml_node.translation.walks import ConditionWalk, DiffusionWalk, JacobianWalk
from pysciml_node.translation.watch import Contents, NotMadeError, have_contents, have_same


class TranslatedModule(NamedTuple):
    """A module as other engines evaluate it.

    Attributes:
        json: the program.
        parameters: the module's parameters, buffers and constants in the order of the flat vector
            that the program reads.
        program: the program as data.
        snapshot: what was seen of the module just now.
        sources: of each parameter the number of its tensor, the module's before those of `p`; the
            tensor itself for a constant.
        contents: numbers of the snapshot's tensors whose entries are part of the program, with
            those entries.
        read: the extra argument as the program reads it.
        compared: for which numbers in it.
    """

    json: str
    parameters: list[Tensor]
    program: Program
    snapshot: Snapshot
    sources: tuple[int | Tensor, ...]
    contents: Contents
    read: Any
    compared: Compared


@dataclass(frozen=True)
class _Translation:
    """A program, and where the tensors that it reads are found.

    Attributes:
        sources: numbers of tensors in a snapshot, or constants.
        prints: whether the field prints when it is evaluated.
        compared: for which numbers in the extra argument it is the field's.
    """

    program: Program
    json: str
    sources: tuple[int | Tensor, ...]
    prints: bool
    compared: Compared

    @property
    def places(self) -> list[int]:
        """The numbers among the sources that the program reads."""
        pairs = zip(self.sources, self.program.read, strict=True)
        return [source for source, read in pairs if read and isinstance(source, int)]

    def parameters(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors that the program reads, of those of the module and of `p`."""
        return [x if isinstance(x, Tensor) else tensors[x] for x in self.sources]


@dataclass(frozen=True)
class _Outcome:
    """What became of a field: a translation, or why there is none, and for which state of it.

    Attributes:
        kind: what goes through the graph, the structure of the state, and the form of `p`.
        tokens: of the snapshot that was taken.
        passing: places of the snapshot that an evaluation changes by itself, such as a count.
        contents: numbers of tensors whose entries are part of the program, with those entries.
        result: the translation, or the words of the refusal.
        silent: whether an evaluation leaves Python's objects as they are, as far as can be seen.
    """

    kind: Any
    tokens: list[Any]
    passing: frozenset[int]
    contents: Contents
    result: _Translation | tuple[str, str | None, bool]
    silent: bool

    @property
    def numbers(self) -> list[int]:
        """Those of the tensors that the program reads, in the snapshots."""
        sources = self.result.sources if isinstance(self.result, _Translation) else ()
        return [i for i in sources if isinstance(i, int)]

    def holds(self, kind: Any, now: Snapshot) -> bool:
        """Whether the field is still what it was."""
        return (
            kind == self.kind
            and self._same(now.tokens)
            and have_contents(now.tensors, self.contents)
        )

    def _same(self, tokens: list[Any]) -> bool:
        if tokens is self.tokens:  # a second look found nothing new
            return True
        if not self.passing or len(tokens) != len(self.tokens):
            return tokens == self.tokens
        pairs = enumerate(zip(tokens, self.tokens, strict=True))
        return all(i in self.passing or now == before for i, (now, before) in pairs)


_Given = tuple[Any, Any]
"""The extra argument of a field, and the same as the program reads it."""

_MOST = 64
"""Translations that are kept of a module."""

_OFTEN = 16
"""Translations of a function after which it is taken for one that is another at each solve."""

_SMALL = 1024
"""Entries of a tensor that are looked at though the program does not use them: `item` might."""

_FIELDS = 256
"""Fields whose translations are kept."""

_CACHE: RecentOf[deque[_Outcome]] = RecentOf(_FIELDS)

_OF_CLASSES: RecentOf[deque[_Outcome]] = RecentOf(_FIELDS)
"""The same of classes of modules: two that look the same are evaluated in the same way."""


def kept(f: Callable[..., Any]) -> deque[_Outcome]:
    """What is kept of a field, the newest first; empty for one that is new."""
    if isinstance(f, DerivedField):
        return kept(f.inner)
    anchor = anchor_of(f)
    outcomes = _CACHE.get(anchor)
    if outcomes is None:
        outcomes = _CACHE[anchor] = deque(maxlen=_MOST)
    return outcomes


def _of_its_class(f: Callable[..., Any]) -> deque[_Outcome]:
    """What is kept of all modules of a class; empty for what is none."""
    if isinstance(f, DerivedField):
        return _of_its_class(f.inner)
    if not isinstance(f, nn.Module):
        return deque()
    outcomes = _OF_CLASSES.get(type(f))
    if outcomes is None:
        outcomes = _OF_CLASSES[type(f)] = deque(maxlen=_MOST)
    return outcomes


def translate(
    module: Callable[..., Any],
    spec: StateSpec,
    p: Any = None,
    read: Any = None,
    silent: bool = False,
    at: At | None = None,
) -> TranslatedModule:
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
        read: the extra argument as the program reads it, with tensors for numbers (numbers.py);
            `p` itself unless it is given.
        silent: refuse a field that counts, records or prints when it is evaluated, and one that is
            another at each solve: for callers that can as well evaluate it itself.
        at: where the solve begins; `None` where the field has been evaluated before.

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
    often = _OFTEN if silent else math.inf
    return _translated(module, spec, p, GraphWalk, at, silent, often, read)


def translate_diffusion(
    diffusion: Callable[..., Any], spec: StateSpec, p: Any, read: Any, at: At
) -> TranslatedModule:
    """The diffusion of a stochastic equation as a program.

    The shape of its result is whatever the diffusion returns: `program.shapes`.

    Args:
        diffusion: called with the time, a 0-d tensor, the state, and `p` if there is one.
        spec: structure of the state.
        p: extra argument.
        read: the same as the program reads it.
        at: where the solve begins.

    Raises:
        UnsupportedModule: as `translate`.
    """
    return _translated(diffusion, spec, p, DiffusionWalk, at, read=read)


def translate_jacobian(
    jacobian: Callable[..., Any], spec: StateSpec, p: Any, read: Any, at: At
) -> TranslatedModule:
    """The Jacobian that a problem brings, `(N, N)` of the flat state, as a program.

    Args:
        jacobian: called with the time, a 0-d tensor, the state, and `p` if there is one.
        spec: structure of the state.
        p: extra argument.
        read: the same as the program reads it.
        at: where the solve begins.

    Raises:
        UnsupportedModule: as `translate`.
    """
    return _translated(jacobian, spec, p, JacobianWalk, at, read=read)


def translate_condition(condition: Callable[..., Any], spec: StateSpec, at: At) -> TranslatedModule:
    """An event's condition `condition(t, u)`, one real number, as a program.

    It is exported, and exported again, as fields are. One that counts, records or prints when it is
    evaluated is refused: the loop that runs the program does not call it.

    Args:
        condition: called with the time, a 0-d tensor, and the state. A module, or any other
            callable.
        spec: structure of the state.
        at: where the solve begins.

    Raises:
        UnsupportedModule: as `translate`.
    """
    return _translated(condition, spec, None, ConditionWalk, at, silent=True)


def _translated(
    f: Callable[..., Any],
    spec: StateSpec,
    p: Any,
    walk: type[GraphWalk],
    at: At | None,
    silent: bool = False,
    often: float = math.inf,
    read: Any = None,
) -> TranslatedModule:
    """The program of a callable, kept or made.

    Args:
        f: the callable.
        spec: structure of the state.
        p: extra argument.
        walk: what goes through its graph, and so knows what it returns.
        at: where the solve begins; `None` where the callable has been evaluated before.
        silent: refuse one that counts, records or prints when it is evaluated.
        often: translations after which it is refused as another one at each solve.
        read: the extra argument as the program reads it; `p` itself unless it is given.
    """
    read = p if read is None else read
    mode = foreign_mode()
    if mode is not None:
        raise UnsupportedModule(f"{label(f)} is evaluated where {mode} may change its operations.")
    tensors, _ = leaves = leaves_of(read)
    foreign = class_of_its_own(tensors)
    if foreign is not None:
        raise UnsupportedModule(
            f"{label(f)} takes a p of the class {foreign}, which may change its operations."
        )
    # torch.export, and the silence around it, are the process's own: one thread at a time. A sweep
    # may translate, and a translation waits for sweeps: there is one lock for both.
    with Surroundings.undisturbed():
        outcomes = kept(f)
        relatives = _of_its_class(f)
        try:
            now = Snapshot.of(f)
        except RecursionError:
            deep = "objects that are nested too deeply to be followed"
            raise UnsupportedModule(f"{label(f)} reaches {deep}.") from None
        except NotMadeError:
            if at is None:
                late = "parameters that its first evaluation makes: evaluate it once before"
                raise UnsupportedModule(f"{label(f)} has {late}.") from None
            make_what_it_keeps(f, spec, p, at)
            return _translated(f, spec, p, walk, None, silent, often, read)
        kind = (walk, spec, form_for(now, leaves))
        outcome = _still_holding(outcomes, kind, now)
        if outcome is None:
            outcome = _still_holding(relatives, kind, now)
            outcomes.extendleft(() if outcome is None else (outcome,))
        if outcome is None and len(outcomes) >= often:
            raise UnsupportedModule(f"{label(f)} is another function at each solve.")
        if outcome is None and at is not None:
            make_what_it_keeps(f, spec, p, at)
            return _translated(f, spec, p, walk, None, silent, often, read)
        if outcome is None:
            if any(map(Tensor.is_inference, now.tensors)):  # others may take their places
                made = "tensors that were made in torch.inference_mode: make it outside of that"
                raise UnsupportedModule(f"{label(f)} cannot be traced with its {made}.")
            before, outcome = now, _outcome(f, spec, (p, read), walk, kind, now)
            now = Snapshot.of(f)
            if not have_same(before.tensors, now.tensors, outcome.numbers):
                raise UnsupportedModule(
                    f"{label(f)} reaches other tensors than when its translation began."
                )
            earlier = [x.result.json for x in outcomes if isinstance(x.result, _Translation)]
            outcomes.appendleft(outcome)
            relatives.appendleft(outcome)
            if isinstance(outcome.result, _Translation):
                tell_of_numbers(label(f), outcome.result.json, earlier)
    if not isinstance(outcome.result, _Translation):
        message, operation, captured = outcome.result
        raise UnsupportedModule(message, operation, captured)
    if silent and not outcome.silent:
        raise UnsupportedModule(f"{label(f)} may change Python's objects, or print.")
    result = outcome.result
    parameters = result.parameters([*now.tensors, *tensors])
    if not result.compared.holds(f, spec, p, read, parameters):
        raise UnsupportedModule(f"{label(f)} is another one for these numbers of p.")
    return TranslatedModule(
        result.json, parameters, result.program, now, result.sources, outcome.contents, read,
        result.compared,
    )  # fmt: skip


def _still_holding(outcomes: deque[_Outcome], kind: Any, now: Snapshot) -> _Outcome | None:
    for outcome in outcomes:
        if outcome.holds(kind, now):
            return outcome
    return None


def _outcome(
    module: Callable[..., Any],
    spec: StateSpec,
    given: _Given,
    walk: type[GraphWalk],
    kind: Any,
    before: Snapshot,
) -> _Outcome:
    result: _Translation | tuple[str, str | None, bool]
    used: set[int] = set()
    surroundings = Surroundings({"f": module, "p": given[0]})
    try:
        with numbers_put_back(before.tensors), streams_put_back():
            result, used = _translate(module, spec, given, walk, before, surroundings)
    except UnsupportedModule as error:
        message, scripts = error.message, Walk({"f": module}).scripts
        if scripts:
            why = "whose operations torch.jit hides; take the module that it was made from"
            message = f"{label(module)} calls {scripts[0]}, {why}."
        result = (message, error.operation, error.captured)
    except BaseException:
        _put_back(surroundings)
        raise
    after = Snapshot.of(module)
    _put_back(surroundings)
    left = Snapshot.of(module).tensors  # what it makes at each evaluation anew is gone
    contents = tuple(
        (i, x.detach().clone())
        for i, x in enumerate(left)
        if i in used or (x.numel() <= _SMALL and not _is_source(i, x, result))
    )
    passing = before.changes(after)
    silent = len(before.tokens) == len(after.tokens) and not passing and not after.sealed
    silent = silent and isinstance(result, _Translation) and not result.prints
    outcome = _Outcome(kind, after.tokens, passing, contents, result, silent)
    # With other tensors at its numbers it serves once: those tokens are not of this translation.
    same = have_same(before.tensors, after.tensors, [*outcome.numbers, *used])
    return outcome if same else replace(outcome, kind=None)


def _put_back(surroundings: Surroundings) -> None:
    """What a field has counted, recorded or kept while it was traced is made of no numbers."""
    if not surroundings.lazy:
        surroundings.put_back()


def _is_source(i: int, x: Tensor, result: Any) -> bool:
    if isinstance(x, nn.Parameter):
        return True
    return isinstance(result, _Translation) and i in result.places


def _translate(
    f: Callable[..., Any],
    spec: StateSpec,
    given: _Given,
    kind: type[GraphWalk],
    snapshot: Snapshot,
    surroundings: Surroundings,
) -> tuple[_Translation, set[int]]:
    """The translation, and the numbers of the tensors whose entries are part of it."""
    p, read = given
    if spec.dtype.is_complex:
        raise UnsupportedModule("modules of complex states cannot be translated.")
    if snapshot.fickle is not None:
        raise UnsupportedModule(f"{label(f)} {snapshot.fickle}, which may differ at each solve.")
    with torch.inference_mode(False), full_precision(spec.device), saved_by(as_it_is):
        walk, prints = _walk(f, spec, read, kind, snapshot)
        program = walk.run()
        _put_back(surroundings)
        sources = tuple(walk.builder.tensors)
        translation = _Translation(program, program.to_json(), sources, prints, Compared(program))
        parameters = translation.parameters([*snapshot.tensors, *leaves_of(read)[0]])
        further = () if p is None else (p,)

        def flat(t: Tensor, u: Any) -> Tensor:
            return walk.flat(f(t, u, *further))

        with saved_by(without_graph):
            check_program(flat, label(f), spec, program, parameters)
    return translation, walk.fixed


def _walk(
    f: Callable[..., Any], spec: StateSpec, p: Any, kind: type[GraphWalk], snapshot: Snapshot
) -> tuple[GraphWalk, bool]:
    """What goes through the graph of a field, and whether the field prints."""
    if not isinstance(f, DerivedField):
        traced = trace(f, spec, p)
        walk = kind(f, spec, traced.exported, snapshot, p)
        walk.fix(traced.read)
        return walk, traced.prints
    if isinstance(f.inner, InModes):
        raise UnsupportedModule(f"{label(f)} is evaluated in autocast, or with a default device.")
    traced = trace(f.inner, f.spec, p)
    with exporting(f) as printed:
        derived = differentiated(traced.exported, f, spec)
    inner = f.inner, f.spec, traced.exported, snapshot, p
    walk = DerivedWalk(*inner, whole=spec, derived=derived)
    walk.fix(traced.read)
    return walk, traced.prints or bool(printed.getvalue())
