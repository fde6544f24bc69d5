"""PhysioNet 2012, set a: two days of intensive care of four thousand patients."""

import lzma
import math
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from pysciml_node import checks
from pysciml_node.data.download import fetch, published_sum, sha256_of
from pysciml_node.data.labelled import Splits, check_division
from pysciml_node.data.series import IrregularSeries, split_at_random

ADDRESSES = ("https://physionet.org/files/challenge-2012/1.0.0/set-a.tar.gz",)
ARCHIVES = ("set-a.tar.gz", "set-a.tar.xz", "set-a.tar", "set-a.zip")
HOURS = 48.0

# Each variable with a generous range for a living patient. A value outside is a slip of the pen
# (a pH of 735, a temperature of -17.8) or a code. The units are the challenge's: mmHg, bpm, degrees
# Celsius, kg, mL, and the laboratory's usual ones.
RANGES: dict[str, tuple[float, float]] = {
    "ALP": (1.0, 5000.0),
    "ALT": (1.0, 20000.0),
    "AST": (1.0, 30000.0),
    "Albumin": (0.5, 7.0),
    "BUN": (0.5, 300.0),
    "Bilirubin": (0.05, 80.0),
    "Cholesterol": (10.0, 700.0),
    "Creatinine": (0.05, 30.0),
    "DiasABP": (5.0, 200.0),
    "FiO2": (0.2, 1.0),
    "GCS": (3.0, 15.0),
    "Glucose": (5.0, 1500.0),
    "HCO3": (2.0, 60.0),
    "HCT": (5.0, 70.0),
    "HR": (10.0, 300.0),
    "K": (1.0, 15.0),
    "Lactate": (0.1, 40.0),
    "MAP": (10.0, 250.0),
    "MechVent": (0.0, 1.0),
    "Mg": (0.2, 15.0),
    "NIDiasABP": (5.0, 200.0),
    "NIMAP": (10.0, 250.0),
    "NISysABP": (20.0, 300.0),
    "Na": (90.0, 200.0),
    "PaCO2": (5.0, 200.0),
    "PaO2": (10.0, 600.0),
    "Platelets": (1.0, 3000.0),
    "RespRate": (1.0, 100.0),
    "SaO2": (20.0, 100.0),
    "SysABP": (20.0, 320.0),
    "Temp": (25.0, 45.0),
    "TroponinI": (0.0, 100.0),
    "TroponinT": (0.0, 50.0),
    "Urine": (0.0, 5000.0),
    "WBC": (0.05, 500.0),
    "Weight": (20.0, 350.0),
    "pH": (6.5, 8.0),
}
VARIABLES = tuple(RANGES)
Outliers = Literal["keep", "drop", "clip"]

# These describe the patient, once at time 0. They are no time series.
_DESCRIPTORS = ("RecordID", "Age", "Gender", "Height", "ICUType")
_UNKNOWN = -1.0


