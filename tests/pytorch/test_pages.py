"""The blocks of PyTorch and Keras on the page "Your model" run, after those of JAX."""

import os
import re
from pathlib import Path

import pytest
from needs_torch import torch

PAGE = Path(__file__).parents[2] / "docs/your_model.md"


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(), re.M | re.S)


@pytest.mark.filterwarnings("ignore")
def test_blocks_of_pytorch_run(tmp_path):
    torch.manual_seed(0)
    namespace = {}
    names, *_ = blocks("python")
    for block in [names, *(b for b in blocks("py") if "keras" not in b)]:
        exec(compile(block, PAGE, "exec"), namespace)
    assert namespace["result"].global_step == 2


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_block_of_keras_runs(monkeypatch):
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "jax")
    pytest.importorskip("keras")
    namespace = {}
    names, *_ = blocks("python")
    for block in [names, *(b for b in blocks("py") if "keras" in b)]:
        exec(compile(block, PAGE, "exec"), namespace)
    other, grads = namespace["other"], namespace["grads"]
    assert len(grads) == len(namespace["trainable"])
    assert any((a != b).any() for a, b in zip(other, namespace["model"].non_trainable_variables))  # noqa: B905
