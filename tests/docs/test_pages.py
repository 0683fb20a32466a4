"""README and docs: claims stand in the records, code runs, and every page and command is found."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def record(name):
    return json.loads((ROOT / "records" / f"{name}.json").read_text())


def readme_row(case):
    (row,) = (line for line in README.read_text().splitlines() if line.startswith(f"| **{case}**"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


# --- what they claim ---


def test_readme_while_loop_stands_in_its_record():
    costs = record("beyond/newton/figures")["costs"]
    micros = {name: cost["seconds"]["median"] * 1e6 for name, cost in costs.items()}
    loops = [name for name in micros if "scan" in name or "checkpointed" in name]
    _, ours, reverse, _ = readme_row("while loop")
    assert ours == f"{micros['while loop, ForwardJacobian']:.0f} µs"
    assert min(loops, key=micros.get) == "checkpointed while loop"
    assert f"{micros['checkpointed while loop']:.0f} µs in a checkpointed loop" in reverse
    assert f"({micros['implicit differentiation']:.0f} µs)" in README.read_text()
    assert record("beyond/newton/figures")["refused"].startswith("Reverse-mode differentiation")


def test_readme_ode_fit_stands_in_its_record():
    figures = record("beyond/ode/figures")
    cells = [
        (figures["fit"]["seconds"][name][-1], figures["costs"][name]["temp_bytes"] / 1e3)
        for name in ("forward mode", "reverse mode, checkpoints")
    ]
    (ours, ours_kb), (reverse, reverse_kb) = cells
    _, left, right, _ = readme_row("ODE fit")
    assert left == f"{ours:.0f} s, {ours_kb:.1f} kB a gradient"
    assert right == f"{reverse:.0f} s, {reverse_kb:.0f} kB"


def test_readme_horizon_stands_in_its_record():
    costs = record("beyond/horizon/figures")["pendulum"]["one kernel"]["lengths"]["100000"]
    millis = {name: cost["seconds"]["median"] * 1e3 for name, cost in costs.items()}
    kb = {name: cost["temp_bytes"] / 1e3 for name, cost in costs.items()}
    checkpointed = min(("each step", "square root", "cube root", "equinox"), key=millis.get)
    _, ours, reverse, _ = readme_row("horizon")
    assert ours == f"{millis['ours']:.0f} ms, {kb['ours']:.1f} kB"
    assert reverse == (
        f"{millis['backprop']:.0f} ms, {kb['backprop'] / 1e3:.0f} MB; with checkpoints "
        f"{millis[checkpointed]:.0f} ms, {kb[checkpointed]:.0f} kB"
    )


def test_readme_stream_stands_in_its_record():
    figures = record("beyond/recall/figures")
    methods = figures["tasks"]["1000"]["methods"]
    took = {name: m["runs"][0]["learned_seconds"] for name, m in methods.items()}
    mb = {name: size / 1e6 for name, size in figures["memory"]["1000"].items()}
    _, ours, reverse, _ = readme_row("stream")
    assert ours == f"learned in {took['RTRL']:.0f} s, {mb['RTRL']:.1f} MB"
    assert reverse == (
        f"{took['backprop']:.0f} s, {mb['backprop']:.0f} MB; with a window of 500 steps not "
        f"({methods['window 500']['runs'][0]['loss']:.2f}, guessing: {figures['guessing']:.2f})"
    )


def test_readme_step_stands_in_its_record():
    over = {}
    for name in ("logreg", "mlp", "mlp-512", "cnn", "resnet", "transformer", "smollm2"):
        model = record(f"bench/{name}")
        reverse = {method: cost for method, cost in model["methods"].items() if is_backprop(method)}
        fastest = min(reverse.values(), key=lambda cost: cost["ratio"]["median"])["rounds"]
        rounds = zip(model["methods"]["prograde-1"]["rounds"], fastest, strict=True)
        over[name] = median(ours / theirs for ours, theirs in rounds)
    slower = [name for name, ratio in over.items() if ratio >= 1]
    networks = [ratio for ratio in over.values() if ratio < 1]
    assert slower == ["logreg"]
    _, ours, reverse, _ = readme_row("step")
    assert readme_row("step")[0] == f"**step** of SGD, {len(networks)} networks"
    assert ours == f"{min(networks):.2f} to {max(networks):.2f} of the time"
    assert reverse == f"1 (logistic regression: ours takes {over['logreg']:.2f})"


def is_backprop(method):
    return "backprop" in method or method == "checkpointed"


def test_readme_memory_stands_in_its_record():
    model = record("bench/smollm2")
    mb = {name: (cost["temp_bytes"] or 0) / 1e6 for name, cost in model["methods"].items()}
    fastest = min(
        ("backprop", "backprop-unrolled", "checkpointed"),
        key=lambda name: model["methods"][name]["ratio"]["median"],
    )
    case, ours, reverse, _ = readme_row("memory")
    assert f"{model['parameters'] / 1e6:.0f} million weights" in case
    assert ours == f"{mb['prograde-1']:.0f} MB"
    assert reverse == f"{mb[fastest]:.0f} MB; with checkpoints {mb['checkpointed']:.0f} MB"


def test_readme_bytes_stand_in_their_record():
    found = record("links/smollm2")["found"]["100 Mbit/s, 50 ms"]
    _, ours, reverse, _ = readme_row("bytes")
    seconds = {name: found[name]["seconds"]["median"] for name in found}
    sent = {name: found[name]["bytes"]["median"] for name in found}
    assert ours == f"{sent['K = 1']:.0f} B, {seconds['K = 1']:.2f} s"
    assert reverse == (
        f"{sent['backprop'] / 1e6:.0f} MB, {seconds['backprop']:.0f} s at 100 Mbit/s"
    )


# --- what they show ---


def test_readme_runs_on_what_a_plain_install_brings():
    """The blocks run in a process that can import nothing that only an extra installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        re.match(r"[\w-]+", requirement)[0].replace("-", "_")
        for requirements in project["optional-dependencies"].values()
        for requirement in requirements
    } - {"prograde", "scipy"}  # jax itself needs scipy
    assert "optax" in extras
    hidden = f"import sys; sys.modules.update(dict.fromkeys({sorted(extras)}))\n"
    code = hidden + "\n".join(python_blocks(README))
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles faster
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.long
@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_code_on_the_pages_runs(page):
    """The Python blocks of a page run one after the other in one namespace."""
    namespace = {}
    for block in python_blocks(page):
        exec(compile(block, page, "exec"), namespace)


