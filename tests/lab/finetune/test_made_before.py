"""Runs that version 0.1 made, before the options were nested: shown, replayed, and continued."""

import shutil
from pathlib import Path

import pytest

from prograde.lab.commands.report import report_of
from prograde.lab.store import Store, claim
from prograde.lab.studies.finetune.plan import Finetune, Plan
from prograde.lab.studies.finetune.replaying import replay

MADE = Path(__file__).parent / "made_before"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A copy of the runs, in the working directory, as their configurations name the files."""
    shutil.copytree(MADE, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")


def points(store):
    return [
        {k: v for k, v in p.items() if k not in ("seconds", "rss")}
        for p in store.read_lines("curve")
    ]


@pytest.mark.parametrize("name", [pytest.param("norm", marks=pytest.mark.long), "subspace"])
def test_a_replay_gives_the_weights_it_gave(name, made, display):
    """Bit for bit on the machine where they were made; to rounding elsewhere."""
    import numpy as np
    from safetensors.numpy import load_file

    replay("model", Path(name), Path("again.safetensors"), None, display)
    found, wanted = load_file("again.safetensors"), load_file(f"{name}.safetensors")
    base = load_file("model/model.safetensors")
    assert found.keys() == wanted.keys()
    for tensor, value in wanted.items():
        np.testing.assert_allclose(found[tensor], value, rtol=2e-5, atol=1e-6)
    assert any((wanted[tensor] != base[tensor]).any() for tensor in wanted)


@pytest.mark.parametrize(
    "name",
    ["norm", *(pytest.param(n, marks=pytest.mark.long) for n in ("subspace", "backprop"))],
)
def test_a_stopped_run_is_continued_to_the_figures_of_a_whole_one(name, made, display):
    whole, stopped = Store(Path(name)), Store(Path(f"{name}-stopped"))
    manifest = stopped.manifest
    study = Finetune.from_config(stopped.config)
    configs = {stopped.directory: study.configs()["."]}
    claim("finetune", configs, True, Finetune.current)
    study.run({".": stopped}, display)
    assert stopped.config == manifest["config"]  # the manifest stays as it was
    wanted, found = whole.read("summary"), stopped.read("summary")
    for figure in ("zero_shot", "calibrated", "final"):
        for key, value in wanted[figure].items():
            if key not in ("seconds", "rss"):
                assert found[figure][key] == pytest.approx(value, rel=1e-4), (figure, key)
    for point, other in zip(points(whole), points(stopped), strict=True):
        assert point["step"] == other["step"]
        assert point["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["norm", "subspace", "backprop", "norm-stopped"])
def test_a_report_is_made_of_it(name, made):
    store = Store(Path(name))
    assert store.study == "finetune"
    (section,) = report_of([store]).sections
    assert section.title == "model on weather.csv"
    if name == "norm-stopped":
        assert "not finished" in section.content[0]
    else:
        table = section.content[0]
        assert table.columns[:3] == ["", "accuracy", "loss"]
        final = store.read("summary")["final"]
        assert table.rows[-1][1:3] == [f"{100 * final['accuracy']:.1f} %", f"{final['loss']:.3f}"]


def test_the_options_of_version_0_1_are_read(made):
    study = Finetune.from_config(Store(Path("subspace")).config)
    assert study.plan == Plan(
        train="subspace", layers="1-1", refresh=4, rank=2, optimizer="momentum", batch_size=8,
        steps=10, rate=0.01, tangents=1,
    )  # fmt: skip
    assert study.data.labels == ("no=n", "yes=y")
    assert study.keep_last
    config = study.resolved().config("memory_limit")
    assert Finetune.from_config(config) == study.resolved()  # and written again
    assert Finetune.current(config) == config
