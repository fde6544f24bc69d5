"""Ctrl-C while Julia runs.

Python notes a signal in a handler written in C. It acts on it only between its own instructions,
that is, after a solve in Julia is over. But the handler can also write the signal's number to a
socket (`signal.set_wakeup_fd`). Julia looks into the other end of it at every step (`interrupted`
in `julia/src/interrupt.jl`), and stops.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # of every CPython; unknown to the type checker
import signal
import socket
import sys
import threading
from types import FrameType, TracebackType

NOT_LISTENING = -1
BRIEFLY = -(2**62)
"""In place of a descriptor: Julia comes back after a moment, so that somebody listens."""

# The module `signal` wraps these functions to turn numbers into enumerations. That would take
# longer than all the rest of a call into Julia.
_get_handler = _signal.getsignal
_set_handler = _signal.signal
_DRAIN = 256
_SIGINT = int(signal.SIGINT)
_sockets: tuple[socket.socket, socket.socket] | None = None


def _pair() -> tuple[socket.socket, socket.socket]:
    global _sockets
    if _sockets is None:
        _sockets = socket.socketpair()
        for end in _sockets:
            end.setblocking(False)
    return _sockets


class Listening:
    """Makes SIGINT visible to Julia while the context lasts, and acts on it when it ends.

    Entering gives the descriptor that Julia polls, or -1 where there is nothing to poll: off the
    main thread, on Windows, and where the program ignores SIGINT or lets it kill the process.
    Leaving restores the handler that was there. If a SIGINT came meanwhile, that handler is called
    then; by default it raises `KeyboardInterrupt`.
    """

    __slots__ = ("_armed", "_handler", "_previous_fd", "_received")

    def __init__(self) -> None:
        self._armed = False
        self._received = False

    def __enter__(self) -> int:
        if threading.get_ident() != threading.main_thread().ident or sys.platform == "win32":
            return NOT_LISTENING
        handler = _get_handler(_SIGINT)
        if not callable(handler):  # SIG_IGN, SIG_DFL, or one that was not set from Python
            return NOT_LISTENING
        reading, writing = _pair()
        self._handler = handler
        _set_handler(_SIGINT, self._note)
        self._previous_fd = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        self._armed = True
        if self._received:  # between the two lines before
            writing.send(bytes([_SIGINT]))
        return reading.fileno()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._received = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._armed:
            return
        signal.set_wakeup_fd(self._previous_fd)
        _set_handler(_SIGINT, self._handler)
        self._forward()
        if self._received:
            self._handler(_SIGINT, None)

    def _forward(self) -> None:
        """Empty the socket, and pass its bytes on to an earlier listener, such as asyncio."""
        try:
            received = _pair()[0].recv(_DRAIN)
        except BlockingIOError:
            return
        if self._previous_fd >= 0:
            previous = socket.socket(fileno=self._previous_fd)
            try:
                previous.send(received)
            except OSError:  # it is full, or no socket: as with a signal that comes in numbers
                pass
            finally:
                previous.detach()
