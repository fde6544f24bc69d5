"""Libraries are built once, kept in private, and built again when they are not what was written."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import pysciml_node as psn
from pysciml_node.torch_engine.native import compiler
from pysciml_node.torch_engine.native.compiler import available, build
from pysciml_node.torch_engine.native.library import source

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

SOURCE = "int answer(void) { return 42; }\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "native"
    monkeypatch.setenv("PSN_NATIVE_CACHE", str(path))
    return path


def library(folder: Path) -> Path:
    (found,) = folder.glob("*.so")
    return found


def test_one_library_for_one_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(SOURCE).answer() == 42
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not library(folder).stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)

    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiler, "_compile", refuse)
    assert build(SOURCE).answer() == 42
    with pytest.raises(AssertionError, match="again"):
        build(SOURCE + " ")


def test_the_next_process_compiles_nothing(folder: Path) -> None:
    build(SOURCE)
    before = library(folder).stat().st_mtime_ns
    code = (
        "from pysciml_node.torch_engine.native import compiler as c\n"
        f"c._compile = None\nassert c.build({SOURCE!r}).answer() == 42\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path.cwd())
    assert library(folder).stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["cut", "changed", "writable", "link"])
def test_what_is_not_as_it_was_written_is_built_again(folder: Path, damage: str) -> None:
    folder.mkdir(mode=0o700)
    code = (
        "from pysciml_node.torch_engine.native.compiler import build\n"
        f"assert build({SOURCE!r}).answer() == 42\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path.cwd())
    path = library(folder)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    elif damage == "writable":
        path.chmod(0o666)
    else:
        path.rename(folder / "elsewhere")
        path.symlink_to(folder / "elsewhere")
    assert build(SOURCE).answer() == 42
    assert compiler._is_whole(path)


def test_a_folder_that_others_may_write_to_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(psn.CompileError, match="PSN_NATIVE_CACHE"):
        build(SOURCE)


def test_many_at_once(folder: Path) -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(build(SOURCE).answer())) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [42] * 6
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSN_CC", "no-such-compiler")
    compiler.find_compiler.cache_clear()
    try:
        assert not available()[0]
        with pytest.raises(
            psn.CompileError, match=r"no-such-compiler(.|\n)*pysciml_node\[native\]"
        ):
            build(SOURCE)
    finally:
        monkeypatch.undo()
        compiler.find_compiler.cache_clear()
    assert os.environ.get("PSN_CC") != "no-such-compiler"


def test_code_is_made_of_the_files_that_were_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed anew beneath a process has structures of another layout."""

    def gone(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", gone)
    assert "} Solve;" in source("control.h")
