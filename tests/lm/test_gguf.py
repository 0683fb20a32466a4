"""GGUF files hold the numbers they stand for."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_logits as reference
from decoders import TOKENS, assert_close, assert_same, directory, logits, raw_logits
from gguf_files import KINDS, config_of, write_gguf

from prograde import lm


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_gguf_holds_the_numbers_that_it_stands_for(kind, model_type, tmp_path):
    config = config_of(model_type, width=256 if kind == "Q6_K" else 64)
    meant = write_gguf(tmp_path / "tiny.gguf", config, kind)
    if kind in ("F32", "BF16", "F16", "Q8_0"):  # what was written is near what was to be
        given = reference.weights(config)
        assert all(np.abs(meant[name] - given[name]).max() < 0.05 for name in given)
    expected, _ = lm.load(directory(tmp_path / "tiny", config, meant))
    found, _ = lm.load(tmp_path / "tiny.gguf")
    assert found.architecture == expected.architecture
    assert_same(found, expected)
    narrow, _ = lm.load(tmp_path / "tiny.gguf", dtype="bfloat16")
    assert_same(narrow, lm.load(tmp_path / "tiny", dtype="bfloat16")[0])
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    "kind", ["Q4_1", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("Q8_0", "Q4_0"))]
)
def test_weights_that_stay_quantized_give_the_same_logits(kind, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", config_of(), kind)
    dense, _ = lm.load(tmp_path / "tiny.gguf")
    kept, _ = lm.load(tmp_path / "tiny.gguf", quantized=True)
    blocks = kept.segments[0]
    matrices = [
        kept.embedding,
        kept.head,
        *(getattr(blocks, part) for part in lm.matrix_shapes(kept.architecture)),
    ]
    assert all(isinstance(matrix, lm.Quantized) and matrix.kind == kind for matrix in matrices)
    assert_close(logits(kept), logits(dense))
    few = np.array([7, 0, 263])
    assert_close(logits(kept, few=few), logits(dense)[..., few])
    np.testing.assert_array_equal(kept.embedding.rows(jnp.asarray(few)), dense.embedding[few])
    np.testing.assert_array_equal(blocks.query.dense(), dense.segments[0].query)
    floats = [x for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(x.ndim <= 2 for x in floats)  # norms alone
    lm.save(tmp_path / "saved", kept, lm.byte_tokenizer())
    assert_same(lm.load(tmp_path / "saved")[0], dense)


def test_quantized_weights_in_bfloat16_and_a_tied_embedding(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", config_of(tie_word_embeddings=True), "Q4_0")
    dense, _ = lm.load(tmp_path / "tiny.gguf", "bfloat16")
    kept, _ = lm.load(tmp_path / "tiny.gguf", "bfloat16", quantized=True)
    assert kept.head is None
    few = raw_logits(kept, jnp.asarray(TOKENS), few=np.array([5, 3]))
    assert few.dtype == jnp.bfloat16
    assert_close(logits(kept), logits(dense), 1e-2)
    assert_close(np.asarray(few, np.float64), logits(dense)[..., [5, 3]], 1e-2)


def test_layers_of_several_kinds_are_numbers_where_they_differ(tmp_path):
    kinds = lambda name: (
        "Q8_0" if "layers.1.mlp.down" in name else "F16" if "q_proj" in name else "Q4_0"
    )
    write_gguf(tmp_path / "tiny.gguf", config_of(), kinds)
    kept, _ = lm.load(tmp_path / "tiny.gguf", quantized=True)
    blocks = kept.segments[0]
    assert isinstance(blocks.up, lm.Quantized)
    assert not isinstance(blocks.down, lm.Quantized)
    assert not isinstance(blocks.query, lm.Quantized)
    assert_close(logits(kept), logits(lm.load(tmp_path / "tiny.gguf")[0]))


def test_a_header_says_what_the_reader_of_the_package_gguf_says(tmp_path):
    from prograde.lm.gguf_file import read_header

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(kind, 100)
    writer.add_float32("float32", 0.1)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("text", "Grüße, 世界")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("texts", ["a", "", "ü"])
    writer.add_custom_alignment(64)
    writer.add_tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("v", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = gguf.GGUFReader(path)
    fields, tensors = read_header(path)
    given = {
        name: field.contents()
        for name, field in theirs.fields.items()
        if not name.startswith("GGUF.")
    }
    assert fields == given
    for tensor in theirs.tensors:
        mine = tensors[tensor.name]
        assert mine.kind == tensor.tensor_type.name
        assert mine.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert mine.data.tobytes() == tensor.data.tobytes()
    assert len(tensors) == 2