# --- what is found ---


def targets(page):
    """The files that a page links to: pages and pictures."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            yield (page.parent / target).resolve()


@named
def test_links_lead_to_files(page):
    for target in targets(page):
        assert target.exists(), f"{page.name} links to {target}"


def test_index_leads_to_every_page():
    reached = {target for target in targets(DOCS / "index.md") if target.suffix == ".md"}
    assert reached | {DOCS / "index.md"} == set(DOCS.glob("*.md"))


def test_navigation_lists_every_page_once():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    listed = [name for entry in nav for name in leaves(entry)]
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def leaves(entry):
    for value in entry.values():
        if isinstance(value, str):
            yield value
        else:
            for inner in value:
                yield from leaves(inner)


def commands():
    """The commands that `prograde --help` lists."""
    code = "import sys; from prograde.lab.cli import main; sys.argv[1:] = ['--help']; main()"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    return re.search(r"\{([\w,\s-]+)\}", text)[1].replace("\n", "").replace(" ", "").split(",")


def test_every_command_is_described_and_found_from_the_index():
    index, page = (DOCS / "index.md").read_text(), (DOCS / "command_line.md").read_text()
    found = commands()
    assert "reproduce" in found
    for command in found:
        assert f"`prograde {command}`" in index, command
        assert f"prograde {command}" in page, command


def test_readme_fits_120_lines():
    assert len(README.read_text().splitlines()) <= 120


@named
def test_prose_fits_120_columns(page):
    """Tables, code, pictures, and what is generated between marks may be wider."""
    text = re.sub(r"<!-- records:.*?<!-- end of records -->", "", page.read_text(), flags=re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for line in text.splitlines():
        prose = not line.startswith(("|", "    ", "![", "<"))
        assert not (prose and len(line) > 120), f"{page.name}: {line[:60]}..."
