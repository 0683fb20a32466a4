"""Texts as tokens: rows of a table as prompts and label tokens, plain text as windows."""

import hashlib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer

from prograde.lab.data.images import DataError
from prograde.lab.data.tables import Row, decoded

SHORTEST, LONGEST = 128, 1024  # between which the length of prompts is chosen
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True, eq=False)
class Examples:
    """Prompts whose next token names the label.

    Prompts are padded on the left, so that all end at the same place. `notes` says what was done
    to the texts.
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


def given_words(options: Sequence[str], labels: Sequence[str], where: Path) -> dict[str, str]:
    """Reads `LABEL= word` options. Labels may hold "=": those of the table are looked for first.

    Raises `DataError` if a label of the table is left out.
    """
    words: dict[str, str] = {}
    for option in options:
        known = [label for label in labels if option.startswith(f"{label}=")]
        label = max(known, key=len) if known else option.partition("=")[0]
        if not label or len(option) <= len(label):
            raise DataError(f'--labels {option!r}: LABEL=" word" is needed: positive=" great".')
        words[label] = option[len(label) + 1 :]
    if missing := [label for label in labels if label not in words]:
        raise DataError(
            f"{where} has the label {missing[0]!r}, which --labels does not name. It names "
            f"{', '.join(map(repr, words))}."
        )
    return words


def default_words(
    labels: Sequence[str], tokenizer: Tokenizer, first_token: bool
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What the model says for each label: a space and the label, or the label alone.

    Takes what is one token, different for each label. Returns the words, and a note if they are not
    the usual ones. Raises `DataError` with an option that works if neither is.
    """
    ways = [{label: f" {label}" for label in labels}, {label: label for label in labels}]
    for words in ways:
        try:
            label_token_ids(words, tokenizer, first_token)
        except DataError:
            continue
        if words is ways[0]:
            return words, ()
        return words, ("the model answers with the labels themselves, without a space before them",)
    label_token_ids(ways[0], tokenizer, first_token)
    raise AssertionError("one of the ways was refused just now")


def label_token_ids(
    words: Mapping[str, str], tokenizer: Tokenizer, first_token: bool
) -> Int[np.ndarray, " labels"]:
    """The token that each label's word is, or begins with.

    Raises `DataError`, with an option that works, if a word is several tokens or two words begin
    with the same one.
    """
    ids: list[int] = []
    for label, word in words.items():
        tokens = tokenizer.encode(word, add_special_tokens=False).ids
        if not tokens:
            raise DataError(
                f"the word {word!r} of the label {label!r} has no token. {_try(words, tokenizer)}"
            )
        if len(tokens) > 1 and not first_token:
            parts = " + ".join(repr(tokenizer.decode([token])) for token in tokens)
            raise DataError(
                f"the word {word!r} of the label {label!r} is {len(tokens)} tokens ({parts}), and "
                f"one is needed. {_try(words, tokenizer)}"
            )
        ids.append(tokens[0])
    for i, token in enumerate(ids):
        if token in ids[:i]:
            alike = [label for label, other in zip(words, ids, strict=True) if other == token]
            raise DataError(
                f"the words of the labels {', '.join(map(repr, alike))} begin with the same token, "
                f"{tokenizer.decode([token])!r}. {_try(words, tokenizer)}"
            )
    return np.asarray(ids, np.int32)


def _try(words: Mapping[str, str], tokenizer: Tokenizer) -> str:
    """An option that names a word of one token for each label, as it is pasted into a shell."""
    taken: set[int] = set()
    options = []
    for label, word in words.items():
        parts = re.findall(r"\w+", label)
        spelled = [*(letters[:1].upper() for letters in parts), *_LETTERS]
        tries = [word, *(f"{space}{p}" for space in (" ", "") for p in (*parts, *spelled))]
        for candidate in tries:
            tokens = tokenizer.encode(candidate, add_special_tokens=False).ids
            if len(tokens) == 1 and tokens[0] not in taken:
                taken.add(tokens[0])
                options.append(f"{label}={candidate}")
                break
        else:
            return "Name a word of one token for each label by --labels."
    return f"Try, or name better words: --labels {shlex.join(options)}"


