"""Reports: the sentences, tables and figures that a study makes of its records.

A `Report` has sections, and a section has sentences, tables and figures. `terminal` prints it,
`page` writes it as HTML, and `markdown` writes it between marks in a page of the documentation.
`figures` holds the style of all figures, and `words` formats numbers.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_NUMBER = re.compile(r"[-+>≥~−]? ?\.?\d|–$")


@dataclass(frozen=True)
class Table:
    """A table of texts.

    **Fields:** `unbroken`: the number of columns, from the left, whose cells stay on one line of a
    terminal.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    unbroken: int = 2

    @property
    def numbers(self) -> list[bool]:
        """Says for each column whether all cells are numbers, which are aligned to the right."""
        return [
            any(cells) and all(_NUMBER.match(cell) for cell in cells if cell)
            for cells in ([row[i] for row in self.rows] for i in range(len(self.columns)))
        ]


@dataclass(frozen=True)
class Figure:
    """A figure: its title, which is also its alternative text, and how to draw it.

    `draw` draws on an empty canvas and may set its size. `name` is the name of its file.
    """

    name: str
    title: str
    draw: "Callable[[Canvas], None]"


@dataclass(frozen=True)
class Section:
    """A part of a report. `content` is shown in its order; a text is one paragraph.

    **Fields:** `made_on`: where the numbers come from; `details`: more about them, such as the
    manifest, folded away on a page; `folded`: tables that are folded away too, by their headings.
    """

    name: str
    title: str
    content: list[str | Table | Figure]
    made_on: str = ""
    details: Any = None
    folded: dict[str, list[Table]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A report. `terms` explains the columns of the tables."""

    title: str
    introduction: str
    terms: str
    sections: list[Section] = field(default_factory=list)
