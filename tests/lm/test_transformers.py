"""Logits are those of `transformers`, whose figures are recorded in reference_logits.json.

`reference_logits.py` makes the record again. Where what is saved here is what was recorded, tensor
for tensor and word for word, the recorded logits are those of what is saved.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import reference_logits as reference
from decoders import assert_close, directory, logits, rms
from safetensors.numpy import load_file

from prograde import lm

RECORD = json.loads(reference.RECORD.read_text())


@pytest.mark.parametrize("name", reference.CONFIGS)
def test_logits_are_those_of_transformers(name, tmp_path):
    model, _ = lm.load(directory(tmp_path / name, reference.CONFIGS[name]))
    assert_close(logits(model)[0, reference.POSITIONS], np.array(RECORD["logits"][name]))
    long = logits(model, reference.LONG_TOKENS)[:, reference.LONG_POSITIONS].reshape(4, 11)
    assert_close(long, np.array(RECORD["long"][name]), 3e-5)


def test_left_padding_is_that_of_transformers(tmp_path):
    model, _ = lm.load(directory(tmp_path / "tiny", reference.CONFIGS["llama_groups"]))
    valid = reference.PADDED_VALID
    found = logits(model, reference.PADDED_TOKENS, jnp.asarray(valid))
    assert_close(found[valid], np.array(RECORD["padded"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", reference.SAVED)
def test_transformers_reads_what_is_saved(name, dtype, tmp_path):
    config, recorded = reference.SAVED[name], RECORD["saved"][name][dtype]
    model, tokenizer = lm.load(directory(tmp_path / "given", config), dtype)
    lm.save(tmp_path / "saved", model, tokenizer)
    # what was saved is what transformers read
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == config | {"dtype": dtype}
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    given = {k: v.astype(jnp.dtype(dtype)) for k, v in reference.weights(config).items()}
    assert saved.keys() == given.keys()
    for tensor, values in given.items():
        assert saved[tensor].dtype == values.dtype
        np.testing.assert_array_equal(saved[tensor], values)
    # and its logits are ours
    wide, _ = lm.load(tmp_path / "saved")
    assert_close(logits(wide)[0, reference.POSITIONS], np.array(recorded["logits"]), 3e-5)
    if dtype == "bfloat16" and name in ("plain", "biases"):
        tokens = reference.ROUNDED_TOKENS
        rounding = rms(logits(model, tokens) - logits(wide, tokens))
        assert 0.5 < rounding / recorded["rounding"] < 1.5


def test_the_record_is_of_all_that_the_script_makes():
    assert RECORD["logits"].keys() == RECORD["long"].keys() == reference.CONFIGS.keys()
    assert RECORD["saved"].keys() == reference.SAVED.keys()
