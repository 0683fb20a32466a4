"""Records on disk: JSON and JSON lines for what was measured, npz for the state to resume from.

Every file is written under a temporary name, synced, and renamed, so that a file under its own name is always complete,
whatever kills the process.
"""

import contextlib
import datetime
import io
import json
import math
import os
import platform
import subprocess
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

MANIFEST = "manifest.json"


class RecordError(RuntimeError):
    """A directory of records that cannot be used as asked; the message says why and what to do."""


def write(path: Path, content: bytes) -> None:
    """Writes a file so that it is at any moment either as before or complete."""
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


def _plain(value: Any) -> Any:
    """Numbers that JSON has: numpy scalars become Python's, and what is not finite becomes null or a word."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value."""
    write(path, (json.dumps(_plain(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads one JSON value."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read as a record ({error}).") from error


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    write(
        path,
        "".join(json.dumps(_plain(value), allow_nan=False) + "\n" for value in values).encode(),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read as a record ({error}).") from error


def save_state(path: Path, state: PyTree) -> None:
    """Saves the arrays of a tree, without pickle."""
    buffer = io.BytesIO()
    arrays: Any = {
        jax.tree_util.keystr(p): np.asarray(x)
        for p, x in jax.tree_util.tree_leaves_with_path(state)
    }
    np.savez(buffer, **arrays)
    write(path, buffer.getvalue())


def load_state(path: Path, like: PyTree) -> PyTree:
    """The saved arrays, as a tree like `like`."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return jax.tree_util.tree_map_with_path(
                lambda p, _: arrays[jax.tree_util.keystr(p)], like
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RecordError(
            f"{path}: not a checkpoint of this run ({error}). Delete it to start this run again."
        ) from error


def environment() -> dict[str, Any]:
    """What a number depends on besides the configuration: code, versions, machine."""

    def git(*arguments: str) -> str | None:
        here = Path(__file__).parent
        try:
            done = subprocess.run(
                ["git", "-C", here, *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = (
        git("rev-parse", "HEAD")
        if git("ls-files", "--error-unmatch", __file__) is not None
        else None
    )
    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
            processor,
        )
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": commit,
        "git_dirty": bool(git("status", "--porcelain", "--", str(Path(__file__).parents[1])))
        if commit
        else None,
        "versions": {
            "python": platform.python_version(),
            **{
                name: metadata.version(name)
                for name in ("prograde", "jax", "jaxlib", "equinox", "optax", "numpy")
            },
        },
        "device": str(jax.devices()[0].device_kind),
        "processor": processor,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """What two configurations differ in, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return [] if old == new else [f"{prefix} is {old!r} there and {new!r} here"]


def claim(configs: dict[Path, dict[str, Any]], resume: bool) -> None:
    """Makes each directory the place of the records of its configuration, or raises, before anything is changed."""
    manifests = {
        directory: _manifest(directory, _plain(config), resume)
        for directory, config in configs.items()
    }
    here = environment()
    for directory, manifest in manifests.items():
        for left in directory.rglob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        manifest["environments"].append(here)
        write_json(directory / MANIFEST, manifest)


def _manifest(directory: Path, config: dict[str, Any], resume: bool) -> dict[str, Any]:
    if not (directory / MANIFEST).exists():
        if directory.exists() and any(not path.match(".*.tmp") for path in directory.iterdir()):
            raise RecordError(
                f"{directory} is not empty and holds no {MANIFEST}. Choose another --out."
            )
        return {"config": config, "environments": []}
    manifest = read_json(directory / MANIFEST)
    if found := differences(manifest["config"], config):
        raise RecordError(
            f"{directory} holds records of another configuration: {'; '.join(found)}. Choose another --out; "
            "nothing was changed."
        )
    if not resume:
        raise RecordError(
            f"{directory} holds records of this configuration. Pass --resume to continue them, or another --out."
        )
    return manifest
