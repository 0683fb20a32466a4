"""The report of `prograde bench`, from records alone."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from prograde.lab.measure.timing import ratio_quartiles
from prograde.lab.report import Figure, Report, Section, Table, figures
from prograde.lab.report.words import (
    BUSY,
    MISSING,
    made_on,
    megabytes,
    milliseconds,
    quartiles,
    unsteady,
    warning,
)
from prograde.lab.store import Store
from prograde.lab.studies.bench import MODELS, WIDE
from prograde.lab.studies.bench.methods import METHODS

Model = dict[str, Any]  # the record of a model

BACKPROPS = (
    "backprop",
    "backprop-unrolled",
    "checkpointed",
    "torch-backprop",
    "torch-backprop-compiled",
)
OURS = "prograde-1"
IN_BLOCKS = "blocks-1"
_RSS = "RSS, MB"

_INTRODUCTION = (
    "What one training step costs by each method, in time, memory and compilation. Backprop runs "
    "with the fastest settings known to us."
)
_TERMS = (
    "Every figure is of one plain SGD step; only the bare pass has no update. R is the time over "
    "that of the bare forward pass in JAX. All methods take turns in one run, and R is the median "
    "of the rounds' own ratios, with their quartiles in brackets. Counted is the same ratio by a "
    "count of multiply-adds (`prograde.check`), without the update. XLA temp is what XLA says a "
    "step needs in addition to parameters and data. RSS is how much the resident memory of a "
    "process grows during steps. Compilation is tracing, lowering and compiling; for PyTorch it is "
    "the first step through torch.compile. The fastest backprop is the fastest of all that were "
    "measured here, in JAX and in PyTorch."
)
# colours by family; bars of PyTorch are hatched
_COLOURS = {
    "bare": figures.BLACK,
    "prograde": figures.GREEN,
    "blocks": figures.GREEN,
    "backprop": figures.BLUE,
    "checkpointed": figures.BLUE,
    "dense": figures.ORANGE,
    "jvp": figures.ORANGE,
    "mezo": figures.YELLOW,
}


def report(stores: list[Store]) -> Report:
    """Shows each store in an overview, the list of methods, and a section for each model."""
    sections = [section for store in stores for section in _sections(store, len(stores) > 1)]
    return Report("What a training step costs", _INTRODUCTION, _TERMS, sections)


def models_of(store: Store) -> dict[str, Model]:
    """The records of a store by the name of the model, in the order of `MODELS`."""
    return {name: store.read(name) for name in (*MODELS, *WIDE) if name in store}


def fastest_backprop(model: Model) -> str:
    """Returns the method of reverse mode with the least median ratio."""
    methods = model["methods"]
    return min((m for m in BACKPROPS if m in methods), key=lambda m: methods[m]["ratio"]["median"])


def over_backprop(model: Model, method: str = OURS) -> dict[str, float]:
    """Returns time over that of the fastest backprop: median and quartiles over rounds."""
    methods = model["methods"]
    return ratio_quartiles(methods[method]["rounds"], methods[fastest_backprop(model)]["rounds"])


def conclusion(models: dict[str, Model]) -> str:
    """Says which step is faster on which model. Times from a busy machine do not count."""
    wins: dict[bool, list[str]] = {True: [], False: []}
    busy = []
    for name, model in models.items():
        over = over_backprop(model)["median"]
        disturbed = (model.get("busy") or 0.0) > BUSY
        (busy if disturbed else wins[over < 1]).append(f"{name} ({over:.2f})")
    said = []
    if wins[True]:
        said.append(
            "A step with one rank-one tangent takes less time than the fastest backprop on "
            f"{', '.join(wins[True])}."
        )
    if wins[False]:
        said.append(f"The fastest backprop takes less, or no more, on {', '.join(wins[False])}.")
    if busy:
        said.append(f"Nothing is said of {', '.join(busy)}: the machine was busy with other work.")
    if not said:
        return "No model has been measured yet."
    return " ".join([*said, "In brackets: its time over that of the fastest backprop."])


def overview_table(models: dict[str, Model], rounds: int) -> Table:
    """Makes a table of the models: the fastest backprop, and our time over its time."""
    rows = []
    for name, model in models.items():
        methods, fastest, over = model["methods"], fastest_backprop(model), over_backprop(model)
        rows.append(
            [
                name,
                f"{model['parameters']:,}",
                milliseconds(methods["bare"]["seconds"]["median"]),
                fastest,
                f"{methods[fastest]['ratio']['median']:.2f}",
                f"{methods[OURS]['ratio']['median']:.2f}",
                quartiles(over),
                quartiles(over_backprop(model, IN_BLOCKS)) if IN_BLOCKS in methods else MISSING,
                "prograde" if over["median"] < 1 else "backprop",
            ]
        )
    columns = ["model", "parameters", "bare, ms", "fastest backprop", "its R", f"R of {OURS}"]
    columns += ["over it", "one block over it", "faster step"]
    if not any(IN_BLOCKS in model["methods"] for model in models.values()):
        i = columns.index("one block over it")
        columns, rows = columns[:i] + columns[i + 1 :], [row[:i] + row[i + 1 :] for row in rows]
    title = f"A step of {OURS} and of the fastest backprop ({rounds} rounds)"
    return Table(title, columns, rows, unbroken=4)


def methods_table() -> Table:
    """Makes the table of the methods."""
    return Table("Methods of prograde bench", ["name", "method"], list(map(list, METHODS.items())))


def model_table(model: Model) -> Table:
    """Makes the table of all methods of a model."""
    fastest, over = fastest_backprop(model), over_backprop(model)
    wins = "" if over["median"] < 1 else ", backprop wins"
    notes = {
        fastest: "fastest backprop",
        OURS: f"{over['median']:.2f} of the fastest backprop{wins}",
    }
    if IN_BLOCKS in model["methods"]:
        in_blocks = over_backprop(model, IN_BLOCKS)["median"]
        notes[IN_BLOCKS] = f"{in_blocks:.2f} of the fastest backprop"
    rows = []
    for method, found in model["methods"].items():
        counted, seconds = found.get("counted_ratio"), found.get("compile_seconds")
        rows.append(
            [
                method,
                milliseconds(found["seconds"]["median"]),
                quartiles(found["ratio"]),
                f"{counted:.2f}" if counted else MISSING,
                megabytes(found.get("temp_bytes")),
                megabytes(_growth(found)),
                MISSING if seconds is None else f"{seconds:.1f}",
                notes.get(method, ""),
            ]
        )
    columns = ["method", "ms", "R (quartiles)", "counted", "XLA temp, MB", _RSS, "compile, s", ""]
    if all(_growth(found) is None for found in model["methods"].values()):  # it was not measured
        i = columns.index(_RSS)
        columns, rows = columns[:i] + columns[i + 1 :], [row[:i] + row[i + 1 :] for row in rows]
    return Table(f"{model['title']}; {model['parameters']:,} parameters", columns, rows, unbroken=3)


def _growth(found: dict[str, Any]) -> int | None:
    before, peak = found.get("rss_before"), found.get("peak_rss")
    return None if before is None or peak is None else max(peak - before, 0)


def _sections(store: Store, several: bool) -> list[Section]:
    models, manifest = models_of(store), store.manifest
    label = store.directory.resolve().name
    rounds = store.config["rounds"]
    versions = {model["torch"]["version"] for model in models.values() if model["torch"]}
    torch = f"PyTorch {', '.join(sorted(versions))}" if versions else "No PyTorch"
    content: list[Any] = [conclusion(models)]
    if models:
        title = "time of a step by method"
        content += [
            overview_table(models, rounds),
            Figure(label, title, lambda canvas: _draw(models, canvas)),
            methods_table(),
        ]
    prefix, of = (f"{label}-", f" ({label})") if several else ("", "")
    made = made_on(manifest, f"{torch}; {rounds} rounds.")
    overview = Section(f"{prefix}overview", f"Overview{of}", content, made, manifest)
    return [
        overview,
        *(
            Section(f"{prefix}{name}", f"{name}{of}", _model_content(model))
            for name, model in models.items()
        ),
    ]


def _model_content(model: Model) -> list[Any]:
    ratios = {name: found["ratio"] for name, found in model["methods"].items()}
    missing = [f"No `{method}` here: {why}" for method, why in model["missing"].items()]
    doubts = filter(None, [warning(model.get("busy")), unsteady(ratios)])
    return [model_table(model), *missing, *doubts]


def _draw(models: dict[str, Model], canvas: Canvas) -> None:
    """Draws a panel for each model, with a bar for each method."""
    rows = -(-len(models) // 2)
    canvas.set_size_inches(10, 0.6 + 2.9 * rows)
    panels = canvas.subplots(rows, 2, squeeze=False).ravel()
    for axes, (name, model) in zip(panels, models.items(), strict=False):
        _bars(axes, name, model)
    for axes in panels[len(models) :]:
        axes.set_axis_off()
    title = "time of a step over that of the bare forward pass in JAX; hatched: PyTorch"
    canvas.suptitle(title, fontsize=9)


def _bars(axes: Any, name: str, model: Model) -> None:
    methods = list(reversed(model["methods"]))
    ratios = [model["methods"][m]["ratio"] for m in methods]
    medians = np.array([r["median"] for r in ratios])
    # cuts bars that are far longer than the others
    widest = min(1.2 * medians.max(), 4 * np.median(medians))
    spread = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
    colours = [_COLOURS[m.removeprefix("torch-").split("-")[0]] for m in methods]
    bars = axes.barh(methods, np.minimum(medians, widest), color=colours, height=0.75)
    positions = range(len(methods))
    axes.errorbar(medians, positions, xerr=spread, fmt="none", ecolor="#666666", elinewidth=0.8)
    for bar, method in zip(bars, methods, strict=True):
        if method.startswith("torch"):
            bar.set(hatch="////", edgecolor="white")
    fastest = fastest_backprop(model)
    least = model["methods"][fastest]["ratio"]["median"]
    axes.axvline(least, color=figures.BLUE, linewidth=0.8, linestyle="--", zorder=0)
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
    axes.grid(visible=False, axis="y")
    axes.set_title(name, fontsize=9, fontweight="bold", loc="left")
    axes.tick_params(axis="y", length=0, labelsize=7.5)
