"""Fetching the files of a data set."""

import hashlib
import http.client
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urljoin

from pysciml_node.data.files import whole_file

_TIMEOUT_SECONDS = 60.0
_SUMS = "SHA256SUMS.txt"


def fetch(
    name: str,
    folder: Path,
    addresses: Sequence[str],
    check: Callable[[Path], object],
    *,
    by_hand: str,
) -> Path:
    """Fetch a file from the first address that serves the right bytes.

    The file gets its name only once its content is checked, so an interrupted download leaves
    nothing behind.

    Args:
        name: of the file in the folder.
        folder: where to put it; made when absent.
        addresses: tried in order.
        check: raises `ValueError` for a file that is not the right one.
        by_hand: what to do where no address can be reached; ends the sentence "Check the
            connection, or ...".

    Returns:
        Where the file is.

    Raises:
        ConnectionError: no address serves the file.
        OSError: the file cannot be written, for example because the disk is full.
    """
    target = folder / name
    failures = []
    for address in addresses:
        try:
            with whole_file(target) as stream:
                for chunk in _chunks(address):
                    stream.write(chunk)
                stream.flush()
                check(Path(stream.name))
        except ValueError as error:
            failures.append(f"{address}: {error}")
        else:
            return target
    listing = "\n    ".join(failures) or "no addresses were given"
    raise ConnectionError(
        f"{name} is not in {folder} and could not be downloaded:\n    {listing}\n"
        f"  Check the connection, or {by_hand}."
    )


def _chunks(address: str) -> Iterator[bytes]:
    """The bytes that an address serves, piece by piece.

    Raises:
        ValueError: it serves nothing, or less than it announced. `fetch` lists the reason.
    """
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_SECONDS) as response:
            announced = response.headers.get("Content-Length")
            size = 0
            while chunk := response.read(1 << 20):
                size += len(chunk)
                yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(str(error)) from error
    if announced is not None and size != int(announced):
        raise ValueError(f"the connection ended after {size} of {announced} bytes")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def published_sum(address: str) -> str | None:
    """The SHA-256 that the folder of an address gives for its file, where it has a list of them."""
    name = address.partition("?")[0].rpartition("/")[2]
    try:
        listed = b"".join(_chunks(urljoin(address, _SUMS))).decode("utf-8")
    except ValueError:
        return None
    pairs = (line.split() for line in listed.splitlines())
    return next((pair[0] for pair in pairs if len(pair) == 2 and pair[1].lstrip("*") == name), None)
