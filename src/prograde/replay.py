"""A run as a log: a seed and a few numbers for each step, from which the parameters are made again without the data.

**Source:** MeZO, arXiv 2305.17333, section 2.1.

Examples:
    >>> import pathlib, tempfile, jax, jax.numpy as jnp, optax, prograde as pg
    >>> base, x = jnp.ones((8, 4)), jnp.eye(8)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.log"
    >>> update = pg.replay.Update(pg.WeightPerturbation(num_tangents=2), optax.adam(1.0))
    >>> @jax.jit
    ... def derivatives_of(key, params):
    ...     return update.estimator.derivatives(lambda w: jnp.mean((x @ w) ** 2), key, params)
    >>> state = update.init(base)
    >>> with pg.replay.ReplayLog.create(path, base, update) as log:
    ...     for step in range(5):
    ...         value, _, derivatives = derivatives_of(update.key(7, step), state.params)
    ...         log.append(step, 7, 0.01, value, derivatives)
    ...         state = update(state, step, 7, 0.01, derivatives)
    >>> again = pg.replay.replay(pg.replay.ReplayLog.open(path), update, base)     # without the data
    >>> bool((again.params == state.params).all())
    True
"""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from prograde.estimators import SeededEstimator
from prograde.kit import float_leaves

_MAGIC = b"prograde replay log 2\n"
_DIGEST = 8  # bytes
_HEAD = 12  # bytes of a block before the digest of its head


class Optimizer(Protocol):
    """What Optax calls a gradient transformation."""

    @property
    def init(self) -> Callable[..., Any]: ...

    @property
    def update(self) -> Callable[..., Any]: ...


class TrainState(NamedTuple):
    """Parameters and the state of the optimizer."""

    params: PyTree
    opt_state: PyTree


@dataclass(frozen=True, eq=False)
class Update:
    """One step of training, given the derivatives: one compiled program for training and for replaying.

        params <- params + rate * optimizer.update(estimator.gradient(key, params, derivatives))

    **Arguments:**

    - `estimator`: a `WeightPerturbation` or a `CentralDifference`; of a `Distributed` one, what it shares out.
    - `optimizer`: an Optax optimizer with a learning rate of 1, such as `optax.sgd(1.0)`: its updates are multiplied by the rate of
      the step, which the log holds.

    Called with a `TrainState`, the step, the seed, the rate and the derivatives it returns the next `TrainState`. The arrays of the one it was given
    are reused and must not be used again. Because both use this program, with the same numbers, a replay gives the same bits as the run, on
    the same platform and versions.

    **Cost:** that of `estimator.gradient` and of the optimizer; the function is not run.

    **Errors:** `TypeError` for another estimator.

    **Source:** seeds and scalars as a record of training: MeZO, arXiv 2305.17333, section 2.1.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, prograde as pg
        >>> update = pg.replay.Update(pg.WeightPerturbation(), optax.sgd(1.0))
        >>> state = update.init(jnp.ones((8, 4)))
        >>> value, _, derivatives = update.estimator.derivatives(lambda w: jnp.sum(w ** 2), update.key(7, 0), state.params)
        >>> state = update(state, 0, 7, 0.01, derivatives)
        >>> state.params.shape
        (8, 4)
    """

    estimator: SeededEstimator
    optimizer: Optimizer

    def __post_init__(self):
        if not isinstance(self.estimator, SeededEstimator):
            raise TypeError(
                f"estimator={self.estimator!r}, but only the estimates of WeightPerturbation and CentralDifference are a seed and a "
                "few numbers."
            )

    def init(self, params: PyTree) -> TrainState:
        """The state before the first step; the parameters are copied, as each update reuses those it is given."""
        params = jax.tree.map(
            lambda x: jnp.array(x) if isinstance(x, jax.Array | np.ndarray) else x, params
        )
        return TrainState(params, self.optimizer.init(float_leaves(params)))

    @staticmethod
    def key(seed: int, step: int) -> Key[Array, ""]:
        """The key of a step: that of the seed, which may have 64 bits, folded with the step. Below 2^32 it is `jax.random.key(seed)`."""
        return _key(_words(seed), np.uint32(step))

    def __call__(
        self,
        state: TrainState,
        step: int,
        seed: int,
        rate: float,
        derivatives: Float[Array, "num_tangents groups numbers"],
    ) -> TrainState:
        floats, rest = eqx.partition(state.params, eqx.is_inexact_array)
        numbers = np.uint32(step), _words(seed), np.float32(rate)
        floats, opt_state = self._program(floats, state.opt_state, *numbers, derivatives)
        return TrainState(eqx.combine(floats, rest), opt_state)

    @functools.cached_property
    def _program(self) -> Callable[..., tuple[PyTree[Array], PyTree]]:
        def updated(
            floats: PyTree[Array],
            opt_state: PyTree,
            step: Array,
            words: Array,
            rate: Array,
            derivatives: Array,
        ) -> tuple[PyTree[Array], PyTree]:
            derivatives = derivatives.astype(jnp.float32)  # what the log holds
            grads = self.estimator.gradient(_key(words, step), floats, derivatives)
            updates, opt_state = self.optimizer.update(grads, opt_state, floats)
            return jax.tree.map(
                lambda w, u: (w + rate * u).astype(w.dtype), floats, updates
            ), opt_state

        return jax.jit(updated, donate_argnums=(0, 1))


