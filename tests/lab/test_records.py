"""Files are whole whatever happens, and directories are never mixed."""

import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from prograde.lab import records


def test_write_leaves_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    records.write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        records.write_json(path, {"a": 2})
    assert records.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_process_killed_while_writing_leaves_a_whole_file(tmp_path):
    """Kills a process that rewrites one record as fast as it can, 20 times; what is left can always be read."""
    path = tmp_path / "record.jsonl"
    program = textwrap.dedent(f"""
        from pathlib import Path
        from prograde.lab import records
        n = 0
        while True:
            n += 1
            records.write_lines(Path({str(path)!r}), [{{"line": i, "of": n}} for i in range(n % 500)] + [{{"end": n}}])
    """)
    for i in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, "JAX_PLATFORMS": "cpu"}
        )
        while not path.exists():
            assert process.poll() is None
        os.sched_yield()
        process.kill()
        process.wait()
        lines = records.read_lines(path)
        assert "end" in lines[-1]
        path.unlink()
        if i == 2 and "CI" not in os.environ:
            break  # a few will do where somebody waits


def test_numbers_that_json_lacks_become_null(tmp_path):
    records.write_json(
        tmp_path / "r",
        {"a": float("inf"), "b": np.float32(1.5), "c": np.array([1, 2]), "d": (float("nan"),)},
    )
    assert records.read_json(tmp_path / "r") == {"a": None, "b": 1.5, "c": [1, 2], "d": [None]}


def test_state_comes_back_bit_for_bit(tmp_path, seed):
    generator = np.random.default_rng(seed)
    state = {
        "w": jnp.asarray(generator.normal(size=(3, 4)), jnp.float32),
        "n": (jnp.asarray(7), jnp.asarray(1.0)),
    }
    records.save_state(tmp_path / "s.npz", state)
    back = records.load_state(tmp_path / "s.npz", state)
    np.testing.assert_array_equal(back["w"], state["w"])
    assert [int(x) for x in back["n"]] == [7, 1]


def test_a_damaged_state_is_named(tmp_path):
    path = tmp_path / "s.npz"
    records.save_state(path, {"w": jnp.zeros(3)})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(records.RecordError, match=r"s\.npz: not a checkpoint.*Delete it"):
        records.load_state(path, {"w": jnp.zeros(3)})


def test_a_directory_is_claimed_once(tmp_path):
    config, other = (
        {"experiment": "mlp", "budget": {"steps": 10}},
        {"experiment": "mlp", "budget": {"steps": 20}},
    )
    records.claim({tmp_path / "a": config}, resume=False)
    with pytest.raises(records.RecordError, match="--resume"):
        records.claim({tmp_path / "a": config}, resume=False)
    records.claim({tmp_path / "a": config}, resume=True)
    before = (tmp_path / "a" / "manifest.json").read_bytes()
    for resume in (False, True):
        with pytest.raises(records.RecordError, match=r"budget\.steps is 10 there and 20 here"):
            records.claim({tmp_path / "new": config, tmp_path / "a": other}, resume)
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before
    assert not (tmp_path / "new").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(records.RecordError, match="not empty"):
        records.claim({tmp_path / "b": config}, resume=False)


def test_what_a_killed_process_left_half_written_is_no_obstacle(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".manifest.json.1234.tmp").write_bytes(b"{")
    records.claim({tmp_path / "a": {}}, resume=True)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["manifest.json"]


def test_the_manifest_says_what_a_number_depends_on(tmp_path):
    records.claim({tmp_path / "a": {}}, resume=False)
    (environment,) = records.read_json(tmp_path / "a" / "manifest.json")["environments"]
    wanted = {
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
