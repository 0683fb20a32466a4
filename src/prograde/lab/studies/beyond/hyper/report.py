"""What `prograde beyond hyper` shows of its figures."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

from prograde.lab.report import Table
from prograde.lab.report.words import milliseconds_spread, size
from prograde.lab.studies.beyond.hyper.run import _STYLE, BACKPROP, CHECKPOINTED, OURS

TITLE = "Hypergradients through a whole training run"
TARGET_ERROR, TARGET_MEMORY = 1e-5, 0.1


def tables(record: dict[str, Any]) -> list[Table]:
    """Makes the tables of the figures."""
    rows = []
    for steps, of in record["long"].items():
        for method, at in of["methods"].items():
            error = [
                f"{of['errors'][p]:.0e}" if method == OURS else "" for p in ("float32", "float64")
            ]
            part = at["temp_bytes"] / of["methods"][BACKPROP]["temp_bytes"]
            cells = [
                f"{int(steps):,}",
                method.removeprefix("backprop, "),
                milliseconds_spread(at["seconds"]),
                f"{at['ratio']['median']:.2f}",
            ]
            rows.append([*cells, size(at["temp_bytes"]), f"{part:.3f}", *error])
    columns = ["steps", "method", "ms", "/ run", "XLA temp", "/ rev."]
    errors = ["float32", "float64"]
    found = [
        Table(
            "Hypergradient in 8 hyperparameters of a training run; time over that of the run, "
            "memory over that of backprop, and distance from its gradient",
            [*columns, *errors],
            rows,
        )
    ]
    at, rows = record["tuning"], []
    start = at["start"]
    rows.append(
        [
            "not tuned",
            "1",
            "",
            f"{start['validation']:.3f}",
            f"{start['loss']:.3f}",
            f"{100 * start['accuracy']:.1f}",
        ]
    )
    for name, runs in at["runs"].items():
        column = lambda key, runs=runs: [run[key] for run in runs]  # noqa: E731
        seconds, accuracy = np.median(column("seconds")), 100 * np.median(column("accuracy"))
        trained = int(np.median([len(run["curve"]) for run in runs]))
        rows.append(
            [
                name,
                f"{trained:,}",
                f"{seconds:.2f}",
                _median(column("validation")),
                _median(column("loss")),
                f"{accuracy:.1f}",
            ]
        )
    columns = ["tuned by", "runs", "s", "held-out loss", "test loss", "test, %"]
    n = len(at["runs"]["hypergradient"])
    title = (
        f"Eight hyperparameters of a run of {record['plan']['run_steps']} steps; "
        f"{n} starts, median (range); test accuracy"
    )
    found.append(Table(title, columns, rows, unbroken=len(columns)))
    at, rows = record["cleaning"], []
    everything = {"equal weights": at["start"] | {"meta_steps": 0}, **at["methods"]}
    for name, of in everything.items():
        cost = at["costs"].get(name)
        cells = [
            f"{of['auc']:.3f}",
            f"{of['validation']:.3f}",
            f"{100 * of['accuracy']:.1f}",
        ]
        step = (
            [milliseconds_spread(cost["seconds"]), size(cost["temp_bytes"])] if cost else ["", ""]
        )
        rows.append([name, str(of["meta_steps"]), *step, *cells])
    columns = ["weights by", "steps", "ms a step", "XLA temp", "AUC", "held-out", "test, %"]
    seconds = record["plan"]["cleaning_seconds"]
    title = (
        f"Weights of {at['examples']} examples, 30 % with wrong labels; "
        f"{seconds:g} s for each method; held-out loss, test accuracy"
    )
    return [*found, Table(title, columns, rows, unbroken=len(columns))]


def conclusion(record: dict[str, Any]) -> str:
    """Says what the figures show, and where ours loses."""
    steps = min(record["long"], key=lambda t: abs(int(t) - 10_000))
    of = record["long"][steps]
    ours, backprop, checkpointed = (of["methods"][m] for m in (OURS, BACKPROP, CHECKPOINTED))
    memory = ours["temp_bytes"] / backprop["temp_bytes"]
    met = memory <= TARGET_MEMORY and min(of["errors"].values()) <= TARGET_ERROR
    in_single = "too" if of["errors"]["float32"] <= TARGET_ERROR else "not"
    over = [
        ours["seconds"]["median"] / other["seconds"]["median"] for other in (backprop, checkpointed)
    ]
    said = [
        f"Through {int(steps):,} training steps, the forward hypergradient of 8 hyperparameters "
        f"needs {size(ours['temp_bytes'])}. This is {memory:.2g} of the memory of unrolled reverse "
        f"mode ({size(backprop['temp_bytes'])}). The two differ by "
        f"{of['errors']['float64']:.0e} in float64 and {of['errors']['float32']:.0e} in float32: "
        f"the target ({TARGET_MEMORY:g} of the memory, an error of {TARGET_ERROR:g}) is "
        f"{'met' if met else 'missed'} in float64, in float32 {in_single}. Forward mode takes "
        f"{over[0]:.2f} of the time of unrolled and {over[1]:.2f} of checkpointed reverse mode, "
        f"which needs {size(checkpointed['temp_bytes'])}."
    ]
    every = [record["long"][t]["methods"][OURS]["temp_bytes"] for t in record["long"]]
    if max(every) > 1.1 * min(every):
        said.append(
            f"The memory of forward mode grew by a factor of {max(every) / min(every):.2g} with "
            "the number of steps."
        )
    elif len(every) > 1:
        said.append("The memory of forward mode does not depend on the number of steps.")
    tuned = record["tuning"]
    hyper, search = (
        [run["validation"] for run in tuned["runs"][m]] for m in ("hypergradient", "random search")
    )
    test = {m: np.median([run["loss"] for run in runs]) for m, runs in tuned["runs"].items()}
    better = sum(a < b for a, b in zip(hyper, search, strict=True))
    said.append(
        f"Tuning by hypergradients lowers the held-out loss from "
        f"{tuned['start']['validation']:.3f} to {np.median(hyper):.3f}. Random search for as long "
        f"lowers it to {np.median(search):.3f}. Hypergradients reach the lower loss from {better} "
        f"of {len(hyper)} starts. On the test part, which neither method saw, the losses are "
        f"{test['hypergradient']:.3f} and {test['random search']:.3f} (before tuning: "
        f"{tuned['start']['loss']:.3f})."
    )
    at = record["cleaning"]
    loss, auc = (
        {name: of[key] for name, of in at["methods"].items()} for key in ("validation", "auc")
    )
    best, tells = min(loss, key=lambda name: loss[name]), max(auc, key=lambda name: auc[name])
    listed = lambda values: ", ".join(f"{name} {value:.3f}" for name, value in values.items())  # noqa: E731
    said.append(
        f"Weights of {at['examples']} examples, learned in equal time: {best} reaches the lowest "
        f"held-out loss ({listed(loss)}), and {tells} finds the wrong labels best (AUC: "
        f"{listed(auc)}). Through this short run, unrolled reverse mode needs "
        f"{size(at['costs'][BACKPROP]['temp_bytes'])} and forward gradients "
        f"{size(at['costs']['forward gradient']['temp_bytes'])}."
    )
    if best == BACKPROP:
        said.append("With many hyperparameters and a run that fits into memory, use reverse mode.")
    return " ".join(said)


def draw(record: dict[str, Any], figure: Figure) -> None:
    """Draws the figures on an empty canvas."""
    figure.set_size_inches(10, 6.4)
    figure.set_layout_engine("constrained")
    (memory, seconds), (tuned, cleaned) = figure.subplots(2, 2)
    lengths = [int(t) for t in record["long"]]
    for method in next(iter(record["long"].values()))["methods"]:
        of = [at["methods"][method] for at in record["long"].values()]
        style = _STYLE[method] | {"label": method}
        memory.plot(lengths, [f["temp_bytes"] for f in of], **style)
        seconds.plot(lengths, [1e3 * f["seconds"]["median"] for f in of], **style)
    memory.set(xlabel="training steps", ylabel="XLA temporary memory", xscale="log", yscale="log")
    memory.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(int(value))))
    memory.set_title("Hypergradient in 8 hyperparameters", loc="left", fontsize=9)
    seconds.set(xlabel="training steps", ylabel="time (ms)", xscale="log", yscale="log")
    seconds.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    seconds.yaxis.set_major_formatter(ScalarFormatter())
    for axes in (memory, seconds):
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    seconds.legend(fontsize=8)
    for name, colour in (("hypergradient", "#D55E00"), ("random search", "#777777")):
        for i, run in enumerate(record["tuning"]["runs"][name]):
            x = np.linspace(0, run["seconds"], len(run["curve"]) + 1)[1:]
            tuned.plot(x, run["curve"], color=colour, linewidth=1, label=name if i == 0 else None)
    start = record["tuning"]["start"]["validation"]
    tuned.axhline(start, color="#000000", linestyle=":", label="not tuned")
    tuned.set(xlabel="time (s)", ylabel="least held-out loss until then (nats)", yscale="log")
    tuned.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    tuned.yaxis.set_major_formatter(ScalarFormatter())
    tuned.yaxis.set_minor_formatter(NullFormatter())
    tuned.set_title("Tuning from several starts", loc="left", fontsize=9)
    tuned.legend(fontsize=8)
    at = record["cleaning"]
    names = ["equal weights", *at["methods"]]
    ofs = [at["start"], *at["methods"].values()]
    labels = {
        "auc": ("AUC of wrong labels", "#56B4E9"),
        "accuracy": ("test accuracy", "#E69F00"),
    }
    for offset, (key, (label, colour)) in zip((-0.2, 0.2), labels.items(), strict=True):
        bars = cleaned.bar(
            np.arange(len(names)) + offset,
            [of[key] for of in ofs],
            0.38,
            color=colour,
            label=label,
        )
        cleaned.bar_label(bars, fmt="%.2f", fontsize=8)
    cleaned.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    cleaned.set(ylim=(0, 1.25))
    cleaned.grid(axis="x", visible=False)
    cleaned.set_axisbelow(True)
    cleaned.set_title("Data cleaning, equal time for each", loc="left", fontsize=9)
    cleaned.legend(fontsize=8, ncols=2, loc="upper left")


def _median(values: list[float]) -> str:
    return f"{np.median(values):.3f} ({min(values):.2f}–{max(values):.2f})"