def _template(template: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens before and after the text."""
    if template.count("{text}") != 1:
        raise DataError(f"--template {template!r}: {{text}} is needed once, where the text goes.")
    before, after = template.split("{text}")
    # a template that begins with the text is one piece with it; what follows it begins with a
    # space or a new line
    return (
        tokenizer.encode(before, add_special_tokens=False).ids,
        tokenizer.encode(after, add_special_tokens=False).ids,
    )


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    found = tokenizer.encode_batch([text.strip() for text in texts], add_special_tokens=False)
    return [encoding.ids for encoding in found]


def suitable_length(rows: Sequence[Row], tokenizer: Tokenizer, template: str) -> int:
    """The length of prompts that leaves 95 % of the texts whole, from `SHORTEST` to `LONGEST`."""
    around = sum(map(len, _template(template, tokenizer)))
    lengths = sorted(len(ids) + around for ids in _encoded([text for text, _ in rows], tokenizer))
    return min(max(lengths[math.ceil(0.95 * len(lengths)) - 1], SHORTEST), LONGEST)


def examples(
    rows: Sequence[Row],
    words: Mapping[str, str],
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
    first_token: bool = False,
) -> Examples:
    """Makes prompts of rows.

    Texts are truncated where a prompt would have more than `max_length` tokens; the template never
    is.
    """
    before, after = _template(template, tokenizer)
    room = max_length - len(before) - len(after)
    if room < 1:
        raise DataError(
            f"--max-length {max_length}: the template alone has {len(before) + len(after)} tokens."
        )
    names = tuple(words)
    texts = tuple(text for text, _ in rows)
    encoded = _encoded(texts, tokenizer)
    cut = sum(len(ids) > room for ids in encoded)
    prompts = [before + ids[:room] + after for ids in encoded]
    length = max(map(len, prompts))
    tokens = np.zeros((len(prompts), length), np.int32)
    valid = np.zeros((len(prompts), length), bool)
    for i, prompt in enumerate(prompts):
        tokens[i, length - len(prompt) :], valid[i, length - len(prompt) :] = prompt, True
    labels = np.asarray([names.index(label) for _, label in rows], np.int32)
    notes = (f"{cut} of {len(rows)} texts were cut to {room} tokens (--max-length)",) if cut else ()
    ids = label_token_ids(words, tokenizer, first_token)
    return Examples(tokens, valid, labels, names, ids, texts, notes)


def windows(path: Path, tokenizer: Tokenizer, length: int) -> Windows:
    """Cuts a text file into windows that follow each other; the rest after the last is left out."""
    text, notes = decoded(path)
    # a tokenizer is slow on one long string: lines keep their ends, and no merge crosses them
    lines = tokenizer.encode_batch(text.splitlines(keepends=True), add_special_tokens=False)
    ids = np.fromiter((i for line in lines for i in line.ids), np.int32)
    count = (len(ids) - 1) // length
    if count < 2:
        raise DataError(
            f"{path} has {len(ids)} tokens, and two windows of --max-length {length} need "
            f"{2 * length + 1}."
        )
    rows = np.stack([ids[i * length : (i + 1) * length + 1] for i in range(count)])
    return Windows(rows, (*notes, f"{len(ids):,} tokens in {count} windows of {length}"))


def digest(data: Examples | Windows) -> str:
    """A digest of everything that training sees of the data."""
    parts = [data.tokens]
    if isinstance(data, Examples):
        parts += [data.valid, data.labels, data.label_tokens]
    content = b"".join(np.ascontiguousarray(x).tobytes() for x in parts)
    return hashlib.sha256(content).hexdigest()[:16]
