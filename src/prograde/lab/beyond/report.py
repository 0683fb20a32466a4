"""Tables and pictures of `prograde beyond`, from records alone: on the terminal, as one page, or for the docs."""

import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console

from prograde.lab import figures, records, report
from prograde.lab.beyond.experiment import Experiment
from prograde.lab.beyond.run import find

_INTRODUCTION = (
    "Problems on which forward gradients are the only way, or plainly the better one: programs with loops of unknown length, long "
    "horizons, streams, hyperparameters. Backprop stands beside them with the fastest settings and the best checkpointing found; where it "
    "wins, it says so."
)
_TERMS = (
    "Programs whose time is given take turns in one run, round by round, each round in another order; times are medians, and a ratio to the "
    "bare run is the median of the rounds' own ratios. Methods that learn for a given time run one after the other. Memory is what XLA plans for temporaries, beside arguments and results."
)
_BEGIN, _END = "<!-- {}: begin, written by prograde beyond --markdown -->", "<!-- {}: end -->"


def picture(experiment: Experiment, record: dict[str, Any]) -> str:
    """The figure of an experiment as SVG text."""
    with matplotlib.rc_context(figures._RC):
        figure = Figure(layout="constrained")
        experiment.draw(record["figures"], figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def made_on(record: dict[str, Any]) -> str:
    """Where the numbers come from, in a sentence."""
    e = record["environment"]
    dirty = " with local changes" if e["git_dirty"] else ""
    length = "full" if record["full"] else "quick"
    return (
        f"Made on {e['processor']}, {e['cores']} cores, jax {e['versions']['jax']}, commit {(e['git_commit'] or 'unknown')[:10]}{dirty}, "
        f"{e['started'][:10]}; {length}, {record['seconds']:.0f} s."
    )


def print_all(directory: Path, console: Console) -> None:
    """Prints tables and what they say."""
    for experiment, record in find(directory):
        for table in experiment.tables(record["figures"]):
            report.print_table(table, console)
        console.print(experiment.conclusion(record["figures"]), highlight=False, markup=False)
        console.print()


def build(directory: Path) -> Path:
    """Writes `report.html` beside the records; returns its path."""
    found = find(directory)
    contents = " · ".join(f'<a href="#{e.name}">{html.escape(e.title)}</a>' for e, _ in found)
    page = report.PAGE.format(
        introduction=html.escape(_INTRODUCTION),
        terms=html.escape(_TERMS),
        contents=contents,
        sections="\n".join(_section(*each) for each in found),
    )
    path = directory / "report.html"
    records.write(path, page.encode())
    return path


def _section(experiment: Experiment, record: dict[str, Any]) -> str:
    title = html.escape(experiment.title)
    return "\n".join(
        [
            f'<section id="{experiment.name}"><h2>{title}</h2>',
            f"<p>{html.escape(experiment.conclusion(record['figures']))}</p>",
            f'<figure role="img" aria-label="{title}">{picture(experiment, record)}</figure>',
            *(report.html_table(table) for table in experiment.tables(record["figures"])),
            f"<p class=small>{html.escape(made_on(record))}</p>",
            f"<details><summary>Record</summary><pre>{html.escape(json.dumps(record['environment'], indent=1))}</pre></details></section>",
        ]
    )


def markdown(experiment: Experiment, record: dict[str, Any], address: str) -> str:
    """What stands between the marks of a page; `address` is that of the picture."""
    parts = [experiment.conclusion(record["figures"]), f"![{experiment.title}]({address})"]
    for table in experiment.tables(record["figures"]):
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        parts.append(
            f"**{table.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        )
    return "\n\n".join([*parts, f"*{made_on(record)}*"])


def write_markdown(directory: Path, page: Path) -> None:
    """Writes what each experiment found between its marks on a page, and its picture into a directory of the page's name beside it."""
    text = page.read_text()
    for experiment, record in find(directory):
        begin, end = _BEGIN.format(experiment.name), _END.format(experiment.name)
        if text.count(begin) != 1 or text.count(end) != 1:
            raise records.RecordError(
                f"{page} lacks the marks between which {experiment.name} goes: {begin} and {end}."
            )
        file = page.with_suffix("") / f"{experiment.name}.svg"
        records.write(file, picture(experiment, record).encode())
        before, rest = text.split(begin)
        body = markdown(experiment, record, f"{file.parent.name}/{file.name}")
        text = f"{before}{begin}\n\n{body}\n\n{end}{rest.split(end)[1]}"
    records.write(page, text.encode())
