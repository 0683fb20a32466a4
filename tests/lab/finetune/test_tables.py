"""Tables as people have them: what is handled, what is refused, and with which remedy."""

import csv
import io
import json
import shlex

import numpy as np
import pytest

from prograde import lm
from prograde.lab.data import DataError, tables, texts
from prograde.lab.studies.finetune import examples
from prograde.lab.studies.finetune.plan import Data

BYTES = lm.byte_tokenizer()


def written(tmp_path, content, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, text="text", label="label"):
    return tables.read_table(path, text, label)


PLAIN = "text,label\nnice day,good\nrain,bad\n"
ROWS = [("nice day", "good"), ("rain", "bad")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_name_themselves_are_read(encoding, tmp_path):
    content = PLAIN.replace("day", "jour né").encode(encoding)
    found = read(written(tmp_path, content))
    assert found.rows == [("nice jour né", "good"), ("rain", "bad")]
    assert found.notes == ()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "cp1252"])
def test_encodings_that_are_guessed_are_named(encoding, tmp_path):
    content = PLAIN.replace("day", "jour né").encode(encoding)
    found = read(written(tmp_path, content))
    assert found.rows == [("nice jour né", "good"), ("rain", "bad")]
    assert len(found.notes) == 1
    assert ("Windows-1252" if encoding == "cp1252" else encoding) in found.notes[0]


@pytest.mark.parametrize(
    ("content", "name", "note"),
    [
        ("text;label\nnice day;good\nrain;bad\n", "a.csv", "semicolons"),
        ("text\tlabel\nnice day\tgood\nrain\tbad\n", "a.csv", "tabs"),
        ("text,label\nnice day,good\nrain,bad\n", "a.tsv", "commas"),
        (" text , label \nnice day,good\n\nrain,bad\n", "a.csv", None),
        ("label,text\ngood,nice day\nbad ,rain\n", "a.csv", None),
        ("text,label,\nnice day,good,\nrain,bad,\n", "a.csv", None),
        (
            '{"text": "nice day", "label": "good"}\n\n{"text": "rain", "label": "bad"}',
            "a.jsonl",
            None,
        ),
        (
            '[{"text": "nice day", "label": "good"}, {"text": "rain", "label": "bad"}]',
            "a.json",
            None,
        ),
    ],
)
def test_tables_of_many_kinds_give_the_same_rows(content, name, note, tmp_path):
    found = read(written(tmp_path, content, name))
    assert found.rows == ROWS
    assert [note in n for n in found.notes] == ([True] if note else [])


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("text,label\n", "a.csv", ["no examples"]),
        ("", "a.csv", ["no examples"]),
        ("text,label\n,good\n", "a.csv", ["no examples", "have no text"]),
        ("review,label\na,b\n", "a.csv", ["'text'", "'review'", "--text review"]),
        ("review,stars\na,b\n", "a.csv", ["'text'", "'label'", "--text and --label"]),
        ("text,text,label\na,b,c\n", "a.csv", ["2 columns 'text'"]),
        (
            "text,label\nfine,good\nwell, not bad,good\n",
            "a.csv",
            ["line 3 has 3 columns", '"well, not bad",good'],
        ),
        ('text,label\na,b\n"open,c\nd,e\n', "a.csv", ["quotation mark"]),
        ("[1, 2]", "a.jsonl", ["line 1 holds list"]),
        ('{"text": ["a"], "label": "b"}', "a.jsonl", ["holds a list"]),
        ('{"text": "a"}', "a.jsonl", ["no column 'label'"]),
        ('{"text": ', "a.jsonl", ["JSON"]),
        ("[" * 100_000, "a.jsonl", ["JSON"]),
        ("anything", "a.xlsx", ["no table"]),
    ],
)
def test_what_is_no_table_is_refused(content, name, words, tmp_path):
    with pytest.raises(DataError) as error:
        read(written(tmp_path, content, name))
    for word in words:
        assert word in str(error.value)


def test_the_suggested_line_repairs_the_table(tmp_path):
    path = written(tmp_path, "text,label\nfine,good\nwell, not bad,good\n")
    with pytest.raises(DataError) as error:
        read(path)
    line = str(error.value).split("would be: ")[1]
    path = written(tmp_path, f"text,label\nfine,good\n{line}\n")
    assert read(path).rows == [("fine", "good"), ("well, not bad", "good")]


def test_rows_that_teach_nothing_are_left_out_and_counted(tmp_path):
    lines = ["nice day,good", " ,good", "rain,", "a\0b,bad", "rain,bad", "short"]
    found = read(written(tmp_path, "text,label\n" + "\n".join(lines)))
    assert found.rows == ROWS
    said = " | ".join(found.notes)
    assert "1 of 6 rows have no text" in said
    assert "2 of 6 rows have no label" in said
    assert "1 of 6 rows hold characters that are no text" in said


