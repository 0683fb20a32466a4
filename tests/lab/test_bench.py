"""The benchmark: every workload means the same to every method, and the page says what the record says."""

import functools
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import prograde as pg
from prograde.lab import bench, bench_methods, bench_report, cli, records, workloads

ROOT = Path(__file__).parents[2]

TINY = {
    "logreg": {"batch": 4},
    "mlp": {"batch": 3},
    "cnn": {"batch": 2},
    "resnet": {"batch": 3, "size": 8, "width": 8, "stages": 2},
    "transformer": {"layers": 2, "width": 16, "heads": 2, "vocabulary": 11, "batch": 2, "length": 6},
    "smollm2": {
        "layers": 2, "width": 24, "queries": 6, "keys": 2, "inner": 20, "vocabulary": 13, "batch": 2, "length": 5,
    },
}  # fmt: skip


quick = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # compiles faster


@pytest.fixture(scope="module", params=TINY)
def tiny(request, seed):
    """A workload at a size that runs in no time: (workload, params, state, batch, loss, gradient)."""
    workload = workloads.WORKLOADS[request.param](**TINY[request.param])

    @quick
    def make(key):
        key_init, key_batch = jax.random.split(key)
        params, state = workload.init(key_init)
        batch = workload.batch(key_batch)
        (loss, _), gradient = jax.value_and_grad(workload.loss, has_aux=True)(params, state, *batch)
        return params, state, batch, loss, gradient

    return workload, *make(jax.random.key(seed))


def dot(a, b):
    return sum(np.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def norm(tree):
    return float(np.sqrt(dot(tree, tree)))


def difference(a, b):
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)


def test_loss_is_a_scalar_and_state_keeps_its_shape(tiny):
    workload, params, state, batch, _, _ = tiny
    loss, new = jax.eval_shape(workload.loss, params, state, *batch)
    assert loss.shape == ()
    assert jax.tree.map(lambda s: (s.shape, s.dtype), new) == jax.tree.map(
        lambda s: (s.shape, s.dtype), state
    )


def test_forward_gradient_is_the_slope_along_signs_times_the_signs(tiny):
    """A rank-one tangent of signs is read off the estimate, and jax.jvp along it, dense, gives the same slope."""
    workload, params, state, batch, _, gradient = tiny
    grad_fn = pg.value_and_grad(
        workload.loss, pg.WeightPerturbation(pg.LowRank(rank=1)), has_aux=True
    )

    @quick
    def both(key, params):
        (loss, new), estimate = grad_fn(key, params, state, *batch)
        direction = jax.tree.map(jnp.sign, estimate)
        along = jax.jvp(
            lambda p: workload.loss(p, state, *batch), (params,), (direction,), has_aux=True
        )
        return loss, new, estimate, direction, *along

    loss, new, estimate, direction, expected, slope, expected_new = both(jax.random.key(3), params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), new, expected_new
    )
    for g, v in zip(jax.tree.leaves(estimate), jax.tree.leaves(direction), strict=True):
        assert np.all(np.asarray(v) != 0)
        np.testing.assert_allclose(g, slope * v, atol=1e-3 * norm(gradient))


def test_other_forms_of_the_loss_have_the_same_gradient(tiny):
    workload, params, state, batch, _, gradient = tiny
    for loss in filter(None, (workload.checkpointed_loss, workload.unrolled_loss)):
        other, _ = quick(jax.grad(loss, has_aux=True))(params, state, *batch)
        assert norm(difference(other, gradient)) < 1e-4 * norm(gradient)


