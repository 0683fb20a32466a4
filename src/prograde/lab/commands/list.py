"""`prograde list`: shows the names that options of studies accept."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class List:
    """List the studies and the names that options accept: experiments, models, estimators."""

    def __call__(self, console: "Console", errors: "Console", rest: tuple[str, ...]) -> int:
        """Prints a table of the studies, and the tables of each study."""
        from prograde.lab.extras import install
        from prograde.lab.report import Table
        from prograde.lab.report.terminal import print_table, say
        from prograde.lab.studies import STUDIES, study

        rows = []
        for name in STUDIES:
            first, *_ = (study(name).__doc__ or "").strip().splitlines()
            rows.append([name, first])
        print_table(Table("Studies", ["name", "what it does"], rows, unbroken=1), console)
        for name in STUDIES:
            try:
                tables = study(name).choices()
            except ImportError as error:
                extra = study(name).extra
                say(console, f"{name}: needs {error.name}. {install(extra)}")
                continue
            for table in tables:
                print_table(table, console)
        return 0
