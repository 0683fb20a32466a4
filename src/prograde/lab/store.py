"""Records on disk: the directory of a study, and files that are complete or absent.

A `Store` is a directory that holds the records of one configuration of a study. `manifest.json`
says which configuration, and on which machines and versions the records were made. The records are
JSON, JSON lines, and npz for the state that a run resumes from. There is no pickle.

Every file is written under a temporary name, synced and renamed. A file under its own name is
complete, whatever kills the process.
"""

import atexit
import contextlib
import datetime
import io
import json
import math
import os
import platform
import subprocess
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import psutil
from jaxtyping import PyTree

MANIFEST = "manifest.json"
_LOCK, _HOLDER = ".lock", ".holder"


class RecordError(RuntimeError):
    """A directory of records that cannot be used as asked. The message says why and what to do."""


@dataclass(frozen=True)
class Store:
    """The records of one configuration of a study, in one directory.

    Names of records are relative paths without suffix, such as `costs` or `search/backprop`.
    """

    directory: Path

    @classmethod
    def open(cls, directory: Path) -> "Store":
        """Opens a directory of records for reading. Raises `RecordError` if it has no manifest."""
        store = cls(directory)
        if not store._path(MANIFEST).exists():
            raise RecordError(f"{directory}: no records here (no {MANIFEST}).")
        return store

    @property
    def manifest(self) -> dict[str, Any]:
        """The configuration, and the environments in which the records were made."""
        return read_json(self._path(MANIFEST))

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that decides the numbers."""
        return self.manifest["config"]

    @property
    def study(self) -> str:
        """The name of the study that made the records."""
        manifest = self.manifest
        if "study" in manifest:
            return manifest["study"]
        # manifests of version 0.1 have no study, but an experiment
        config = manifest["config"]
        if "job" in config:
            return "finetune"
        return "compare" if config.get("experiment") == "compare" else "reproduce"

    def __contains__(self, name: str) -> bool:
        return self._path(f"{name}.json").exists() or self._path(f"{name}.jsonl").exists()

    def names(self, folder: str = "") -> list[str]:
        """Returns the names of all records in a folder, sorted."""
        files = (self.directory / folder).glob("[!.]*.json*")
        found = {path.relative_to(self.directory).with_suffix("") for path in files}
        return sorted(str(path) for path in found if path.name != "manifest")

    def read(self, name: str, default: Any = None) -> Any:
        """Reads a record. Without such a record, returns `default` if one is given."""
        path = self._path(f"{name}.json")
        return default if default is not None and not path.exists() else read_json(path)

    def write(self, name: str, value: Any) -> None:
        """Writes a record."""
        write_json(self._path(f"{name}.json"), value)

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """Returns the record of this name, which it measures and writes first if there is none."""
        if name not in self:
            self.write(name, measure())
        return self.read(name)

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Reads a record of JSON lines."""
        return read_lines(self._path(f"{name}.jsonl"))

    def write_lines(self, name: str, values: list[dict[str, Any]]) -> None:
        """Writes a record of JSON lines."""
        write_lines(self._path(f"{name}.jsonl"), values)

    def path(self, name: str) -> Path:
        """Returns the path of a file that is not a JSON record, such as a log."""
        return self._path(name)

    def _path(self, file: str) -> Path:
        return self.directory / file


Config = dict[str, Any]


def claim(
    study: str,
    configs: dict[Path, Config],
    resume: bool,
    current: Callable[[Config], Config] = lambda config: config,
) -> list[Store]:
    """Makes each directory the store of its configuration, or raises before anything is changed.

    A directory with records of the same configuration is continued with `resume`, and refused
    without. A directory with other files is refused. `current` translates the configuration of
    older records. The stores are locked until this process ends: a second process that claims one
    of them is refused.
    """

    def manifests() -> dict[Path, dict[str, Any]]:
        return {
            directory: _manifest(study, directory, plain(config), resume, current)
            for directory, config in configs.items()
        }

    manifests()  # refuses before it leaves a lock in another's directory
    for directory in configs:
        _lock(directory)
    found = manifests()  # again: another process may have written in between
    here = environment()
    for directory, manifest in found.items():
        for left in directory.rglob(".*.tmp"):  # left by a process that was killed while it wrote
            left.unlink(missing_ok=True)
        manifest["environments"].append(here)
        write_json(directory / MANIFEST, manifest)
    return [Store(directory) for directory in configs]


