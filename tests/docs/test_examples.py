"""The examples run as they stand, each in a process of its own, and end with what they assert."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.long
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_reaches_what_it_asserts(path):
    assert "assert " in path.read_text()
    if path.stem == "in_mjx":
        pytest.importorskip("mujoco.mjx", reason="mujoco-mjx is not installed")
    result = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
