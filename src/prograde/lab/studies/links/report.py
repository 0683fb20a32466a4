"""The report of `prograde links`, from records alone: measured, predicted and projected."""

from collections.abc import Mapping
from typing import Any

from prograde.lab.report import Report, Section, Table
from prograde.lab.report.words import made_on, quartiles, unsteady, warning
from prograde.lab.store import Store
from prograde.lab.studies.links import model
from prograde.lab.studies.links.model import LINKS, WORKERS

_INTRODUCTION = (
    "Training steps of workers that are joined by a slow link: forward gradients, which send one "
    "number for each tangent and the loss, compared with data-parallel backprop."
)
_TERMS = (
    "A time is the median over the steps of all workers, with its quartiles and the number n of "
    "steps. Predicted is `compute + 2 delay rounds + 8 bytes / rate`; nothing in it is fitted. "
    "`payload` is what `prograde.distributed.payload` counts, without the bytes around messages. "
    "K is the number of tangents, W that of workers, n that of parameters."
)
_MIDDLE = "100 Mbit/s, 50 ms"
_TITLES = {"mlp": "MLP, 32 examples a worker", "smollm2": "135M parameters, 2 x 64 tokens a worker"}
_KINDS = {"2": "2 processes", "2 apart": "2 that exchange nothing", "4": "4 processes"}
_STEP_COLUMNS = ["link", "workers", "method", "a step, measured", "predicted"]
_STEP_COLUMNS += ["bytes a step at the interface", "`payload`"]


def report(stores: list[Store]) -> Report:
    """Shows each part of each store in a section."""
    sections = [section for store in stores for section in _sections(store, len(stores) > 1)]
    return Report("Training over a slow link", _INTRODUCTION, _TERMS, sections)


def _sections(store: Store, several: bool) -> list[Section]:
    parts = {name: store.read(name) for name in store.names()}
    found = {name: part["found"] for name, part in parts.items()}
    label = store.directory.resolve().name
    sections = []

    def add(name: str, title: str, content: list[Any]) -> None:
        if name in parts:
            content = [*content, *_doubts(name, parts[name])]
        full = f"{label}-{name}" if several else name
        made = made_on(store.manifest) if not sections else ""
        details = store.manifest if not sections else None
        sections.append(Section(full, title, content, made, details))

    if "link" in found:
        add("link", "The link", [_link_table(found["link"])])
    if "mlp" in found:
        around = model.bytes_around(found["mlp"])
        if "smollm2" in found:
            add("smollm2", "135M parameters", _smollm2(found["smollm2"], around))
        add("mlp", "MLP", _mlp(found["mlp"], around))
    if "scaling" in found:
        add("scaling", "Two cores against one", [_scaling_table(found["scaling"])])
    if {"mlp", "smollm2", "updates"} <= found.keys():
        add("updates", "Projected", _projection(found))
    return sections


def _doubts(name: str, part: dict[str, Any]) -> list[str]:
    """Lists reasons for doubt about the figures of a part."""
    note = f"Note on the part `{name}`: {part['note']}" if part["note"] else ""
    return [*filter(None, [note, warning(part.get("busy")), unsteady(_ratios(name, part))])]


def _ratios(name: str, part: dict[str, Any]) -> Mapping[str, dict[str, float]]:
    """Returns the times or ratios of a part that should be steady, by name."""
    found = part["found"]
    if name == "scaling":
        return {
            f"{workload}, {_KINDS[kind]}": one
            for workload, figures in found.items()
            for kind, one in figures["of_ideal"].items()
        }
    if name in ("smollm2", "mlp"):
        groups = {"2": found} if name == "smollm2" else {w: found[w] for w in ("1", "2", "4")}
        return {
            f"{w} x {method} ({link})": one["seconds"]
            for w, links in groups.items()
            for link, methods in links.items()
            for method, one in methods.items()
        }
    return {}


def _link_table(found: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            f"{1e3 * f['round_trip_seconds']:.2f} ms",
            f"{f['bits_a_second'] / 1e6:,.1f} Mbit/s",
            f"{f['queue_bytes']:,.0f}",
        ]
        for name, f in found.items()
    ]
    columns = ["link", "there and back", "rate", "queue, bytes"]
    return Table("The link, as a plain TCP connection finds it", columns, rows)


