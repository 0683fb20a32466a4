"""Tables of texts with labels, as people have them: read, cleaned, and split by text."""

import csv
import io
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prograde.lab.data.images import DataError

Row = tuple[str, str]
"""A text and its label."""

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_MOST_LABELS = 50


@dataclass(frozen=True)
class Rows:
    """The rows of a table that can be learned. `notes` says what was found and done."""

    rows: list[Row]
    notes: tuple[str, ...] = ()


def read_table(path: Path, text: str, label: str) -> Rows:
    """Reads the columns `text` and `label` of a .csv, .tsv or .jsonl file.

    Rows without a text or a label, and texts with characters that are no text, are left out. Raises
    `DataError` for what cannot be read as a table.
    """
    content, notes = decoded(path)
    if path.suffix in (".jsonl", ".json"):
        found = _json_rows(path, content, text, label)
    elif path.suffix in (".csv", ".tsv"):
        found, more = _separated_rows(path, content, text, label)
        notes += more
    else:
        raise DataError(
            f"{path} is no table. Examples with labels are in .csv, .tsv or .jsonl files, and a "
            ".txt file is learned as plain text."
        )
    if not found:
        raise DataError(f"{path} holds no examples.")
    cleaned = _cleaned(found)
    if not cleaned.rows:
        raise DataError(f"{path} holds no examples: {'; '.join(cleaned.notes)}.")
    return Rows(cleaned.rows, (*notes, *cleaned.notes))


