"""A log gives back what was appended, and refuses what it cannot keep before it takes it."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from logs import BASE, SGD, same_records, steps, written

from prograde.replay import LogError, ReplayLog, fingerprint

ONES = np.ones((3, 1, 1), np.float32)


@pytest.mark.parametrize("seeds", ["constant", "steps", "each"])
@pytest.mark.parametrize("rates", ["constant", "steps", "schedule"])
def test_what_is_read_is_what_was_appended_bit_by_bit(rates, seeds, tmp_path):
    entries = steps(120, rates, seeds)
    with ReplayLog.create(tmp_path / "run.log", BASE, SGD[3]) as log:
        for entry in entries:
            log.append(*entry)
    found = ReplayLog.open(tmp_path / "run.log")
    assert same_records(found, log)
    for i, (step, seed, rate, value, derivatives) in enumerate(entries):
        record = found.records[i]
        assert (record["step"], record["seed"]) == (step, seed)
        read = [record["rate"], record["value"], *record["derivatives"].ravel()]
        given = [rate, value, *derivatives.ravel()]
        assert np.asarray(read, np.float32).tobytes() == np.asarray(given, np.float32).tobytes()


def test_the_bytes_of_a_block_are_those_that_are_documented(tmp_path):
    """Written out once more: count, seeds, rates; its digest; seed, rate, values, derivatives."""
    entries = [(0, 7, 0.5, 2.0, ONES), (1, 7, 0.5, 3.0, 2 * ONES)]
    start, end = written(tmp_path / "run.log", entries, (2,))
    block = (tmp_path / "run.log").read_bytes()[start:end]
    assert np.frombuffer(block[:12], "<u4").tolist() == [2, 1, 1]
    assert np.frombuffer(block[20:28], "<u8").tolist() == [7]
    floats = np.frombuffer(block[28:-8], "<f4").tolist()
    assert floats == [0.5, 2.0, 3.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0]


def test_a_rate_that_changes_its_sign_only_is_not_the_same(tmp_path):
    entries = [(step, 7, rate, 1.0, ONES) for step, rate in enumerate([0.0, -0.0, 0.0])]
    written(tmp_path / "run.log", entries, (3,))
    signs = np.signbit(ReplayLog.open(tmp_path / "run.log").records["rate"])
    assert signs.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("rates", "size", "bound"), [("constant", 8_800, 10_000), ("schedule", 12_720, 14_000)]
)
def test_a_thousand_steps_of_one_derivative_take_what_is_said(rates, size, bound, tmp_path):
    config = {"run": "low-rank-paper-seed0"}
    with ReplayLog.create(tmp_path / "run.log", BASE, SGD[1], config) as log:
        header = log.path.stat().st_size
        for entry in steps(1000, rates, num_tangents=1):
            log.append(*entry)
        log.flush()
        assert log.path.stat().st_size - header == size  # the figures in the documentation
        log.finish(BASE)
    assert log.path.stat().st_size - header == size + 60
    assert log.path.stat().st_size <= bound


def test_digests_and_records_do_not_depend_on_the_blocks(tmp_path):
    entries = steps(10, "steps", "steps")
    for name, blocks in {"one": (10,), "few": (3, 6, 1), "each": (1,) * 10}.items():
        written(tmp_path / name, entries, blocks, finish=BASE if name == "few" else None)
    one, few, each = (ReplayLog.open(tmp_path / name) for name in ("one", "few", "each"))
    assert len({log.path.stat().st_size for log in (one, few, each)}) == 3
    assert same_records(one, few)
    assert same_records(one, each)
    assert len({one.digest(i) for i in range(11)}) == 11
    for i in range(11):
        assert one.digest(i) == few.digest(i) == each.digest(i)
    # a worker that was behind takes the rest from another
    written(tmp_path / "behind", entries[:4], (4,))
    with ReplayLog.open(tmp_path / "behind", append=True) as behind:
        behind.extend(few.records[4:])
        assert behind.digest(10) == few.digest(10)
    assert same_records(ReplayLog.open(tmp_path / "behind"), one)


def test_each_digest_is_of_all_a_step_holds(tmp_path):
    entries = steps(3)
    written(tmp_path / "run.log", entries, (3,))
    digests = {ReplayLog.open(tmp_path / "run.log").digest(3)}
    step, seed, rate, value, derivatives = entries[1]
    others = [
        (step, seed - 1, rate, value, derivatives),
        (step, seed, -rate, value, derivatives),
        (step, seed, rate, -value, derivatives),
        (step, seed, rate, value, -derivatives),
    ]
    for i, other in enumerate(others):
        written(tmp_path / f"{i}.log", [entries[0], other, entries[2]], (3,))
        digests.add(ReplayLog.open(tmp_path / f"{i}.log").digest(3))
    assert len(digests) == 5


def test_fingerprints_stay_with_the_step_they_follow(tmp_path):
    path, entries = tmp_path / "run.log", steps(5)
    others = {"bias": jnp.ones(16)}
    with ReplayLog.create(path, BASE, SGD[3], steps=5) as log:
        log.record_parameters(BASE)
        for entry in entries[:2]:
            log.append(*entry)
        log.record_parameters(others)
        with pytest.raises(LogError, match=r"after 2 steps.* last alike after 0 steps"):
            log.record_parameters(BASE)
        for entry in entries[2:]:
            log.append(*entry)
    wanted = {0: fingerprint(BASE), 2: fingerprint(others)}
    found = ReplayLog.open(path)
    assert (found.fingerprints, found.finished, found.planned) == (wanted, False, 5)
    with ReplayLog.open(path, append=True) as log:
        log.finish(others)
        log.finish(others)  # once more writes nothing
    found = ReplayLog.open(path)
    assert (found.fingerprints, found.finished) == (wanted | {5: fingerprint(others)}, True)
    found.verify(2, others)
    found.verify(1, others)  # nobody said what these were
    with pytest.raises(LogError, match=r"after 2 steps .* last alike after 0"):
        found.verify(2, BASE)
    with ReplayLog.open(path, append=True) as log:  # a run that goes on is not over
        log.append(*steps(6)[5])
        log.flush()
        assert not log.finished
    assert not ReplayLog.open(path).finished


class Failed:
    """A loss whose computation failed."""

    def __array__(self, *_, **__):
        raise RuntimeError("a worker is gone")


NEXT = (10, 7, 0.1, 2.5, ONES)
BAD = {
    "a negative seed": ((10, -1, 0.1, 2.5, ONES), ValueError, r"seed=-1, .*0 to 2\^64 - 1"),
    "a seed of 65 bits": ((10, 2**64, 0.1, 2.5, ONES), ValueError, "seed=18446744073709551616"),
    "a seed that is no number": ((10, None, 0.1, 2.5, ONES), ValueError, "seed=None"),
    "half a seed": ((10, 1.5, 0.1, 2.5, ONES), ValueError, r"seed=1\.5"),
    "a rate beyond float32": ((10, 7, 1e300, 2.5, ONES), ValueError, r"rate=1e\+300.*float32"),
    "a rate below float32": ((10, 7, 1e-60, 2.5, ONES), ValueError, "rate=1e-60.*float32"),
    "a rate that is no number": ((10, 7, float("nan"), 2.5, ONES), ValueError, "rate=nan"),
    "an infinite rate": ((10, 7, np.float32("inf"), 2.5, ONES), ValueError, "rate=.*inf"),
    "a rate of words": ((10, 7, "fast", 2.5, ONES), ValueError, "rate='fast'"),
    "complex derivatives": ((10, 7, 0.1, 2.5, ONES + 1j), TypeError, "complex64.*real numbers"),
    "derivatives of words": (
        (10, 7, 0.1, 2.5, ONES.astype(str)),
        TypeError,
        "derivatives has dtype",
    ),
    "too few derivatives": ((10, 7, 0.1, 2.5, ONES[:2]), LogError, r"shape \(3, 1, 1\)"),
    "a complex loss": ((10, 7, 0.1, 2.5j, ONES), TypeError, "value has dtype complex128"),
    "a loss for each": ((10, 7, 0.1, np.ones(3), ONES), ValueError, r"value has shape \(3,\)"),
    "a loss of words": ((10, 7, 0.1, "low", ONES), TypeError, "value has dtype"),
    "another step": ((9, 7, 0.1, 2.5, ONES), LogError, "step 10 is next, not 9"),
    "a negative step": ((-1, 7, 0.1, 2.5, ONES), ValueError, "step=-1"),
    "a step that is no number": ((True, 7, 0.1, 2.5, ONES), ValueError, "step=True"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_append_is_refused_and_costs_no_good_one(case, tmp_path):
    entry, error, message = BAD[case]
    entries = steps(10)
    with ReplayLog.create(tmp_path / "run.log", BASE, SGD[3], {"data": "none"}) as log:
        for good in entries:
            log.append(*good)
        with pytest.raises(error, match=message):
            log.append(*entry)
        log.append(*NEXT)
    written(tmp_path / "good.log", [*entries, NEXT], (11,))
    assert same_records(ReplayLog.open(log.path), ReplayLog.open(tmp_path / "good.log"))


def test_numbers_of_numpy_and_jax_are_numbers(tmp_path):
    with ReplayLog.create(tmp_path / "run.log", BASE, SGD[3]) as log:
        log.append(np.int64(0), np.uint64(2**64 - 1), np.float64(0.5), jnp.float32(1), ONES)
        log.append(jnp.int32(1), jnp.uint32(7), jnp.float32(0.5), np.float64(1e300), ONES.tolist())
    found = ReplayLog.open(log.path).records
    assert found["seed"].tolist() == [2**64 - 1, 7]
    assert found["value"].tolist() == [1, np.inf]


def test_records_of_another_worker_are_taken_all_or_none(tmp_path):
    written(tmp_path / "whole.log", steps(6), (6,))
    records = ReplayLog.open(tmp_path / "whole.log").records
    bad = records.copy()
    bad["rate"][4] = np.inf
    with ReplayLog.create(tmp_path / "run.log", BASE, SGD[3], {"data": "none"}) as log:
        with pytest.raises(ValueError, match="rate="):
            log.extend(bad)
        assert len(log) == 0
        with pytest.raises(TypeError, match="records=list"):
            log.extend([1, 2])  # pyright: ignore[reportArgumentType]
        with pytest.raises(LogError, match="step 0 is next, not 1"):
            log.extend(records[1:])
        log.extend(records)
    assert same_records(ReplayLog.open(log.path), ReplayLog.open(tmp_path / "whole.log"))


@pytest.mark.parametrize("at", [0, 2])
def test_a_loss_that_failed_costs_no_step_before_it(at, tmp_path):
    entries = steps(4)
    log = ReplayLog.create(tmp_path / "run.log", BASE, SGD[3], {"data": "none"})
    for i, entry in enumerate(entries):
        log.append(*(entry if i != at else (*entry[:3], Failed(), entry[4])))
    with pytest.raises(RuntimeError, match="a worker is gone") as caught:
        log.flush()
    assert f"the {at} steps before it; step {at} is next" in caught.value.__notes__[0]
    assert len(log) == at
    for entry in entries[at:]:
        log.append(*entry)
    log.close()
    written(tmp_path / "undisturbed.log", entries, (4,))
    again, undisturbed = ReplayLog.open(log.path), ReplayLog.open(tmp_path / "undisturbed.log")
    assert again.digest(4) == undisturbed.digest(4)


def test_a_full_disk_costs_no_whole_step_and_the_rest_waits(tmp_path):
    path, entries = tmp_path / "run.log", steps(8)
    log = ReplayLog.create(path, BASE, SGD[3], {"data": "none"})
    for entry in entries[:4]:
        log.append(*entry)
    log.flush()
    before, content = resource.getrlimit(resource.RLIMIT_FSIZE), path.read_bytes()
    for entry in entries[4:]:
        log.append(*entry)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + 30, before[1]))
    try:
        for _ in range(2):
            with pytest.raises(LogError, match="Its 4 steps are whole; 4 more wait"):
                log.flush()
            assert path.read_bytes() == content  # no half of a block is left
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.close()
    written(tmp_path / "undisturbed.log", entries, (4, 4))
    assert path.read_bytes() == (tmp_path / "undisturbed.log").read_bytes()


def test_two_do_not_write_at_once(tmp_path):
    path = tmp_path / "run.log"
    with ReplayLog.create(path, BASE, SGD[3]) as log:
        with pytest.raises(LogError, match=r"run.log is being written"):
            ReplayLog.open(path, append=True)
        assert len(ReplayLog.open(path)) == 0  # reading is free
        log.append(*steps(2)[0])
    with ReplayLog.open(path, append=True) as log:
        assert len(log) == 1


def test_what_is_no_log_of_ours_to_begin_or_open_is_refused_by_name(tmp_path):
    path = tmp_path / "run.log"
    written(path, steps(2), (2,))
    content = path.read_bytes()
    with pytest.raises(LogError, match=r"exists. Open it to continue it, or choose another path"):
        ReplayLog.create(path, BASE, SGD[3])
    assert path.read_bytes() == content
    for append in (False, True):
        with pytest.raises(LogError, match="there is no replay log"):
            ReplayLog.open(tmp_path / "nothing.log", append)
        with pytest.raises(LogError, match=r"is a directory. Give the file in it, such as .*log"):
            ReplayLog.open(tmp_path, append)
        with pytest.raises(LogError, match="cannot be opened"):
            ReplayLog.open(path / "inside.log", append)
    with pytest.raises(LogError, match="could not be created"):
        ReplayLog.create(path / "inside.log", BASE, SGD[3])
    with pytest.raises(TypeError, match="config cannot be kept as JSON"):
        ReplayLog.create(tmp_path / "a.log", BASE, SGD[3], {"loss": len})
    with pytest.raises(TypeError, match="a dictionary is needed"):
        ReplayLog.create(tmp_path / "a.log", BASE, SGD[3], [1])  # pyright: ignore
    with pytest.raises(ValueError, match="steps=-5"):
        ReplayLog.create(tmp_path / "a.log", BASE, SGD[3], steps=-5)
    with pytest.raises(ValueError, match="append=True and partial=True"):
        ReplayLog.open(path, append=True, partial=True)
    log = ReplayLog.open(path)
    assert log.header["config"] == {"data": "none"}
    for write in (lambda: log.append(*steps(3)[2]), lambda: log.finish(BASE)):
        with pytest.raises(LogError, match="opened for reading"):
            write()
    for count in (-1, 3, 1.5):
        with pytest.raises(ValueError, match=f"steps={count}"):
            log.digest(count)  # pyright: ignore[reportArgumentType]
    assert {p.name for p in tmp_path.iterdir()} == {"run.log"}  # nothing was left half made


def test_fingerprint_sees_every_bit_and_every_name():
    tree = {"a": jnp.zeros(3), "b": jnp.ones((2, 2), jnp.bfloat16), "c": "text"}
    others = [
        tree | {"a": jnp.zeros(3).at[1].set(1e-45)},
        {"a": tree["a"], "d": tree["b"]},
        tree | {"a": jnp.zeros((3, 1))},
        tree | {"a": jnp.zeros(3, jnp.int32)},
    ]
    assert len({fingerprint(t) for t in [tree, *others]}) == 5
    assert fingerprint(tree) == fingerprint(dict(reversed(tree.items())))
    assert fingerprint({"k": jax.random.key(1)}) != fingerprint({"k": jax.random.key(2)})
    with pytest.raises(TypeError, match=r"params\['w'\] has dtype object"):
        fingerprint({"w": np.array([None])})