def physionet(
    data_dir: str | Path,
    *,
    download: bool = True,
    quantization: float | None = 1.0,
    outliers: Outliers = "keep",
    validation: float = 0.0,
    test: float = 0.2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    addresses: Sequence[str] = ADDRESSES,
    sha256: str | None = None,
) -> Splits[IrregularSeries]:
    """Load the 37 variables of set a, each scaled to [0, 1] by its range over all patients.

    Times are in units of the 48 hours. A value of -1 is the challenge's code for an unknown one
    and counts as not observed. Patients without any observation are left out.

    Args:
        data_dir: folder with `set-a.tar.gz` (or `.tar.xz`, `.tar`, `.zip`), or with the
            unpacked folder `set-a`.
        download: fetch the archive when there is none.
        quantization: hours that times are rounded to multiples of; values of one variable that
            meet are averaged. The published experiments use 1. Times stay as they are, to the
            minute, when None.
        outliers: what to do with values outside `RANGES`: `"keep"` as the published
            experiments, `"drop"` (count as not observed) or `"clip"`. Scaling comes after.
        validation: share of the patients held out to choose settings on.
        test: share held out to report on.
        seed: of the division; the same seed gives the same division.
        dtype: of times and values.
        addresses: of the archive, tried in order.
        sha256: of a downloaded archive; default what the file `SHA256SUMS.txt` beside an address
            says, which PhysioNet has.

    Returns:
        The parts, in the order of `VARIABLES`.

    Raises:
        FileNotFoundError: there is no archive and `download` is off.
        ConnectionError: there is no archive and none could be fetched.
        ValueError: a file is not of the challenge's form, or an argument is out of range.

    Examples:
        >>> data = physionet("data/physionet")  # doctest: +SKIP
        >>> data.train.variables  # doctest: +SKIP
        37

    Reference:
        I. Silva et al., Predicting in-hospital mortality of ICU patients: the
        PhysioNet/Computing in Cardiology challenge 2012, Comput. Cardiol. 39 (2012) 245-248.
    """
    seed = check_division(validation, test, seed, dtype)
    if quantization is not None:
        hint = "It is in hours; None keeps the times as they are."
        checks.number("quantization", quantization, above=0, at_most=HOURS, hint=hint)
    checks.choice("outliers", outliers, get_args(Outliers))
    checks.path("data_dir", data_dir)
    source = _find(Path(data_dir))
    if source is None:
        if not download:
            raise FileNotFoundError(
                f"{data_dir} holds neither a folder set-a nor one of {', '.join(ARCHIVES)}.\n"
                "  Name the folder that does, or allow the download (download=True)."
            )
        source = _download(Path(data_dir), addresses, sha256)
    records = (parse_record(text, name=name) for name, text in _records(source))
    tables = [_tabulate(record, quantization, outliers) for record in records]
    return split_at_random(
        _scaled([table for table in tables if table is not None], dtype),
        validation=validation,
        test=test,
        seed=seed,
    )


def _download(folder: Path, addresses: Sequence[str], sha256: str | None) -> Path:
    published = [sha256] if sha256 is not None else [published_sum(url) for url in addresses]
    return fetch(
        ARCHIVES[0],
        folder,
        addresses,
        partial(_check_archive, sums={digest.lower() for digest in published if digest}),
        by_hand=f"put set-a.tar.gz of the challenge into {folder} by hand",
    )


Record = tuple[np.ndarray, np.ndarray, np.ndarray]
_LEAVE_OUT = "Take the file out of the folder, or fetch the archive anew."


def parse_record(text: str, *, name: str = "record") -> Record:
    """The observations of one patient's file: a heading, then lines `hh:mm,variable,value`.

    Args:
        text: of the file.
        name: what to call it in error messages.

    Returns:
        Hours, places in `VARIABLES`, and values, one entry an observation, in the file's order.

    Raises:
        ValueError: a line of another form.

    Examples:
        >>> hours, places, values = parse_record("Time,Parameter,Value\\n01:30,HR,73\\n")
        >>> hours.tolist(), VARIABLES[places[0]], values.tolist()
        ([1.5], 'HR', [73.0])
    """
    if not isinstance(text, str):
        checks.refuse("text", "the text of a file", text, "Write path.read_text().")
    heading, *lines = text.splitlines() or [""]
    if heading.strip() != "Time,Parameter,Value":
        raise ValueError(
            f"{name} is no record of the challenge: it must start with 'Time,Parameter,Value', "
            f"but starts with {heading[:40]!r}.\n  {_LEAVE_OUT}"
        )
    hours, places, values = [], [], []
    for number, line in enumerate(lines, start=2):
        try:
            clock, variable, value = line.split(",")
            place = _PLACES.get(variable)
            if place is None:
                if variable and variable not in _DESCRIPTORS:
                    raise ValueError(f"unknown variable {variable!r}")
                continue
            hours.append(_hours(clock))
            values.append(_number(value))
            places.append(place)
        except ValueError as error:
            raise ValueError(
                f"{name}, line {number}: {line!r} ({error}).\n  {_LEAVE_OUT}"
            ) from error
    return np.array(hours), np.array(places, dtype=np.int64), np.array(values)


def _hours(clock: str) -> float:
    """Hours of a time `hh:mm` within the two days."""
    match = _CLOCK.fullmatch(clock)
    hours = int(match[1]) + int(match[2]) / 60 if match else math.inf
    if hours > HOURS:
        raise ValueError(f"the time must be hh:mm, from 00:00 to {HOURS:.0f}:00, but is {clock!r}")
    return hours


