"""Irregular series, and the readers of PhysioNet, CIFAR-10 and the prices, on small files."""

import hashlib
import io
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysciml_node.data import IrregularSeries, cifar10, physionet, prices
from pysciml_node.data.physionet import RANGES, VARIABLES, parse_record

cifar10_module = sys.modules["pysciml_node.data.cifar10"]


def random_series(lengths: list[int], variables: int = 2, seed: int = 0) -> IrregularSeries:
    generator = torch.Generator().manual_seed(seed)
    samples = [
        (
            torch.rand(n, generator=generator, dtype=torch.float64).sort().values,
            torch.randn(n, variables, generator=generator, dtype=torch.float64),
            torch.rand(n, variables, generator=generator) < 0.6,
        )
        for n in lengths
    ]
    return IrregularSeries.join(samples)


LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 1000))
def test_picked_samples_keep_their_rows(lengths, seed):
    series = random_series(lengths, seed=seed)
    index = torch.randperm(len(series), generator=torch.Generator().manual_seed(seed))
    picked = series[index]
    for place, sample in enumerate(index.tolist()):
        start, stop = series.first[sample], series.first[sample] + series.lengths[sample]
        mine = picked.sample == place
        assert torch.equal(picked.times[mine], series.times[start:stop])
        assert torch.equal(picked.values[mine], series.values[start:stop])
        assert torch.equal(picked.observed[mine], series.observed[start:stop])
    assert torch.equal(series[slice(0, 2)].values, series.values[: int(series.lengths[:2].sum())])


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, share=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
def test_hiding_divides_the_rows_and_leaves_every_sample_some(lengths, share, seed):
    series = random_series(lengths)
    shown, hidden = series.hide(share, generator=torch.Generator().manual_seed(seed))
    assert len(shown) == len(series)
    assert torch.equal(shown.times, series.times[~hidden])
    taken = torch.bincount(series.sample[hidden], minlength=len(series))
    assert taken.tolist() == [int(share * n) for n in lengths]
    both = series.only(hidden).observed | series.only(~hidden).observed
    assert torch.equal(both, series.observed)


def test_merged_times_are_the_different_ones_in_order():
    series = random_series([3, 4])
    series.times[0] = series.times[3]
    times, place = series.merged
    assert bool((times.diff() > 0).all())
    assert torch.equal(times[place], series.times)


