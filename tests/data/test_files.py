"""Files are there whole or not at all, whatever interrupts their writing."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest

from pysciml_node.data import download
from pysciml_node.data.files import whole_file


def write(path: Path, content: bytes) -> None:
    with whole_file(path) as stream:
        stream.write(content)


def test_a_file_takes_the_place_of_the_older_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write(path, b"old")
    with whole_file(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interruption_leaves_the_older_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    write(path, b"old")

    def interrupted() -> None:
        with whole_file(path) as stream:
            stream.write(b"new")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_share_a_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as first, whole_file(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    path = tmp_path / "file"
    write(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"the disk is full: .*file could not be written\.\n  Make room"
    ):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_download_on_a_full_disk_asks_no_other_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    folder = tmp_path / "data"
    with pytest.raises(OSError, match="the disk is full"):
        download.fetch("f", folder, [source.as_uri()] * 2, lambda path: None, by_hand="...")
    assert not list(folder.iterdir())


class Short(io.BytesIO):
    """A response that ends before what it announced."""

    headers = {"Content-Length": "10"}  # noqa: RUF012


def test_a_download_that_ends_early_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        download.urllib.request, "urlopen", lambda address, timeout: Short(b"12345")
    )
    with pytest.raises(ConnectionError, match="after 5 of 10 bytes"):
        download.fetch("f", tmp_path, ["http://x"], lambda path: None, by_hand="...")
    assert not list(tmp_path.iterdir())