def _number(value: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the value must be a finite number, but is {value!r}")
    return number


_CLOCK = re.compile(r"([0-9]{1,2}):([0-5][0-9])")
_PLACES = {variable: place for place, variable in enumerate(VARIABLES)}
_LOW, _HIGH = (np.array(bounds) for bounds in zip(*RANGES.values(), strict=True))


def _tabulate(
    record: Record, quantization: float | None, outliers: Outliers
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Times in hours `(n,)`, means `(n, 37)` and numbers `(n, 37)` of the values there."""
    hours, places, values = record
    low, high = _LOW[places], _HIGH[places]
    kept = values != _UNKNOWN
    if outliers == "drop":
        kept &= (values >= low) & (values <= high)
    elif outliers == "clip":
        values = values.clip(low, high)
    if not kept.any():
        return None
    hours, places, values = hours[kept], places[kept], values[kept]
    if quantization is not None:
        # Halves go up: to even, as numpy rounds, would make the intervals unequal.
        hours = np.floor(hours / quantization + 0.5) * quantization
    times, rows = np.unique(hours, return_inverse=True)
    sums, counts = np.zeros((2, len(times), len(VARIABLES)))
    np.add.at(sums, (rows, places), values)
    np.add.at(counts, (rows, places), 1.0)
    return times, sums / np.maximum(counts, 1.0), counts


def _scaled(
    tables: list[tuple[np.ndarray, np.ndarray, np.ndarray]], dtype: torch.dtype
) -> IrregularSeries:
    if not tables:
        raise ValueError(
            "no record holds any observation.\n"
            '  Write outliers="keep", or look at the files: they may be cut short.'
        )
    times, values, counts = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    observed = counts > 0
    low = np.where(observed, values, np.inf).min(axis=0)
    high = np.where(observed, values, -np.inf).max(axis=0)
    # A variable that is never seen, or always the same, has no width: it stays at 0.
    width = np.where(high > low, high - low, 1.0)
    scaled = np.where(observed, (values - np.where(high < low, 0.0, low)) / width, 0.0)
    return IrregularSeries(
        torch.from_numpy(times / HOURS).to(dtype),
        torch.from_numpy(scaled).to(dtype),
        torch.from_numpy(observed),
        torch.tensor([len(table[0]) for table in tables]),
    )


def _find(folder: Path) -> Path | None:
    unpacked = (folder / "set-a", folder) if folder.is_dir() else ()
    for candidate in unpacked:
        if any(candidate.glob("[0-9]*.txt")):
            return candidate
    archives = (folder / name for name in ARCHIVES)
    return next((path for path in archives if path.is_file()), None)


def _records(source: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each record, in the order of the names."""
    texts = dict(_texts(source))
    if not texts:
        raise ValueError(
            f"{source} holds no records such as 132539.txt.\n"
            "  Delete it and load again to fetch it anew."
        )
    for name in sorted(texts):
        try:
            yield f"{source}: {name}", texts[name].decode("ascii")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{source}: {name} is no record of the challenge ({error}).\n"
                "  Delete the archive and load again to fetch it anew."
            ) from error


def _texts(source: Path) -> Iterable[tuple[str, bytes]]:
    if source.is_dir():
        for path in source.glob("[0-9]*.txt"):
            yield path.name, path.read_bytes()
        return
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                for name in archive.namelist():
                    if _is_record(name):
                        yield Path(name).name, archive.read(name)
            return
        with tarfile.open(source) as archive_tar:
            for member in archive_tar:
                stream = archive_tar.extractfile(member) if _is_record(member.name) else None
                if stream is not None:
                    yield Path(member.name).name, stream.read()
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(_damaged(source, error)) from error
    except OSError as error:
        if error.errno is not None:  # the system's errors have a number, gzip's have none
            raise
        raise ValueError(_damaged(source, error)) from error


def _damaged(source: Path, error: Exception) -> str:
    reason = str(error).partition("\n")[0].rstrip(":")
    return (
        f"{source} is a damaged archive ({reason}).\n  Delete it and load again to fetch it anew."
    )


def _is_record(name: str) -> bool:
    path = Path(name)
    return path.suffix == ".txt" and path.stem.isdigit()


def _check_archive(path: Path, sums: set[str]) -> None:
    """Refuse an archive that is cut short, holds no records or is not a published one."""
    digest = sha256_of(path)
    if sums and digest not in sums:
        raise ValueError(f"its SHA-256 is {digest}, expected {' or '.join(sorted(sums))}")
    if not sum(1 for _ in _texts(path)):
        raise ValueError("the archive holds no records")