def test_smollm2_has_the_parameters_of_the_model_that_it_is_named_after():
    shapes, _ = jax.eval_shape(lambda: workloads.smollm2().init(jax.random.key(0)))
    assert sum(w.size for w in jax.tree.leaves(shapes)) == 134_515_008


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_pytorch_computes_the_same_loss_and_gradient(tiny, tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    from prograde.lab import bench_torch
    from prograde.lab.bench_torch import torch

    workload, params, state, batch, loss, gradient = tiny
    bench_methods.save_arrays(tmp_path / "arrays.npz", params, state, [batch])
    worker = bench_torch.Worker(workload.name, workload.sizes, str(tmp_path / "arrays.npz"))
    theirs = worker.loss(worker.leaves, worker.state, *worker.batches[0])
    np.testing.assert_allclose(theirs.item(), loss, rtol=1e-5)
    squares = [
        float((g**2).sum()) for g in torch.autograd.grad(theirs, list(worker.leaves.values()))
    ]
    np.testing.assert_allclose(sum(squares) ** 0.5, norm(gradient), rtol=1e-4)
    _, value = worker.steps(
        "torch-jvp", 1
    )  # attention and batch normalisation have forward derivatives
    assert np.isfinite(value)


def test_methods_move_the_weights_as_their_names_say(monkeypatch):
    monkeypatch.setattr(bench_methods, "LEARNING_RATE", 1.0)  # so that the move is the gradient
    workload = workloads.logreg(batch=4)
    side = bench_methods.JaxSide(workload)
    params, state, count = side.carry
    batch = side.batches[0]
    gradient, _ = jax.jit(jax.grad(workload.loss, has_aux=True))(params, state, *batch)

    def slope_along_signs(moved):
        direction = jax.tree.map(np.sign, moved)
        return dot(gradient, direction), direction

    assert set(side.methods) == {
        m for m in bench_methods.METHODS if "torch" not in m and m != "backprop-unrolled"
    }
    for name in set(side.methods) - {"prograde-16"}:
        side.carry = jax.tree.map(jnp.copy, (params, state, count))
        assert side.compile(name)["compile_seconds"] > 0
        side.visit(name, 1)
        moved = difference(params, side.carry[0])
        assert int(side.carry[2]) == 1
        if name == "bare":
            assert norm(moved) == 0
        elif name in ("backprop", "checkpointed"):
            assert norm(difference(moved, gradient)) < 1e-5 * norm(gradient)
        elif name == "dense-jvp":  # moved = slope v, and |v|^2 is n or nearly
            n = sum(w.size for w in jax.tree.leaves(params))
            assert float(dot(gradient, moved)) == pytest.approx(norm(moved) ** 2 / n, rel=0.1)
        elif name == "prograde-4":  # a mean of (g . v) v
            assert float(dot(gradient, moved)) > 0
        else:  # slope times signs; a central difference rounds
            slope, direction = slope_along_signs(moved)
            for m, v in zip(jax.tree.leaves(moved), jax.tree.leaves(direction), strict=True):
                np.testing.assert_allclose(m, slope * v, atol=5e-3 * norm(gradient))


def test_each_round_visits_every_method_once_in_an_order_of_its_own():
    log = []

    def visit(name):
        def steps(count):
            log.append((name, count))
            return 0.5 * count, 1.0

        return steps

    names = ["bare", "backprop", "mezo"]
    seconds = bench.take_turns(
        {n: visit(n) for n in names}, dict.fromkeys(names, 2), 6, lambda name: None
    )
    assert seconds == {n: [0.5] * 6 for n in names}
    rounds = [tuple(n for n, _ in log[3 * i : 3 * i + 3]) for i in range(6)]
    assert all(sorted(r) == sorted(names) for r in rounds)
    assert len(set(rounds)) > 1
    with pytest.raises(RuntimeError, match="not finite"):
        bench.take_turns(
            {"bare": lambda count: (1.0, float("nan"))}, {"bare": 1}, 1, lambda name: None
        )


def test_a_visit_takes_as_many_steps_as_fill_it():
    assert bench.calibrate(lambda count: (count * 1e-3, 0.0)) == bench.VISIT_SECONDS / 1e-3
    assert bench.calibrate(lambda count: (count * 10.0, 0.0)) == 1


# the record and what is made from it


def fabricated(rounds=4):
    """A record in which backprop wins on one of two models, and PyTorch has the fastest backprop there."""
    generator = random.Random(0)
    bare = [1e-3 * (1 + 0.1 * generator.random()) for _ in range(rounds)]

    def method(ratio, **more):
        return {
            "seconds": bench.costs.quartiles([ratio * b for b in bare]),
            "ratio": bench.costs.quartiles([ratio] * rounds),
            "rounds": [ratio * b for b in bare],
            "steps_a_visit": 3,
            "compile_seconds": 1.5,
            "temp_bytes": 3_000_000,
            "rss_before": 10_000_000,
            "peak_rss": 14_200_000,
            **more,
        }

    common = {
        "bare": method(1.0),
        "prograde-1": method(2.0),
        "backprop": method(4.0),
        "checkpointed": method(5.0),
    }
    torch = {"torch-backprop": method(1.6, temp_bytes=None, compile_seconds=None)}
    model = {"sizes": {}, "parameters": 1234, "missing": {}}
    return {
        "environment": records.environment(),
        "rounds": rounds,
        "models": {
            "mlp": {**model, "title": "An MLP", "torch": None, "methods": common},
            "cnn": {
                **model,
                "title": "A CNN",
                "torch": {"version": "9.9", "threads": 2},
                "missing": {"torch-jvp": "why not"},
                "methods": common | torch,
            },
        },
    }


def test_page_marks_the_fastest_backprop_and_where_it_wins(tmp_path):
    record = fabricated()
    assert bench_report.fastest_backprop(record["models"]["mlp"]) == "backprop"
    assert bench_report.fastest_backprop(record["models"]["cnn"]) == "torch-backprop"
    assert bench_report.over_backprop(record["models"]["cnn"])["median"] == pytest.approx(1.25)
    records.write_json(tmp_path / "bench.json", record)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench_report.BEGIN}\n{bench_report.END}\nafter\n")
    for _ in range(2):  # the second time in the place of the first
        bench_report.write_markdown(bench.read(tmp_path / "bench.json"), page)
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert text.count("| prograde-1 |") == 2
        assert "0.50 of the fastest backprop |" in text
        assert "1.25 of the fastest backprop, backprop wins |" in text
        assert "| torch-backprop | 1.6" in text
        assert "No `torch-jvp` here: why not" in text
        assert "| 3 | 4.2 | 1.5 |" in text
    assert "<svg" in (tmp_path / "page" / "overview.svg").read_text()
    (tmp_path / "other.md").write_text("no marks")
    with pytest.raises(records.RecordError, match="lacks the marks"):
        bench_report.write_markdown(record, tmp_path / "other.md")
    shown = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    bench_report.print_tables(record, list(record["models"]), shown)
    bench_report.print_overview(record, shown)
    assert "A CNN" in shown.export_text()
    shown.file.close()