def test_sums_of_a_sample_ignore_what_was_not_observed():
    series = random_series([3, 2])
    entries = torch.where(series.observed, series.values, torch.nan)
    expected = torch.stack(
        [(series.values * series.observed)[series.sample == k].sum() for k in range(2)]
    )
    torch.testing.assert_close(series.per_sample(entries), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([2, 2])}, "with sum N"),
        ({"lengths": torch.tensor([3, 0])}, "sample 1 has no rows"),
        ({"times": torch.tensor([0.5, 0.2, 0.1])}, "must not decrease"),
        ({"values": torch.zeros(3)}, "with sum N"),
        ({"times": torch.tensor([0.1, 0.5, torch.nan])}, "times must be finite, but row 2"),
        ({"values": torch.tensor([[0, torch.inf]] * 3)}, "variable 1 of row 0 is inf"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    parts = {
        "times": torch.tensor([0.1, 0.5, 0.2]),
        "values": torch.zeros(3, 2),
        "observed": torch.ones(3, 2, dtype=torch.bool),
        "lengths": torch.tensor([2, 1]),
    }
    with pytest.raises(ValueError, match=message):
        IrregularSeries(**(parts | change))
    with pytest.raises(TypeError, match="bool"):
        IrregularSeries(**(parts | {"observed": torch.ones(3, 2)}))
    with pytest.raises(ValueError, match="between 0 and 1"):
        IrregularSeries(**parts).hide(1.0)


def test_prices_have_gaps_and_no_trading_day_twice():
    data = prices()
    for part in (data.train, data.validation, data.test):
        assert part.variables == 3
        assert bool(part.observed.all())
        inner = part.sample[1:] == part.sample[:-1]
        gaps = part.times.diff()[inner] * 28
        assert float(gaps.min()) == pytest.approx(1.0, abs=1e-4)
        # Friday to Monday.
        assert int((gaps > 2.5).sum()) >= 3 * len(part)
    assert torch.equal(data.test.values, prices().test.values)


def record(*lines: str) -> str:
    head = ["Time,Parameter,Value", "00:00,RecordID,1", "00:00,Age,54", "00:00,Height,-1"]
    return "\n".join([*head, *lines]) + "\n"


RECORDS = {
    "100001": record("00:07,HR,73", "00:37,HR,77", "01:29,HR,80", "01:31,Temp,-17.8"),
    "100002": record("00:00,Weight,-1", "47:55,HR,113", "47:59,pH,7.4"),
    "100003": record("00:00,Weight,-1"),
    "100004": record("10:00,HR,93", "10:10,Temp,37", "20:00,pH,735"),
}


@pytest.fixture(params=["folder", "inner folder", "tar.gz", "tar.xz", "zip"])
def archive(request, tmp_path) -> Path:
    if request.param.endswith("folder"):
        folder = tmp_path if request.param == "folder" else tmp_path / "set-a"
        folder.mkdir(exist_ok=True)
        for name, text in RECORDS.items():
            (folder / f"{name}.txt").write_text(text)
    elif request.param == "zip":
        with zipfile.ZipFile(tmp_path / "set-a.zip", "w") as file:
            for name, text in RECORDS.items():
                file.writestr(f"set-a/{name}.txt", text)
    else:
        kind = request.param.partition(".")[2]
        write_tar(
            tmp_path / f"set-a.{request.param}",
            {f"set-a/{name}.txt": text.encode() for name, text in RECORDS.items()},
            kind,
        )
    return tmp_path


def write_tar(path: Path, files: dict[str, bytes], kind: str) -> None:
    with tarfile.open(path, f"w:{kind}") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def whole(data) -> dict[int, IrregularSeries]:
    """All samples, by their number of rows and first value."""
    parts = [part[k : k + 1] for part in (data.train, data.test) for k in range(len(part))]
    return {round(float(part.times[0]) * 48, 2): part for part in parts}


def test_physionet_is_quantized_averaged_and_scaled(archive):
    data = physionet(archive, download=False, test=0.34)
    assert (len(data.train), len(data.validation), len(data.test)) == (2, 0, 1)
    found = whole(data)
    hr, temp, ph = (VARIABLES.index(name) for name in ("HR", "Temp", "pH"))
    first = found[0.0]
    # 00:07 rounds to 0; 00:37, 01:29 and 01:31 to 1, 1 and 2 hours.
    assert (first.times * 48).round().tolist() == [0.0, 1.0, 2.0]
    assert first.observed[:, hr].tolist() == [True, True, False]
    # Heart rates over all patients run from 73 to 113: 73, and the mean of 77 and 80.
    torch.testing.assert_close(
        first.values[:2, hr], torch.tensor([0.0, (78.5 - 73) / 40]), rtol=0, atol=1e-6
    )
    # Kept outliers stretch the scale: -17.8 to 37 degrees, pH 7.4 to 735.
    assert float(first.values[2, temp]) == 0.0
    assert float(found[48.0].values[0, ph]) == 0.0
    assert not first.values[~first.observed].any()


def test_physionet_outliers_and_minutes(archive):
    exact = whole(physionet(archive, download=False, test=0.34, quantization=None))
    assert (exact[0.12].times * 48 * 60).round().tolist() == [7.0, 37.0, 89.0, 91.0]
    dropped = whole(physionet(archive, download=False, test=0.34, outliers="drop"))
    assert dropped[0.0].observed.sum() == 2
    clipped = whole(physionet(archive, download=False, test=0.34, outliers="clip"))
    assert clipped[0.0].observed.sum() == 3
    low, high = RANGES["Temp"]
    # Clipped to 25 degrees, the lowest; 37 is the highest there is.
    assert low < 37 < high
    place = VARIABLES.index("Temp")
    assert float(clipped[0.0].values[2, place]) == 0.0
    assert float(clipped[10.0].values[0, place]) == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must start with"),
        ("<html>", "must start with"),
        ("Time,Parameter,Value\n00:07,HR", "line 2"),
        ("Time,Parameter,Value\n00:07,HR,73\n00:07,Mood,5", "line 3.*unknown variable 'Mood'"),
        ("Time,Parameter,Value\nnoon,HR,73", "line 2"),
        ("Time,Parameter,Value\n00:07,HR,nan", "line 2.*finite number, but is 'nan'"),
        ("Time,Parameter,Value\n00:07,HR,-inf", "line 2.*finite number"),
        ("Time,Parameter,Value\n-5:00,HR,73", "line 2.*from 00:00 to 48:00, but is '-5:00'"),
        ("Time,Parameter,Value\n00:-7,HR,73", "line 2.*hh:mm"),
        ("Time,Parameter,Value\n00:75,HR,73", "line 2.*hh:mm"),
        ("Time,Parameter,Value\n48:01,HR,73", "line 2.*to 48:00"),
    ],
)
def test_damaged_records_are_named_with_their_line(text, message):
    with pytest.raises(ValueError, match=message):
        parse_record(text)


def test_physionet_downloads_says_what_is_missing_and_refuses_wrong_arguments(tmp_path):
    source = tmp_path / "source.tar.gz"
    write_tar(source, {f"set-a/{n}.txt": text.encode() for n, text in RECORDS.items()}, "gz")
    folder = tmp_path / "data"
    data = physionet(folder, test=0.34, addresses=["file:///nowhere", source.as_uri()])
    assert len(data.train) == 2
    assert [path.name for path in folder.iterdir()] == ["set-a.tar.gz"]
    with pytest.raises(FileNotFoundError, match=r"set-a\.tar\.gz"):
        physionet(tmp_path / "empty", download=False)
    source.write_bytes(b"<html>")
    with pytest.raises(ConnectionError, match="by hand"):
        physionet(tmp_path / "empty", addresses=[source.as_uri()])
    with pytest.raises(ValueError, match="quantization"):
        physionet(folder, quantization=-1.0)
    with pytest.raises(ValueError, match="outliers must be one of"):
        physionet(folder, outliers="hide")
    with pytest.raises(ValueError, match="leave samples"):
        physionet(folder, test=0.0)


