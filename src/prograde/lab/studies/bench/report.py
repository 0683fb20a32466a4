"""Tables, a figure and a page of the documentation from a record of `prograde bench`."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from prograde.lab import costs, figures, records
from prograde.lab.bench_methods import METHODS
from prograde.lab.report import Table

BACKPROPS = (
    "backprop",
    "backprop-unrolled",
    "checkpointed",
    "torch-backprop",
    "torch-backprop-compiled",
)
BEGIN, END = "<!-- bench: begin, written by prograde bench --markdown -->", "<!-- bench: end -->"
OURS = "prograde-1"

_TERMS = """Each figure is that of one plain SGD step, but for the forward pass alone. R is the time over that of the
forward pass alone, in JAX: all methods take turns in one run, and R is the median of the rounds' ratios, with their
quartiles in brackets. Counted is the same ratio by a count of multiply-adds (`prograde.check`), without the update. XLA temp is what XLA says a step needs beside parameters and data; RSS is how much the resident
memory of a process grows during steps. Compilation is tracing, lowering and compiling; of PyTorch, the first step through
torch.compile. The fastest backprop is the fastest of all that were measured here, of JAX and of PyTorch."""

# colours of Okabe and Ito; a family has one, PyTorch is hatched
_COLOURS = {
    "bare": "#000000",
    "prograde": "#009E73",
    "backprop": "#0072B2",
    "checkpointed": "#0072B2",
    "dense": "#D55E00",
    "jvp": "#D55E00",
    "mezo": "#E69F00",
}


def fastest_backprop(model: dict[str, Any]) -> str:
    """The method of least median ratio among those of reverse mode."""
    methods = model["methods"]
    return min((m for m in BACKPROPS if m in methods), key=lambda m: methods[m]["ratio"]["median"])


def over_backprop(model: dict[str, Any], method: str = OURS) -> dict[str, float]:
    """Time of a method over that of the fastest backprop: median and quartiles of the rounds' ratios."""
    methods = model["methods"]
    return costs.ratio_quartiles(
        methods[method]["rounds"], methods[fastest_backprop(model)]["rounds"]
    )


def _quartiles(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _megabytes(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e6:.2g}" if value < 1e7 else f"{value / 1e6:,.0f}"


def _growth(figures_of_method: dict[str, Any]) -> int | None:
    before, peak = figures_of_method.get("rss_before"), figures_of_method.get("peak_rss")
    return None if before is None or peak is None else max(peak - before, 0)


def overview(record: dict[str, Any]) -> Table:
    """One line a model: the fastest backprop, and ours over it."""
    rows = []
    for name, model in record["models"].items():
        methods, fastest, over = model["methods"], fastest_backprop(model), over_backprop(model)
        rows.append(
            [
                name,
                f"{model['parameters']:,}",
                _milliseconds(methods["bare"]["seconds"]["median"]),
                fastest,
                f"{methods[fastest]['ratio']['median']:.2f}",
                f"{methods[OURS]['ratio']['median']:.2f}",
                _quartiles(over),
                "prograde" if over["median"] < 1 else "backprop",
            ]
        )
    columns = [
        "model",
        "parameters",
        "bare, ms",
        "fastest backprop",
        "its R",
        f"R of {OURS}",
        "over it",
        "faster step",
    ]
    return Table(
        f"A step of {OURS} and of the fastest backprop ({record['rounds']} rounds)", columns, rows
    )


def model_table(record: dict[str, Any], name: str) -> Table:
    """All methods of a model."""
    model, rows = record["models"][name], []
    fastest, over = fastest_backprop(model), over_backprop(model)
    wins = "" if over["median"] < 1 else ", backprop wins"
    notes = {
        fastest: "fastest backprop",
        OURS: f"{over['median']:.2f} of the fastest backprop{wins}",
    }
    for method, found in model["methods"].items():
        seconds = found.get("compile_seconds")
        rows.append(
            [
                method,
                _milliseconds(found["seconds"]["median"]),
                _quartiles(found["ratio"]),
                f"{counted:.2f}" if (counted := found.get("counted_ratio")) else "–",
                _megabytes(found.get("temp_bytes")),
                _megabytes(_growth(found)),
                "–" if seconds is None else f"{seconds:.1f}",
                notes.get(method, ""),
            ]
        )
    columns = [
        "method",
        "ms",
        "R (quartiles)",
        "counted",
        "XLA temp, MB",
        "RSS, MB",
        "compile, s",
        "",
    ]
    if all(_growth(found) is None for found in model["methods"].values()):  # it was not measured
        columns, rows = [c for c in columns if c != "RSS, MB"], [row[:5] + row[6:] for row in rows]
    return Table(f"{model['title']}; {model['parameters']:,} parameters", columns, rows)


def conclusion(record: dict[str, Any]) -> str:
    """Who is faster where, in a sentence or two."""
    wins: dict[bool, list[str]] = {True: [], False: []}
    for name, model in record["models"].items():
        over = over_backprop(model)
        wins[over["median"] < 1].append(f"{name} ({over['median']:.2f})")
    said = []
    if wins[True]:
        said.append(
            f"A step with one rank-one tangent takes less time than the fastest backprop on {', '.join(wins[True])}."
        )
    if wins[False]:
        said.append(f"The fastest backprop takes less, or no more, on {', '.join(wins[False])}.")
    return " ".join([*said, "In brackets: its time over that of the fastest backprop."])


def print_tables(record: dict[str, Any], names: list[str], console: Console) -> None:
    """Prints the tables of these models."""
    for name in names:
        _print(model_table(record, name), console)
        for method, why in record["models"][name]["missing"].items():
            console.print(f"{name}: no {method} here ({why})", highlight=False, markup=False)


def print_overview(record: dict[str, Any], console: Console) -> None:
    """Prints who is faster where."""
    _print(overview(record), console)
    console.print(conclusion(record), highlight=False, markup=False)


def _print(table: Table, console: Console) -> None:
    shown = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for i, column in enumerate(table.columns):
        left = i == 0 or i == len(table.columns) - 1 or column == "fastest backprop"
        shown.add_column(column, no_wrap=i < 3, justify="left" if left else "right")
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)


