"""Solves that were before, but for their states and the numbers of tensors, where there is C.

An engine's `prepare` finds what a solve needs whatever the problem is. Most solves are the next one
of a training, and of these everything is known once the field has been looked at again.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pysciml_node.algorithms.adjoints import DiscreteAdjoint
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.ode import ODEProblem, ends_of
from pysciml_node.steps.anatomy import anchor_of, parts_of
from pysciml_node.steps.start import Start
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.translation import again, watched
from pysciml_node.translation.leaves import form_among, leaves_of
from pysciml_node.translation.numbers import ways_to_read
from pysciml_node.translation.snapshot import Snapshot
from pysciml_node.translation.stable_abi import function_of
from pysciml_node.translation.surrounded import WALKED, Walked
from pysciml_node.translation.watch import CHANGED, answers
from pysciml_node.translation.ways import keep

# Functions of Python's stable ABI, in the order of repeat.c.
_FUNCTIONS = (
    *("PyDict_GetItem", "PyTuple_GetItem", "PyList_GetItem", "PyObject_Size", "PyObject_GetAttr"),
    *("PyObject_Type", "PyObject_CallNoArgs", "PyObject_CallFunctionObjArgs", "PyLong_FromVoidPtr"),
    *("PyTuple_Pack", "PyFloat_AsDouble", "PyLong_AsSsize_t", "PyList_New", "PyList_Append"),
    *("PyObject_RichCompareBool", "PyDict_Next", "Py_IncRef", "Py_DecRef"),
)
# Parts of a problem that change what a solve of it needs.
_ABSENT = ("mass_matrix", "jac", "jac_sparsity")
# Functions that say in which modes torch is, and what they answer where it is in none.
_MODES = (
    *(torch.is_inference_mode_enabled, False, torch._C._is_any_autocast_enabled, False),
    *(torch._C._get_tracing_state, None),
    *(torch._C._are_functorch_transforms_active, False),
    *(partial(getattr, forward_ad, "_current_level"), -1),
    *(torch._C._len_torch_function_stack, 0, torch._C._len_torch_dispatch_stack, 0),
)
_MADE_ANEW = frozenset((types.FunctionType, types.MethodType))
_PLAIN = frozenset((Tensor,))

See = Callable[[], Surroundings]

_Found = tuple["Repeated", list[Tensor], Walked, list[int]]
_repeat: Callable[..., _Found | None] | None = None

recall: Callable[..., Any] | None = None
"""Finds in C what a solve comes to by what was given for it, where it can: see solving/plans.py."""


class Repeated(NamedTuple):
    """What solves need that are told apart by nothing else; in the order of repeat.c.

    Attributes:
        prepared: what they share.
        start: of the interval.
        end: of it.
        given: how many tensors a function was given.
        form: of the extra argument, in which there are no numbers; `None` where there is none.
        keys: of the parts of a state; `None` where it is one tensor.
        shapes: of these.
        asked: what code asks of tensors.
        answers: what they answer.
    """

    prepared: Any
    start: float
    end: float
    given: int
    form: Any
    keys: tuple[Any, ...] | None
    shapes: tuple[torch.Size, ...]
    asked: list[Callable[[Tensor], Any]]
    answers: list[Any]


Known = tuple[Any, list[Tensor], See, Any]
"""What is known of a solve: what it shares with others; the tensors of its field and of the extra
argument; what gives the surroundings of the field as they are now; and the extra argument, with a
tensor for each number that the program reads as one."""


def source() -> str:
    """The code that finds them."""
    return (files(__package__) / "repeat.c").read_text(encoding="utf-8")


def use(library: ctypes.CDLL) -> None:
    """Find such solves by a library from now on; where there is no interpreter's lock, not at all.

    Args:
        library: made of repeat.c.
    """
    global _repeat, recall
    names = "tspan", "spec", "p", "u0", "memory", "tensors", "shape", "_version"
    kinds = Tensor, Tensor.is_inference, False, True, list, tuple, dict
    kept = watched.entries(), again._look, Repeated, WALKED
    objects = None, float, *names, *kinds, *kept, _ABSENT, _MODES
    if again._look is not None:
        _repeat, recall = (
            function_of(library, name, _FUNCTIONS, objects) for name in ("repeat", "recall")
        )


def repeat(problem: ODEProblem, algorithm: Algorithm, options: SolveOptions) -> Known | None:
    """What is known of a solve; `None` where such a one was not before, or a mode may forbid it.

    Plain tensors of a state that `is_looked_at` have been found to have its shapes, and not to be
    of inference mode.
    """
    if _repeat is None:
        return None
    f, p = problem.f, problem.p
    anchor, parts = (anchor_of(f), parts_of(f)) if type(f) in _MADE_ANEW else (f, ())
    try:
        found = _repeat(anchor, parts, problem.__dict__, options, algorithm)
    except CHANGED:
        return None
    if found is None:
        return None
    known, tensors, walked, versions = found
    if known.asked and answers(known.asked, tensors) != known.answers:
        return None
    if p is None and not parts:
        return known.prepared, tensors, partial(_see, walked, f, versions), None
    start = Start("f", f, p, parts, walked.tensors)
    see = partial(walked.surroundings.again, start)
    if p is None:
        return known.prepared, tensors, see, None
    for read in ways_to_read(p, problem.spec) if start.is_plain else ():
        leaves = leaves_of(read)
        if form_among(tensors, known.asked, leaves) == known.form:
            return known.prepared, [*tensors, *leaves[0]], see, read
    return None


def is_looked_at(state: Any) -> bool:
    """Whether a state is nothing but plain tensors, which C looks at."""
    kind = type(state)
    if kind is dict:
        state = state.values()
    elif kind is not tuple:
        return kind is Tensor
    return _PLAIN.issuperset(map(type, state))


def _see(walked: Walked, f: Any, versions: list[int]) -> Surroundings:
    """The surroundings of a field that is given nothing, with the versions of its tensors then."""
    return walked.surroundings.again(Start("f", f, None, (), walked.tensors, versions))


def remember(
    problem: ODEProblem,
    algorithm: Algorithm,
    options: SolveOptions,
    prepared: Any,
    now: Snapshot,
    form: Any,
) -> None:
    """Have later solves begin at once that differ in states, and in numbers of tensors, alone.

    Args:
        problem: what is solved.
        algorithm: how. Like the options and the structure of the state `prepared` has to keep it,
            so that no other one is given its identity.
        options: of the solve, with nothing in them of this one alone.
        prepared: what is known of such solves.
        now: what was seen of the field just now.
        form: of the extra argument.
    """
    watch, (t0, t1) = now.watch, ends_of(problem)
    moving = set(map(type, problem.tspan)) != {float}
    if _repeat is None or moving or not isinstance(options.adjoint, DiscreteAdjoint):
        return
    if Walked.known(now) is None:
        return
    again.note(watch)
    count = 0 if watch.given is None else len(watch.given.first)
    way = id(problem.spec), id(options), id(algorithm)
    spec, asked = problem.spec, (watch.asked, watch.answers)
    keep(watch, way, Repeated(prepared, t0, t1, count, form, spec.keys, spec.shapes, *asked))
