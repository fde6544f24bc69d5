"""The IDX file format: a big-endian header with type and shape, then the entries."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node import checks

_GZIP_MAGIC = b"\x1f\x8b"
_FETCH = "Delete it and load again to fetch it anew."
_UNPACK = "Unpack an archive first, and give one of the files in it."
_DTYPES: dict[int, np.dtype[Any]] = {
    0x08: np.dtype(">u1"),
    0x09: np.dtype(">i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}


def read_bytes(path: str | Path) -> bytes:
    """Read a file, unpacking it when it is gzipped.

    Args:
        path: the file; its content, not its name, tells whether it is gzipped.

    Returns:
        The unpacked content.

    Raises:
        ValueError: the gzip stream is damaged or cut short.
    """
    raw = checks.path("path", path).read_bytes()
    if not raw.startswith(_GZIP_MAGIC):
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}).\n  {_FETCH}") from error


def parse_idx(content: bytes, *, name: str = "content") -> Tensor:
    """Turn the bytes of an IDX file into a tensor.

    The header is two zero bytes, a byte for the type of the entries, a byte for the number of
    dimensions and the dimensions as big-endian 32-bit integers.

    Args:
        content: the unpacked file.
        name: what to call the content in error messages.

    Returns:
        A tensor of the stored type and shape.

    Raises:
        ValueError: the header is not that of an IDX file, or the size does not match it.

    Examples:
        >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9])).tolist()
        [7, 8, 9]
    """
    if not isinstance(content, bytes):
        checks.refuse("content", "the bytes of a file", content, "Write path.read_bytes().")
    name = checks.text("name", name)
    if len(content) < 4 or content[:2] != b"\x00\x00" or content[2] not in _DTYPES:
        raise ValueError(
            f"{name} is not an IDX file: it must start with two zero bytes and a type code, "
            f"but starts with {content[:4].hex(' ') or 'nothing'}.\n  {_UNPACK}"
        )
    dtype, rank = _DTYPES[content[2]], content[3]
    start = 4 + 4 * rank
    if len(content) < start:
        raise ValueError(
            f"{name} ends inside its header ({len(content)} of {start} bytes).\n  {_FETCH}"
        )
    shape = struct.unpack(f">{rank}I", content[4:start])
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(
            f"{name} should hold {expected} bytes for entries of shape {shape}, "
            f"but holds {len(content)}.\n  {_FETCH}"
        )
    entries = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return torch.from_numpy(entries.astype(dtype.newbyteorder("=")))


def read_idx(path: str | Path) -> Tensor:
    """Read an IDX file, gzipped or not.

    Args:
        path: the file.

    Returns:
        A tensor of the stored type and shape.

    Raises:
        ValueError: the file is not an IDX file or is damaged.
        FileNotFoundError: there is no such file.

    Reference:
        Y. LeCun, C. Cortes, C. J. C. Burges, The MNIST database of handwritten digits,
        section "File formats".
    """
    return parse_idx(read_bytes(path), name=str(path))