def test_the_page_in_the_docs_is_that_of_the_record():
    path, page = ROOT / "records" / "bench.json", ROOT / "docs" / "benchmarks.md"
    text = page.read_text()
    block = text[
        text.index(bench_report.BEGIN) + len(bench_report.BEGIN) : text.index(bench_report.END)
    ].strip()
    expected = (
        bench_report.markdown(bench.read(path), "benchmarks/overview.svg") if path.exists() else ""
    )
    assert block == expected.strip()


def test_a_record_is_continued_but_never_mixed_or_overwritten(tmp_path):
    path = tmp_path / "bench.json"
    records.write_json(path, fabricated())
    before = path.read_bytes()
    assert set(bench.claim(path, ["logreg"], 4)["models"]) == {"mlp", "cnn"}
    for names, rounds, words in (
        (["logreg"], 5, "another rounds"),
        (["logreg", "mlp"], 4, "holds mlp already"),
    ):
        with pytest.raises(records.RecordError, match=words):
            bench.claim(path, names, rounds)
    assert path.read_bytes() == before
    records.write_json(path, [1])
    with pytest.raises(records.RecordError, match="not a record of prograde bench"):
        bench.claim(path, ["logreg"], 4)


def test_ctrl_c_leaves_the_models_that_are_complete(tmp_path, monkeypatch, capsys):
    def record(self, rounds, with_memory):
        if self.workload.name == "mlp":
            raise KeyboardInterrupt
        return fabricated()["models"]["mlp"]

    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # the command changes it
    monkeypatch.setattr(bench.Measurement, "record", record)
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(
        sys, "argv", ["prograde", "bench", "logreg", "mlp", "--out", str(tmp_path / "new")]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    path = tmp_path / "new" / "bench.json"
    assert set(bench.read(path)["models"]) == {"logreg"}
    assert f"{path} holds logreg." in capsys.readouterr().err.replace("\n", "")


@pytest.fixture
def without_torch(tmp_path):
    """An environment in which PyTorch is not installed."""
    hidden = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, p=None: None if n == 'torch' else f(n, p)"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    return {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "150", "PYTHONPATH": str(tmp_path)}


def test_command_measures_records_and_shows(tmp_path, without_torch, monkeypatch, capsys):
    path = tmp_path / "record.json"
    command = [
        sys.executable,
        "-m",
        "prograde.lab.cli",
        "bench",
        "logreg",
        "--rounds",
        "1",
        "--no-memory",
        "--out",
        path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=without_torch)
    assert done.returncode == 0, done.stderr
    assert "logreg: 1 rounds: done" in done.stdout
    assert "fastest backprop" in done.stdout
    model = json.loads(path.read_text())["models"]["logreg"]
    assert model["torch"] is None
    assert model["parameters"] == 7850
    assert set(model["methods"]) == set(bench_methods.steps(workloads.logreg()))
    for figures in model["methods"].values():
        assert figures["seconds"]["median"] > 0
        assert figures["compile_seconds"] > 0
        assert figures["temp_bytes"] >= 0
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    page = tmp_path / "page.md"
    monkeypatch.setattr(
        sys, "argv", ["prograde", "bench", "--from", str(path), "--markdown", str(page)]
    )
    cli.main()
    assert "fastest backprop" in capsys.readouterr().out
    assert "## logreg" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mlq"], "Valid names: all, logreg, mlp, mlp-512, cnn, resnet, transformer, smollm2"),
        (["mlp", "--rounds", "0"], "--rounds 0"),
        (["mlp", "--from", "record.json"], "takes neither models nor --out"),
        (["--from", "nowhere.json"], "nowhere.json"),
    ],
)
def test_a_bad_request_says_what_is_valid(arguments, words, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    monkeypatch.setattr(sys, "argv", ["prograde", "bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_process_of_pytorch_answers_and_says_what_is_wrong(tmp_path):
    workload = workloads.logreg(batch=4)
    side = bench_methods.JaxSide(workload)
    side.save(tmp_path / "arrays.npz")
    side.compile("bare")
    with bench.TorchSide(workload, tmp_path / "arrays.npz") as torch_side:
        found = torch_side.compile("torch-bare")
        assert found["first_loss"] == pytest.approx(side.visit("bare", 1)[1], rel=1e-5)
        seconds, _ = torch_side.visit("torch-backprop", 2)
        assert seconds > 0
        with pytest.raises(bench.TorchError, match="KeyError"):
            torch_side.visit("torch-nothing", 1)
        assert torch_side.memory("torch-jvp")["peak_rss"] > 0
        torch_side._process.kill()
        with pytest.raises(bench.TorchError, match="ended"):
            torch_side.visit("torch-bare", 1)
