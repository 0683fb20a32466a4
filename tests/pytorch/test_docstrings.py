"""The examples of prograde.torch run, and its public names have what those of the core have."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
from needs_torch import torch  # noqa: F401

import prograde.torch

FILES = sorted(Path(prograde.torch.__file__).parent.glob("*.py"))


@pytest.mark.parametrize(
    "path", [p for p in FILES if ">>> " in p.read_text()], ids=lambda p: p.stem
)
@pytest.mark.filterwarnings("ignore")
def test_examples_run(path):
    module = importlib.import_module(f"prograde.torch.{path.stem}")
    found = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    written = re.findall(r"^\s*>>> ", path.read_text(), re.M)
    assert sum(len(test.examples) for test in found) == len(written)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    for test in found:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", prograde.torch.__all__)
def test_public_docstrings_say_what_a_user_needs(name):
    text = getattr(prograde.torch, name).__doc__
    assert ">>>" in text
    assert re.search(r"arXiv|Source", text)
