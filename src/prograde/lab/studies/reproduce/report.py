"""The report: tables and figures from records alone, as one self-contained page, on the terminal, or for the docs."""

import html
import json
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from prograde.lab import records
from prograde.lab.experiments import METHOD_TITLES, Experiment
from prograde.lab.figures import figure
from prograde.lab.models import Surface
from prograde.lab.summary import Outcome, Spread, Summary, find

_INTRODUCTION = (
    "Training by forward gradients, beside backprop: the experiments of “Gradients without Backpropagation” "
    "(arXiv 2202.08587), run again. Figures marked “reported” are the paper's, at second hand; all others were measured here."
)
_TERMS = """R is the time of a full training step over that of a bare forward pass on the same batches: all methods take turns
in one run, and R is the median of the rounds' ratios. T is the time a method takes to reach the best held-out loss of backprop,
over the time backprop takes, both at the same setting; time is steps times the measured median cost of a step, T is the
median over the seeds; “> x” means that the median seed does not get there in a run of x times backprop's time (all methods run
for the same number of steps). “paper” is the paper's
learning rate, the same for all methods; “tuned” is a rate found for each method by a search of the same budget. Held-out is
the data's test part; the search uses a validation part taken from the training data. All runs are plain SGD with the rate
eta_0 exp(-1e-4 t). Losses are means over seeds, with the least and the greatest."""


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    unbroken: int = 2  # columns whose cells stay on a line of a terminal


def spread_text(spread: Spread | None, percent: bool = False) -> str:
    """Mean, and where there are several, the least and the greatest."""
    if spread is None:
        return "–"
    low, mean, high = (
        f"{100 * v:.1f}" if percent else f"{v:.3g}" for v in (spread.low, spread.mean, spread.high)
    )
    unit = " %" if percent else ""
    return f"{mean}{unit}" if spread.n == 1 or low == high else f"{mean}{unit} ({low} to {high})"


def mebibytes(value: int | None) -> str:
    """A number of bytes in MiB."""
    return "–" if value is None else f"{value / 2**20:,.1f}"


def ratio_text(outcome: Outcome) -> str:
    """T, or what it exceeds."""
    if outcome.method == "backprop":
        return "1"
    if not outcome.compared:
        return "–"
    seeds = (
        f" ({outcome.reached} of {outcome.compared} seeds)"
        if outcome.reached < outcome.compared
        else ""
    )
    if outcome.time_ratio is not None:
        return f"{outcome.time_ratio:.2f}{seeds}"
    return (
        f"> {outcome.time_bound:.2f}{seeds}"
        if outcome.time_bound is not None
        else f"diverged{seeds}"
    )


def _reported_ratio(experiment: Experiment, outcome: Outcome) -> str:
    rates = dict(zip(experiment.paper_rates, experiment.reported.t_ratio, strict=False))
    if (
        outcome.method != "forward"
        or outcome.setting == "tuned"
        or outcome.learning_rate not in rates
    ):
        return ""
    return f"{rates[outcome.learning_rate]:g}"


def training_table(summary: Summary) -> Table:
    """What each method reached at each setting."""
    rows = []
    for o in summary.outcomes:
        ended = f"{o.finished} of {len(o.runs)}" if o.finished < len(o.runs) else str(len(o.runs))
        diverged = (
            f"; {len(o.diverged)} diverged, first at step {min(step for _, step in o.diverged)}"
            if o.diverged
            else ""
        )
        rows.append(
            [
                o.setting,
                o.method,
                f"{o.learning_rate:.2g}",
                spread_text(o.final_loss),
                spread_text(o.final_accuracy, percent=True),
                ratio_text(o),
                _reported_ratio(summary.experiment, o),
                ended + diverged,
            ]
        )
    columns = ["setting", "method", "rate", "held-out loss", "accuracy", "T", "reported", "seeds"]
    if isinstance(summary.experiment.subject, Surface):
        keep = [i for i, c in enumerate(columns) if c not in ("accuracy", "T", "reported")]
        columns, rows = [columns[i] for i in keep], [[row[i] for i in keep] for row in rows]
        columns[columns.index("held-out loss")] = "final f"
    return Table(f"{summary.experiment.title}: what was reached", columns, rows)


