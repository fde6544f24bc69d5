"""CIFAR-10: 32x32 colour images of ten classes."""

import io
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node._optional import require
from pysciml_node.data.download import fetch, sha256_of
from pysciml_node.data.labelled import LabelledData, Splits, check_dtype

ADDRESSES = ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",)
ARCHIVE = "cifar-10-python.tar.gz"
SUBSET = "cifar10-subset.tar"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_SHAPE = (3, 32, 32)


def cifar10(
    data_dir: str | Path,
    *,
    download: bool = True,
    validation: int = 0,
    dtype: torch.dtype = torch.float32,
    addresses: Sequence[str] = ADDRESSES,
) -> Splits[LabelledData]:
    """Load CIFAR-10: 50,000 training and 10,000 test images with entries in [0, 1].

    A subset is read where the folder holds `cifar10-subset.tar` instead: image files
    `cifar10/train/<class>/*.jpg` and `cifar10/test/<class>/*.jpg`.

    Args:
        data_dir: folder with `cifar-10-python.tar.gz` or `cifar10-subset.tar`.
        download: fetch the archive when there is neither.
        validation: how many training images to hold out to choose settings on: the last ones of
            the archive, or of the subset in a fixed random order.
        dtype: of the entries.
        addresses: of the archive, tried in order.

    Returns:
        The parts; `x` of shape `(N, 3, 32, 32)`, `y` of shape `(N,)` in the order of
        `CLASSES`.

    Raises:
        FileNotFoundError: there is no archive and `download` is off.
        ConnectionError: there is no archive and none could be fetched.
        ValueError: a file's content is not CIFAR-10's, or `validation` is out of range.
        ImportError: the subset is to be read, and Pillow is not installed.

    Examples:
        >>> data = cifar10("data/cifar10")  # doctest: +SKIP
        >>> tuple(data.train.x.shape)  # doctest: +SKIP
        (50000, 3, 32, 32)

    Reference:
        A. Krizhevsky, Learning multiple layers of features from tiny images, technical report,
        University of Toronto (2009).
    """
    folder = checks.path("data_dir", data_dir)
    checks.whole("validation", validation, at_least=0)
    check_dtype(dtype)
    archive, subset = folder / ARCHIVE, folder / SUBSET
    if archive.is_file():
        _check_archive(archive)
        parts = _read_archive(archive)
    elif subset.is_file():
        parts = _read_subset(subset)
    elif download:
        by_hand = f"put {ARCHIVE} into {folder} by hand"
        parts = _read_archive(fetch(ARCHIVE, folder, addresses, _check_archive, by_hand=by_hand))
    else:
        raise FileNotFoundError(
            f"{folder} holds neither {ARCHIVE} nor {SUBSET}.\n"
            "  Name the folder that does, or allow the download (download=True)."
        )
    train, test = (LabelledData(x.to(dtype) / 255.0, y) for x, y in parts)
    cut = len(train) - checks.whole("validation", validation, at_least=0, at_most=len(train) - 1)
    return Splits(train[:cut], train[cut:], test)


Part = tuple[Tensor, Tensor]


def _check_archive(path: Path) -> None:
    digest = sha256_of(path)
    if digest != SHA256:
        raise ValueError(
            f"{path} is not {ARCHIVE}: its SHA-256 is {digest}, expected {SHA256}.\n"
            "  Delete it and load again to fetch it anew."
        )


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that makes arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The few classes and functions that a pickled array is made of."""
        of_numpy = module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype")
        if of_numpy or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of images")


def _read_archive(path: Path) -> tuple[Part, Part]:
    with tarfile.open(path) as archive:
        batches = {Path(m.name).name: m for m in archive.getmembers() if m.isfile()}

        def read(name: str) -> Part:
            stream = archive.extractfile(batches[name])
            if stream is None:
                raise ValueError(
                    f"{path} holds no file {name}.\n  Delete it and load again to fetch it anew."
                )
            content = _ArraysOnly(stream, encoding="bytes").load()
            images = torch.from_numpy(np.asarray(content[b"data"]).reshape(-1, *_SHAPE))
            return images, torch.tensor(content[b"labels"])

        train = [read(f"data_batch_{k}") for k in range(1, 6)]
        images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
        return (images, labels), read("test_batch")


def _read_subset(path: Path) -> tuple[Part, Part]:
    image = require("PIL.Image", extra="examples", purpose="read the subset's images")
    samples: dict[str, list[tuple[Tensor, int]]] = {"train": [], "test": []}
    with tarfile.open(path) as archive:
        for member in sorted((m for m in archive if m.isfile()), key=lambda m: m.name):
            places = Path(member.name).parts
            stream = archive.extractfile(member)
            if len(places) < 3 or places[-3] not in samples or stream is None:
                continue
            if places[-2] not in CLASSES:
                raise ValueError(
                    f"{path}: {member.name} is of no class of CIFAR-10.\n"
                    f"  Name its folder after one of them: {', '.join(CLASSES)}."
                )
            pixels = np.array(image.open(io.BytesIO(stream.read())).convert("RGB"))
            if pixels.shape != (32, 32, 3):
                raise ValueError(
                    f"{path}: {member.name} is of shape {pixels.shape}, not 32x32.\n"
                    "  Resize the image, or leave it out."
                )
            samples[places[-3]].append(
                (torch.from_numpy(pixels).permute(2, 0, 1), CLASSES.index(places[-2]))
            )
    train, test = (_mixed(path, part) for part in samples.values())
    return train, test


def _mixed(path: Path, samples: list[tuple[Tensor, int]]) -> Part:
    """The samples in a fixed random order: files come sorted by class."""
    if not samples:
        raise ValueError(
            f"{path} must hold images train/<class>/*.jpg and test/<class>/*.jpg.\n"
            f"  Pack them so, or delete it and load {ARCHIVE} instead."
        )
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    images = torch.stack([image for image, _ in samples])[order]
    return images, torch.tensor([label for _, label in samples])[order]
