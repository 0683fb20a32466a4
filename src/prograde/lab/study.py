"""A study: something that is measured, recorded, and shown from its records alone.

A study is a frozen dataclass, and its fields are the options of its command. It

- says which configuration decides its numbers (`configs`),
- measures into stores (`run`),
- and makes a report from stores alone (`report`).

Everything else happens once, for all studies, in `prograde.lab.cli` and the modules beside this
one: claiming and resuming a directory, Ctrl-C, exit codes, progress, and writing a report to the
terminal, to HTML and to the pages of the documentation.

To add a study, write a folder `studies/NAME/` with a `plan.py` that holds the class, and add a line
to `studies/__init__.py`.
"""

import abc
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from prograde.lab.display import Display
from prograde.lab.report import Report, Table
from prograde.lab.store import Store, plain


class UsageError(ValueError):
    """A command that cannot be carried out as given. The message says which option and why."""


class Study(abc.ABC):
    """What every study is. Subclasses are frozen dataclasses; their docstring is the help text.

    The module of a subclass must import quickly: it is imported to show the help of any command.
    Import JAX and the rest inside `run` and `report`.
    """

    name: ClassVar[str]
    """The name of the command, and of the study in the manifest of its records."""
    extra: ClassVar[str] = "lab"
    """The optional dependencies that it needs."""

    @abc.abstractmethod
    def configs(self) -> dict[str, dict[str, Any]]:
        """The configuration of each store that the study fills: directory below `--out` -> config.

        Most studies fill one store, `--out` itself, which is called ".". Raises `UsageError` for
        options that make no sense. Whatever can be refused is refused here, before anything runs.
        """

    @abc.abstractmethod
    def run(self, stores: dict[str, Store], display: Display) -> None:
        """Measures what the stores do not hold yet. The keys are those of `configs`."""

    @classmethod
    @abc.abstractmethod
    def report(cls, stores: list[Store]) -> Report:
        """Makes the report of these stores, from their records alone."""

    @classmethod
    def choices(cls) -> list[Table]:
        """Tables for `prograde list`: what the options of the study can name."""
        return []

    @property
    def label(self) -> str:
        """What the default directory of the records is called, after the date."""
        return self.name

    def prepare(self) -> None:  # noqa: B027, most studies need nothing
        """Prepares this process before JAX starts in it: its allocator, for example.

        It is called for a run alone, and not to show records.
        """

    def join(self) -> int:
        """Joins a group of processes that run the study together. Returns the number of this one.

        Process 0 talks and writes the report. The others write records of their own.
        """
        return 0

    def config(self, *without: str) -> dict[str, Any]:
        """The fields of the study, except some, as a configuration."""
        fields = dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]
        return plain({name: value for name, value in fields.items() if name not in without})

    @classmethod
    def current(cls, config: dict[str, Any]) -> dict[str, Any]:
        """A configuration of older records, as this version writes it.

        A directory is continued if its configuration, read like this, is that of the command.
        """
        return config


def directories(out: Path, configs: dict[str, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """The directory of each store below `out`."""
    return {out / name if name != "." else out: config for name, config in configs.items()}