def cost_table(summary: Summary) -> Table:
    """What a step of each method costs."""
    reported = {
        "forward": summary.experiment.reported.r_f,
        "backprop": summary.experiment.reported.r_b,
    }
    rows = []
    for method, cost in summary.costs.items():
        seconds, ratio, memory = cost["seconds"], cost["ratio"], summary.memory.get(method, {})
        rss = (memory.get("peak_rss"), memory.get("rss_before"))
        rows.append(
            [
                method,
                f"{1e3 * seconds['median']:.3g} ({1e3 * seconds['low']:.3g} to {1e3 * seconds['high']:.3g})",
                f"{ratio['median']:.2f}",
                f"{reported[method]:g}" if reported.get(method) else "",
                mebibytes(memory.get("temp_bytes")),
                mebibytes(rss[0]),
            ]
        )
    columns = ["method", "ms a step (quartiles)", "R", "reported", "XLA temp, MiB", "peak RSS, MiB"]
    if not summary.memory:
        columns, rows = columns[:3], [row[:3] for row in rows]
    n = next(iter(summary.costs.values()))["seconds"]["n"]
    return Table(f"{summary.experiment.title}: cost of a step ({n} rounds)", columns, rows)


def depth_tables(summary: Summary) -> list[Table]:
    """Cost against depth, and memory against depth."""
    methods = [m for m in METHOD_TITLES if m != "bare"]
    times, memories = [], []
    for depth, figures in sorted(summary.depths.items()):
        ratio = {m: figures["costs"][m]["ratio"]["median"] for m in methods}
        bare = f"{1e3 * figures['costs']['bare']['seconds']['median']:.3g}"
        quotients = [f"{ratio[m] / ratio['backprop']:.2f}" for m in ("forward", "low-rank")]
        times.append([str(depth), bare, *(f"{ratio[m]:.2f}" for m in methods), *quotients])
        memory = figures["memory"]
        memories.append(
            [
                str(depth),
                *(mebibytes(memory[m]["temp_bytes"]) for m in METHOD_TITLES),
                *(mebibytes(memory[m]["peak_rss"]) for m in METHOD_TITLES),
            ]
        )
    rounds = next(iter(summary.depths.values()))["costs"]["bare"]["seconds"]["n"]
    reported = f"reported: {summary.experiment.reported.note}"
    time_columns = [
        "layers",
        "bare, ms",
        *(f"R {m}" for m in methods),
        "forward/backprop",
        "low-rank/backprop",
    ]
    memory_columns = [
        "layers",
        *(f"temp {m}" for m in METHOD_TITLES),
        *(f"RSS {m}" for m in METHOD_TITLES),
    ]
    return [
        Table(f"{summary.experiment.title} ({rounds} rounds; {reported})", time_columns, times),
        Table(
            "Memory of a step, MiB: what XLA needs beside arguments, and peak RSS of a process",
            memory_columns,
            memories,
        ),
    ]


def tables(summary: Summary) -> list[Table]:
    """All tables of an experiment."""
    if summary.depths:
        return depth_tables(summary)
    found = [training_table(summary)] if summary.outcomes else []
    return [*found, *([cost_table(summary)] if summary.costs else [])]


def _conclusion(summary: Summary) -> str:
    """Agreement and disagreement with the paper in words, from the figures."""
    if summary.depths:
        return _depth_conclusion(summary)
    if isinstance(summary.experiment.subject, Surface):
        return _surface_conclusion(summary)
    said, reported = [], summary.experiment.reported
    if summary.costs and reported.r_f and reported.r_b:
        r = {m: c["ratio"]["median"] for m, c in summary.costs.items()}
        said.append(
            f"The paper's estimator costs {r['forward']:.2f} bare forward passes here (reported {reported.r_f:g}), backprop "
            f"{r['backprop']:.2f} (reported {reported.r_b:g}), the rank-one tangent {r['low-rank']:.2f}."
        )
        confirmed = "confirmed" if r["forward"] < r["backprop"] else "not confirmed"
        share = {
            m: f"{r[m] / r['backprop']:.2f} of a backprop step" for m in ("forward", "low-rank")
        }
        said.append(
            f"That a dense forward-gradient step is cheaper than a backprop step is {confirmed}: it takes {share['forward']}; "
            f"the rank-one step takes {share['low-rank']}."
        )
    for o in summary.outcomes:
        claim = _reported_ratio(summary.experiment, o)
        if claim and o.compared:
            said.append(
                f"At rate {o.learning_rate:g} (reported T {claim}), {_reached(o)}: {_verdict(o)}."
            )
        elif o.setting == "tuned" and o.method != "backprop" and o.compared:
            said.append(f"With both tuned, {o.method}: {_reached(o)}.")
        if o.diverged:
            said.append(_divergence(o))
    return " ".join(said)


def _reached(o: Outcome) -> str:
    if o.time_ratio is not None:
        return f"T is {o.time_ratio:.2f}"
    if o.time_bound is not None:
        return f"backprop's best loss was not reached in a run of {o.time_bound:.2f} times backprop's time"
    return "backprop's best loss was not reached before the run diverged"


