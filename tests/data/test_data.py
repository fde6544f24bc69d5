"""Data sets: division, batches, the IDX format and MNIST's files."""

import gzip
import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysciml_node import data as psn_data
from pysciml_node.data import LabelledData, ShuffledBatches, ordered_batches, stratified_split
from pysciml_node.data import mnist as load_mnist
from pysciml_node.data.idx import parse_idx, read_idx

# The package exports the function under the module's name.
mnist_module = sys.modules["pysciml_node.data.mnist"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=120),
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_a_stratified_split_is_a_partition_with_equal_class_shares(labels, weights, seed):
    shares = {str(k): w / sum(weights) for k, w in enumerate(weights)}
    y = torch.tensor(labels)
    parts = stratified_split(y, shares, generator=generator(seed))
    together = torch.cat(list(parts.values())).sort().values
    assert together.tolist() == list(range(len(labels)))
    for name, index in parts.items():
        for label in set(labels):
            exact = shares[name] * labels.count(label)
            assert abs(int((y[index] == label).sum()) - exact) <= 1.0


@pytest.mark.parametrize("shares", [{"a": 0.5, "b": 0.4}, {"a": 1.0, "b": 0.0}, {}])
def test_shares_must_be_positive_and_add_up_to_one(shares):
    with pytest.raises(ValueError, match="add up to one"):
        stratified_split(torch.zeros(4, dtype=torch.int64), shares, generator=generator())


def test_digits_have_disjoint_parts_that_depend_on_the_seed_alone():
    first, again, other = psn_data.digits(), psn_data.digits(), psn_data.digits(seed=1)
    assert len(first.train) + len(first.validation) + len(first.test) == 1797
    for part in (first.train, first.validation, first.test):
        assert part.x.shape[1:] == (8, 8)
        assert float(part.x.min()) == 0.0
        assert float(part.x.max()) == 1.0
        assert set(part.y.tolist()) == set(range(10))
    assert torch.equal(first.test.x, again.test.x)
    assert not torch.equal(first.test.x, other.test.x[: len(first.test)])
    rows = [part.x.flatten(1) for part in (first.train, first.validation, first.test)]
    # No two of scikit-learn's digits are equal, so rows identify samples.
    assert len(torch.cat(rows).unique(dim=0)) == 1797


@pytest.mark.parametrize(("x", "y"), [((3, 2), (4,)), ((3, 2), (3, 1)), ((), (1,))])
def test_inputs_and_labels_must_pair_up(x, y):
    with pytest.raises(ValueError, match="one label a sample"):
        LabelledData(torch.zeros(x), torch.zeros(y, dtype=torch.int64))


def test_labels_must_be_integers():
    with pytest.raises(TypeError, match="integer dtype"):
        LabelledData(torch.zeros(2, 1), torch.zeros(2))


def numbered(n: int) -> LabelledData:
    return LabelledData(torch.arange(float(n)).unsqueeze(1), torch.arange(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), batch=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_a_pass_shows_no_sample_twice_and_all_batches_are_full(n, batch, seed):
    batch = min(batch, n)
    batches = ShuffledBatches(numbered(n), batch, generator=generator(seed))
    for _ in range(2):
        seen = torch.cat([next(batches).y for _ in range(n // batch)])
        assert len(seen.unique()) == len(seen) == (n // batch) * batch


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 11])
def test_a_restored_position_gives_the_batches_that_would_have_come(taken):
    original = ShuffledBatches(numbered(10), 3, generator=generator(5))
    for _ in range(taken):
        next(original)
    restored = ShuffledBatches(numbered(10), 3, generator=generator(99))
    restored.load_state_dict(original.state_dict())
    for _ in range(10):
        assert torch.equal(next(original).y, next(restored).y)


def test_a_position_of_another_data_set_is_refused():
    state = ShuffledBatches(numbered(10), 3, generator=generator())
    next(state)
    with pytest.raises(ValueError, match="10 samples"):
        ShuffledBatches(numbered(9), 3, generator=generator()).load_state_dict(state.state_dict())


def test_ordered_batches_go_through_the_data_once():
    parts = list(ordered_batches(numbered(7), 3))
    assert torch.cat([part.y for part in parts]).tolist() == list(range(7))
    with pytest.raises(ValueError, match="positive whole number"):
        next(ordered_batches(numbered(7), 0))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_sizes_out_of_range_are_refused(batch_size):
    with pytest.raises(ValueError, match="between 1 and the 10"):
        ShuffledBatches(numbered(10), batch_size, generator=generator())


IDX_CODES = {
    np.uint8: 0x08,
    np.int8: 0x09,
    np.int16: 0x0B,
    np.int32: 0x0C,
    np.float32: 0x0D,
    np.float64: 0x0E,
}


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, IDX_CODES[array.dtype.type], array.ndim])
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return header + shape + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize("dtype", list(IDX_CODES))
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_back_as_written(tmp_path, dtype, shape, packed):
    array = (np.arange(np.prod(shape)) * 7 - 20).astype(dtype).reshape(shape)
    path = tmp_path / "file"
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content) if packed else content)
    read = read_idx(path)
    assert read.numpy().dtype == dtype
    np.testing.assert_array_equal(read.numpy(), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG....", "not an IDX file"),
        (bytes([0, 0, 0x08, 3, 0, 0]), "ends inside its header"),
        (bytes([0, 0, 0x08, 1, 0, 0, 0, 4, 1]), "should hold 12 bytes"),
        (bytes([0, 0, 0x08, 1, 0, 0, 0, 1, 1, 2]), "should hold 9 bytes"),
    ],
)
def test_damaged_idx_content_is_named(content, message):
    with pytest.raises(ValueError, match=message):
        parse_idx(content, name="images")


