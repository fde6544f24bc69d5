"""The MNIST handwritten digits, read from their four IDX files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from pysciml_node import checks
from pysciml_node.data.download import fetch
from pysciml_node.data.idx import parse_idx, read_bytes
from pysciml_node.data.labelled import LabelledData, Splits, check_dtype

# LeCun's own page no longer serves the files; these two mirrors hold the same bytes.
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# SHA-256 of the unpacked content, so that files packed anew are recognised too.
CHECKSUMS = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def mnist(
    data_dir: str | Path,
    *,
    download: bool = True,
    validation: int = 0,
    dtype: torch.dtype = torch.float32,
    mirrors: Sequence[str] = MIRRORS,
) -> Splits[LabelledData]:
    """Load MNIST: 60,000 training and 10,000 test images of 28x28 pixels in [0, 1].

    Args:
        data_dir: folder with the four files (`train-images-idx3-ubyte.gz` and so on, gzipped or
            unpacked).
        download: fetch the files that are missing.
        validation: how many of the last training images to hold out to choose settings on.
        dtype: of the pixels.
        mirrors: addresses of folders with the four `.gz` files, tried in order.

    Returns:
        The parts; `x` of shape `(N, 28, 28)`, `y` of shape `(N,)` with values 0 to 9.

    Raises:
        FileNotFoundError: files are missing and `download` is off.
        ConnectionError: files are missing and no mirror could be reached.
        ValueError: a file's content is not MNIST's, or `validation` is out of range.

    Examples:
        >>> data = mnist("data/mnist")  # doctest: +SKIP
        >>> tuple(data.train.x.shape)  # doctest: +SKIP
        (60000, 28, 28)

    Reference:
        Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Proc. IEEE 86 (1998) 2278-2324.
    """
    folder = checks.path("data_dir", data_dir)
    checks.whole("validation", validation, at_least=0)
    check_dtype(dtype)
    paths = {name: _find(folder, name) for name in CHECKSUMS}
    missing = [name for name, path in paths.items() if path is None]
    if missing and not download:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(name + '.gz' for name in missing)}.\n"
            f"  Name the folder that holds them, or allow the download (download=True)."
        )
    for name in missing:
        paths[name] = _download(name, folder, mirrors)
    tensors = {
        name: parse_idx(_verified(path, name), name=str(path))
        for name, path in paths.items()
        if path is not None
    }
    train = _labelled(tensors, "train", dtype)
    cut = len(train) - checks.whole("validation", validation, at_least=0, at_most=len(train) - 1)
    return Splits(train[:cut], train[cut:], _labelled(tensors, "t10k", dtype))


def _labelled(tensors: dict[str, torch.Tensor], prefix: str, dtype: torch.dtype) -> LabelledData:
    images, labels = tensors[f"{prefix}-images-idx3-ubyte"], tensors[f"{prefix}-labels-idx1-ubyte"]
    return LabelledData(images.to(dtype) / 255.0, labels.to(torch.int64))


def _find(folder: Path, name: str) -> Path | None:
    candidates = (folder / f"{name}.gz", folder / name)
    return next((path for path in candidates if path.is_file()), None)


def _verified(path: Path, name: str) -> bytes:
    content = read_bytes(path)
    digest = hashlib.sha256(content).hexdigest()
    if digest != CHECKSUMS[name]:
        raise ValueError(
            f"{path} is not MNIST's {name}: its unpacked content has SHA-256 {digest}, "
            f"expected {CHECKSUMS[name]}.\n  Delete it and load again to fetch it anew."
        )
    return content


def _download(name: str, folder: Path, mirrors: Sequence[str]) -> Path:
    return fetch(
        f"{name}.gz",
        folder,
        [f"{mirror.rstrip('/')}/{name}.gz" for mirror in mirrors],
        lambda path: _verified(path, name),
        by_hand=f"put the four MNIST files into {folder} by hand "
        f"({', '.join(f'{key}.gz' for key in CHECKSUMS)})",
    )
