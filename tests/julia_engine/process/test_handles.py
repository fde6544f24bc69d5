"""What is owned by Python is given back exactly once."""

from __future__ import annotations

import gc
import threading

import pytest

from pysciml_node.julia_engine.process import handles
from pysciml_node.julia_engine.process.handles import Handle


@pytest.fixture(autouse=True)
def queue(monkeypatch):
    monkeypatch.setattr(handles, "pending", type(handles.pending)())
    return handles.pending


def test_closing_gives_back_once():
    handle = Handle(3)
    handle.close()
    handle.close()
    del handle
    assert list(handles.pending) == [3]


def test_a_closed_handle_has_no_number():
    handle = Handle(3)
    assert handle.number == 3
    handle.close()
    with pytest.raises(ValueError, match="freed already"):
        _ = handle.number


def test_a_collected_handle_is_given_back_even_from_a_cycle():
    def cycle() -> None:
        knot: dict[str, object] = {"handle": Handle(4)}
        knot["knot"] = knot

    cycle()
    gc.collect()
    assert list(handles.pending) == [4]


def test_a_handle_may_die_on_any_thread():
    owned = [Handle(number) for number in range(1, 101)]
    halves = [owned[:50], owned[50:]]
    del owned
    threads = [threading.Thread(target=half.clear) for half in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(handles.pending) == list(range(1, 101))