def find(directories: Iterable[Path]) -> list[Store]:
    """Finds the stores in these directories and directly below them, sorted by path."""
    found = []
    for directory in directories:
        paths = [directory / MANIFEST, *sorted(directory.glob(f"*/{MANIFEST}"))]
        stores = [Store(path.parent) for path in paths if path.exists()]
        if not stores:
            raise RecordError(f"{directory}: no records here (no {MANIFEST}).")
        found += stores
    return found


def _manifest(
    study: str,
    directory: Path,
    config: Config,
    resume: bool,
    current: Callable[[Config], Config],
) -> dict[str, Any]:
    if not (directory / MANIFEST).exists():
        if directory.exists() and any(not path.match(".*") for path in directory.iterdir()):
            raise RecordError(
                f"{directory} is not empty and holds no {MANIFEST}. Choose another --out."
            )
        return {"study": study, "config": config, "environments": []}
    manifest = read_json(directory / MANIFEST)
    if (there := Store(directory).study) != study:
        raise RecordError(
            f"{directory} holds records of {there}, and this is {study}. Choose another --out; "
            "nothing was changed."
        )
    if found := differences(current(manifest["config"]), config):
        raise RecordError(
            f"{directory} holds records of another configuration: {'; '.join(found)}. "
            "Choose another --out; nothing was changed."
        )
    if not resume:
        raise RecordError(
            f"{directory} holds records of this configuration. "
            "Pass --resume to continue them, or another --out."
        )
    return manifest


def _lock(directory: Path) -> None:
    """Locks a store until this process ends."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(directory / _LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except filelock.Timeout:
        holder = directory / _HOLDER
        who = holder.read_text().strip() if holder.exists() else "another process"
        raise RecordError(
            f"{directory} is in use by {who}. Wait until it ends, or choose another --out."
        ) from None
    write(directory / _HOLDER, f"process {os.getpid()} on {platform.node()}\n".encode())
    atexit.register(lock.release)


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lists in words where two configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return [] if old == new else [f"{prefix} is {old!r} there and {new!r} here"]


def environment() -> dict[str, Any]:
    """Describes what affects numbers beyond the configuration: code, versions, machine, load."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", __file__) else None
    package = str(Path(__file__).parents[1])
    names = ("prograde", "jax", "jaxlib", "equinox", "optax", "numpy")
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": commit,
        "git_dirty": bool(git("status", "--porcelain", "--", package)) if commit else None,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in names},
        },
        "device": str(jax.devices()[0].device_kind),
        "processor": _processor(),
        "cores": cores(),
        "load": psutil.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    with contextlib.suppress(OSError):  # on Linux, `platform` knows only the architecture
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def write(path: Path, content: bytes) -> None:
    """Writes a file atomically: at any moment it is as before, or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    with contextlib.suppress(OSError):  # some file systems do not sync directories
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def plain(value: Any) -> Any:
    """Converts a value for JSON: NumPy numbers become Python's, NaN and inf become null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value."""
    write(path, (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads one JSON value. Raises `RecordError` if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: cannot be read as a record ({error}).") from error


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    lines = (json.dumps(plain(value), allow_nan=False) + "\n" for value in values)
    write(path, "".join(lines).encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines. Raises `RecordError` if the file is missing or a line is not JSON."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: cannot be read as a record ({error}).") from error


def save_state(path: Path, state: PyTree) -> None:
    """Saves the arrays of a tree."""
    buffer = io.BytesIO()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays: Any = {jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves}
    np.savez(buffer, **arrays)
    write(path, buffer.getvalue())


def load_state(path: Path, like: PyTree) -> PyTree:
    """Loads the arrays of `save_state` into a tree of the structure of `like`."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return jax.tree_util.tree_map_with_path(
                lambda p, _: arrays[jax.tree_util.keystr(p)], like
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RecordError(
            f"{path}: not a checkpoint of this run ({error}). Delete it to start this run again."
        ) from error
