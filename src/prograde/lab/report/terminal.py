"""Writes a report to the terminal.

Texts from records are printed as they are, and never read as markup.
"""

import re

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from prograde.lab.report import Figure, Report, Table

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """Escapes control characters of a text, so that none reaches the terminal."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def say(console: Console, text: str) -> None:
    """Prints a sentence as it is, however long."""
    console.print(Text(visible(text)), soft_wrap=True)


def print_report(report: Report, console: Console) -> None:
    """Prints the tables and sentences of all sections. Figures are left to the page."""
    for section in report.sections:
        for part in section.content:
            if isinstance(part, Table):
                print_table(part, console)
            elif not isinstance(part, Figure):
                for line in part.split("\n"):  # an indented line is a command to paste
                    console.print(Text(visible(line)), soft_wrap=line.startswith("    "))
        console.print()


def print_table(table: Table, console: Console) -> None:
    """Prints one table."""
    shown = RichTable(
        title=Text(visible(table.title)),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for i, (column, number) in enumerate(zip(table.columns, table.numbers, strict=True)):
        justify = "right" if number else "left"
        shown.add_column(Text(column), overflow="fold", no_wrap=i < table.unbroken, justify=justify)
    for row in table.rows:
        shown.add_row(*(Text(visible(cell)) for cell in row))
    console.print(shown)