def decoded(path: Path) -> tuple[str, tuple[str, ...]]:
    """The text of a file, and a note where its encoding had to be guessed."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None
    try:
        for mark, encoding in _BYTE_ORDER_MARKS.items():
            if content.startswith(mark):
                return content.decode(encoding), ()
        if encoding := _unmarked_utf16(content):
            return content.decode(encoding), (f"{path.name} was read as {encoding}",)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged: it begins as {error.encoding}, but {error}.") from None
    try:
        return content.decode("utf-8"), ()
    except UnicodeDecodeError:
        repair = shlex.join(["iconv", "-f", "ENCODING", "-t", "UTF-8", str(path)])
        note = (
            f"{path.name} is not in UTF-8 and was read as Windows-1252 (Latin-1). If letters look "
            f"wrong, convert it: {repair}"
        )
        return content.decode("cp1252", errors="replace"), (note,)


def _unmarked_utf16(content: bytes) -> str | None:
    """UTF-16 without a byte order mark has NUL in every second place, where it holds Latin text."""
    head = np.frombuffer(content[: 2 * (min(len(content), 2000) // 2)], np.uint8).reshape(-1, 2)
    if not len(head):
        return None
    first, second = (head == 0).mean(axis=0)
    if second > 0.5 and first < 0.1:
        return "utf-16-le"
    return "utf-16-be" if first > 0.5 and second < 0.1 else None


def _json_rows(path: Path, content: str, text: str, label: str) -> list[Row]:
    try:
        if path.suffix == ".json" and content.lstrip().startswith("["):
            found = list(enumerate(json.loads(content), 1))
        else:
            lines = enumerate(content.split("\n"), 1)
            found = [(number, json.loads(line)) for number, line in lines if line.strip()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON lines ({error}).") from None
    rows = []
    for number, row in found:
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} holds {type(row).__name__}, not an object.")
        _columns_are_there(path, list(row), text, label)
        for column in (text, label):
            if isinstance(row[column], dict | list):
                raise DataError(
                    f"{path}: line {number}, column {column!r} holds a "
                    f"{type(row[column]).__name__}, not a text."
                )
        rows.append((_said(row[text]), _said(row[label])))
    return rows


def _said(value: Any) -> str:
    return "" if value is None else str(value)


def _separated_rows(
    path: Path, content: str, text: str, label: str
) -> tuple[list[Row], tuple[str, ...]]:
    usual = "\t" if path.suffix == ".tsv" else ","
    columns, separator, notes = _header(content, usual), usual, ()
    for other in _SEPARATORS:
        if not {text, label} <= set(columns) and {text, label} <= set(_header(content, other)):
            columns, separator = _header(content, other), other
            notes = (f"the columns of {path.name} are separated by {_SEPARATORS[other]}",)
    if not columns:
        return [], ()
    _columns_are_there(path, columns, text, label)
    for column in (text, label):
        if columns.count(column) > 1:
            raise DataError(f"{path} has {columns.count(column)} columns {column!r}. Rename one.")
    places = columns.index(text), columns.index(label)
    rows: list[Row] = []
    too_long: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=separator)
    try:
        next(reader)
        for fields in reader:
            if not fields:
                continue
            if len(fields) > len(columns) and any(f.strip() for f in fields[len(columns) :]):
                too_long.append((reader.line_num, fields))
            rows.append(tuple(fields[p] if p < len(fields) else "" for p in places))  # pyright: ignore
        list(csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise DataError(
                f"{path}: a quotation mark is opened in column {text!r} or {label!r} and never "
                f"closed; the last row read is {_short(str(rows[-1] if rows else ''))}. Double "
                'quotation marks inside a text: ""'
            ) from None
        if "after" not in str(error):  # `"a" b` is read as it always was
            raise DataError(f"{path} cannot be read ({error}).") from None
    if too_long:
        raise DataError(_has_stray_separators(path, columns, too_long, separator, places))
    return rows, notes


def _header(content: str, separator: str) -> list[str]:
    try:
        first = next(csv.reader(io.StringIO(content, newline=""), delimiter=separator), [])
    except csv.Error:
        return []
    return [column.strip() for column in first]


def _columns_are_there(path: Path, columns: list[str], text: str, label: str) -> None:
    missing = [column for column in (text, label) if column not in columns]
    if not missing:
        return
    others = [column for column in columns if column not in (text, label)]
    advice = "Name them by --text and --label."
    if len(missing) == len(others) == 1:
        option = "--text" if missing[0] == text else "--label"
        advice = f"Add {shlex.join([option, others[0]])}."
    raise DataError(
        f"{path} has no column {' and no column '.join(map(repr, missing))}. "
        f"Columns: {', '.join(map(repr, columns))}. {advice}"
    )


def _has_stray_separators(
    path: Path,
    columns: list[str],
    too_long: list[tuple[int, list[str]]],
    separator: str,
    places: tuple[int, int],
) -> str:
    number, fields = too_long[0]
    name = _SEPARATORS[separator].removesuffix("s")
    said = (
        f"{path}: line {number} has {len(fields)} columns, and the header has {len(columns)}"
        f"{f'; {len(too_long)} lines are like this' if len(too_long) > 1 else ''}. "
        f"A text that holds a {name} needs quotation marks around it."
    )
    more = len(fields) - len(columns) + 1
    at = places[0]
    whole = [*fields[:at], separator.join(fields[at : at + more]), *fields[at + more :]]
    line = io.StringIO()
    csv.writer(line, delimiter=separator, lineterminator="").writerow(whole)
    return f"{said} Line {number} would be: {_short(line.getvalue(), 200)}"


def _cleaned(rows: list[Row]) -> Rows:
    """Leaves out rows that nothing can be learned from, and counts them."""
    kept, out = [], Counter()
    for text, label in rows:
        if not text.strip():
            out["have no text"] += 1
        elif not label.strip():
            out["have no label"] += 1
        elif not _is_text(text) or not _is_text(label):
            out["hold characters that are no text (NUL or half of a pair)"] += 1
        else:
            kept.append((text, label.strip()))
    notes = [f"{count} of {len(rows)} rows {why}: left out" for why, count in out.items()]
    texts: dict[str, set[str]] = {}
    for text, label in kept:
        texts.setdefault(same(text), set()).add(label)
    if len(texts) < len(kept):
        notes.append(
            f"{len(kept):,} rows hold {len(texts):,} different texts; all rows of a text stay on "
            "the same side of the split"
        )
    if unsure := sum(len(labels) > 1 for labels in texts.values()):
        notes.append(f"{unsure} of {len(texts):,} texts have several labels")
    return Rows(kept, tuple(notes))


def _is_text(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def same(text: str) -> str:
    """What two texts have in common that count as the same: everything but white space."""
    return " ".join(text.split())


def by_text(rows: Sequence[Row], seed: int) -> list[list[Row]]:
    """Groups the rows of each text, in an order that the seed decides."""
    order = np.random.Generator(np.random.Philox(key=[seed, 0x7E57])).permutation(len(rows))
    groups: dict[str, list[Row]] = {}
    for i in order:
        groups.setdefault(same(rows[i][0]), []).append(rows[i])
    return list(groups.values())


def split_rows(rows: Sequence[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Splits rows into training and held-out rows, in an order that the seed decides.

    All rows of a text are on the same side, next to each other. Where no text is repeated,
    exactly `held_out` rows are held out; otherwise a few more may be.
    """
    if held_out >= len(rows):
        raise DataError(
            f"--held-out {held_out}: there are {len(rows)} examples, and some are needed for "
            "training."
        )
    train: list[Row] = []
    out: list[Row] = []
    for group in by_text(rows, seed):
        (train if len(out) >= held_out else out).extend(group)
    if not train:
        raise DataError(
            f"the {len(rows)} examples hold too few different texts to hold {held_out} out: "
            "nothing would be left for training."
        )
    return train, out


