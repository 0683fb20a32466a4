"""The file that holds the steps of a run."""

import contextlib
import json
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, PyTree

from prograde.replay._file import GrowingFile, not_readable, write_new
from prograde.replay._fingerprint import fingerprint
from prograde.replay._format import (
    DIGEST,
    NEWEST,
    Content,
    LogError,
    chain,
    header_bytes,
    parameters_block,
    read_blocks,
    read_header,
    record_type,
    steps_block,
)
from prograde.replay._update import (
    Update,
    check_derivatives,
    check_value,
    checked_rate,
    checked_seed,
    checked_whole,
    described,
    shape_of,
)


class ReplayLog:
    """An append-only, checksummed file of steps: number, seed, learning rate, loss, derivatives.

    Each step has a digest of itself and of the digest before it, so no step can be altered, left
    out or moved without making all that follow wrong. Steps are written in blocks.
    `record_parameters` and `finish` add fingerprints of the parameters, which a replay compares
    with its own.

    - `ReplayLog.create(path, base, update, config, steps=)` begins a log. The path must not exist.
    - `ReplayLog.open(path)` reads a log, and refuses one that is damaged.
    - `ReplayLog.open(path, partial=True)` reads the whole blocks before a damage.
    - `ReplayLog.open(path, append=True)` continues a log. A torn block at its end, as a machine
      that stopped leaves it, is cut off.

    **Fields:**

    - `header`: a dictionary. `base`, the `fingerprint` of the parameters before the first step;
      `shape` of the derivatives of a step; `estimator` and `optimizer`, as text; `config`, what was
      given to `create`; `versions`.
    - `records`: a NumPy array with the fields `step`, `seed`, `rate`, `value` (the loss),
      `derivatives` and `digest`.
    - `fingerprints`: the fingerprints of the parameters, by the number of steps before them.
    - `planned`: how many steps the run was to have; `None` where nobody said.
    - `finished`: whether the log ends with `finish`.
    - `damage`: what was wrong with the file, in words; empty for a whole file. With `append=True`,
      what was cut off.
    - `flush_every`: steps that are written together in a block, unless `flush` is called: 50.

    **Cost:** 4 bytes a step, 4 for each derivative, and 40 for each block, as the seed and the rate
    are written once where all steps of a block have the same; 4 bytes a step more where the rate
    changes within a block, and 8 where the seed does. 1,000 steps with one derivative at a constant
    rate take 8.8 KB and the header, with a schedule 12.7 KB. A fingerprint takes 60 bytes. What a
    killed process had not flushed is lost, and nothing else.

    **Errors:** `LogError` for a file that is missing, damaged, of another kind, or being written.

    **Source:** the log of seeds and scalars: MeZO, arXiv 2305.17333; digests in a chain, as in any
    append-only log.

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
        self, path: Path, header: dict[str, Any], number: int, content: Content, partial: bool
    ):
        self.path, self.header, self.records = path, header, content.records
        self.fingerprints, self.finished = content.fingerprints, content.finished
        self.damage = content.damage(path, header.get("steps"))
        self.partial = partial
        self.flush_every = 50
        self._number, self._digest = number, content.digest
        self._file: GrowingFile | None = None
        self._waiting: list[tuple[int, int, float, float | Array, Array]] = []

    @classmethod
    def create(
        cls,
        path: str | Path,
        base: PyTree,
        update: Update,
        config: dict[str, Any] | None = None,
        steps: int | None = None,
    ) -> "ReplayLog":
        """Begins the log of a run.

        **Arguments:**

        - `path`: where; must not exist.
        - `base`: the parameters before the first step.
        - `update`: the update of the run.
        - `config`: kept with the log, as JSON.
        - `steps`: how many steps are planned. A replay of fewer then needs to be asked for.

        **Errors:** `LogError` for a path that exists or cannot be written; `TypeError` for a
        `config` that JSON cannot hold.
        """
        path = Path(path)
        if not isinstance(update, Update):
            raise TypeError(f"update={update!r}, but an Update is needed.")
        header = {
            "base": fingerprint(base),
            "shape": list(shape_of(update.estimator)),
            "estimator": repr(update.estimator),
            "optimizer": described(update.optimizer, base),
            "config": _as_json(config or {}),
            "steps": None if steps is None else checked_whole("steps", steps, 2**32),
            "versions": {name: version_of(name) for name in ("prograde", "jax", "optax")},
        }
        write_new(path, header_bytes(header))
        return cls.open(path, append=True)

    @classmethod
    def open(cls, path: str | Path, append: bool = False, *, partial: bool = False) -> "ReplayLog":
        """Reads and verifies a log.

        **Arguments:**

        - `append`: open it to add steps. A torn block at its end is cut off; `damage` says so.
        - `partial`: read the whole blocks before a damage, and allow a replay of fewer steps than
          planned.

        **Errors:** `LogError` where blocks are damaged (unless `partial`, or torn and `append`),
        where the file is not a replay log, and where another process is appending to it;
        `ValueError` for `append` and `partial` together.
        """
        path = Path(path)
        if append and partial:
            raise ValueError(
                "append=True and partial=True, but partial=True is for reading. To continue from "
                "the steps before a damage, cut the file as the error without it says."
            )
        with contextlib.ExitStack() as on_error:
            file = None
            if append:
                file = on_error.enter_context(contextlib.closing(GrowingFile(path)))
            try:
                content = path.read_bytes()
            except OSError as error:
                raise not_readable(path, error) from None
            header, start, number = read_header(path, content)
            found = read_blocks(content, start, header, number)
            log = cls(path, header, number, found, partial)
            if found.fault and not (partial or (append and found.torn)):
                raise LogError(log.damage)
            if file is not None:
                file.continue_at(found.end)
                log._file = file
            on_error.pop_all()
        return log

    @property
    def planned(self) -> int | None:
        """How many steps the run was to have; `None` where nobody said."""
        return self.header.get("steps")

    @property
    def appending(self) -> bool:
        """Whether steps can be added."""
        return self._file is not None

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
        """Adds a step; the first is step 0. Derivatives may still be computed: `flush` waits.

        **Errors:** `LogError` for a log that was opened for reading, another step than the next,
        and derivatives of another shape; `ValueError` or `TypeError` for numbers that the log
        cannot hold. What was appended before stays.
        """
        self._accept([(step, seed, rate, value, derivatives)])
        if len(self._waiting) >= self.flush_every:
            self.flush()

    def extend(self, records: np.ndarray) -> None:
        """Adds records of the same run that another worker has: all of them, or none."""
        names = ("step", "seed", "rate", "value", "derivatives")
        if not set(names) <= set(getattr(records, "dtype", np.dtype("V1")).names or ()):
            raise TypeError(
                f"records={type(records).__name__}, but the `records` of a ReplayLog are needed."
            )
        self._accept([tuple(record[name] for name in names) for record in records])
        self.flush()

    def _accept(self, entries: list[Any]) -> None:
        """Checks steps, and takes them only where all are good."""
        if self._file is None:
            raise LogError(
                f"{self.path} was opened for reading. Use ReplayLog.open(path, append=True)."
            )
        checked = []
        for step, seed, rate, value, derivatives in entries:
            following = len(self) + len(checked)
            if checked_whole("step", step, 2**32) != following:
                raise LogError(
                    f"{self.path} holds {following} steps, so step {following} is next, not {step}."
                )
            if tuple(np.shape(derivatives)) != tuple(self.header["shape"]):
                raise LogError(
                    f"{self.path} holds derivatives of shape {tuple(self.header['shape'])} for "
                    f"each step, not {np.shape(derivatives)}."
                )
            check_derivatives(derivatives, self.header["shape"])
            check_value(value)
            checked.append((following, checked_seed(seed), checked_rate(rate), value, derivatives))
        self._waiting += checked

    def flush(self) -> None:
        """Writes what was appended as one block, and waits until it is on the disk.

        Where a loss or a derivative cannot be had, because its computation failed, the steps before
        it are written, it and those after it are dropped, and its error is raised.

        **Errors:** `LogError` where the disk refuses. The steps then wait for the next `flush`.
        """
        if self._file is None or not self._waiting:
            return
        records, failure = np.zeros(len(self._waiting), record_type(self.header)), None
        count = 0
        for record, entry in zip(records, self._waiting, strict=True):
            try:
                with np.errstate(over="ignore", invalid="ignore"):
                    record["step"], record["seed"], record["rate"] = entry[:3]
                    record["value"], record["derivatives"] = map(np.asarray, entry[3:])
            except Exception as error:
                failure = error
                break
            count += 1
        records = records[:count].copy()
        if count:
            chain(records, self._digest)
            self._write(steps_block(records, self._digest))
            self._digest = records["digest"][-1].tobytes()
            self.records = np.concatenate([self.records, records])
            self.finished = False
        self._waiting = [] if failure else self._waiting[count:]
        if failure is not None:
            failure.add_note(
                f"{self.path} holds the {len(self.records)} steps before it; step "
                f"{len(self.records)} is next."
            )
            raise failure

    def record_parameters(self, params: PyTree) -> None:
        """Adds the fingerprint of the parameters after the steps so far, for a replay to verify.

        **Cost:** waits for the parameters and copies them to the host, to hash them; 60 bytes.

        A log of format 2 has no place for it: it warns and writes nothing.

        **Errors:** `LogError` where the same step has another fingerprint.
        """
        self._record(params, final=False)

    def finish(self, params: PyTree) -> None:
        """Adds the fingerprint of the last parameters, and that the run is over."""
        self._record(params, final=True)

    def _record(self, params: PyTree, final: bool) -> None:
        self.flush()
        if self._file is None:
            raise LogError(
                f"{self.path} was opened for reading. Use ReplayLog.open(path, append=True)."
            )
        if self._number < NEWEST:
            warnings.warn(
                f"{self.path} is a log of format {self._number}, which has no place for a "
                "fingerprint of the parameters: a replay of it cannot be verified.",
                stacklevel=3,
            )
            return
        found = fingerprint(params)
        self.verify(len(self), found)
        if len(self) in self.fingerprints and (self.finished or not final):
            return
        self._write(parameters_block(found, final, self._digest))
        self.fingerprints[len(self)], self.finished = found, final

    def verify(self, steps: int, params: PyTree) -> None:
        """Raises unless the parameters after so many steps are those of the run, bit for bit.

        Does nothing where the log has no fingerprint for that step. `params` may also be a
        fingerprint.

        **Errors:** `LogError` where they differ.
        """
        if steps not in self.fingerprints:
            return
        wanted = self.fingerprints[steps]
        found = params if isinstance(params, str) else fingerprint(params)
        if found == wanted:
            return
        before = max((n for n in self.fingerprints if n < steps), default=0)
        versions = {name: version_of(name) for name in self.header["versions"]}
        differ = [
            f"{name} {wrote} wrote the log, and this is {versions[name]}"
            for name, wrote in self.header["versions"].items()
            if versions[name] != wrote
        ]
        machine = f" ({'; '.join(differ)})" if differ else ""
        raise LogError(
            f"{self.path}: the parameters after {steps} steps have the fingerprint "
            f"{found[:16]}..., and those of the run had {wanted[:16]}.... They were last alike "
            f"after {before} steps. Either the update differs from the run's, or the machine or "
            f"the versions do{machine}: the same bits come only from the same platform, versions "
            "and number of cores. With verify=False they are not compared."
        )

    def _write(self, block: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(block)
        except OSError as error:
            raise LogError(
                f"{self.path} could not be written ({error}). Its {len(self.records)} steps are "
                f"whole; {len(self._waiting)} more wait for the next flush."
            ) from error

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._file is not None:
            try:
                self.flush()
            finally:
                self._file.close()
                self._file = None

    def digest(self, steps: int) -> str:
        """The digest of the first so many steps, the header included.

        It is equal where two workers logged the same steps, whatever their blocks and fingerprints.

        **Errors:** `ValueError` for more steps than there are.
        """
        steps = checked_whole("steps", steps, len(self) + 1)
        if steps == 0:
            return header_bytes(self.header, self._number)[-DIGEST:].hex()
        self.flush()
        return self.records["digest"][steps - 1].tobytes().hex()


def _as_json(config: dict[str, Any]) -> Any:
    try:
        found = json.loads(json.dumps(config))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"config cannot be kept as JSON ({error}). Use dictionaries, lists, text and numbers."
        ) from None
    if not isinstance(found, dict):
        raise TypeError(f"config={config!r}, but a dictionary is needed.")
    return found


def version_of(name: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return "unknown"