def test_a_cut_gzip_file_is_named(tmp_path):
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.arange(50, dtype=np.uint8)))[:-12])
    with pytest.raises(ValueError, match="damaged gzip"):
        read_idx(path)


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch) -> Path:
    """A mirror with four small files, their checksums in place of the real ones."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    rng = np.random.default_rng(0)
    checksums = {}
    for name in mnist_module.CHECKSUMS:
        count = 6 if name.startswith("train") else 4
        shape = (count, 28, 28) if "images" in name else (count,)
        content = idx_bytes(rng.integers(0, 10, shape).astype(np.uint8))
        checksums[name] = hashlib.sha256(content).hexdigest()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(mnist_module, "CHECKSUMS", checksums)
    return folder


def test_mnist_reads_files_that_are_there(tiny_mnist):
    data = load_mnist(tiny_mnist, download=False, validation=2)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [4, 2, 4]
    assert data.monitor[0] == "validation"
    raw = read_idx(tiny_mnist / "train-images-idx3-ubyte.gz")
    torch.testing.assert_close(
        torch.cat([data.train.x, data.validation.x]) * 255, raw.float(), rtol=0, atol=1e-4
    )


def test_mnist_downloads_missing_files_from_the_first_mirror_that_has_them(tiny_mnist, tmp_path):
    mirrors = [(tmp_path / "nowhere").as_uri(), tiny_mnist.as_uri()]
    data = load_mnist(tmp_path / "data", mirrors=mirrors)
    assert len(data.test) == 4
    assert data.monitor[0] == "test"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(
        path.name for path in tiny_mnist.iterdir()
    )


def test_mnist_refuses_wrong_content_and_keeps_none_of_it(tiny_mnist, tmp_path):
    bad = tiny_mnist / "t10k-labels-idx1-ubyte.gz"
    bad.write_bytes(gzip.compress(idx_bytes(np.zeros(4, dtype=np.uint8))))
    with pytest.raises(ValueError, match="SHA-256"):
        load_mnist(tiny_mnist)
    with pytest.raises(ConnectionError, match="SHA-256"):
        load_mnist(tmp_path / "data", mirrors=[tiny_mnist.as_uri()])
    assert not (tmp_path / "data" / bad.name).exists()
    assert not list((tmp_path / "data").glob(".*"))


def test_mnist_says_what_is_missing_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz"):
        load_mnist(tmp_path, download=False)
    with pytest.raises(ConnectionError, match="by hand"):
        load_mnist(tmp_path, mirrors=[(tmp_path / "nowhere").as_uri()])


def test_mnist_validation_must_leave_training_images(tiny_mnist):
    with pytest.raises(ValueError, match="at least 0 and at most 5"):
        load_mnist(tiny_mnist, validation=6)


def test_importing_the_data_package_needs_no_optional_package():
    script = (
        "import sys; import pysciml_node.data; "
        "print([m for m in ('sklearn', 'matplotlib') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"
