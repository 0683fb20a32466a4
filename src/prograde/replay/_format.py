r"""The bytes of a replay log: a header, and blocks of which each depends on the steps before it.

    header       "prograde replay log 3\n", length, JSON, digest
    steps        head (count, seeds, rates), its digest, seeds, rates, values, derivatives, digest
    parameters   head (0, kind, 32), its digest, SHA-256 of the parameters, digest

All numbers are little-endian, lengths and heads are uint32, a digest is 8 bytes of BLAKE2b.

Each step has a digest of its numbers, keyed with the digest of the step before it, so a changed,
missing or moved step makes all that follow wrong. A block stores the digest of its last step; the
reader computes the others. The number of a step is its place in the log. Seeds and rates are stored
once where all steps of a block have the same.

The head has its own digest: a wrong length that pointed beyond the end of the file would look like
a torn block, and whole blocks after it would be cut off.

A block of parameters is keyed with the digest of the step before it and does not change the chain:
two workers that log the same steps have the same digests.

Format 2 has no blocks of parameters and is read as well.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DIGEST = 8  # bytes
NEWEST = 3
_HEAD = 12  # bytes
_FINGERPRINT = 32  # bytes
_AFTER, _FINAL = 1, 2  # kinds of blocks of parameters: after a step, after the last one
_MOST_NUMBERS = 2**24  # in the derivatives of one step


class LogError(RuntimeError):
    """A replay log cannot be used as asked. The message says why, and which steps are whole.

    **Source:** none; it names what is wrong with a file.

    Examples:
        >>> import prograde as pg
        >>> try:
        ...     pg.replay.ReplayLog.open("no/such/run.log")
        ... except pg.replay.LogError as error:
        ...     print(error)
        no/such/run.log: there is no replay log.
    """


@dataclass
class Content:
    """What the whole blocks of a log hold."""

    records: np.ndarray
    digest: bytes  # of the last step
    end: int  # bytes of the file that are whole
    fingerprints: dict[int, str] = field(default_factory=dict)  # of the parameters, by steps
    finished: bool = False  # the last block says that the run is over
    fault: str = ""  # what is wrong with the block after the whole ones
    torn: bool = False  # and whether that block is the last of the file

    def damage(self, path: Path, planned: int | None) -> str:
        """What is wrong with the blocks, how much is whole, and what to do; empty if all is."""
        if not self.fault:
            return ""
        trust = "" if self.torn else ", so that it and what follows cannot be trusted"
        plan = "" if planned is None else f"; {planned} were planned"
        remedy = (
            "append=True cuts the rest off and continues from them"
            if self.torn
            else f"to continue from them, cut the file to its first {self.end} bytes"
        )
        return (
            f"{path}: {self.fault}{trust}. The first {len(self.records)} steps are whole{plan}. "
            f"To read these alone, use partial=True; {remedy}."
        )


def header_bytes(header: dict[str, Any], number: int = NEWEST) -> bytes:
    """The header as written, with its digest at the end."""
    text = json.dumps(header, sort_keys=True).encode()
    content = b"prograde replay log %d\n" % number + len(text).to_bytes(4, "little") + text
    return content + digest_of(b"", content)


def read_header(path: Path, content: bytes) -> tuple[dict[str, Any], int, int]:
    """(header, where it ends, number of the format).

    **Errors:** `LogError` for another kind of file, another format, and a header that is damaged.
    """
    found = re.match(rb"prograde replay log (\d{1,9})\n", content)
    if found is None:
        raise LogError(
            f"{path} does not begin as a replay log does. It is another kind of file, or its "
            "beginning was altered."
        )
    if (number := int(found[1])) not in (2, NEWEST):
        raise LogError(
            f"{path} is a replay log of format {number}, and this version of prograde knows only "
            f"format 2 and {NEWEST}. Use the version that wrote it."
        )
    start = found.end() + 4
    end = start + int.from_bytes(content[found.end() : start], "little")
    if len(content) < end + DIGEST or digest_of(b"", content[:end]) != content[end : end + DIGEST]:
        raise LogError(
            f"{path} does not begin as a replay log does: its header was cut off or altered. "
            "Nothing in it can be used."
        )
    try:
        header = json.loads(content[start:end])
    except (ValueError, RecursionError) as error:
        raise LogError(f"{path} has a header that is not JSON ({error}).") from None
    _check_header(path, header)
    return header, end + DIGEST, number


def _check_header(path: Path, header: Any) -> None:
    """Raises unless the header holds what a log needs."""
    if not isinstance(header, dict):
        raise LogError(f"{path} has a header that is not an object, but {type(header).__name__}.")
    kinds = {"base": str, "estimator": str, "shape": list, "config": dict, "versions": dict}
    for name, kind in kinds.items():
        if not isinstance(header.get(name), kind):
            raise LogError(
                f"{path} has {name}={_short(header.get(name))} in its header, but "
                f"{kind.__name__} is needed. The log was not written by prograde."
            )
    shape = header["shape"]
    whole = len(shape) == 3 and all(type(n) is int and n >= 1 for n in shape)
    if not whole or math.prod(shape) > _MOST_NUMBERS:
        raise LogError(
            f"{path} has shape={_short(shape)} in its header, but three whole numbers "
            f"[tangents, groups, numbers] of at most {_MOST_NUMBERS:,} derivatives are needed."
        )
    versions, planned = header["versions"], header.get("steps")
    if not all(isinstance(versions.get(name), str) for name in ("prograde", "jax")):
        raise LogError(
            f"{path} has versions={_short(versions)} in its header, but those of prograde and jax "
            "are needed."
        )
    if planned is not None and (type(planned) is not int or planned < 0):
        raise LogError(
            f"{path} has steps={_short(planned)} in its header, but a whole number is needed."
        )
    for name in ("state", "program"):
        optimizer = header.get("optimizer")
        if optimizer is not None and not (
            isinstance(optimizer, dict) and isinstance(optimizer.get(name), str)
        ):
            raise LogError(
                f"{path} has optimizer={_short(optimizer)} in its header, but its state and "
                "program as text are needed."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def digest_of(before: bytes, content: bytes) -> bytes:
    """The digest of some bytes that follow those with the digest `before`."""
    return hashlib.blake2b(content, digest_size=DIGEST, key=before).digest()


def record_type(header: dict[str, Any]) -> np.dtype:
    """The type of the record of a step."""
    fields = [
        ("step", "<u8"),
        ("seed", "<u8"),
        ("rate", "<f4"),
        ("value", "<f4"),
        ("derivatives", "<f4", tuple(header["shape"])),
        ("digest", f"V{DIGEST}"),
    ]
    return np.dtype(fields)


def chain(records: np.ndarray, digest: bytes) -> None:
    """Fills in the digests of records that follow the one with this digest."""
    content, size, digests = records.tobytes(), records.itemsize, []
    for i in range(0, len(content), size):
        digest = digest_of(digest, content[i : i + size - DIGEST])
        digests.append(digest)
    records["digest"] = np.frombuffer(b"".join(digests), f"V{DIGEST}")


def steps_block(records: np.ndarray, before: bytes) -> bytes:
    """A block of steps as written. The records have their digests; `before` is the one before."""
    columns = (
        _stored_once(records["seed"]),
        _stored_once(records["rate"]),
        records["value"],
        records["derivatives"],
    )
    head = _head(len(records), len(columns[0]), len(columns[1]))
    body = b"".join(column.tobytes() for column in columns)
    return head + digest_of(before, head) + body + records["digest"][-1].tobytes()


def parameters_block(fingerprint: str, final: bool, before: bytes) -> bytes:
    """A block of parameters as written, after the step with the digest `before`."""
    head, body = _head(0, _FINAL if final else _AFTER, _FINGERPRINT), bytes.fromhex(fingerprint)
    return head + digest_of(before, head) + body + digest_of(before, head + body)


def _head(*numbers: int) -> bytes:
    return np.asarray(numbers, "<u4").tobytes()


def _stored_once(numbers: np.ndarray) -> np.ndarray:
    """One number if all are bit-identical (0.0 and -0.0 differ), else all."""
    bits = numbers.view(f"u{numbers.itemsize}")
    return numbers[:1] if (bits == bits[0]).all() else numbers


def read_blocks(content: bytes, start: int, header: dict[str, Any], number: int) -> Content:
    """The blocks from `start` on, up to the first that is not whole."""
    kind = record_type(header)
    found = Content(np.zeros(0, kind), content[start - DIGEST : start], start)
    blocks: list[np.ndarray] = []
    first = 0
    while found.end < len(content) and not found.fault:
        head, at = content[found.end : found.end + _HEAD], found.end + _HEAD + DIGEST
        if len(content) < at:
            found.fault, found.torn = f"the block of steps {first} and following is torn", True
            break
        if digest_of(found.digest, head) != content[found.end + _HEAD : at]:
            found.fault = f"the block of steps {first} and following was altered"
            break
        count, seeds, rates = np.frombuffer(head, "<u4").tolist()
        if count == 0:
            _read_parameters(content, at, found, first, seeds, rates, number)
            continue
        if not {seeds, rates} <= {1, count}:
            found.fault = f"the block of steps {first} and following was altered"
            break
        columns = {"seed": seeds, "rate": rates, "value": count, "derivatives": count}
        stop = at + sum(kind[name].itemsize * length for name, length in columns.items()) + DIGEST
        last = first + count - 1
        if stop > len(content):
            found.fault, found.torn = f"the block of steps {first} to {last} is torn", True
            break
        records = np.zeros(count, kind)
        records["step"] = np.arange(first, first + count)
        for name, length in columns.items():
            records[name] = np.frombuffer(content, kind[name], length, at)
            at += kind[name].itemsize * length
        chain(records, found.digest)
        if records["digest"][-1].tobytes() != content[at:stop]:
            found.fault = f"the block of steps {first} to {last} was altered"
            # a block that was not written to its end may be as long as it was to be
            found.torn = stop == len(content)
            break
        found.digest, found.end, first = content[at:stop], stop, first + count
        found.finished = False
        blocks.append(records)
    found.records = np.concatenate([found.records, *blocks])
    return found


def _read_parameters(
    content: bytes, at: int, found: Content, steps: int, kind: int, size: int, number: int
) -> None:
    """Reads the block of parameters whose head ends at `at`."""
    name, body, stop = (
        f"the fingerprint of the parameters after {steps} steps",
        at + _FINGERPRINT,
        at + _FINGERPRINT + DIGEST,
    )
    if number < 3 or kind not in (_AFTER, _FINAL) or size != _FINGERPRINT:
        found.fault = f"the block of steps {steps} and following was altered"
    elif stop > len(content):
        found.fault, found.torn = f"{name} is torn", True
    elif (
        digest_of(found.digest, content[found.end : found.end + _HEAD] + content[at:body])
        != content[body:stop]
    ):
        found.fault, found.torn = f"{name} was altered", stop == len(content)
    else:
        found.fingerprints[steps] = content[at:body].hex()
        found.finished, found.end = kind == _FINAL, stop
