"""Tokenizers of GGUF files split as the rule of GPT-2 does."""

import pytest
from gguf_files import CONTROL, OWN, TEXTS, bpe_twin, config_of, words, write_gguf

from prograde import lm


@pytest.mark.parametrize("rule", ["smollm", "gpt-2"])
def test_tokenizer_of_a_gguf_file_follows_the_rule_of_gpt2(rule, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", config_of(), "F32", fields={"tokenizer_pre": rule}.items())
    _, tokenizer = lm.load(tmp_path / "tiny.gguf")
    for text in TEXTS:
        assert tokenizer.encode(text).ids == bpe_twin(
            tokenizer, text, digits_apart=rule == "smollm"
        ), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert ("12" in tokenizer.encode("in 12").tokens) == (rule == "gpt-2")
    assert tokenizer.encode("the<|im_start|>the<tool>").tokens == ["the", CONTROL, "the", OWN]
    assert tokenizer.token_to_id(CONTROL) == words().index(CONTROL)
    ids = tokenizer.encode("the<|im_start|>the<tool>").ids
    assert (
        tokenizer.decode(ids) == "thethe<tool>"
    )  # a control token is no text, one of the user's is
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the<|im_start|>the<tool>"
    lm.save(tmp_path / "saved", lm.load(tmp_path / "tiny.gguf")[0], tokenizer)
    again = lm.load(tmp_path / "saved")[1]
    assert [again.encode(text).ids for text in TEXTS] == [
        tokenizer.encode(text).ids for text in TEXTS
    ]


def test_bytes_are_tokens():
    tokenizer = lm.byte_tokenizer()
    assert tokenizer.get_vocab_size() == 256
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
