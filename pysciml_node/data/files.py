"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only at the end, and replaces an older one then.

    Until then the bytes are in a file of another name beside it. No other process writes to that
    one, and it is removed when anything goes wrong. It is renamed once it has reached the disk.

    Args:
        path: the file; its folder is made when absent.

    Yields:
        Where to write to.

    Raises:
        OSError: the file could not be written; the message says when the disk is full.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes"
        >>> with whole_file(path) as stream:
        ...     _ = stream.write(b"done")
        >>> path.read_bytes(), len(list(path.parent.iterdir()))
        (b'done', 1)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
    try:
        with partial.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            error.errno,
            f"the disk is full: {path} could not be written.\n"
            "  Make room and try again; a file of this name that was there before is as it was.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let the new name reach the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
