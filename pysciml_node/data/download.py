"""Fetching the files of a data set."""

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

_TIMEOUT_SECONDS = 60.0


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
    nothing behind that a later call would take for the file.

    Args:
        name: of the file in the folder.
        folder: where to put it; made when absent.
        addresses: tried in order.
        check: raises `ValueError` for a file that is not the right one.
        by_hand: what to do where no address can be reached, ending the sentence "Check the
            connection, or ...".

    Returns:
        Where the file is.

    Raises:
        ConnectionError: no address serves the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    failures = []
    for address in addresses:
        partial = folder / f".{name}.{os.getpid()}.partial"
        try:
            with (
                partial.open("wb") as stream,
                urllib.request.urlopen(address, timeout=_TIMEOUT_SECONDS) as response,
            ):
                while chunk := response.read(1 << 20):
                    stream.write(chunk)
            check(partial)
            os.replace(partial, target)
        except (urllib.error.URLError, OSError, ValueError) as error:
            failures.append(f"{address}: {error}")
            partial.unlink(missing_ok=True)
        else:
            return target
    listing = "\n    ".join(failures) or "no addresses were given"
    raise ConnectionError(
        f"{name} is not in {folder} and could not be downloaded:\n    {listing}\n"
        f"  Check the connection, or {by_hand}."
    )