def _verdict(o: Outcome) -> str:
    if o.time_ratio is not None:
        return (
            "this agrees with a T below 1"
            if o.time_ratio < 1
            else "this disagrees with a T below 1"
        )
    if o.time_bound is not None and o.time_bound < 1:
        return "this does not decide whether T is below 1"
    return "this disagrees with a T below 1"


def _divergence(o: Outcome) -> str:
    first = min(step for _, step in o.diverged)
    return f"{o.method} at its {o.setting} rate diverged in {len(o.diverged)} of {o.finished} seeds, first at step {first}."


def _surface_conclusion(summary: Summary) -> str:
    said = []
    finals = {(o.setting, o.method): o.final_loss for o in summary.outcomes}
    for setting in dict.fromkeys(o.setting for o in summary.outcomes):
        forward, backprop = finals.get((setting, "forward")), finals.get((setting, "backprop"))
        if forward and backprop:
            said.append(
                f"At the {setting} rate, forward gradients end at f = {forward.mean:.2g} (mean of {forward.n}; "
                f"{forward.low:.2g} to {forward.high:.2g}), gradient descent at {backprop.mean:.2g}."
            )
    said += [_divergence(o) for o in summary.outcomes if o.diverged]
    return " ".join(said)


def _depth_conclusion(summary: Summary) -> str:
    least, most = min(summary.depths), max(summary.depths)

    def ratio(method: str, depth: int) -> float:
        costs = summary.depths[depth]["costs"]
        return costs[method]["ratio"]["median"] / costs["backprop"]["ratio"]["median"]

    def temp(method: str, depth: int) -> str:
        return mebibytes(summary.depths[depth]["memory"][method]["temp_bytes"])

    def range_of(method: str) -> str:
        found = [summary.depths[d]["costs"][method]["ratio"]["median"] for d in summary.depths]
        return f"{min(found):.1f} to {max(found):.1f}"

    low_rank = [ratio("low-rank", d) for d in summary.depths]
    return (
        f"Reported: {summary.experiment.reported.note}. Here R_f of the paper's estimator is {range_of('forward')}, R_b is "
        f"{range_of('backprop')}, and R of the rank-one tangent {range_of('low-rank')}, {min(low_rank):.2f} to {max(low_rank):.2f} of "
        f"R_b. "
        f"The paper's estimator takes {ratio('forward', least):.1f} times as long as backprop at {least} layers and "
        f"{ratio('forward', most):.1f} times at {most}; the rank-one tangent {ratio('low-rank', least):.2f} and "
        f"{ratio('low-rank', most):.2f} times. From {least} to {most} layers the temporary memory of a rank-one step goes from "
        f"{temp('low-rank', least)} to {temp('low-rank', most)} MiB, of backprop from {temp('backprop', least)} to "
        f"{temp('backprop', most)}, of the dense tangent from {temp('forward', least)} to {temp('forward', most)}."
    )


def build(directories: list[Path], out: Path) -> Path:
    """Writes `report.html` into `out`, from the records in `directories`; returns its path."""
    summaries = find(directories)
    sections = "\n".join(_section(s) for s in summaries)
    contents = " · ".join(
        f'<a href="#{s.experiment.name}">{html.escape(s.experiment.title)}</a>' for s in summaries
    )
    page = PAGE.format(
        introduction=html.escape(_INTRODUCTION),
        terms=html.escape(_TERMS),
        contents=contents,
        sections=sections,
    )
    path = out / "report.html"
    records.write(path, page.encode())
    return path


def _section(summary: Summary) -> str:
    parts = [
        f'<section id="{summary.experiment.name}"><h2>{html.escape(summary.experiment.title)}</h2>'
    ]
    if conclusion := _conclusion(summary):
        parts.append(f"<p>{html.escape(conclusion)}</p>")
    if svg := figure(summary):
        parts.append(
            f'<figure role="img" aria-label="{html.escape(summary.experiment.title)}">{svg}</figure>'
        )
    parts += [html_table(table) for table in tables(summary)]
    parts.append(
        f"<p class=small>{html.escape(_made_on(summary))}</p>"
        f"<details><summary>Manifest</summary><pre>{html.escape(json.dumps(summary.manifest, indent=1))}</pre></details></section>"
    )
    return "\n".join(parts)


def html_table(table: Table) -> str:
    """A table of a page."""

    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in table.rows)
    return (
        f"<div class=wide><table><caption>{html.escape(table.title)}</caption><thead>{row(table.columns, 'th')}</thead>\n"
        f"<tbody>{body}</tbody></table></div>"
    )


