"""Several processes that run one command together: how they find each other and get to the same point."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import prograde as pg
from prograde.lab import records

TIMEOUT = 60  # seconds to wait for the others


def agree(facts: dict[str, Any]) -> Mesh:
    """The mesh of all workers, when all have the same code and are about to do the same."""
    code = {"the code of prograde": source_digest(), "the version of jax": jax.__version__}
    pg.distributed.agree(code | facts, timeout=TIMEOUT)
    return jax.make_mesh((jax.device_count(),), ("workers",))


def source_digest() -> str:
    """A digest of the package's own code."""
    root = Path(pg.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def share_files(directory: Path, suffixes: tuple[str, ...] = (".json", ".jsonl", ".log")) -> None:
    """Gives every worker the records and logs of the one that got furthest, so that all go on from the same point.

    Logs are seeds and scalars: no parameter is sent.
    """
    paths = [
        p for p in sorted(directory.rglob("*")) if p.suffix in suffixes and "workers" not in p.parts
    ]
    sizes = multihost_utils.process_allgather(
        np.asarray(sum(p.stat().st_size for p in paths), np.int32)
    )
    source = int(np.argmax(sizes)) == jax.process_index()
    files = {str(p.relative_to(directory)): p.read_bytes().hex() for p in paths} if source else {}
    for name, data in json.loads(_from(source, json.dumps(files).encode())).items():
        if not source:
            records.write(directory / name, bytes.fromhex(data))


def _from(source: bool, content: bytes) -> bytes:
    """What one of the workers has, for all."""
    length = int(
        multihost_utils.broadcast_one_to_all(np.asarray(len(content), np.int32), is_source=source)
    )
    padded = np.zeros(length, np.uint8)
    if source:
        padded[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded, is_source=source)).tobytes()