def _words(seed: int) -> np.ndarray:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}, but a whole number from 0 to 2^64 - 1 is needed.")
    return np.asarray([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def _key(words: Array | np.ndarray, step: Array | np.uint32) -> Key[Array, ""]:
    return jax.random.fold_in(
        jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32"), step
    )


class LogError(RuntimeError):
    """A replay log that cannot be used as asked; the message says why, and what is whole of it."""


def fingerprint(params: PyTree) -> str:
    """SHA-256 of the arrays of a tree: their paths, dtypes, shapes and bytes, as hexadecimal digits.

    **Arguments:**

    - `params`: any tree; leaves that are not arrays are left out.

    **Cost:** the arrays are copied to the host one by one.

    **Source:** FIPS 180-4 for the hash.

    Examples:
        >>> import jax.numpy as jnp, prograde as pg
        >>> pg.replay.fingerprint({"w": jnp.zeros(3)})[:16]
        'db2e2ab495f1d4b7'
    """
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not isinstance(x, jax.Array | np.ndarray | np.generic):
            continue
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        array = np.asarray(x)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class ReplayLog:
    """An append-only, checksummed file with a record for each step: number, seed, learning rate, loss, derivatives.

    Each record has a digest of itself and of the digest before it, so that none can be altered, left out or moved without all
    that follow being wrong. Records are written in blocks, each with the digest of its last record; the digests of the others are
    computed again. A block that was not written to its end (a machine that stopped) is cut off when the log is
    opened to be continued; anything else that is wrong raises `LogError`, naming the steps.

    - `ReplayLog.create(path, base, update, config)` begins one; it refuses a path that exists.
    - `ReplayLog.open(path)` reads one; `ReplayLog.open(path, append=True)` continues it.

    **Fields:** `header`: what the log begins with, a dictionary: `base`, the `fingerprint` of the parameters it starts from; `shape` of the
    derivatives of a step; `estimator`, as text; `config`, whatever was given to `create`; `versions`. `records`: a NumPy array with the fields `step`,
    `seed`, `rate`, `value` (the loss), `derivatives` and `digest`. `flush_every`: how many steps are written together, in a block, if nobody
    calls `flush` before: 50.

    **Cost:** 4 bytes a step, 4 for each derivative, and 40 for each block, as the seed and the rate are written once where all steps of a
    block have the same; 4 bytes a step more where the rate changes within a block, and 8 where the seed does. 1,000 steps
    with one derivative at a constant rate are 8.8 KB and the header, with a schedule 12.7 KB. What a killed process had not flushed is lost, and
    nothing else.

    **Source:** the log of seeds and scalars: MeZO, arXiv 2305.17333; digests in a chain, as in any append-only log.

    Examples:
        >>> import tempfile, pathlib, jax.numpy as jnp, optax, prograde as pg
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.log"
        >>> update = pg.replay.Update(pg.WeightPerturbation(num_tangents=2), optax.sgd(1.0))
        >>> with pg.replay.ReplayLog.create(path, jnp.ones((8, 4)), update) as log:
        ...     log.append(0, 7, 0.01, 2.5, jnp.ones((2, 1, 1)))
        >>> len(pg.replay.ReplayLog.open(path))
        1
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        file: BinaryIO | None,
        records: np.ndarray,
        start: bytes,
    ):
        self.path, self.header, self.records = path, header, records
        self._file, self._digest = file, start
        self._waiting: list[tuple[int, int, float, float | Array, Array]] = []
        self.flush_every = 50

    @classmethod
    def create(
        cls, path: str | Path, base: PyTree, update: Update, config: dict[str, Any] | None = None
    ) -> "ReplayLog":
        """Begins a log for a run that starts from the parameters `base`; `config` is kept with it, as JSON."""
        path, estimator = Path(path), update.estimator
        header = {
            "base": fingerprint(base),
            "shape": [estimator.num_tangents, estimator.num_groups, estimator.num_numbers],
            "estimator": repr(estimator),
            "config": json.loads(json.dumps(config or {})),
            "versions": {"prograde": _version("prograde"), "jax": jax.__version__},
        }
        content = _begin(header)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename this fails where there is a file
        except FileExistsError:
            raise LogError(
                f"{path} exists. Open it to continue it, or choose another path; nothing was changed."
            ) from None
        finally:
            temporary.unlink()
        return cls(
            path, header, open(path, "r+b"), _no_records(header), content[-_DIGEST:]
        ).__at_end()

    @classmethod
    def open(cls, path: str | Path, append: bool = False) -> "ReplayLog":
        """Reads and verifies a log. With `append=True` a torn block at its end is cut off, and more can be appended."""
        path = Path(path)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise LogError(f"{path}: there is no replay log.") from None
        header, start = _read_header(path, content)
        records, digest, end = _read_blocks(path, content, start, header)
        file = None
        if append:
            file = open(path, "r+b")  # noqa: SIM115
            if end < len(content):
                file.truncate(end)
                os.fsync(file.fileno())
        return cls(path, header, file, records, digest).__at_end()

    def __at_end(self) -> "ReplayLog":
        if self._file is not None:
            self._file.seek(0, os.SEEK_END)
        return self

    def __len__(self) -> int:
        return len(self.records) + len(self._waiting)

    def __enter__(self) -> "ReplayLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def append(
        self,
        step: int,
        seed: int,
        rate: float,
        value: float | Float[Array, ""],
        derivatives: Float[Array, "num_tangents groups numbers"],
    ) -> None:
        """Adds the record of a step; the first is step 0. Does not wait for the derivatives to be computed before they are flushed."""
        if self._file is None:
            raise LogError(
                f"{self.path} was opened for reading. Use ReplayLog.open(path, append=True)."
            )
        if step != len(self):
            raise LogError(
                f"{self.path} holds {len(self)} steps, so step {len(self)} is next, not {step}."
            )
        if tuple(derivatives.shape) != tuple(self.header["shape"]):
            raise LogError(
                f"{self.path} holds derivatives of shape {tuple(self.header['shape'])} for each step, not {derivatives.shape}."
            )
        self._waiting.append((step, seed, rate, value, derivatives))
        if len(self._waiting) >= self.flush_every:
            self.flush()

    def extend(self, records: np.ndarray) -> None:
        """Adds records of the same run that another worker has."""
        for record in records:
            self.append(
                int(record["step"]),
                int(record["seed"]),
                record["rate"],
                record["value"],
                record["derivatives"],
            )
        self.flush()

    def flush(self) -> None:
        """Writes what was appended as one block, and waits until it is on the disk."""
        if self._file is None or not self._waiting:
            return
        records = np.zeros(len(self._waiting), _record_type(self.header))
        for record, (step, seed, rate, value, derivatives) in zip(
            records, self._waiting, strict=True
        ):
            record["step"], record["seed"], record["rate"] = step, seed, rate
            record["value"], record["derivatives"] = np.asarray(value), np.asarray(derivatives)
        _chain(records, self._digest)
        self._file.write(_block(records, self._digest))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._digest = records["digest"][-1].tobytes()
        self.records, self._waiting = np.concatenate([self.records, records]), []

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._file is not None:
            try:
                self.flush()
            finally:
                self._file.close()
                self._file = None

    def digest(self, steps: int) -> str:
        """The digest of the first so many records, the header included: equal where the logs of two workers are."""
        if steps == 0:
            return _begin(self.header)[-_DIGEST:].hex()
        self.flush()
        return self.records["digest"][steps - 1].tobytes().hex()


def replay(
    log: ReplayLog, update: Update, base: PyTree, on_step: Callable[[int], None] | None = None
) -> TrainState:
    """The parameters, and the state of the optimizer, after all steps of a log.

    **Arguments:**

    - `log`: what happened.
    - `update`: the update of the run, with the same estimator and optimizer.
    - `base`: the parameters the run started from.
    - `on_step`: called with the number of steps that were dispatched, to show progress.

    **Returns:** the same bits as the run had, on the same platform and versions, with the same number of processor cores; elsewhere the same to rounding.

    **Cost:** one update a step. The function is not run, and no data is read.

    **Errors:** `LogError` for other base parameters, or another estimator, than those of the log.

    **Source:** MeZO, arXiv 2305.17333, section 2.1.

    Examples:
        >>> import tempfile, pathlib, jax.numpy as jnp, optax, prograde as pg
        >>> base, path = jnp.ones((8, 4)), pathlib.Path(tempfile.mkdtemp()) / "run.log"
        >>> update = pg.replay.Update(pg.WeightPerturbation(), optax.adam(1.0))
        >>> state = update.init(base)
        >>> with pg.replay.ReplayLog.create(path, base, update) as log:
        ...     for step in range(5):
        ...         key = update.key(7, step)
        ...         value, _, derivatives = update.estimator.derivatives(lambda w: jnp.sum(w ** 2), key, state.params)
        ...         log.append(step, 7, 0.01, value, derivatives)
        ...         state = update(state, step, 7, 0.01, derivatives)
        >>> again = pg.replay.replay(pg.replay.ReplayLog.open(path), update, base)
        >>> bool((again.params == state.params).all())
        True
    """
    if repr(update.estimator) != log.header["estimator"]:
        raise LogError(
            f"{log.path} is the log of {log.header['estimator']}, not of {update.estimator!r}."
        )
    if (found := fingerprint(base)) != log.header["base"]:
        raise LogError(
            f"{log.path} starts from parameters with the fingerprint {log.header['base'][:16]}..., and these have {found[:16]}.... "
            "Replay it from the parameters the run started from."
        )
    log.flush()
    state = update.init(base)
    for i, record in enumerate(log.records):
        derivatives = jnp.asarray(record["derivatives"])
        state = update(
            state, int(record["step"]), int(record["seed"]), float(record["rate"]), derivatives
        )
        if on_step is not None:
            on_step(i + 1)
    return state


def _begin(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    content = _MAGIC + len(text).to_bytes(4, "little") + text
    return content + _digest(b"", content)


def _digest(before: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST, key=before).digest()


def _record_type(header: dict[str, Any]) -> np.dtype:
    shape = tuple(header["shape"])
    fields = [
        ("step", "<u8"),
        ("seed", "<u8"),
        ("rate", "<f4"),
        ("value", "<f4"),
        ("derivatives", "<f4", shape),
        ("digest", f"V{_DIGEST}"),
    ]
    return np.dtype(fields)


def _no_records(header: dict[str, Any]) -> np.ndarray:
    return np.zeros(0, _record_type(header))


def _read_header(path: Path, content: bytes) -> tuple[dict[str, Any], int]:
    if (found := re.match(rb"prograde replay log (\d+)\n", content)) and found[0] != _MAGIC:
        raise LogError(
            f"{path} is a replay log of format {int(found[1])}, and this version of prograde knows only format 2. Use the version that "
            "wrote it."
        )
    length = int.from_bytes(content[len(_MAGIC) : len(_MAGIC) + 4], "little")
    end = len(_MAGIC) + 4 + length
    whole = content.startswith(_MAGIC) and len(content) >= end + _DIGEST
    if not whole or _digest(b"", content[:end]) != content[end : end + _DIGEST]:
        raise LogError(
            f"{path} does not begin as a replay log does, or its beginning was altered. Nothing of it can be used."
        )
    return json.loads(content[len(_MAGIC) + 4 : end]), end + _DIGEST


def _chain(records: np.ndarray, digest: bytes) -> None:
    """Fills in the digests of records that follow one with this digest."""
    content, size, digests = records.tobytes(), records.itemsize, []
    for i in range(0, len(content), size):
        digest = _digest(digest, content[i : i + size - _DIGEST])
        digests.append(digest)
    records["digest"] = np.frombuffer(b"".join(digests), f"V{_DIGEST}")


def _block(records: np.ndarray, before: bytes) -> bytes:
    """What is written of records: how many there are, and how many seeds and rates, one or one for each; the digest of that; seeds,
    rates, values, derivatives; the digest of the last record.

    The step is not written: it is the place in the log. The head has a digest of its own because a wrong length that points beyond the
    end of the file would look like a torn block, and whole ones after it would be cut off.
    """
    columns = (
        _once(records["seed"]),
        _once(records["rate"]),
        records["value"],
        records["derivatives"],
    )
    head = np.asarray([len(records), len(columns[0]), len(columns[1])], "<u4").tobytes()
    parts = (
        head,
        _digest(before, head),
        *(column.tobytes() for column in columns),
        records["digest"][-1].tobytes(),
    )
    return b"".join(parts)


def _once(numbers: np.ndarray) -> np.ndarray:
    """The first, if all have the same bits, of which 0 and -0 do not."""
    bits = numbers.view(f"u{numbers.itemsize}")
    return numbers[:1] if (bits == bits[0]).all() else numbers


def _read_blocks(
    path: Path, content: bytes, start: int, header: dict[str, Any]
) -> tuple[np.ndarray, bytes, int]:
    """(records, digest of the last, where they end in the file)."""
    kind, digest, end, blocks, first = (
        _record_type(header),
        content[start - _DIGEST : start],
        start,
        [],
        0,
    )

    def altered(steps: str) -> LogError:
        return LogError(
            f"{path}: the block of steps {steps} was altered, so that it and what follows cannot be trusted. The first {first} steps "
            f"are whole: cut the file to its first {end} bytes to use them."
        )

    while len(content) >= (at := end + _HEAD + _DIGEST):
        head = content[end : end + _HEAD]
        if _digest(digest, head) != content[end + _HEAD : at]:
            raise altered(f"{first} and following")
        count, seeds, rates = np.frombuffer(head, "<u4").tolist()
        columns = {"seed": seeds, "rate": rates, "value": count, "derivatives": count}
        stop = at + sum(kind[name].itemsize * length for name, length in columns.items()) + _DIGEST
        if stop > len(content):
            break
        records = np.zeros(count, kind)
        records["step"] = np.arange(first, first + count)
        for name, length in columns.items():
            records[name] = np.frombuffer(content, kind[name], length, at)
            at += kind[name].itemsize * length
        _chain(records, digest)
        if records["digest"][-1].tobytes() != content[at:stop]:
            if stop == len(content):
                break  # the last block: as if it had not been written to its end
            raise altered(f"{first} to {first + count - 1}")
        digest, end, first = content[at:stop], stop, first + count
        blocks.append(records)
    return np.concatenate([_no_records(header), *blocks]), digest, end


def _version(name: str) -> str:
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return "unknown"
