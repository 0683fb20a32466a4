"""Writes reports between marks in a page of the documentation.

A page says where a report goes and which records it shows:

    <!-- records: records/beyond/newton -->
    <!-- end of records -->

After the directories, `only NAME ...` picks sections by name. `prograde report --pages PAGE` writes
the text between the marks, and a test compares it with the records.
"""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from prograde.lab.report import Figure, Report, Section, Table, figures
from prograde.lab.store import RecordError, write

_MARKS = re.compile(r"<!-- records: (?P<what>[^\n]*?) -->\n.*?<!-- end of records -->", re.DOTALL)
_WIDTH = 120


def render(page: Path, make: Callable[[list[Path]], Report]) -> tuple[str, dict[Path, str]]:
    """Renders a page; returns its text, and the figures by path.

    `make` makes the report of directories, which are relative to the working directory. Figures go
    into a directory next to the page, with its name. Raises `RecordError` if the page has no marks.
    """
    text, drawn = page.read_text(), {}
    folder = page.with_suffix("")

    def filled(found: re.Match[str]) -> str:
        where, _, only = found["what"].partition(" only ")
        report = make([Path(word) for word in where.split()])
        names = only.split()
        known = {section.name: section for section in report.sections}
        if missing := [name for name in names if name not in known]:
            raise RecordError(
                f"{page}: the marks name {', '.join(missing)}, but {where} has {', '.join(known)}."
            )
        sections = [known[name] for name in names] or report.sections
        parts = [] if names or len(sections) == 1 else [_paragraph(report.terms)]
        for section in sections:
            parts += _section(section, len(sections) > 1, folder, drawn)
        body = "\n\n".join(parts)
        return f"<!-- records: {found['what']} -->\n\n{body}\n\n<!-- end of records -->"

    rendered, count = _MARKS.subn(filled, text)
    if not count:
        raise RecordError(
            f"{page} has no marks between which a report goes: "
            "<!-- records: DIR --> and <!-- end of records -->."
        )
    return rendered, drawn


def update(page: Path, make: Callable[[list[Path]], Report]) -> None:
    """Writes a page and its figures again."""
    text, drawn = render(page, make)
    for path, picture in drawn.items():
        write(path, picture.encode())
    write(page, text.encode())


def differences(page: Path, make: Callable[[list[Path]], Report]) -> list[Path]:
    """Returns the files, page or figures, that differ from their records."""
    text, drawn = render(page, make)
    wanted = {page: text} | drawn
    return [p for p, content in wanted.items() if not p.exists() or p.read_text() != content]


def _section(section: Section, titled: bool, folder: Path, drawn: dict[Path, str]) -> list[str]:
    parts = [f"## {section.title}"] if titled else []
    for part in section.content:
        if isinstance(part, Table):
            parts.append(f"**{part.title}**\n\n{table(part)}")
        elif isinstance(part, Figure):
            path = folder / f"{part.name}.svg"
            drawn[path] = figures.svg(part)
            parts.append(f"![{part.title}]({folder.name}/{path.name})")
        else:
            parts.append(_paragraph(part))
    return [*parts, *([_paragraph(f"*{section.made_on}*")] if section.made_on else [])]


def table(table: Table) -> str:
    """Formats a table as Markdown."""
    rules = ["---:" if number else "---" for number in table.numbers]
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    lines = [table.columns, rules, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _paragraph(text: str) -> str:
    return textwrap.fill(
        " ".join(text.split(" ")), _WIDTH, break_long_words=False, break_on_hyphens=False
    )
