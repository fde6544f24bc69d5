"""Ctrl-C as Julia gets to see it; the other end is read here by Python."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading

import pytest

from pysciml_node.julia_engine.process.interrupt import NOT_LISTENING, Listening

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is not passed on to Julia there")


def peek(descriptor: int) -> bytes:
    end = socket.socket(fileno=descriptor)
    try:
        return end.recv(16, socket.MSG_PEEK)
    except BlockingIOError:
        return b""
    finally:
        end.detach()


def test_a_signal_is_seen_while_listening_and_raised_after_it():
    seen = []

    def listen() -> None:
        with Listening() as descriptor:
            seen.append(peek(descriptor))
            signal.raise_signal(signal.SIGINT)
            seen.append(peek(descriptor))
            seen.append(peek(descriptor))  # looking takes nothing away

    with pytest.raises(KeyboardInterrupt):
        listen()
    assert seen == [b"", bytes([signal.SIGINT]), bytes([signal.SIGINT])]


def test_the_next_one_starts_clean():
    for _ in range(3):
        with Listening() as descriptor:
            assert peek(descriptor) == b""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1


def test_the_users_handler_is_the_one_that_is_called(monkeypatch):
    called = []
    before = signal.signal(signal.SIGINT, lambda number, frame: called.append(number))
    try:
        with Listening():
            signal.raise_signal(signal.SIGINT)
            assert called == []
        assert called == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_inside_is_kept_as_the_context():
    def fail() -> None:
        with Listening():
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("meanwhile")

    with pytest.raises(KeyboardInterrupt) as caught:
        fail()
    assert isinstance(caught.value.__context__, RuntimeError)


def test_within_one_another_the_outer_one_hears_too():
    seen = []

    def listen() -> None:
        with Listening() as outer:
            try:
                with Listening():
                    signal.raise_signal(signal.SIGINT)
            finally:
                seen.append(peek(outer))

    with pytest.raises(KeyboardInterrupt):
        listen()
    assert seen == [bytes([signal.SIGINT])]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_program_that_wants_no_exception_gets_none(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with Listening() as descriptor:
            assert descriptor == NOT_LISTENING
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_there_is_nothing_to_hear_off_the_main_thread():
    heard = []

    def listen() -> None:
        with Listening() as descriptor:
            heard.append(descriptor)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [NOT_LISTENING]


def test_an_event_loop_still_hears_its_signals():
    """asyncio owns the same hook; what arrives meanwhile is handed on."""

    async def main() -> list[str]:
        heard: list[str] = []
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.append, "user")
        with Listening():
            signal.raise_signal(signal.SIGUSR1)
        await asyncio.sleep(0.05)
        return heard

    assert asyncio.run(main()) == ["user"]