def without(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Leaves out the rows whose text is also in `others`."""
    there = {same(text) for text, _ in others}
    return [row for row in rows if same(row[0]) not in there]


def last_fifth(rows: Sequence[Row], most: int) -> int:
    """The number of rows at the end that make about a fifth, and share no text with the others."""
    wanted = min(most, len(rows) // 5)
    cuts = [i for i in range(1, len(rows)) if same(rows[i][0]) != same(rows[i - 1][0])]
    if not wanted or not cuts:
        return 0
    return len(rows) - min(cuts, key=lambda cut: abs(cut - (len(rows) - wanted)))


def check_labels(rows: Sequence[Row], where: Path, part: str = "") -> tuple[str, ...]:
    """The labels of a table, sorted. Raises `DataError` if there is one only, or far too many.

    `part` says which examples these are, such as "training ".
    """
    found = Counter(label for _, label in rows)
    if len(found) < 2:
        raise DataError(
            f"{where}: all {len(rows)} {part}examples have the label {next(iter(found))!r}. "
            "Two labels are needed."
        )
    if len(found) > _MOST_LABELS:
        text, label = next(row for row in rows if found[row[1]] == min(found.values()))
        raise DataError(
            f"{where} has {len(found)} different labels, such as {_short(label)!r} of the text "
            f"{_short(text)!r}. Is --label the right column? A separator inside a text needs "
            f"quotation marks around the text. At most {_MOST_LABELS} labels can be learned."
        )
    return tuple(sorted(found))


def rare_labels(train: Sequence[Row], held_out: Sequence[Row], labels: Sequence[str]) -> list[str]:
    """Says which labels have too few examples to be learned, or to be tested."""
    notes = []
    for label in labels:
        here, there = (sum(row[1] == label for row in rows) for rows in (train, held_out))
        if here == 0:
            notes.append(f"the label {label!r} has no training example: it cannot be learned")
        elif there == 0:
            notes.append(
                f"the label {label!r} has {here} training example{'s' * (here > 1)} and no "
                "held-out one: the figures say nothing about it"
            )
        elif here == 1:
            notes.append(f"the label {label!r} has a single training example")
    return notes


def _short(text: str, length: int = 60) -> str:
    text = same(text)
    return text if len(text) <= length else text[: length - 1] + "…"