def print_table(table: Table, console: Console) -> None:
    """Prints one table on the terminal."""
    rich_table = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for i, column in enumerate(table.columns):
        rich_table.add_column(column, overflow="fold", no_wrap=i < table.unbroken)
    for row in table.rows:
        rich_table.add_row(*row)
    console.print(rich_table)


def print_tables(summaries: list[Summary], console: Console) -> None:
    """Prints the tables and what they say on the terminal."""
    for summary in summaries:
        for table in tables(summary):
            print_table(table, console)
        if conclusion := _conclusion(summary):
            console.print(conclusion, highlight=False, markup=False)
        console.print()


_BEGIN, _END = (
    "<!-- records: begin, written by prograde report --markdown -->",
    "<!-- records: end -->",
)


def write_markdown(directories: list[Path], page: Path) -> None:
    """Writes tables and figures into a page of the documentation, between its two marks; the rest of the page stays.

    A page that does not exist is made; figures go into a directory beside the page, of its name.
    """
    figures = page.with_suffix("")
    parts = [_TERMS.replace("\n", " ")]
    for summary in find(directories):
        name = summary.experiment.name
        parts.append(f"## {summary.experiment.title}\n\n{_conclusion(summary)}")
        if svg := figure(summary):
            records.write(figures / f"{name}.svg", svg.encode())
            parts.append(f"![{summary.experiment.title}]({figures.name}/{name}.svg)")
        for table in tables(summary):
            lines = [table.columns, ["---"] * len(table.columns), *table.rows]
            parts.append(
                f"**{table.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
            )
        parts.append(f"*{_made_on(summary)}*")
    text = page.read_text() if page.exists() else f"{_BEGIN}\n{_END}\n"
    if text.count(_BEGIN) != 1 or text.count(_END) != 1:
        raise records.RecordError(
            f"{page} exists and lacks the marks between which tables go: {_BEGIN} and {_END}."
        )
    before, rest = text.split(_BEGIN)
    body = "\n\n".join(parts)
    records.write(page, f"{before}{_BEGIN}\n\n{body}\n\n{_END}{rest.split(_END)[1]}".encode())


def _made_on(summary: Summary) -> str:
    """Where the numbers come from, in a sentence."""
    config = summary.manifest["config"]
    places = []
    for e in summary.manifest["environments"]:
        dirty = " with local changes" if e["git_dirty"] else ""
        commit = f"commit {(e['git_commit'] or 'unknown')[:10]}{dirty}"
        places.append(
            f"{e['processor']}, {e['cores']} cores, jax {e['versions']['jax']}, {commit}, {e['started'][:10]}"
        )
    data = f" Data: {config['data']['name']}." if config.get("data") else ""
    flags = summary.manifest["environments"][0]["xla_flags"]
    flags = f" XLA_FLAGS: {flags}." if flags else ""
    trials = []
    for method, found in summary.searches.items():
        rates = [trial["learning_rate"] for trial in found["trials"]]
        edge = " (the edge of the search)" if found["best"] in (min(rates), max(rates)) else ""
        trials.append(
            f"{method} {found['best']:.2g}{edge} of {len(rates)} trials of {found['steps']} steps"
        )
    search = f" Rates found: {'; '.join(trials)}." if trials else ""
    return f"Made on {'; then on '.join(dict.fromkeys(places))}.{data}{flags}{search}"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>prograde: report</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ margin-bottom: .3rem; }} h2 {{ margin-top: 2.5rem; border-top: 2px solid #1a1a1a; padding-top: .5rem; }}
figure {{ margin: 1rem 0; }} figure svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-size: 13px; margin: 1rem 0; width: 100%; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; font-weight: 600; padding-bottom: .3rem; }}
th, td {{ text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }}
thead th {{ border-bottom: 2px solid #888; }} .wide {{ overflow-x: auto; }}
.small, pre {{ font-size: 12px; color: #555; }} pre {{ white-space: pre-wrap; }}
@media print {{ body {{ max-width: none; margin: 0; font-size: 11px; }} table {{ font-size: 9px; }} section {{ break-inside: auto; }}
  figure, tr {{ break-inside: avoid; }} h2 {{ break-after: avoid; }} details {{ display: none; }} }}
</style></head><body>
<h1>Training without backpropagation</h1>
<p>{introduction}</p>
<p class=small>{contents}</p>
<details open><summary>How to read the tables</summary><p class=small>{terms}</p></details>
{sections}
</body></html>
"""
