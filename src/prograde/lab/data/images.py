"""Data sets of images: the digits of this package, MNIST, or a directory of idx files."""

import gzip
import hashlib
import importlib.resources
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import platformdirs
import pooch
from jaxtyping import Float32, Int32

IMAGE_SIZE = 28
NUM_CLASSES = 10

_IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
_SHA256SUMS = """
440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609  train-images-idx3-ubyte.gz
3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c  train-labels-idx1-ubyte.gz
8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6  t10k-images-idx3-ubyte.gz
f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6  t10k-labels-idx1-ubyte.gz
"""
_MNIST_SHA256 = {line.split()[1]: line.split()[0] for line in _SHA256SUMS.strip().splitlines()}
_MNIST_MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
BATCH_SIZE = 64
_VALIDATION_PART = 10  # one in ten training examples is kept for the search of learning rates


class DataError(ValueError):
    """Data that cannot be found or used. The message says which file and what was expected."""


@dataclass(frozen=True)
class Dataset:
    """Images with pixels in [0, 1] and their labels, in three parts.

    `validation` is taken from the training data, and only the search of learning rates uses it.
    `test` is the data set's own test part, which the records call held-out.
    """

    name: str
    train: tuple[Float32[np.ndarray, "n 28 28"], Int32[np.ndarray, " n"]]
    validation: tuple[Float32[np.ndarray, "n 28 28"], Int32[np.ndarray, " n"]]
    test: tuple[Float32[np.ndarray, "n 28 28"], Int32[np.ndarray, " n"]]

    def fingerprint(self) -> str:
        """SHA-256 over all arrays."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            for array in part:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def synthetic(num_batches: int = 10) -> Dataset:
    """Makes random images and labels, to measure costs. All parts are the same."""
    generator, n = np.random.default_rng(0), num_batches * BATCH_SIZE
    images = generator.random((n, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    part = images, generator.integers(0, NUM_CLASSES, n).astype(np.int32)
    return Dataset("synthetic", part, part, part)


def load(source: str, data_dir: Path | None = None) -> Dataset:
    """Loads "digits", "mnist", or the four idx files in a directory.

    **Arguments:** `data_dir`: the directory of the MNIST files.

    **Errors:** `DataError` names the file, what was expected and what was found.
    """
    if data_dir is not None and source != "mnist":
        raise DataError(
            f"--data-dir {data_dir} goes with --data mnist only; this is --data {source}."
        )
    if source == "digits":
        return _digits()
    if source == "mnist":
        return _mnist(data_dir)
    directory = Path(source)
    if not directory.is_dir():
        raise DataError(
            f"--data {source}: there is no such directory. "
            "Use digits, mnist, or a directory of idx files."
        )
    return _from_idx(
        directory.name or str(directory),
        {key: _find_idx(directory, name) for key, name in _IDX_FILES.items()},
    )


def _split(
    name: str, train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> Dataset:
    kept_apart = np.arange(len(train_y)) % _VALIDATION_PART == 0
    return Dataset(
        name,
        (train_x[~kept_apart], train_y[~kept_apart]),
        (train_x[kept_apart], train_y[kept_apart]),
        (test_x, test_y),
    )


def _digits() -> Dataset:
    resource = importlib.resources.files("prograde.lab.data") / "digits.csv.gz"
    with resource.open("rb") as raw, gzip.open(raw) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    table = table[np.random.Generator(np.random.Philox(0)).permutation(len(table))]
    small = table[:, :-1].reshape(-1, 8, 8) / 16
    images = np.asarray(jax.image.resize(small, (len(small), IMAGE_SIZE, IMAGE_SIZE), "bilinear"))
    labels = table[:, -1].astype(np.int32)
    num_test = len(labels) // 5
    return _split(
        "digits", images[num_test:], labels[num_test:], images[:num_test], labels[:num_test]
    )


def _mnist(data_dir: Path | None) -> Dataset:
    if data_dir is None and (from_environment := os.environ.get("PROGRADE_DATA_DIR")):
        data_dir = Path(from_environment)
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(f"--data-dir {data_dir}: there is no such directory.")
    return _from_idx(
        "mnist", {key: _mnist_file(f"{name}.gz", data_dir) for key, name in _IDX_FILES.items()}
    )


def _mnist_file(name: str, data_dir: Path | None) -> Path:
    """Finds the verified file: in the data directory, else in the cache, else on a mirror."""
    expected = _MNIST_SHA256[name]
    for folder in [data_dir, data_dir / "mnist"] if data_dir is not None else []:
        if (path := folder / name).is_file():
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != expected:
                raise DataError(
                    f"{path}: expected SHA-256 {expected}, found {found}. "
                    "This is not the original MNIST file. Replace it, "
                    f"or use --data {folder} to train on it as it is."
                )
            return path
    cache = Path(platformdirs.user_cache_dir("prograde")) / "mnist"
    failures = []
    for mirror in _MNIST_MIRRORS:
        try:  # pooch verifies cached files and downloads
            return Path(pooch.retrieve(mirror + name, f"sha256:{expected}", fname=name, path=cache))
        except Exception as error:  # pooch raises any error of its transport
            failures.append(f"{mirror}: {type(error).__name__}")
    raise DataError(
        f"{name} is neither in the data directory ({data_dir or 'none given'}) nor in the cache "
        f"({cache}), and could not be downloaded ({'; '.join(failures)}). "
        "Put the four MNIST .gz files into a directory and pass --data-dir DIR or set "
        "PROGRADE_DATA_DIR; or use --data digits, which needs no network."
    )


def _find_idx(directory: Path, name: str) -> Path:
    for candidate in (directory / f"{name}.gz", directory / name):
        if candidate.is_file():
            return candidate
    raise DataError(f"{directory}: expected {name}.gz or {name} in this directory, found neither.")


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads an idx file: a magic number 0 0 8 d (bytes in d dimensions), d sizes, the data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path}: expected a complete gzip file, found a damaged one ({error}). Fetch it again."
        ) from error
    magic, expected_magic = content[:4].hex(), f"000008{dimensions:02x}"
    if magic != expected_magic:
        raise DataError(
            f"{path}: expected an idx file of unsigned bytes in {dimensions} dimensions "
            f"(magic number {expected_magic}), found {magic or 'an empty file'}."
        )
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(
            f"{path}: expected a header of {header} bytes, found {len(content)} bytes. "
            "The file is truncated."
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) != header + (size := int(np.prod(shape, dtype=np.int64))):
        raise DataError(
            f"{path}: expected {size} bytes of data for shape {shape}, "
            f"found {len(content) - header}. The file is "
            f"{'truncated' if len(content) < header + size else 'too long'}."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _from_idx(name: str, paths: dict[str, Path]) -> Dataset:
    arrays = []
    for part in ("train", "test"):
        images_path, labels_path = paths[f"{part}_images"], paths[f"{part}_labels"]
        images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
        if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise DataError(
                f"{images_path}: expected images of 28 x 28, "
                f"found {images.shape[1]} x {images.shape[2]}."
            )
        if len(images) != len(labels):
            raise DataError(
                f"{labels_path}: expected one label for each of {len(images)} images, "
                f"found {len(labels)}."
            )
        least = (
            math.ceil(BATCH_SIZE * _VALIDATION_PART / (_VALIDATION_PART - 1))
            if part == "train"
            else 1
        )
        if len(images) < least:
            raise DataError(
                f"{images_path}: expected at least {least} images, found {len(images)}."
            )
        if labels.max() >= NUM_CLASSES:
            raise DataError(
                f"{labels_path}: expected labels from 0 to {NUM_CLASSES - 1}, found {labels.max()}."
            )
        arrays += [images.astype(np.float32) / 255, labels.astype(np.int32)]
    return _split(name, *arrays)