def test_lone_surrogates_are_no_text(tmp_path):
    lines = [{"text": "\ud800", "label": "a"}, {"text": "b", "label": "a"}]
    found = read(written(tmp_path, "\n".join(map(json.dumps, lines)), "a.jsonl"))
    assert found.rows == [("b", "a")]


def test_rows_of_a_text_stay_on_one_side():
    """20 texts, 12 times each: no text is on both sides, in the validation part neither."""
    rows = [(f"text {i % 20}", "ab"[i % 2]) for i in range(240)]
    for seed in range(5):
        train, held_out = tables.split_rows(rows, 120, seed)
        assert len(train) + len(held_out) == 240
        assert len(held_out) == 120
        assert not {t for t, _ in train} & {t for t, _ in held_out}
        for most in (500, 20):  # a fifth of 120 is 24; of 20, two texts of twelve are nearest
            last = tables.last_fifth(train, most)
            assert last == 24
            assert not {t for t, _ in train[-last:]} & {t for t, _ in train[:-last]}


def test_the_split_of_different_texts_is_the_one_it_always_was():
    """Written down: the permutation of seed 3, cut after the first four rows."""
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(10)]
    order = np.random.Generator(np.random.Philox(key=[3, 0x7E57])).permutation(10)
    train, held_out = tables.split_rows(rows, 4, seed=3)
    assert held_out == [rows[i] for i in order[:4]]
    assert train == [rows[i] for i in order[4:]]
    assert [int(t.split()[1]) for t, _ in held_out + train] == [6, 9, 5, 0, 4, 3, 2, 8, 7, 1]


def test_one_text_alone_cannot_be_split():
    with pytest.raises(DataError, match="too few different texts"):
        tables.split_rows([("same", "a"), (" same ", "b")] * 4, 4, 0)


@pytest.mark.parametrize(("count", "most", "wanted"), [(10, 500, 2), (4, 500, 0), (100, 5, 5)])
def test_a_fifth_of_different_texts(count, most, wanted):
    assert tables.last_fifth([(str(i), "a") for i in range(count)], most) == wanted


def test_other_held_out_data_take_their_texts_out_of_training(tmp_path):
    lines = "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20))
    train = written(tmp_path, "text,label\n" + lines)
    other = written(tmp_path, "text,label\ntext 3,b\n text  4,a\nnew,a\n", "other.csv")
    rows, held_out, _, notes = examples.rows_of(Data(data=train, held_out_data=other), 0)
    assert len(held_out) == 3
    assert len(rows) == 18
    assert not {"text 3", "text 4"} & {text for text, _ in rows}
    assert any("2 training examples" in note for note in notes)
    # a file that is sorted by its labels is shuffled: the validation part has both
    assert {label for _, label in rows[-4:]} == {"a", "b"} or rows != sorted(rows)


def test_repeated_texts_rare_labels_and_contradictions_are_told(tmp_path):
    lines = ["one,a", "two,b"] * 6 + ["three,rare", "one,b"]
    path = written(tmp_path, "text,label\n" + "\n".join(lines))
    _, _, _, notes = examples.rows_of(Data(data=path, held_out=1), 1)
    said = " | ".join(notes)
    assert "14 rows hold 3 different texts" in said
    assert "1 of 3 texts have several labels" in said
    assert "'rare'" in said


def test_240_labels_are_refused_with_an_example(tmp_path):
    lines = "".join(f"a text,that,{i}\n" for i in range(240))
    path = written(tmp_path, "text,note,label\n" + lines)
    with pytest.raises(DataError, match=r"240 different labels, such as '0' .* separator inside"):
        examples.rows_of(Data(data=path), 0)


def test_labels_with_spaces_and_equals_signs_are_named_by_the_longest():
    labels = ["a", "a=b", "very good"]
    words = texts.given_words(["a= x", "a=b= y", "very good= z"], labels, "table")
    assert words == {"a": " x", "a=b": " y", "very good": " z"}
    with pytest.raises(DataError, match="'very good'"):
        texts.given_words(["a= x", "a=b= y"], labels, "table")
    for bad in ("=x", "word"):
        with pytest.raises(DataError, match="LABEL="):
            texts.given_words([bad, "a= x", "a=b= y", "very good= z"], labels, "table")


class Pieces:
    """A tokenizer of which a space and a digit are two tokens, and words are one, as SmolLM2's."""

    def __init__(self, known=()):
        self.known = known

    def encode(self, text, add_special_tokens=False):
        pieces, rest = [], text
        while rest:
            piece = next((w for w in self.known if rest.startswith(w)), rest[0])
            pieces.append(piece)
            rest = rest[len(piece) :]
        return type("Encoding", (), {"ids": [hash(p) % 2**31 for p in pieces], "pieces": pieces})

    def decode(self, ids):
        return str(ids)


def test_labels_of_digits_are_said_without_a_space():
    words, notes = texts.default_words(["0", "1"], Pieces(), first_token=False)
    assert words == {"0": "0", "1": "1"}
    assert "without a space" in notes[0]
    words, notes = texts.default_words(["no", "yes"], Pieces([" no", " yes"]), first_token=False)
    assert words == {"no": " no", "yes": " yes"}
    assert notes == ()


