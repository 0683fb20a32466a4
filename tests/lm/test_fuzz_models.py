"""Damaged and forged model files, thousands of them: a model, or an error that names the file."""

import collections
import json
import struct

import pytest
import reference_logits as reference
from decoders import directory
from gguf_files import config_of, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prograde import lm
from prograde.lm.files import _Weights
from prograde.lm.gguf_file import read_header

pytestmark = pytest.mark.long
FUZZ = settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
NUMBERS = st.one_of(
    st.integers(), st.integers(-3, 70), st.floats(), st.sampled_from([2**31, 2**62, 10**400])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)


@pytest.fixture
def counts(capsys):
    found = collections.Counter()
    yield found
    with capsys.disabled():
        print(f"\n{dict(found)}", end=" ")


def test_a_forged_config_gives_sizes_or_an_error(counts, tmp_path):
    config = reference.CONFIGS["llama3_positions"]
    path = directory(tmp_path / "tiny", config)
    keys = [*config, "head_dim", "attention_bias", "rope_parameters", "sliding_window"]
    scaling = st.dictionaries(st.sampled_from(sorted(reference._LLAMA3)), VALUES, max_size=2)

    @FUZZ
    @given(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=3), scaling)
    def forged(changes, scaled):
        made = config | {"rope_scaling": reference._LLAMA3 | scaled} | changes
        (path / "config.json").write_text(json.dumps(made))
        try:
            lm.load(path)
            counts["read"] += 1
        except lm.ModelError as error:
            assert str(path) in str(error)  # noqa: PT017
            counts["refused"] += 1

    forged()
    assert counts["refused"] > 100


def damaged(content, changes):
    data = bytearray(content)
    for kind, at, some in changes:
        at = at % max(1, len(data))
        if kind == "flip" and data:
            data[at] ^= some[0] or 1
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + len(some)]
        elif kind == "write":
            data[at : at + len(some)] = some
    return bytes(data)


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "cut", "drop", "write"]),
        st.integers(0, 2**20),
        st.binary(min_size=1, max_size=8)
        | st.sampled_from([struct.pack("<Q", n) for n in (2**31, 2**62, 2**64 - 1)]),
    ),
    min_size=1,
    max_size=3,
)


def test_a_damaged_gguf_header_gives_fields_or_an_error(counts, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, config_of(num_hidden_layers=1), "Q8_0")
    content = path.read_bytes()
    header = content[: content.index(b"token_embd") + 700]

    @FUZZ
    @given(CHANGES)
    def forged(changes):
        path.write_bytes(damaged(header, changes) + content[len(header) :])
        try:
            fields, tensors = read_header(path)
            lm.Architecture.from_gguf(fields, "output.weight" not in tensors, False)
            counts["read"] += 1
        except lm.ModelError:
            counts["refused"] += 1

    forged()
    assert counts["refused"] > 100


def test_damaged_safetensors_give_shapes_or_an_error(counts, tmp_path):
    path = directory(tmp_path / "tiny", reference.CONFIGS["llama_groups"])
    content = (path / "model.safetensors").read_bytes()

    @FUZZ
    @given(CHANGES)
    def forged(changes):
        head = damaged(content[:1500], changes)
        (path / "model.safetensors").write_bytes(head + content[1500:])
        try:
            weights = _Weights(path)
            for name in weights.shapes:
                weights.array(name)
            counts["read"] += 1
        except lm.ModelError as error:
            assert str(path) in str(error)  # noqa: PT017
            counts["refused"] += 1

    forged()
    assert counts["refused"] > 100
