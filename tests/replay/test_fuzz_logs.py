"""Damaged and forged logs, thousands of them: an error that names the log, or whole steps."""

import collections
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logs import steps, written

from prograde.replay import LogError, ReplayLog
from prograde.replay._format import digest_of

pytestmark = pytest.mark.long
FUZZ = settings(
    max_examples=1500,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(path, bytes, where the blocks end, records) of a log that is whole."""
    path = tmp_path_factory.mktemp("fuzz") / "run.log"
    ends = written(path, steps(10, "schedule", "steps"), (3, 1, 2, 4), planned=10, finish={})
    return path, path.read_bytes(), ends, ReplayLog.open(path).records.tobytes()


@pytest.fixture
def counts(capsys):
    found = collections.Counter()
    yield found
    with capsys.disabled():
        print(f"\n{dict(found)}", end=" ")


def outcome(path, partial):
    """What opening gives; anything but a LogError is a failure."""
    try:
        return ReplayLog.open(path, partial=partial)
    except LogError as error:
        assert str(path) in str(error)  # noqa: PT017
        return None


@pytest.mark.parametrize("partial", [False, True])
def test_a_damaged_log_gives_whole_steps_or_an_error(whole, counts, partial):
    path, content, _, records = whole

    @FUZZ
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["flip", "cut", "drop", "double", "insert"]),
                st.integers(0, len(content)),
                st.integers(1, 60),
                st.binary(min_size=1, max_size=8),
            ),
            min_size=1,
            max_size=3,
        )
    )
    def damaged(changes):
        data = bytearray(content)
        for kind, at, size, some in changes:
            if kind == "flip" and at < len(data):
                data[at] ^= some[0] or 1
            elif kind == "cut":
                del data[at:]
            elif kind == "drop":
                del data[at : at + size]
            elif kind == "double":
                data[at:at] = data[at : at + size]
            elif kind == "insert":
                data[at:at] = some
        path.write_bytes(data)
        log = outcome(path, partial)
        counts["refused" if log is None else "read"] += 1
        if log is not None:
            assert records.startswith(log.records.tobytes())

    damaged()
    assert counts["refused"] > 100


def test_a_forged_header_gives_a_log_or_an_error(whole, counts):
    path, content, ends, _ = whole
    start = content.index(b"\n") + 5
    header = json.loads(content[start : ends[0] - 8])

    @FUZZ
    @given(
        st.dictionaries(st.sampled_from(sorted(header)), JSON, min_size=1, max_size=3), st.data()
    )
    def forged(changes, data):
        made = header | changes
        if data.draw(st.booleans()):
            made.pop(data.draw(st.sampled_from(sorted(made))))
        text = json.dumps(made).encode()
        head = content[: start - 4] + len(text).to_bytes(4, "little") + text
        path.write_bytes(head + digest_of(b"", head) + content[ends[0] :])
        log = outcome(path, partial=True)
        counts["refused" if log is None else "read"] += 1
        if log is not None:
            assert (len(log), log.digest(0)) == (0, log.digest(0))  # its blocks are of another log

    forged()
    assert counts["refused"] > 100


def test_forged_blocks_give_whole_steps_or_an_error(whole, counts):
    """Heads with a right digest and any counts, followed by anything."""
    path, content, ends, records = whole
    before = content[ends[1] - 8 : ends[1]]
    number = st.one_of(st.integers(0, 5), st.sampled_from([32, 2**31, 2**32 - 1]))

    @FUZZ
    @given(number, number, number, st.binary(max_size=200))
    def forged(count, seeds, rates, rest):
        head = b"".join(n.to_bytes(4, "little") for n in (count, seeds, rates))
        path.write_bytes(content[: ends[1]] + head + digest_of(before, head) + rest)
        assert outcome(path, partial=False) is None
        log = outcome(path, partial=True)
        assert log is not None
        assert log.records.tobytes() == records[: len(log) * log.records.itemsize]
        assert len(log) == 3
        counts["read"] += 1

    forged()
