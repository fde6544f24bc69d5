"""The boundary with Julia is one table, which both sides are held to."""

from __future__ import annotations

import re
from array import array
from typing import Any

import pytest
import torch

from pysciml_node.julia_engine.process import entries, env, runtime
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def call(name: str, *arguments: Any) -> int:
        calls.append((name, *arguments))
        return 7

    def call_released(name: str, *arguments: Any, wrap: Any, release: bool) -> Any:
        result = call(name, *arguments)
        return result if wrap is None else wrap(result)

    monkeypatch.setattr(runtime, "call", call)
    monkeypatch.setattr(runtime, "call_released", call_released)
    return calls


def test_fields_are_given_by_name_and_passed_in_order(called):
    times, out = array("d", [0.0, 1.0]), torch.zeros(2, 4)
    handle = Handle(3)
    enter("interpolate!", out=out, n=4, times=times, record=handle, m=2)
    assert called == [("interpolate!", 3, 4, 2, times.buffer_info()[0], out.data_ptr())]
    handle.forget()


def test_tensors_are_addresses_and_have_to_be_contiguous(called):
    out = torch.zeros(4)
    assert enter("look!", t=torch.tensor(0.5), address=out, n=4) == 7
    assert called == [("look!", 0.5, out.data_ptr(), 4)]
    with pytest.raises(ValueError, match="contiguous"):
        enter("look!", t=0.5, address=torch.zeros(4, 2)[:, 0], n=4)


def test_results_are_wrapped(called):
    handle = enter("make_tableau", json="{}", wrap=Handle)
    assert handle.number == 7
    handle.forget()


@pytest.mark.parametrize(
    "given", [{"t": 0.0, "n": 1}, {"t": 0.0, "n": 1, "address": None, "more": 1}, {}]
)
def test_fields_that_are_missing_or_unknown_are_refused(called, given):
    with pytest.raises(TypeError, match="look! takes t, address, n"):
        enter("look!", **given)
    assert not called


def test_arrays_of_another_type_are_refused(called):
    with pytest.raises(ValueError, match="'q' is expected"):
        enter("make_source", text="", dtype=0, dims=1, shape=array("d", [1.0]))


def test_the_table_is_that_of_the_julia_files():
    """Julia checks names and types when it compiles; here an entry that is missing is found."""
    folder = env.bundled_project()
    files = [*(folder / "src").glob("*.jl"), *(folder / "ext").rglob("*.jl")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    for name, (long, fields) in entries.table().items():
        found = re.search(rf"(?m)^(?:function )?(?:PySciMLNode\.)?{name}\(([^)]*::[^)]*)\)", source)
        assert found is not None, name
        names = [argument.split("::")[0].strip() for argument in found[1].split(",")]
        expected = ["fd"] * long + [field for field, _ in fields]
        assert [argument for argument in names if argument] == expected, name
