"""Texts to fine-tune on: tables with a label column as prompts and label tokens, plain text as windows of tokens."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer

from prograde.lab.data import DataError


@dataclass(frozen=True, eq=False)
class Examples:
    """Prompts whose next token names the label.

    Prompts are padded on the left, so that all end at the same place. `notes` says what was done to the texts.
    """

    tokens: Int[np.ndarray, "examples length"]
    valid: Bool[np.ndarray, "examples length"]
    labels: Int[np.ndarray, " examples"]
    names: tuple[str, ...]
    label_tokens: Int[np.ndarray, " labels"]
    texts: tuple[str, ...]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Windows:
    """A text cut into windows of equal length, each with the token that follows it."""

    tokens: Int[np.ndarray, "windows length+1"]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def read_table(path: Path, text: str, label: str) -> list[tuple[str, str]]:
    """(text, label) of each row of a .csv, .tsv or .jsonl file."""
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    try:
        if path.suffix in (".jsonl", ".json"):
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
        elif path.suffix in (".csv", ".tsv"):
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        else:
            raise DataError(
                f"{path} is no table: .csv, .tsv or .jsonl have examples with labels, .txt is trained on as text."
            )
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}).") from None
    if not rows:
        raise DataError(f"{path} holds no examples.")
    for number, row in enumerate(rows, 1):
        for column in (text, label):
            if not isinstance(row, dict) or row.get(column) is None:
                there = ", ".join(map(repr, rows[0])) if isinstance(rows[0], dict) else "none"
                raise DataError(
                    f"{path}: row {number} has no column {column!r}. Columns: {there}. Name them by --text and --label."
                )
    return [(str(row[text]), str(row[label])) for row in rows]


def split_rows(rows: Sequence[tuple[str, str]], held_out: int, seed: int) -> tuple[list, list]:
    """(training, held-out), in an order that the seed decides."""
    if held_out >= len(rows):
        raise DataError(
            f"{len(rows)} examples, of which --held-out {held_out} are to be held out: fewer than there are is needed."
        )
    order = np.random.Generator(np.random.Philox(key=[seed, 0x7E57])).permutation(len(rows))
    shuffled = [rows[i] for i in order]
    return shuffled[held_out:], shuffled[:held_out]


def label_words(
    rows: Sequence[tuple[str, str]], given: Mapping[str, str], where: Path
) -> dict[str, str]:
    """What the model is to say for each label, from --labels, or " " and the label itself."""
    found = Counter(label for _, label in rows)
    if len(found) < 2:
        raise DataError(
            f"{where}: all {len(rows)} examples have the label {next(iter(found))!r}. Two labels are needed."
        )
    if given:
        if unknown := [label for label in found if label not in given]:
            raise DataError(
                f"{where} has the label {unknown[0]!r} ({found[unknown[0]]} rows), which --labels does not name. It names "
                f"{', '.join(map(repr, given))}."
            )
        return dict(given)
    if len(found) > 50:
        raise DataError(
            f"{where} has {len(found)} different labels. Is --label the right column? Name at most 50 by --labels."
        )
    return {label: f" {label}" for label in sorted(found)}


def label_token_ids(
    words: Mapping[str, str], tokenizer: Tokenizer, first_token: bool
) -> Int[np.ndarray, " labels"]:
    """The token that each label's word is, or begins with."""
    ids = []
    for label, word in words.items():
        tokens = tokenizer.encode(word, add_special_tokens=False).ids
        if not tokens:
            raise DataError(f"the word {word!r} of the label {label!r} has no token.")
        if len(tokens) > 1 and not first_token:
            parts = " + ".join(repr(tokenizer.decode([token])) for token in tokens)
            raise DataError(
                f"the word {word!r} of the label {label!r} is {len(tokens)} tokens: {parts}. Choose a word of one token by "
                f'--labels {label}=" word", or let the first stand for it by --first-token.'
            )
        ids.append(tokens[0])
    for i, token in enumerate(ids):
        if token in ids[:i]:
            same = [label for label, other in zip(words, ids, strict=True) if other == token]
            raise DataError(
                f"the labels {', '.join(map(repr, same))} begin with the same token. Choose other words by --labels."
            )
    return np.asarray(ids, np.int32)


def examples(
    rows: Sequence[tuple[str, str]],
    words: Mapping[str, str],
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
    first_token: bool = False,
) -> Examples:
    """Rows as prompts. Texts that make a prompt longer than `max_length` tokens lose their end, never the template its."""
    if template.count("{text}") != 1:
        raise DataError(f"--template {template!r}: it holds {{text}} once, where the text goes.")
    before, after = (
        tokenizer.encode(part, add_special_tokens=False).ids for part in template.split("{text}")
    )
    room = max_length - len(before) - len(after)
    if room < 1:
        raise DataError(
            f"--max-length {max_length}: the template alone has {len(before) + len(after)} tokens."
        )
    names = tuple(words)
    # a template that begins with the text is one piece with it; what follows it begins with a space or a line
    prompts, cut = [], 0
    for text, _ in rows:
        ids = tokenizer.encode(text.strip(), add_special_tokens=False).ids
        cut += len(ids) > room
        prompts.append(before + ids[:room] + after)
    length = max(map(len, prompts))
    tokens = np.zeros((len(prompts), length), np.int32)
    valid = np.zeros((len(prompts), length), bool)
    for i, prompt in enumerate(prompts):
        tokens[i, length - len(prompt) :], valid[i, length - len(prompt) :] = prompt, True
    labels = np.asarray([names.index(label) for _, label in rows], np.int32)
    notes = (f"{cut} of {len(rows)} texts were cut to {room} tokens",) if cut else ()
    ids = label_token_ids(words, tokenizer, first_token)
    return Examples(tokens, valid, labels, names, ids, tuple(text for text, _ in rows), notes)


def windows(path: Path, tokenizer: Tokenizer, length: int) -> Windows:
    """A text file as windows that follow each other; what does not fill the last is left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except ValueError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}).") from None
    # a tokenizer is slow on one long string: lines keep their ends, and no merge crosses them
    lines = tokenizer.encode_batch(text.splitlines(keepends=True), add_special_tokens=False)
    ids = np.fromiter((i for line in lines for i in line.ids), np.int32)
    count = (len(ids) - 1) // length
    if count < 2:
        raise DataError(
            f"{path} has {len(ids)} tokens: two windows of --max-length {length} need {2 * length + 1}."
        )
    rows = np.stack([ids[i * length : (i + 1) * length + 1] for i in range(count)])
    return Windows(rows, (f"{len(ids):,} tokens in {count} windows of {length}",))


def digest(data: Examples | Windows) -> str:
    """What decides whether two runs see the same data."""
    parts = [data.tokens] + (
        [data.valid, data.labels, data.label_tokens] if isinstance(data, Examples) else []
    )
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in parts)).hexdigest()[
        :16
    ]
