"""`prograde report`: builds reports again, from records alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from prograde.lab.report import Report
    from prograde.lab.store import Store


@dataclass(frozen=True)
class ReportCommand:
    """Build reports again, from records alone.

    - prograde report runs/NAME: tables on the terminal, and report.html beside the records
    - prograde report --pages docs/*.md: write the reports that these pages ask for between marks
    - prograde report --pages docs/*.md --check: fail if a page differs from its records
    """

    directories: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[DIR ...]")
    ] = ()
    """Directories of records. Several of one study are shown on one page."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where report.html goes. Default: the first directory."""
    pages: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[PAGE ...]")] = ()
    """Pages of documentation, with marks that name the directories of the records."""
    check: bool = False
    """Compare the pages with the records; write nothing."""

    def __call__(self, console: "Console", errors: "Console", rest: tuple[str, ...]) -> int:
        """Shows the directories, or writes the pages."""
        from prograde.lab import store
        from prograde.lab.report import markdown
        from prograde.lab.report.terminal import say
        from prograde.lab.study import UsageError

        if bool(self.directories) == bool(self.pages):
            raise UsageError("report needs directories of records, or --pages of a documentation.")
        if self.directories:
            show(store.find(self.directories), self.out or self.directories[0], console)
            return 0
        differ = 0
        for page in self.pages:
            if self.check:
                for path in markdown.differences(page, report_of_directories):
                    say(errors, f"{path} differs from its records.")
                    differ = 1
            else:
                markdown.update(page, report_of_directories)
                say(console, f"Figures and tables are in {page}.")
        return differ


def report_of_directories(directories: list[Path]) -> "Report":
    """Makes the report of the stores in these directories."""
    from prograde.lab import store

    return report_of(store.find(directories))


def report_of(stores: "list[Store]") -> "Report":
    """Makes the report of stores, which must be of one study."""
    from prograde.lab.store import RecordError
    from prograde.lab.studies import STUDIES, study

    names: dict[str, Any] = {s.study: s.directory for s in stores}
    if len(names) > 1:
        raise RecordError(
            "the directories hold records of several studies, and a report shows one: "
            f"{', '.join(f'{name} in {directory}' for name, directory in names.items())}."
        )
    (name,) = names
    if name not in STUDIES:
        raise RecordError(
            f"{stores[0].directory}: records of {name!r}, which this version does not know."
        )
    return study(name).report(stores)


def show(stores: "list[Store]", out: Path, console: "Console") -> None:
    """Prints the report of stores, and writes it as a page."""
    from prograde.lab.report import page, terminal

    report = report_of(stores)
    terminal.print_report(report, console)
    terminal.say(console, f"Report: {page.write(report, out / 'report.html')}")