def _colour(method: str) -> str:
    return _COLOURS[method.removeprefix("torch-").split("-")[0]]


def figure(record: dict[str, Any]) -> str:
    """A panel a model, a bar a method: R, as SVG text."""
    models = record["models"]
    rows = -(-len(models) // 2)
    with rc_context(
        figures._RC | {"hatch.linewidth": 0.6, "axes.grid.axis": "x", "axes.axisbelow": True}
    ):
        fig = Figure(figsize=(10, 0.6 + 2.9 * rows), layout="constrained")
        panels = fig.subplots(rows, 2, squeeze=False).ravel()
        for axes, (name, model) in zip(panels, models.items(), strict=False):
            _bars(axes, name, model)
        for axes in panels[len(models) :]:
            axes.set_axis_off()
        fig.suptitle(
            "time of a step over that of the bare forward pass in JAX; hatched: PyTorch", fontsize=9
        )
        buffer = io.StringIO()
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _bars(axes: Any, name: str, model: dict[str, Any]) -> None:
    methods = list(reversed(model["methods"]))
    ratios = [model["methods"][m]["ratio"] for m in methods]
    medians = np.array([r["median"] for r in ratios])
    widest = min(
        1.2 * medians.max(), 4 * np.median(medians)
    )  # what is far longer than the others is cut
    spread = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
    bars = axes.barh(
        methods, np.minimum(medians, widest), color=[_colour(m) for m in methods], height=0.75
    )
    axes.errorbar(
        medians, range(len(methods)), xerr=spread, fmt="none", ecolor="#666666", elinewidth=0.8
    )
    for bar, method in zip(bars, methods, strict=True):
        if method.startswith("torch"):
            bar.set(hatch="////", edgecolor="white")
    fastest = fastest_backprop(model)
    axes.axvline(
        model["methods"][fastest]["ratio"]["median"],
        color="#0072B2",
        linewidth=0.8,
        linestyle="--",
        zorder=0,
    )
    for i, (method, r) in enumerate(zip(methods, ratios, strict=True)):
        cut = " →" if r["median"] > widest else ""
        fits = r["high"] < 0.87 * widest
        axes.annotate(
            f"{r['median']:.2f}{cut}" + (" fastest backprop" if method == fastest else ""),
            (r["high"] if fits else widest, i),
            xytext=(4 if fits else -3, 0),
            textcoords="offset points",
            va="center",
            ha="left" if fits else "right",
            fontsize=7,
            fontweight="bold" if method in (fastest, OURS) else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    axes.set(xlim=(0, widest))
    axes.set_title(name, fontsize=9, fontweight="bold", loc="left")
    axes.tick_params(axis="y", length=0, labelsize=7.5)


def made_on(record: dict[str, Any]) -> str:
    """Where the numbers come from, in a sentence."""
    e = record["environment"]
    dirty = " with local changes" if e["git_dirty"] else ""
    versions = {model["torch"]["version"] for model in record["models"].values() if model["torch"]}
    torch = f"PyTorch {', '.join(sorted(versions))}" if versions else "no PyTorch"
    flags = f" XLA_FLAGS: {e['xla_flags']}." if e["xla_flags"] else ""
    return (
        f"Made on {e['processor']}, {e['cores']} cores, jax {e['versions']['jax']}, {torch}, commit "
        f"{(e['git_commit'] or 'unknown')[:10]}{dirty}, {e['started'][:10]}; {record['rounds']} rounds.{flags}"
    )


def markdown(record: dict[str, Any], picture: str) -> str:
    """What stands between the marks of the page; `picture` is the address of the figure."""

    def lines(table: Table) -> str:
        rows = [table.columns, ["---"] * len(table.columns), *table.rows]
        return f"**{table.title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)

    listed = "\n".join(f"- `{name}`: {title}" for name, title in METHODS.items())
    parts = [
        conclusion(record),
        lines(overview(record)),
        f"![time of a step by method]({picture})",
        _TERMS.replace("\n", " "),
        listed,
    ]
    for name, model in record["models"].items():
        parts.append(f"## {name}\n\n{lines(model_table(record, name))}")
        parts += [f"No `{method}` here: {why}" for method, why in model["missing"].items()]
    return "\n\n".join([*parts, f"*{made_on(record)}*"])


def write_markdown(record: dict[str, Any], page: Path) -> None:
    """Writes tables and figure into a page, between its marks, the figure into a directory of the page's name beside it."""
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise records.RecordError(
            f"{page} exists and lacks the marks between which tables go: {BEGIN} and {END}."
        )
    picture = page.with_suffix("") / "overview.svg"
    records.write(picture, figure(record).encode())
    before, rest = text.split(BEGIN)
    body = markdown(record, f"{picture.parent.name}/{picture.name}")
    records.write(page, f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.split(END)[1]}".encode())