@pytest.mark.parametrize(
    "labels",
    [
        ["very good", "very bad"],
        ["a=b", "a=c"],
        ["it's", "its", "$HOME", "-1", "`x`"],
        ["1.0", "2.0", "3.0"],
        [f"label {i}" for i in range(30)],
        ["日本", "中国"],
    ],
)
@pytest.mark.parametrize("tokenizer", [BYTES, Pieces([" very", " good"])])
def test_the_suggested_labels_can_be_pasted(labels, tokenizer):
    with pytest.raises(DataError) as error:
        texts.default_words(labels, tokenizer, first_token=False)
    option, *pasted = shlex.split("--labels" + str(error.value).split("--labels")[1])
    assert option == "--labels"
    words = texts.given_words(pasted, labels, "table")
    assert words.keys() == set(labels)
    assert len(texts.label_token_ids(words, tokenizer, first_token=False)) == len(labels)


def test_long_texts_are_cut_and_counted(tmp_path):
    rows = [{"text": "x" * 50 if i < 3 else f"s{i}", "label": "ab"[i % 2]} for i in range(8)]
    path = written(tmp_path, "\n".join(map(json.dumps, rows)), "a.jsonl")
    data = Data(data=path, template="{text} =>", held_out=2, max_length=24)
    split = examples.read(data, 0, BYTES)
    cut = [note for note in split.notes if "were cut" in note]
    assert sum(int(note.split(": ")[1].split(" of ")[0]) for note in cut) in (1, 3)
    assert split.train.tokens.shape[1] <= 24
    ends = BYTES.encode(" =>").ids
    assert (split.train.tokens[:, -3:] == ends).all()  # the template is whole


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [([5] * 10, 128), ([300] * 100, 303), ([20] * 95 + [4000] * 5, 128), ([4000] * 10, 1024)],
)
def test_the_length_of_prompts_leaves_95_percent_whole(lengths, wanted):
    rows = [("x" * n, "a") for n in lengths]
    assert texts.suitable_length(rows, BYTES, "{text} =>") == wanted


def test_the_chosen_length_is_named(tmp_path):
    lines = "".join(f"{'x' * 200} {i},{'ab'[i % 2]}\n" for i in range(20))
    data = Data(
        data=written(tmp_path, "text,label\n" + lines), template="{text}:", labels=("a=a", "b=b")
    )
    split = examples.read(data, 0, BYTES)
    assert any("--max-length 204" in note for note in split.notes)
    assert split.train.tokens.shape[1] == 204


@pytest.mark.long
def test_no_table_ends_in_another_error(tmp_path, capsys):
    """Tables by hypothesis: read, or refused by a `DataError`; what is read is split by text."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    counts = {"read": 0, "refused": 0, "split": 0}
    cell = st.text(max_size=12) | st.sampled_from(["a", "b", "0", "1", "", " ", "a=b", '"', "\0"])
    separators = st.sampled_from([",", ";", "\t", "|", "\n"])
    quoted = st.booleans()
    encodings = st.sampled_from(["utf-8", "utf-16", "cp1252", "utf-16-le", "latin-1"])
    names = st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.json"])

    row = st.tuples(cell, st.sampled_from(["a", "b", "0", "1", "very good"])).map(list)
    lines = st.lists(row | st.lists(cell, min_size=1, max_size=4), max_size=12) | st.lists(row)

    @settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(lines, separators, quoted, encodings, names)
    def fuzz(lines, separator, quoted, encoding, name):
        header = [["text", "label"]]
        if name.startswith("a.js"):
            content = "\n".join(
                json.dumps(dict(zip(["text", "label"], row, strict=False))) for row in lines
            )
        elif quoted and separator != "\n":
            buffer = io.StringIO()
            csv.writer(buffer, delimiter=separator).writerows(header + lines)
            content = buffer.getvalue()
        else:
            content = "\n".join(separator.join(row) for row in header + lines)
        path = written(tmp_path, content.encode(encoding, errors="replace"), name)
        try:
            found = read(path)
            assert found.rows
            assert all(text.strip() and label and "\0" not in text for text, label in found.rows)
            counts["read"] += 1
            train, held_out, labels, _ = examples.rows_of(Data(data=path), 0)
            same = lambda part: {tables.same(text) for text, _ in part}
            assert not same(train) & same(held_out)
            words, _ = examples.words_of(Data(data=path), labels, BYTES)
            assert words.keys() == set(labels)
            counts["split"] += 1
        except DataError as error:
            counts["refused"] += 1
            if "--labels" in str(error) and "Try" in str(error):
                pasted = shlex.split(str(error).split("--labels ")[1])
                again, _ = examples.words_of(Data(data=path, labels=tuple(pasted)), labels, BYTES)
                assert again.keys() == set(labels)

    fuzz()
    with capsys.disabled():
        print(f"\ntables: {counts}")
