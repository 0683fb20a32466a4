"""Connects processes that run one command together, and brings them to the same point."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import prograde as pg
from prograde.lab import store
from prograde.lab.data import BATCH_SIZE
from prograde.lab.study import UsageError

TIMEOUT = 60  # seconds to wait for the other processes


def join() -> int:
    """Joins the other processes; returns the number of this one.

    Raises `UsageError` if the others are not found, or if the devices do not divide a batch.
    """
    _keep_output_of_libraries_away()
    try:
        pg.distributed.initialize(timeout=TIMEOUT)
    except (ValueError, pg.distributed.StartError) as error:
        raise UsageError(str(error)) from None
    if BATCH_SIZE % jax.device_count():
        raise UsageError(
            f"{jax.device_count()} devices do not divide a batch of {BATCH_SIZE}. "
            "Start another number of processes."
        )
    return jax.process_index()


def devices() -> Mesh:
    """Returns a mesh of the devices of all processes."""
    return jax.make_mesh((jax.device_count(),), ("workers",))


def agree(facts: dict[str, Any]) -> Mesh:
    """Checks that all processes have the same code and the same facts; returns their devices.

    Raises `UsageError` on all processes if they differ.
    """
    code = {"the code of prograde": source_digest(), "the version of jax": jax.__version__}
    try:
        pg.distributed.agree(code | facts, timeout=TIMEOUT)
    except pg.distributed.StartError as error:
        raise UsageError(str(error)) from None
    return devices()


def source_digest() -> str:
    """Returns a digest of the code of this package."""
    root = Path(pg.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def share_files(directory: Path, suffixes: tuple[str, ...] = (".json", ".jsonl", ".log")) -> None:
    """Copies the records and logs of the worker that got furthest to all others.

    All then resume from the same point. Logs are seeds and scalars: no parameter is sent. Each
    worker keeps its own manifest.
    """
    paths = [
        path
        for path in sorted(directory.rglob("*"))
        if path.suffix in suffixes and "workers" not in path.parts and path.name != store.MANIFEST
    ]
    sizes = multihost_utils.process_allgather(
        np.asarray(sum(p.stat().st_size for p in paths), np.int32)
    )
    source = int(np.argmax(sizes)) == jax.process_index()
    files = {str(p.relative_to(directory)): p.read_bytes().hex() for p in paths} if source else {}
    for name, data in json.loads(_from(source, json.dumps(files).encode())).items():
        if not source:
            store.write(directory / name, bytes.fromhex(data))


def _from(source: bool, content: bytes) -> bytes:
    """Returns the bytes of the source worker on all workers."""
    length = int(
        multihost_utils.broadcast_one_to_all(np.asarray(len(content), np.int32), is_source=source)
    )
    padded = np.zeros(length, np.uint8)
    if source:
        padded[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded, is_source=source)).tobytes()


def _keep_output_of_libraries_away() -> None:
    """Reserves standard output for Python, because Gloo prints lines that break the display."""
    sys.stdout.flush()
    own = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = os.fdopen(own, "w", buffering=1, errors="backslashreplace")