def test_a_download_is_what_the_list_of_sums_says(tmp_path):
    source = tmp_path / "set-a.tar.gz"
    write_tar(source, {f"set-a/{n}.txt": text.encode() for n, text in RECORDS.items()}, "gz")
    right = hashlib.sha256(source.read_bytes()).hexdigest()
    sums = tmp_path / "SHA256SUMS.txt"
    sums.write_text(f"{'0' * 64} outcomes.txt\n{right} set-a.tar.gz\n")
    assert len(physionet(tmp_path / "a", test=0.34, addresses=[source.as_uri()]).train) == 2
    sums.write_text(f"{'0' * 64} set-a.tar.gz\n")
    with pytest.raises(ConnectionError, match=f"SHA-256 is {right}, expected 0000"):
        physionet(tmp_path / "b", addresses=[source.as_uri()])
    assert not list((tmp_path / "b").iterdir())
    with pytest.raises(ConnectionError, match="expected abc"):
        physionet(tmp_path / "c", addresses=[source.as_uri()], sha256="ABC")


@pytest.mark.parametrize("kind", ["gz", "xz", "zip"])
def test_damaged_archives_are_named_with_what_to_do(tmp_path, kind):
    path = tmp_path / ("set-a.zip" if kind == "zip" else f"set-a.tar.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("set-a/1.txt", record("00:07,HR,73" * 200))
    else:
        write_tar(path, {"set-a/1.txt": record("00:07,HR,73" * 200).encode()}, kind)
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"damaged archive.*\n  Delete it"):
        physionet(tmp_path, download=False)


def test_the_split_is_a_partition_that_depends_on_the_seed_alone(archive):
    first, again = (physionet(archive, download=False, test=0.34, seed=5) for _ in range(2))
    assert torch.equal(first.test.values, again.test.values)
    starts = [whole(physionet(archive, download=False, test=0.34, seed=s)) for s in range(4)]
    assert all(set(found) == {0.0, 10.0, 48.0} for found in starts)


@pytest.fixture
def tiny_cifar(tmp_path, monkeypatch) -> Path:
    """The archive of the python version, two images a batch, and its SHA-256 for the real one."""
    rng = np.random.default_rng(0)
    files = {}
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        images = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
        content = {b"data": images, b"labels": [len(files), 9]}
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps(content, protocol=2)
    folder = tmp_path / "cifar"
    folder.mkdir()
    path = folder / "cifar-10-python.tar.gz"
    write_tar(path, files, "gz")
    monkeypatch.setattr(cifar10_module, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return folder


def test_cifar10_reads_and_downloads_the_python_version(tiny_cifar, tmp_path):
    data = cifar10(tiny_cifar, download=False, validation=2)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [8, 2, 2]
    assert data.train.y.tolist() == [0, 9, 1, 9, 2, 9, 3, 9]
    address = (tiny_cifar / "cifar-10-python.tar.gz").as_uri()
    again = cifar10(tmp_path / "other", addresses=[address])
    raw = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    torch.testing.assert_close(
        again.train.x[:2] * 255, torch.from_numpy(raw.reshape(2, 3, 32, 32)).float()
    )
    with pytest.raises(ValueError, match="at least 0 and at most 9"):
        cifar10(tiny_cifar, validation=10)


def test_cifar10_refuses_other_content(tiny_cifar, tmp_path, monkeypatch):
    path = tiny_cifar / "cifar-10-python.tar.gz"
    evil = pickle.dumps({b"data": print, b"labels": []}, protocol=2)
    write_tar(path, {f"x/data_batch_{k}": evil for k in range(1, 6)}, "gz")
    with pytest.raises(ValueError, match="SHA-256"):
        cifar10(tiny_cifar)
    monkeypatch.setattr(cifar10_module, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(pickle.UnpicklingError, match="has no place"):
        cifar10(tiny_cifar)
    with pytest.raises(FileNotFoundError, match="cifar-10-python"):
        cifar10(tmp_path / "nowhere", download=False)


def test_cifar10_reads_the_subset_in_a_mixed_order(tmp_path):
    image = pytest.importorskip("PIL.Image")
    files = {}
    for part, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(cifar10_module.CLASSES):
            for k in range(count):
                stream = io.BytesIO()
                image.new("RGB", (32, 32), (25 * label, 100, 0)).save(stream, "jpeg", quality=95)
                files[f"cifar10/{part}/{name}/{k:04}.jpg"] = stream.getvalue()
    write_tar(tmp_path / "cifar10-subset.tar", files, "")
    data = cifar10(tmp_path, download=False)
    assert len(data.train) == 30
    assert len(data.test) == 10
    assert data.train.y.tolist() != sorted(data.train.y.tolist())
    red = data.train.x[:, 0].mean(dim=(1, 2)) * 255
    # JPEG keeps an even colour to a few levels.
    torch.testing.assert_close(red, 25.0 * data.train.y, rtol=0, atol=5.0)
