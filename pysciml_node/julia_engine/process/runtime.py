"""The one door to Julia: it is started here, once, and called from here only.

Only numbers, strings, pointers as integers and integer handles cross. Julia is entered by the
thread that started it and by no forked child: its memory manager knows of neither.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from array import array
from collections.abc import Callable
from typing import Any

import torch

from pysciml_node.errors import EngineUnavailable, JuliaError
from pysciml_node.julia_engine.process import handles, launch
from pysciml_node.julia_engine.process.errors import translate
from pysciml_node.julia_engine.process.interrupt import BRIEFLY, Listening

_NOBODY = 0
# It loads Enzyme, whose start alone can take half a minute.
_SLOW = frozenset({"SciMLSensitivity"})


class _Runtime:
    """The state of the running Julia; there is one in a process."""

    def __init__(self) -> None:
        self.owner = _NOBODY  # the thread that may call
        self.pid = 0
        self.raised: type[Exception] = Exception  # juliacall.JuliaError
        self.module: Any = None
        self.failure: str | None = None
        self.functions: dict[str, Callable[..., Any]] = {}
        self.released: dict[str, Callable[..., Any]] = {}
        self.crossings: dict[str, Callable[[int], int]] = {}
        self.loaded: set[str] = set()
        self.blas_threads = 0


_runtime = _Runtime()
_starting = threading.Lock()


def is_started() -> bool:
    """Whether Julia runs in this process and the engine is loaded."""
    return _runtime.module is not None and _runtime.pid == os.getpid()


def unavailable_reason() -> str | None:
    """Why the engine cannot start as things are, with the remedy; None when it can.

    Nothing is installed and Julia is not loaded, though an executable may be asked for its version.
    """
    if is_started():
        return None
    if _runtime.pid:
        return _forked()
    return _runtime.failure or launch.missing()


def start() -> None:
    """Start Julia and load the engine; where it runs already, do nothing.

    Nothing is installed: the command `install` does that, when it is asked to.

    Raises:
        EngineUnavailable: nothing could be started; the message holds the remedy.
        RuntimeError: this process was forked from one in which Julia runs.
    """
    if is_started():
        return
    if _runtime.pid:
        raise RuntimeError(_forked())
    with _starting:
        if is_started():
            return
        if _runtime.failure is not None:
            raise EngineUnavailable(_runtime.failure)
        launch.prepare()
        try:
            juliacall, module = launch.launch()
        except EngineUnavailable as error:
            # Julia cannot be started twice in a process.
            _runtime.failure = str(error)
            raise
        _runtime.raised = juliacall.JuliaError
        _runtime.module = module
        _runtime.pid = os.getpid()
        _runtime.owner = threading.get_ident()
        _match_threads()


def call(name: str, *arguments: Any) -> Any:
    """Call a quick function of the Julia module, holding Python's lock.

    Args:
        name: of the function in the module `PySciMLNode`.
        *arguments: numbers and strings.

    Returns:
        The value that Julia returned, as Python converts it.

    Raises:
        JuliaError: Julia raised.
        RuntimeError: wrong thread or process.
    """
    if threading.get_ident() != _runtime.owner:
        _enter()
    function = _runtime.functions.get(name) or _function(name)
    if handles.pending:
        free_pending()
    try:
        return function(*arguments)
    except _runtime.raised as error:
        raise translate(error) from None


def call_released(
    name: str,
    *arguments: Any,
    wrap: Callable[[Any], Any] | None = None,
    release: bool = True,
) -> Any:
    """Call a function that runs for long: other Python threads run on, and Ctrl-C stops it.

    Julia gets another argument in front: the descriptor for `interrupted(descriptor)`. A function
    that sees an interrupt frees its objects and throws an `InterruptException`.

    Args:
        name: of the function in the module `PySciMLNode`.
        *arguments: numbers and strings.
        wrap: called with the result while Ctrl-C is still held back, so a handle gets its owner
            before anything can be raised.
        release: whether other Python threads may run; they may not where Julia calls back into
            Python.

    Returns:
        The result, wrapped.

    Raises:
        JuliaError: Julia raised.
        KeyboardInterrupt: Ctrl-C, once Julia has stopped.
        RuntimeError: wrong thread or process.
    """
    if threading.get_ident() != _runtime.owner:
        _enter()
    if release:
        function = _runtime.released.get(name) or _released(name)
    else:
        function = _runtime.functions.get(name) or _function(name)
    if handles.pending:
        free_pending()
    if torch.get_num_threads() != _runtime.blas_threads:
        _match_threads()
    with Listening() as descriptor:
        try:
            result = function(descriptor, *arguments)
        except _runtime.raised as error:
            raise translate(error) from None
        return result if wrap is None else wrap(result)


def cross(name: str, *words: int) -> int:
    """Call an entry that takes whole numbers and addresses alone, by its own address.

    It calls nothing of Python's, and other Python threads run on. To listen for Ctrl-C takes longer
    than a small solve does. So an entry that is not through after a moment comes back, and Python
    listens while it goes on.

    Args:
        name: of the entry.
        *words: its arguments behind the descriptor, in order; what they are the addresses of has
            to stay.

    Returns:
        What it returns: 0, or the number of an object.

    Raises:
        JuliaError: Julia raised.
        KeyboardInterrupt: Ctrl-C, once Julia has stopped.
        RuntimeError: wrong thread or process.
    """
    if threading.get_ident() != _runtime.owner:
        _enter()
    if handles.pending:
        free_pending()
    if torch.get_num_threads() != _runtime.blas_threads:
        _match_threads()
    result = _cross(name, BRIEFLY, *words)
    if result >= 0:
        return result
    work = handles.Handle(-result)
    with Listening() as descriptor:
        result = _cross("go_on!", descriptor, work.number)
        work.forget()
        return result


def _cross(name: str, descriptor: int, *words: int) -> int:
    function = _runtime.crossings.get(name) or _crossing(name)
    row = array("q", (descriptor, *words))
    try:
        failed = function(row.buffer_info()[0])
    except BaseException:
        # Of a handler of signals, which may run once Julia has come back: nobody else will free it.
        if row[0] not in (descriptor, 0):
            handles.pending.append(abs(row[0]))
        raise
    if failed:
        error = _raised()
        raise error
    return row[0]


def _raised() -> BaseException:
    """What the last crossing raised."""
    name, message, trace = map(str, call("raised"))
    return KeyboardInterrupt() if name == "InterruptException" else JuliaError(name, message, trace)


def free_pending() -> None:
    """Free the objects of closed and collected handles; every call does this first."""
    if threading.get_ident() != _runtime.owner:
        _enter()
    free = _runtime.functions.get("free") or _function("free")
    while True:
        try:
            number = handles.pending.popleft()
        except IndexError:
            return
        free(number)


def require(*packages: str) -> None:
    """Load Julia packages that only some solves need.

    Args:
        *packages: names, such as `"OrdinaryDiffEqRosenbrock"`.

    Raises:
        EngineUnavailable: a package is not in the project, or does not load.
    """
    for name in packages:
        if name in _runtime.loaded:
            continue
        if name in _SLOW:
            print(
                f"pysciml_node: loading {name}, up to a minute, and longer the first time.",
                file=sys.stderr,
                flush=True,
            )
        try:
            call("load", name)
        except JuliaError as error:
            raise EngineUnavailable(
                f"the Julia package {name} could not be loaded: {error}\n"
                f"  {launch.how_to_add(name)}"
            ) from error
        _runtime.loaded.add(name)


def _function(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(_runtime.module, name.replace("!", "_b"))
    _runtime.functions[name] = function
    return function


def _released(name: str) -> Callable[..., Any]:
    function: Any = _runtime.functions.get(name) or _function(name)
    released: Callable[..., Any] = function._jl_call_nogil
    _runtime.released[name] = released
    return released


def _crossing(name: str) -> Callable[[int], int]:
    # Python's lock is let go of.
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(call("address_of", name))
    _runtime.crossings[name] = function
    return function


def _match_threads() -> None:
    """Give Julia's linear algebra as many threads as torch has."""
    count = torch.get_num_threads()
    _runtime.module.LinearAlgebra.BLAS.set_num_threads(count)
    _runtime.blas_threads = count


def _enter() -> None:
    """Let a thread in that is not the owner: start Julia for the first, refuse the others."""
    if not _runtime.owner and not _runtime.pid:
        start()
        return
    if _runtime.pid != os.getpid():
        raise RuntimeError(_forked())
    raise RuntimeError(
        "the Julia engine was started by another thread, and only that thread may use it.\n"
        '  Solve and differentiate in one thread, or use engine="torch" here. Gradients of CUDA '
        "tensors: torch.autograd.set_multithreading_enabled(False) round backward()."
    )


def _forked() -> str:
    return (
        "the Julia engine cannot be used in a process forked from one in which Julia runs.\n"
        '  Start the process by "spawn" or "forkserver": '
        'torch.multiprocessing.get_context("spawn"), or '
        'DataLoader(..., multiprocessing_context="spawn").'
    )


def _after_fork_in_child() -> None:
    _runtime.owner = _NOBODY
    handles.pending.clear()  # they are the parent's to free


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
