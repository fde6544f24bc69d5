"""The door to Julia, on a Julia."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pysciml_node.errors import EngineUnavailable, JuliaError
from pysciml_node.julia_engine.process import handles, launch, runtime
from pysciml_node.julia_engine.process.handles import Handle

pytestmark = pytest.mark.julia

Define = Callable[[str, str], None]


@pytest.fixture
def define(monkeypatch) -> Define:
    """Give the engine's module another function for the time of a test."""

    def define(name: str, source: str) -> None:
        function = runtime._runtime.module.seval(source)
        monkeypatch.setitem(runtime._runtime.functions, name, function)
        monkeypatch.setitem(runtime._runtime.released, name, function._jl_call_nogil)

    return define


def test_numbers_and_strings_cross(define):
    define("echo", "(a, b, c) -> string(a, b, c)")
    assert runtime.call("echo", 1, 2.5, "three") == "12.5three"


def test_starting_again_does_nothing():
    before = runtime._runtime.module
    runtime.start()
    assert runtime.is_started()
    assert runtime._runtime.module is before
    assert runtime.unavailable_reason() is None
    assert "Julia 1." in launch.describe()


def test_an_unknown_function_is_an_error_of_ours():
    with pytest.raises(AttributeError):
        runtime.call("no_such_function")


@pytest.mark.parametrize("call", [runtime.call, runtime.call_released])
def test_exceptions_of_julia(define, call):
    define("fail", '(arguments...) -> throw(DomainError(-1.0, "must be positive"))')
    with pytest.raises(JuliaError, match=r"^Julia: DomainError(.|\n)*must be positive") as caught:
        call("fail")
    error = caught.value
    assert error.julia_type == "DomainError"
    assert "Stacktrace" in error.julia_backtrace
    assert "Stacktrace" not in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.julia_backtrace) == (str(error), error.julia_backtrace)


def test_a_long_message_is_cut_and_kept(define):
    define("fail", 'n -> error(join(("line $i" * "."^1000 for i in 1:n), "\\n"))')
    with pytest.raises(JuliaError) as caught:
        runtime.call("fail", 1000)
    assert len(str(caught.value).splitlines()) <= 21
    assert len(str(caught.value)) < 10_000
    assert "line 1000" in caught.value.julia_message


def test_an_exception_of_a_python_callback_comes_through_as_itself(define):
    define("run", "f -> f()")

    def callback() -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        runtime.call("run", callback)


def test_other_threads_run_while_julia_does(define):
    define("spin", "(fd, seconds) -> (stop = time() + seconds; while time() < stop end)")
    ticks = []
    over = threading.Event()

    def tick() -> None:
        while not over.wait(0.01):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    runtime.call_released("spin", 0.3)
    over.set()
    thread.join()
    assert len(ticks) > 5


def test_another_thread_is_refused(define):
    define("echo", "a -> a")
    caught: list[BaseException] = []

    def enter() -> None:
        try:
            runtime.call("echo", 1)
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "only that thread" in str(caught[0])
    assert 'engine="torch"' in str(caught[0])


def _child(connection: Any) -> None:
    answers = [str(runtime.unavailable_reason())]
    for enter in (runtime.start, lambda: runtime.call("free", 0)):
        try:
            enter()
            answers.append("entered")
        except RuntimeError as error:
            answers.append(str(error))
    connection.send(answers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_is_refused_with_the_remedy():
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(theirs,))
    child.start()
    assert ours.poll(20)
    answers = ours.recv()
    child.join(20)
    assert child.exitcode == 0
    assert all("spawn" in answer for answer in answers)
    assert runtime.is_started()


LOOP = """
function (fd, seconds)
    start, steps = time(), 0
    while time() - start < seconds
        stop_when_interrupted(fd)
        steps += 1
    end
    return steps
end
"""


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is not passed on to Julia there")
def test_ctrl_c_stops_julia_within_a_second_and_leaves_it_usable(define):
    define("loop", LOOP)
    runtime.call_released("loop", 0.01)  # compiled
    for _ in range(3):
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            runtime.call_released("loop", 30.0)
        assert time.perf_counter() - start < 1.2
        timer.join()
        assert runtime.call_released("loop", 0.01) > 0


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is not passed on to Julia there")
def test_a_result_that_comes_with_ctrl_c_gets_its_owner(define, monkeypatch):
    """Julia was done already: the handle is made, dies with the exception, and is given back."""
    define("answer", "fd -> 41")
    freed: list[int] = []
    monkeypatch.setitem(runtime._runtime.functions, "free", freed.append)

    def wrap(number: int) -> Handle:
        signal.raise_signal(signal.SIGINT)
        return Handle(number)

    with pytest.raises(KeyboardInterrupt):
        runtime.call_released("answer", wrap=wrap)
    runtime.free_pending()
    assert freed == [41]


def test_what_died_is_freed_by_the_next_call(define, monkeypatch):
    define("echo", "a -> a")
    freed: list[int] = []
    monkeypatch.setitem(runtime._runtime.functions, "free", freed.append)
    Handle(5).close()
    Handle(6).close()
    assert freed == []
    runtime.call("echo", 1)
    assert freed == [5, 6]
    assert not handles.pending


def test_a_package_that_is_not_there_names_the_remedy():
    with pytest.raises(EngineUnavailable, match=r"NoSuchPackageAsThis(.|\n)*(Pkg.add|install)"):
        runtime.require("NoSuchPackageAsThis")


def test_julias_linear_algebra_has_as_many_threads_as_torch(define):
    define("threads", "fd -> LinearAlgebra.BLAS.get_num_threads()")
    before = torch.get_num_threads()
    try:
        for count in (2, 1):
            torch.set_num_threads(count)
            assert runtime.call_released("threads") == count
    finally:
        torch.set_num_threads(before)


def test_memory_is_flat_over_failing_and_good_calls(define):
    """Errors are rendered and let go; nothing of Julia's stays referenced from here."""
    import juliacall

    define("good", "a -> a + 1")
    define("fail", "a -> error(a)")
    values = juliacall.PythonCall.JlWrap.Cjl.PYJLVALUES

    def run() -> int:
        for _ in range(30):
            runtime.call("good", 1)
            with pytest.raises(JuliaError):
                runtime.call("fail", "no")
        juliacall.Base.GC.gc()
        return int(juliacall.Base.length(values)) - int(
            juliacall.Base.length(juliacall.PythonCall.JlWrap.Cjl.PYJLFREEVALUES)
        )

    first = run()
    assert run() <= first + 2
