"""Every public name has a docstring with an example, and every example in the package runs."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
# the text of every module, by its name
TEXTS = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): (
        path.read_text()
    )
    for path in sorted((SOURCE / "prograde").rglob("*.py"))
}
# tests/pytorch runs those of prograde.torch
WITH_EXAMPLES = [
    name for name, text in TEXTS.items() if ">>> " in text and not name.startswith("prograde.torch")
]
PUBLIC = ["", "distributed", "diagnostics", "kit", "lm", "nnx", "online", "replay", "testing"]
PAPERS = [
    "",
    "lm",
    "nnx",
    "online",
    "testing",
]  # the packages whose names follow a paper or another source

# what an author subclasses, what is raised, and what needs several processes
NO_EXAMPLE = {
    "distributed.ReplicaError",
    "distributed.StartError",
    "distributed.initialize",
    "lm.Blocks",
    "lm.ModelError",
    "replay.LogError",
}
NO_SOURCE = {"Estimate", "Estimator", "TangentDistribution", "lm.Blocks", "lm.ModelError"}


def examples(name):
    finder = doctest.DocTestFinder()
    return [test for test in finder.find(importlib.import_module(name)) if test.examples]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name):
    """All of them: doctest does not look into every object, so what the file holds is counted."""
    found = examples(name)
    written = re.findall(r"^\s*>>> ", TEXTS[name], re.M)
    assert sum(len(test.examples) for test in found) == len(written)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    for test in found:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def public_objects():
    for package in PUBLIC:
        module = importlib.import_module(f"prograde.{package}".rstrip("."))
        here = (
            n for n, o in vars(module).items() if getattr(o, "__module__", "") == module.__name__
        )
        names = getattr(module, "__all__", None) or sorted(n for n in here if n[0] != "_")
        for name in names:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):  # modules and aliases have none
                yield package, f"{package}.{name}".lstrip("."), thing


NAMES = [pytest.param(*case, id=case[1]) for case in public_objects()]


@pytest.mark.parametrize(("package", "name", "thing"), NAMES)
def test_public_docstrings_say_what_a_user_needs(package, name, thing):
    text = thing.__doc__
    assert text
    if name not in NO_EXAMPLE:
        assert ">>>" in text, f"{name} has no example"
    if package in PAPERS and name not in NO_SOURCE:
        assert re.search(r"arXiv|Source", text), f"{name} names no source"
