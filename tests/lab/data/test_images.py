"""Loading: what is right is loaded, and every kind of damage is named."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pooch
import pytest

from prograde.lab.data import images as data

SHARED_MNIST = Path(__file__).parents[4] / "shared" / "data"
NAMES = list(data._IDX_FILES.values())


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def directory(tmp_path, seed):
    """A small data set as four idx files, two of them compressed."""
    generator = np.random.default_rng(seed)
    for part, n in (("train", 80), ("t10k", 10)):
        images = generator.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_digits_are_complete_and_shaped_as_mnist():
    digits = data.load("digits")
    parts = (digits.train, digits.validation, digits.test)
    assert sum(len(y) for _, y in parts) == 1797
    for x, y in parts:
        assert x.shape == (len(y), 28, 28)
        assert (x.dtype, y.dtype) == (np.float32, np.int32)
        assert x.min() >= 0
        assert x.max() <= 1
        assert set(y) == set(range(10))
    assert digits.fingerprint() == data.load("digits").fingerprint()


def test_parts_do_not_overlap():
    images = [
        {image.tobytes() for image in part[0]}
        for part in (lambda d: (d.train, d.validation, d.test))(data.load("digits"))
    ]
    assert not images[0] & images[1]
    assert not images[0] & images[2]
    assert not images[1] & images[2]


def test_a_directory_of_idx_files_loads(directory):
    loaded = data.load(str(directory))
    assert len(loaded.train[1]) + len(loaded.validation[1]) == 80
    assert len(loaded.test[1]) == 10
    raw = data._read_idx(directory / "t10k-images-idx3-ubyte.gz", 3)
    np.testing.assert_allclose(loaded.test[0], raw / 255, rtol=1e-6)


def damage(path: Path, change) -> None:
    compressed = path.suffix == ".gz"
    content = gzip.decompress(path.read_bytes()) if compressed else path.read_bytes()
    content = change(content)
    path.write_bytes(gzip.compress(content) if compressed else content)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("train-images-idx3-ubyte.gz", lambda c: b"\0\0\x09" + c[3:], r"00000803.*found 00000903"),
        ("t10k-labels-idx1-ubyte", lambda c: b"", r"00000801.*empty file"),
        ("train-labels-idx1-ubyte", lambda c: c[:6], r"header of 8 bytes, found 6"),
        (
            "train-images-idx3-ubyte.gz",
            lambda c: c[:-1],
            r"expected 62720 bytes.*found 62719.*truncated",
        ),
        ("train-labels-idx1-ubyte", lambda c: c + b"x", r"expected 80 bytes.*found 81.*too long"),
        (
            "train-labels-idx1-ubyte",
            lambda c: idx(np.zeros(79, np.uint8)),
            r"one label for each of 80 images, found 79",
        ),
        ("train-labels-idx1-ubyte", lambda c: c[:-1] + b"\x0a", r"labels from 0 to 9, found 10"),
        (
            "t10k-images-idx3-ubyte.gz",
            lambda c: idx(np.zeros((10, 8, 8), np.uint8)),
            r"28 x 28, found 8 x 8",
        ),
    ],
)
def test_damage_is_named(directory, name, change, words):
    damage(directory / name, change)
    with pytest.raises(data.DataError, match=words) as caught:
        data.load(str(directory))
    assert str(directory / name) in str(caught.value)


def test_too_few_images_for_a_batch_are_refused(directory):
    for name, array in (
        ("images-idx3", np.zeros((71, 28, 28), np.uint8)),
        ("labels-idx1", np.zeros(71, np.uint8)),
    ):
        for path in directory.glob(f"train-{name}*"):
            damage(path, lambda c: idx(array))
    with pytest.raises(data.DataError, match="at least 72 images, found 71"):
        data.load(str(directory))


def test_damaged_compression_is_named(directory):
    path = directory / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"no gzip at all", whole[:-8] + b"\0" * 8):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=r"complete gzip file") as caught:
            data.load(str(directory))
        assert str(path) in str(caught.value)


def test_a_missing_file_or_directory_is_named(directory):
    (directory / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        data.DataError, match=r"t10k-labels-idx1-ubyte.gz or t10k-labels-idx1-ubyte"
    ):
        data.load(str(directory))
    with pytest.raises(data.DataError, match=r"no such directory. Use digits, mnist"):
        data.load(str(directory / "nowhere"))
    with pytest.raises(data.DataError, match=r"--data-dir .*no such directory"):
        data.load("mnist", directory / "nowhere")


def test_an_mnist_file_with_another_checksum_is_refused(directory):
    name = f"{NAMES[0]}.gz"
    found = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    with pytest.raises(
        data.DataError, match=f"expected SHA-256 {data._MNIST_SHA256[name]}, found {found}"
    ) as caught:
        data.load("mnist", directory)
    assert str(directory / name) in str(caught.value)


def test_without_file_or_network_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("PROGRADE_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def offline(url, known_hash, fname, path):
        raise ConnectionError(url)

    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(
        data.DataError, match=r"--data-dir DIR or set PROGRADE_DATA_DIR.*--data digits"
    ):
        data.load("mnist")


def test_a_mirror_that_serves_something_else_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(data.platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))
    served = tmp_path / "served"
    served.mkdir()
    name = f"{NAMES[0]}.gz"
    (served / name).write_bytes(b"something else")
    monkeypatch.setattr(data, "_MNIST_MIRRORS", (f"{served.as_uri()}/",))
    with pytest.raises(data.DataError, match="could not be downloaded"):
        data._mnist_file(name, None)
    assert not list((tmp_path / "cache").rglob(name))


@pytest.mark.skipif(
    not SHARED_MNIST.is_dir(), reason="the MNIST files are not beside this checkout"
)
def test_mnist_from_a_data_directory(monkeypatch):
    mnist = data.load("mnist", SHARED_MNIST)
    assert [len(part[1]) for part in (mnist.train, mnist.validation, mnist.test)] == [
        54_000,
        6_000,
        10_000,
    ]
    assert list(mnist.test[1][:5]) == [7, 2, 1, 0, 4]
    monkeypatch.setenv("PROGRADE_DATA_DIR", str(SHARED_MNIST))
    assert data.load("mnist").fingerprint() == mnist.fingerprint()


def test_a_data_directory_that_would_be_ignored_is_refused(directory):
    with pytest.raises(data.DataError, match=r"--data-dir .* goes with --data mnist only"):
        data.load("digits", directory)


def test_one_training_example_in_ten_is_validation_and_none_is_in_two_parts():
    """Which rows: 0, 10, 20, ... of the training data; the test part is left as it is."""
    train, test = np.arange(25), np.arange(100, 104)
    found = data._split("x", train[:, None], train, test[:, None], test)
    assert found.validation[1].tolist() == [0, 10, 20]
    assert found.train[1].tolist() == [i for i in range(25) if i % 10]
    assert found.test[1].tolist() == test.tolist()
    for images, labels in (found.train, found.validation, found.test):
        assert images[:, 0].tolist() == labels.tolist()
