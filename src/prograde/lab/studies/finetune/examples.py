"""The examples of a run: which rows are trained on, and which are held out."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from prograde.lab.data import tables, texts
from prograde.lab.data.tables import Row
from prograde.lab.studies.finetune.plan import HELD_OUT, Data

_VALIDATION = 500  # examples, at most


@dataclass(frozen=True, eq=False)
class Split:
    """What is trained on, and what is held out.

    The last `validation` training examples may be kept apart, to say where to stop: they share no
    text with the others. `notes` says what was found in the data, and done to it.
    """

    train: texts.Examples | texts.Windows
    held_out: texts.Examples | texts.Windows
    validation: int
    notes: tuple[str, ...]


def rows_of(data: Data, seed: int) -> tuple[list[Row], list[Row], tuple[str, ...], list[str]]:
    """The training rows, the held-out rows, the labels, and notes. Reads no model."""
    found = tables.read_table(data.data, data.text, data.label)
    labels = tables.check_labels(found.rows, data.data)
    notes = list(found.notes)
    if data.held_out_data is not None:
        other = tables.read_table(data.held_out_data, data.text, data.label)
        notes += [f"held out: {note}" for note in other.notes]
        if unknown := sorted({label for _, label in other.rows} - set(labels)):
            raise tables.DataError(
                f"{data.held_out_data} has the label {unknown[0]!r}, and {data.data} has not."
            )
        held_out = other.rows
        kept = tables.without(found.rows, held_out)
        if len(kept) < len(found.rows):
            notes.append(
                f"{len(found.rows) - len(kept)} training examples have a text that is held out: "
                "left out"
            )
        train = [row for group in tables.by_text(kept, seed) for row in group]
    else:
        wanted = min(data.held_out or HELD_OUT, len(found.rows) // 2)
        train, held_out = tables.split_rows(found.rows, wanted, seed)
    train = train[: data.examples]
    if not train:
        raise tables.DataError("all training examples have a text that is held out.")
    tables.check_labels(train, data.data, "training ")
    return train, held_out, labels, notes + tables.rare_labels(train, held_out, labels)


def words_of(
    data: Data, labels: Sequence[str], tokenizer: Tokenizer
) -> tuple[dict[str, str], list[str]]:
    """The word of each label, and notes. Raises `DataError` for words that are not one token."""
    if data.labels:
        words, notes = texts.given_words(data.labels, labels, data.data), ()
    else:
        words, notes = texts.default_words(labels, tokenizer, data.first_token)
    texts.label_token_ids(words, tokenizer, data.first_token)
    return words, list(notes)


def read(data: Data, seed: int, tokenizer: Tokenizer) -> Split:
    """Reads the examples of a run, as tokens."""
    if data.plain_text:
        return _read_text(data, tokenizer)
    train, held_out, labels, notes = rows_of(data, seed)
    words, more = words_of(data, labels, tokenizer)
    notes += more
    length = data.max_length
    if length is None:
        length = texts.suitable_length(train, tokenizer, data.template)
        if length != texts.SHORTEST:
            notes.append(f"prompts have {length} tokens at most (--max-length {length})")
    learned, tested = (
        texts.examples(rows, words, tokenizer, data.template, length, data.first_token)
        for rows in (train, held_out)
    )
    notes += [f"training: {note}" for note in learned.notes]
    notes += [f"held out: {note}" for note in tested.notes]
    return Split(learned, tested, tables.last_fifth(train, _VALIDATION), tuple(notes))


def _read_text(data: Data, tokenizer: Tokenizer) -> Split:
    length = data.max_length or texts.SHORTEST
    whole = texts.windows(data.data, tokenizer, length)
    if data.held_out_data is not None:
        train, held_out = whole, texts.windows(data.held_out_data, tokenizer, length)
    else:
        # the end of a text is new, where its middle need not be
        last = min(max(1, len(whole) // 10), data.held_out or HELD_OUT)
        train = dataclasses.replace(whole, tokens=whole.tokens[:-last][: data.examples])
        held_out = texts.Windows(whole.tokens[-last:], ())
    notes = (*train.notes, *(f"held out: {note}" for note in held_out.notes))
    return Split(train, held_out, min(_VALIDATION, len(train) // 5), notes)


def subset(examples: texts.Examples, index: np.ndarray) -> texts.Examples:
    """Some of the examples."""
    arrays = {name: getattr(examples, name)[index] for name in ("tokens", "valid", "labels")}
    chosen = tuple(examples.texts[i] for i in index)
    return dataclasses.replace(examples, **arrays, texts=chosen)
