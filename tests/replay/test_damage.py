"""No damage to a log is ever taken for a step, and what is lost is said."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from logs import BASE, SGD, same_records, steps, written

from prograde.replay import LogError, ReplayLog, replay
from prograde.replay._format import chain, digest_of, header_bytes, record_type, steps_block

BLOCKS = (3, 1, 2, 4)
KINDS = pytest.mark.parametrize(
    ("rates", "seeds"), [("constant", "constant"), ("schedule", "each")]
)
HEAD = 20  # bytes of a block that say where it ends, and their digest


@KINDS
def test_cut_at_every_byte_a_log_keeps_its_whole_blocks_and_says_what_is_lost(
    rates, seeds, tmp_path
):
    path, entries = tmp_path / "run.log", steps(10, rates, seeds)
    ends = written(path, entries, BLOCKS, planned=10, finish=BASE)
    content, whole = path.read_bytes(), ReplayLog.open(path)
    assert (len(whole), whole.finished, whole.damage) == (10, True, "")
    counts = (*BLOCKS, 0)
    for length in (*range(0, ends[0], 7), *range(ends[0] - 1, len(content))):
        path.write_bytes(content[:length])
        if length < ends[0]:
            for partial in (False, True):
                with pytest.raises(LogError, match="does not begin as a replay log"):
                    ReplayLog.open(path, partial=partial)
            continue
        blocks = sum(end <= length for end in ends[1:])
        kept = sum(counts[:blocks])
        if length == ends[blocks]:  # between two blocks there is nothing to see
            assert ReplayLog.open(path).damage == ""
        else:
            with pytest.raises(LogError) as error:
                ReplayLog.open(path)
            last = f"to {kept + counts[blocks] - 1} is torn" if counts[blocks] else "is torn"
            torn = last if length >= ends[blocks] + HEAD else "and following is torn"
            assert torn in str(error.value)
            assert f"The first {kept} steps are whole; 10 were planned." in str(error.value)
            assert ReplayLog.open(path, partial=True).damage == str(error.value)
        assert ReplayLog.open(path, partial=True).records.tobytes() == (
            whole.records[:kept].tobytes()
        )
        assert path.stat().st_size == length  # read only: left as it is


@KINDS
def test_a_log_that_was_cut_off_goes_on(rates, seeds, tmp_path):
    path, entries = tmp_path / "run.log", steps(10, rates, seeds)
    ends = written(path, entries, BLOCKS)
    content, whole = path.read_bytes(), ReplayLog.open(path)
    within = [end + more for end in ends[:-1] for more in (0, 1, HEAD - 1, HEAD, HEAD + 1)]
    for length in [*within, len(content) - 1, len(content)]:
        path.write_bytes(content[:length])
        blocks = sum(end <= length for end in ends[1:])
        kept = sum(BLOCKS[:blocks])
        with ReplayLog.open(path, append=True) as log:
            assert len(log) == kept
            assert path.read_bytes() == content[: ends[blocks]]  # the torn part is gone
            assert ("is torn" in log.damage) == (length != ends[blocks])
            log.extend(whole.records[kept:])
        assert same_records(ReplayLog.open(path), whole)


@KINDS
def test_no_flipped_bit_is_ever_taken_for_what_was_written(rates, seeds, tmp_path):
    path = tmp_path / "run.log"
    ends = written(path, steps(10, rates, seeds), BLOCKS, planned=10)
    content, whole = path.read_bytes(), ReplayLog.open(path)
    for i in (*range(0, ends[0], 7), *range(ends[0] - 1, len(content))):
        altered = bytearray(content)
        altered[i] ^= (0x01, 0x10, 0x80, 0xFF)[i % 4]
        path.write_bytes(altered)
        with pytest.raises(LogError) as error:
            ReplayLog.open(path)
        if i < ends[0]:
            continue
        # the message says which steps, and how to keep those before
        block = sum(end <= i for end in ends[1:])
        first, last = sum(BLOCKS[:block]), sum(BLOCKS[: block + 1]) - 1
        until = "and following" if i < ends[block] + HEAD else f"to {last}"
        assert f"block of steps {first} {until} was altered" in str(error.value)
        assert f"The first {first} steps are whole; 10 were planned" in str(error.value)
        read = ReplayLog.open(path, partial=True)
        assert read.records.tobytes() == whole.records[:first].tobytes()
        if last == 9 and until != "and following":  # as if it had not been written to its end
            assert "append=True cuts the rest off" in str(error.value)
        else:
            assert f"its first {ends[block]} bytes" in str(error.value)
            with pytest.raises(LogError, match="was altered"):
                ReplayLog.open(path, append=True)
    path.write_bytes(content[: ends[2]])
    assert ReplayLog.open(path).records.tobytes() == whole.records[: sum(BLOCKS[:2])].tobytes()


def test_no_flipped_bit_of_a_fingerprint_is_taken_for_it(tmp_path):
    path = tmp_path / "run.log"
    ends = written(path, steps(4), (4,), finish=BASE)
    content = path.read_bytes()
    for i, bits in itertools.product(range(ends[-2], ends[-1]), (0x01, 0x80)):
        altered = bytearray(content)
        altered[i] ^= bits
        path.write_bytes(altered)
        with pytest.raises(LogError, match=r"was altered.*The first 4 steps are whole"):
            ReplayLog.open(path)
        read = ReplayLog.open(path, partial=True)
        assert (len(read), read.fingerprints, read.finished) == (4, {}, False)


def test_blocks_that_are_swapped_or_left_out_are_found(tmp_path):
    path = tmp_path / "run.log"
    ends = written(path, steps(8), (2, 2, 2, 2), finish=BASE)
    content = path.read_bytes()
    blocks = [content[a:b] for a, b in itertools.pairwise(ends)]
    for order in ([1, 0, 2, 3], [0, 2, 3], [0, 0, 1, 2, 3], [0, 1, 1, 3], [0, 1, 3], [0, 4]):
        path.write_bytes(content[: ends[0]] + b"".join(blocks[i] for i in order))
        first = 2 * next(i for i, j in enumerate(order) if i != j)
        with pytest.raises(LogError, match=f"block of steps {first} and following"):
            ReplayLog.open(path)


def test_a_block_of_another_run_is_found(tmp_path):
    ends = written(tmp_path / "run.log", steps(4), (2, 2))
    written(tmp_path / "other.log", steps(4, "steps", "each"), (2, 2))
    content, other = (tmp_path / "run.log").read_bytes(), (tmp_path / "other.log").read_bytes()
    (tmp_path / "run.log").write_bytes(content[: ends[1]] + other[-(len(content) - ends[1]) :])
    with pytest.raises(LogError, match="block of steps 2 and following"):
        ReplayLog.open(tmp_path / "run.log")


def test_a_log_of_another_format_is_refused_by_its_number(tmp_path):
    path = tmp_path / "run.log"
    written(path, steps(4), (4,))
    path.write_bytes(path.read_bytes().replace(b"replay log 3\n", b"replay log 1\n"))
    for append in (False, True):
        with pytest.raises(LogError, match=r"of format 1, and this version .* format 2 and 3"):
            ReplayLog.open(path, append)


HEADER = {
    "base": "0" * 64,
    "shape": [3, 1, 1],
    "estimator": "WeightPerturbation()",
    "optimizer": {"state": "EmptyState()", "program": "0" * 64},
    "config": {},
    "steps": None,
    "versions": {"prograde": "0.1.0", "jax": "0.10.0", "optax": "0.2.8"},
}
FORGED = {
    "no object": ([1], "a header that is not an object, but list"),
    "no base": ({"base": ...}, "base=None.*str is needed"),
    "a base of numbers": ({"base": 7}, "base=7.*str is needed"),
    "no shape": ({"shape": ...}, "shape=None"),
    "a shape of words": ({"shape": ["a", 1, 1]}, r"shape=\['a', 1, 1\].*three whole numbers"),
    "a shape of two": ({"shape": [3, 1]}, "three whole numbers"),
    "a negative shape": ({"shape": [-3, 1, -1]}, "three whole numbers"),
    "a shape of halves": ({"shape": [3.5, 1, 1]}, "three whole numbers"),
    "a shape of terabytes": ({"shape": [10**6, 10**6, 10**6]}, "at most 16,777,216 derivatives"),
    "an endless shape": ({"shape": [10**400, 1, 1]}, "three whole numbers"),
    "no estimator": ({"estimator": ...}, "estimator=None"),
    "an estimator of numbers": ({"estimator": [1]}, r"estimator=\[1\]"),
    "no config": ({"config": ...}, "config=None"),
    "no versions": ({"versions": ...}, "versions=None"),
    "versions of nobody": ({"versions": {}}, "those of prograde and jax"),
    "an optimizer of words": ({"optimizer": "adam"}, "optimizer='adam'"),
    "an optimizer without a program": ({"optimizer": {"state": "x"}}, "its state and program"),
    "half a step": ({"steps": 1.5}, r"steps=1\.5"),
    "a negative plan": ({"steps": -1}, "steps=-1"),
}


def forged_header(text):
    content = b"prograde replay log 3\n" + len(text).to_bytes(4, "little") + text
    return content + digest_of(b"", content)


@pytest.mark.parametrize("case", FORGED)
def test_a_header_with_a_right_digest_and_wrong_content_is_named(case, tmp_path):
    changes, message = FORGED[case]
    header = changes
    if isinstance(changes, dict):
        header = {k: v for k, v in (HEADER | changes).items() if v is not ...}
    path = tmp_path / "run.log"
    path.write_bytes(forged_header(json.dumps(header).encode()))
    for append in (False, True):
        with pytest.raises(LogError, match=message):
            ReplayLog.open(path, append)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff\xfe", b"{", b""], ids=range(4))
def test_a_header_that_is_not_json_is_named(text, tmp_path):
    (tmp_path / "run.log").write_bytes(forged_header(text))
    with pytest.raises(LogError, match=r"run.log has a header that is not JSON"):
        ReplayLog.open(tmp_path / "run.log")


@pytest.mark.parametrize("counts", [(0, 1, 1), (0, 9, 32), (2, 0, 1), (2, 1, 3), (2**32 - 1, 5, 1)])
def test_a_block_with_a_right_digest_and_wrong_counts_is_named(counts, tmp_path):
    start = header_bytes(HEADER)
    head = np.asarray(counts, "<u4").tobytes()
    block = head + digest_of(start[-8:], head) + bytes(200)
    (tmp_path / "run.log").write_bytes(start + block)
    with pytest.raises(LogError, match="block of steps 0 and following was altered"):
        ReplayLog.open(tmp_path / "run.log")


def test_a_log_of_the_format_before_has_no_fingerprints(tmp_path):
    """A block of parameters has no place in it; what a run adds to it stays in its format."""
    header = {k: v for k, v in HEADER.items() if k not in ("optimizer", "steps")}
    start, path = header_bytes(header, 2), tmp_path / "run.log"
    records = np.zeros(2, record_type(header))
    records["step"] = [0, 1]
    chain(records, start[-8:])
    path.write_bytes(start + steps_block(records, start[-8:]))
    with ReplayLog.open(path, append=True) as log:
        assert log.planned is None
        log.append(*steps(3)[2])
        with pytest.warns(UserWarning, match="format 2, which has no place for a fingerprint"):
            log.finish(BASE)
    found = ReplayLog.open(path)
    assert (len(found), found.fingerprints, found.finished) == (3, {}, False)
    assert path.read_bytes().startswith(b"prograde replay log 2\n")
    head = np.asarray([0, 1, 32], "<u4").tobytes()
    last = found.records["digest"][-1].tobytes()
    body = head + bytes(32)
    path.write_bytes(
        path.read_bytes() + head + digest_of(last, head) + bytes(32) + digest_of(last, body)
    )
    with pytest.raises(LogError, match="block of steps 3 and following was altered"):
        ReplayLog.open(path)


def test_replay_of_less_than_all_needs_to_be_asked_for(tmp_path):
    """Of a torn log, and of one that ends before the planned steps."""
    path, update = tmp_path / "run.log", SGD[3]
    entries = [(i, 7, 0.1, 1.0, np.ones((3, 1, 1), np.float32)) for i in range(6)]
    written(path, entries, (2, 2, 2), planned=8)
    content = path.read_bytes()
    counts = []
    progress = lambda log, **options: (
        counts.clear(),
        replay(log, update, BASE, counts.append, **options),
    )
    with pytest.raises(LogError, match=r"holds 6 of 8 planned steps.* steps=6, or .* partial=True"):
        replay(ReplayLog.open(path), update, BASE)
    progress(ReplayLog.open(path), steps=6)
    assert counts == [1, 2, 3, 4, 5, 6]
    path.write_bytes(content[:-1])
    with pytest.raises(LogError, match=r"steps 4 to 5 is torn. .* first 4 steps.*; 8 were planned"):
        ReplayLog.open(path)
    partial = ReplayLog.open(path, partial=True)
    progress(partial)
    assert counts[-1] == 4
    progress(partial, steps=0)
    assert counts == []
    for steps_asked in (5, -1):
        with pytest.raises(ValueError, match=f"steps={steps_asked}.* 0 to 4"):
            replay(partial, update, BASE, steps=steps_asked)
    with ReplayLog.open(path, append=True) as log:  # a run that goes on is not over
        progress(log)
        log.finish({"bias": jnp.zeros(16)})
    with pytest.raises(LogError, match="after 4 steps"):  # they are not zero
        replay(ReplayLog.open(path), update, BASE)
    progress(ReplayLog.open(path), verify=False)  # finished early, as the run said
    assert counts[-1] == 4
