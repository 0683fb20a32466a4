"""Files are whole whatever happens, and directories are never mixed."""

import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from prograde.lab import store


def test_write_leaves_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    store.write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write_json(path, {"a": 2})
    assert store.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_process_killed_while_writing_leaves_a_whole_file(tmp_path):
    """Kills processes that rewrite one record as fast as they can; what is left can be read."""
    path = tmp_path / "record.jsonl"
    program = textwrap.dedent(f"""
        from pathlib import Path
        from prograde.lab import store
        n = 0
        while True:
            n += 1
            lines = [{{"line": i, "of": n}} for i in range(n % 500)]
            store.write_lines(Path({str(path)!r}), lines + [{{"end": n}}])
    """)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, "JAX_PLATFORMS": "cpu"}
        )
        while not path.exists():
            assert process.poll() is None
        os.sched_yield()
        process.kill()
        process.wait()
        lines = store.read_lines(path)
        assert "end" in lines[-1]
        path.unlink()


def test_numbers_that_json_lacks_become_null(tmp_path):
    store.write_json(
        tmp_path / "r",
        {"a": float("inf"), "b": np.float32(1.5), "c": np.array([1, 2]), "d": (float("nan"),)},
    )
    assert store.read_json(tmp_path / "r") == {"a": None, "b": 1.5, "c": [1, 2], "d": [None]}


def test_state_comes_back_bit_for_bit(tmp_path, seed):
    generator = np.random.default_rng(seed)
    state = {
        "w": jnp.asarray(generator.normal(size=(3, 4)), jnp.float32),
        "n": (jnp.asarray(7), jnp.asarray(1.0)),
    }
    store.save_state(tmp_path / "s.npz", state)
    back = store.load_state(tmp_path / "s.npz", state)
    np.testing.assert_array_equal(back["w"], state["w"])
    assert [int(x) for x in back["n"]] == [7, 1]


def test_a_damaged_state_is_named(tmp_path):
    path = tmp_path / "s.npz"
    store.save_state(path, {"w": jnp.zeros(3)})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(store.RecordError, match=r"s\.npz: not a checkpoint.*Delete it"):
        store.load_state(path, {"w": jnp.zeros(3)})


def test_a_directory_is_claimed_once(tmp_path):
    config, other = (
        {"experiment": "mlp", "budget": {"steps": 10}},
        {"experiment": "mlp", "budget": {"steps": 20}},
    )
    store.claim("toy", {tmp_path / "a": config}, resume=False)
    with pytest.raises(store.RecordError, match="--resume"):
        store.claim("toy", {tmp_path / "a": config}, resume=False)
    store.claim("toy", {tmp_path / "a": config}, resume=True)
    before = (tmp_path / "a" / "manifest.json").read_bytes()
    for resume in (False, True):
        with pytest.raises(store.RecordError, match=r"budget\.steps is 10 there and 20 here"):
            store.claim("toy", {tmp_path / "new": config, tmp_path / "a": other}, resume)
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before
    assert not (tmp_path / "new").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(store.RecordError, match="not empty"):
        store.claim("toy", {tmp_path / "b": config}, resume=False)
    with pytest.raises(store.RecordError, match="holds records of toy, and this is another"):
        store.claim("another", {tmp_path / "a": config}, resume=True)


def test_what_a_killed_process_left_half_written_is_no_obstacle(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".manifest.json.1234.tmp").write_bytes(b"{")
    store.claim("toy", {tmp_path / "a": {}}, resume=True)
    left = [
        p.name for p in (tmp_path / "a").iterdir() if not p.name.startswith((".lock", ".holder"))
    ]
    assert left == ["manifest.json"]


def test_the_manifest_says_what_a_number_depends_on(tmp_path):
    store.claim("toy", {tmp_path / "a": {}}, resume=False)
    (environment,) = store.Store.open(tmp_path / "a").manifest["environments"]
    wanted = {
        "load",
        "started",
        "git_commit",
        "git_dirty",
        "versions",
        "device",
        "processor",
        "cores",
        "xla_flags",
    }
    assert wanted <= set(environment)
    assert {"jax", "jaxlib", "equinox", "prograde", "python"} <= set(environment["versions"])


def test_a_record_is_measured_once(tmp_path):
    (records,) = store.claim("toy", {tmp_path: {}}, resume=False)
    calls = []

    def measure():
        calls.append(1)
        return {"n": len(calls)}

    assert records.once("part/a", measure) == records.once("part/a", measure) == {"n": 1}
    assert records.names("part") == ["part/a"]
    assert records.names() == []
    assert records.read("absent", {}) == {}
    with pytest.raises(store.RecordError, match=r"absent\.json"):
        records.read("absent")


@pytest.mark.parametrize(
    ("config", "study"),
    [
        ({"experiment": "beale"}, "reproduce"),
        ({"experiment": "compare", "model": "mlp"}, "compare"),
        ({"job": {}, "plan": {}}, "finetune"),
    ],
)
def test_manifests_without_a_study_are_told_by_their_configuration(config, study, tmp_path):
    store.write_json(tmp_path / store.MANIFEST, {"config": config, "environments": []})
    assert store.Store.open(tmp_path).study == study


def test_a_second_process_cannot_claim_a_directory_in_use(tmp_path):
    store.claim("toy", {tmp_path / "a": {}}, resume=False)
    program = textwrap.dedent(f"""
        from pathlib import Path
        from prograde.lab import store
        try:
            store.claim("toy", {{Path({str(tmp_path / "a")!r}): {{}}}}, resume=True)
        except store.RecordError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"is in use by process {os.getpid()} on" in done.stdout, done.stderr
    assert len(store.Store.open(tmp_path / "a").manifest["environments"]) == 1


def test_a_directory_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        store.claim("toy", {tmp_path / "file" / "a": {}}, resume=False)