def _smollm2(found: dict[str, Any], around: float) -> list[Any]:
    said = []
    if _MIDDLE in found:
        ours, theirs = (found[_MIDDLE][m]["seconds"]["median"] for m in ("K = 1", "backprop"))
        least = model.line_kept_full(found)
        said.append(
            f"Over {_MIDDLE}, our step is {theirs / ours:.0f} times as fast as backprop's. With an "
            "all-reduce that used the full rate from its first byte to its last, backprop would "
            f"take {duration(least)}, and our step would be {least / ours:.0f} times as fast."
        )
    title = "135M parameters (the shapes of SmolLM2), 4 x 64 tokens in all"
    rows = _step_rows(found, 2, around)
    return [*said, Table(title, _STEP_COLUMNS, rows, unbroken=3)]


def _mlp(found: dict[str, Any], around: float) -> list[Any]:
    rows = [row for w in (2, 4) for row in _step_rows(found[str(w)], w, around)]
    table = Table("MLP 784-1024-1024-10, batch 64 in all", _STEP_COLUMNS, rows, unbroken=3)
    return [table, f"Gloo and TCP add {around:,.0f} bytes to the message of one round."]


def _step_rows(source: dict[str, Any], workers: int, around: float) -> list[list[str]]:
    predicted = model.predicted(source, workers, around)
    return [
        [
            link,
            str(workers),
            method,
            spread(one["seconds"]),
            duration(predicted[link, method]),
            f"{one['bytes']['median']:,.0f}",
            f"{one['payload']:,}",
        ]
        for link in LINKS
        if link in source
        for method, one in source[link].items()
    ]


def _scaling_table(found: dict[str, Any]) -> Table:
    rows = [
        [name, spread(f["seconds"]["1"]), *(quartiles(f["of_ideal"][kind]) for kind in _KINDS)]
        for name, f in found.items()
    ]
    title = "The same batch; parts of the ideal, which is twice as fast as one process"
    return Table(title, ["workload", "1 process", *_KINDS.values()], rows)


def _projection(found: dict[str, Any]) -> list[Any]:
    around, rows, sizes = model.bytes_around(found["mlp"]), [], {}
    for workload, source in (("mlp", found["mlp"]["2"]), ("smollm2", found["smollm2"])):
        for workers in WORKERS:
            for p in model.projected(source, found["updates"][workload], workers, around):
                sizes[workload] = p["parameters"]
                rows.append(_projection_row(workload, p))
    columns = ["workload", "workers", "link, 50 ms", "ours: compute", "ours, ring"]
    columns += ["ours, doubling", "backprop, ring", "backprop, doubling"]
    columns += ["ours, doubling, for the progress of a step of backprop"]
    title = "Projected, each worker with a tangent of its own (K = 1, so K W = W)"
    rates = [
        [
            f"{w:,}",
            str(k),
            f"{k * w:,}",
            *(f"1/{1 / model.rate_factor(n, k * w):,.0f}" for n in sizes.values()),
        ]
        for w in (1, *WORKERS)
        for k in (1, 64)
    ]
    heads = ["workers W", "tangents K", "K W", *(f"{n:,} parameters" for n in sizes.values())]
    rate_title = "The rate, as a part of what the gradient allows, 1 / (1 + n / (K W))"
    return [Table(title, columns, rows), Table(rate_title, heads, rates)]


def _projection_row(workload: str, p: dict[str, Any]) -> list[str]:
    ours, theirs = p["ours"], p["backprop"]
    extrapolated = "" if p["update_measured"] else " (extrapolated)"
    times = (ours["ring"], ours["doubling"], theirs["ring"], theirs["doubling"])
    progress = ours["doubling"] / model.rate_factor(p["parameters"], p["workers"])
    return [
        _TITLES[workload],
        f"{p['workers']:,}",
        p["link"],
        duration(ours["compute"]) + extrapolated,
        *map(duration, times),
        duration(progress),
    ]


def duration(value: float) -> str:
    """Formats a time, from microseconds to days, with its unit."""
    if value >= 1e5:
        return f"{value / 86400:,.0f} days"
    if value >= 100:
        return f"{value:,.0f} s"
    if value >= 10:
        return f"{value:.1f} s"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def spread(found: dict[str, float]) -> str:
    """Formats a median time with its quartiles and the number of values."""
    low, middle, high = (duration(found[k]) for k in ("low", "median", "high"))
    return f"{middle} ({low} to {high}, n = {found['n']})"
