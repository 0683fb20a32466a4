"""The cost model of a step over a link, beside what was measured, and the tables of a record of `links.py`.

    seconds = compute + 2 delay rounds + 8 bytes / rate

`compute` is what one worker takes for its part of the batch when it exchanges nothing. In each round a worker hears that its neighbour is ready and
then gets the data: two delays. A ring of W workers gathers in W - 1 rounds, in which each worker passes on W - 1 messages, and sums an array
of b bytes in 2 (W - 1) rounds and 2 b (W - 1) / W bytes; XLA has each array summed after the one before. Nothing is fitted: rounds and bytes are counted
in the compiled step, what Gloo and TCP put around a message is counted at the interface, delay and rate are those the relay was told.
"""

import math
import re
from pathlib import Path
from typing import Any

from prograde.lab import records

BEGIN, END = (
    "<!-- links: begin, written by benchmarks/links.py --markdown -->",
    "<!-- links: end -->",
)
DELAY = 0.025
RATES = {"10 Mbit/s": 10e6, "100 Mbit/s": 100e6, "1 Gbit/s": 1e9}
LINKS = {f"{name}, 50 ms": (rate, DELAY) for name, rate in RATES.items()} | {
    "unlimited": (math.inf, 0.0)
}
WORKERS = (2, 64, 4096)
TITLES = {"mlp": "MLP, 32 examples a worker", "smollm2": "135M parameters, 2 x 64 tokens a worker"}


def arrays(collective: str) -> list[int]:
    """Bytes of the float32 arrays that a collective of the compiled step returns."""
    shapes = re.findall(r"f32\[([\d,]*)\]", collective)
    return [4 * math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]


def exchange(collectives: list[str], workers: int, around: float) -> tuple[int, float]:
    """(rounds, bytes from each worker) of a step, with so many bytes around each message of a gather."""
    rounds, sent = 0, 0.0
    for collective in collectives:
        for size in arrays(collective):
            if collective.startswith("all-gather"):
                rounds, sent = (
                    rounds + workers - 1,
                    sent + (workers - 1) * (size / workers + around),
                )
            else:
                rounds, sent = rounds + 2 * (workers - 1), sent + 2 * size * (workers - 1) / workers
    return rounds, sent


def seconds(compute: float, rounds: float, sent: float, rate: float, delay: float) -> float:
    return compute + 2 * delay * rounds + 8 * sent / rate


def rate_factor(parameters: int, tangents: int) -> float:
    """The rate that so many tangents in all allow, as a part of that of the gradient: 1 / (1 + n / (K W))."""
    return 1 / (1 + parameters / tangents)


def _found(record: dict, part: str) -> dict[str, Any]:
    return record["parts"][part]["found"]


def model(record: dict) -> dict[str, Any]:
    """What the model says of each measured step, and of 64 and 4,096 workers."""
    if not {"mlp", "smollm2", "updates"} <= record["parts"].keys():
        return {}
    mlp, smollm2, updates = (_found(record, part) for part in ("mlp", "smollm2", "updates"))
    alone = mlp["2"]["100 Mbit/s, 50 ms"]["K = 1"]
    around = alone["bytes"]["median"] - alone["payload"]
    predicted = []
    measured = [
        ("mlp", w, where, found)
        for w in ("2", "4")
        for where, found in mlp[w].items()
        if where != "apart"
    ]
    measured += [
        ("smollm2", "2", where, found) for where, found in smollm2.items() if where != "apart"
    ]
    for workload, w, where, found in measured:
        apart = (mlp[w] if workload == "mlp" else smollm2)["apart"]
        for method, one in found.items():
            compute = apart[method]["seconds"]["median"]
            rounds, sent = exchange(one["collectives"], int(w), around)
            in_all = seconds(compute, rounds, sent, *LINKS[where])
            predicted.append(
                {
                    "workload": workload,
                    "workers": int(w),
                    "link": where,
                    "method": method,
                    "compute": compute,
                }
                | {
                    "rounds": rounds,
                    "bytes": sent,
                    "seconds": in_all,
                    "measured": one["seconds"]["median"],
                }
            )
    projected = []
    for workload, source in (("mlp", mlp["2"]), ("smollm2", smollm2)):
        for w in WORKERS:
            projected += _projected(workload, source, updates[workload], w, around)
    return {"bytes_around_a_message": around, "predicted": predicted, "projected": projected}


def _projected(
    workload: str, source: dict, updates: dict, workers: int, around: float
) -> list[dict]:
    """A step on each link with so many workers, each with its own tangent: by a ring, and by doubling, log2 W rounds."""
    ours, theirs = (source["unlimited"][method] for method in ("K = 1", "backprop"))
    own = max(0.0, source["apart"]["K = 1"]["seconds"]["median"] - updates["1"]["median"])
    known = [int(t) for t in updates if int(t) <= workers]
    update = (
        updates[str(max(known))]["median"] * workers / max(known)
        if workers not in known
        else updates[str(workers)]["median"]
    )
    update = updates["1"]["median"] if workers == 2 else update
    found = []
    for link, rate in RATES.items():
        row = {
            "workload": workload,
            "workers": workers,
            "link": link,
            "parameters": ours["parameters"],
        }
        row |= {"update": update, "update_measured": workers in known or workers == 2}
        for name, compute, collectives in (
            ("ours", own + update, ["all-gather " + f"f32[{workers},2]"]),
            (
                "backprop",
                source["apart"]["backprop"]["seconds"]["median"],
                theirs["collectives"][1:],
            ),
        ):
            rounds, sent = exchange(collectives, workers, around)
            doubling = math.ceil(math.log2(workers)) * (
                1 if name == "ours" else 2
            )  # arrays joined into one
            row[name] = {
                "compute": compute,
                "ring": seconds(compute, rounds, sent, rate, DELAY),
                # messages double in size, so there are but as many around them as rounds
                "doubling": seconds(
                    compute,
                    doubling,
                    sent - around * (rounds - doubling) if name == "ours" else sent,
                    rate,
                    DELAY,
                ),
            }
        found.append(row)
    return found


def _seconds(value: float) -> str:
    if value >= 1e5:
        return f"{value / 86400:,.0f} days"
    if value >= 100:
        return f"{value:,.0f} s"
    return (
        f"{value:.1f} s"
        if value >= 10
        else f"{value:.2f} s"
        if value >= 1
        else f"{1e3 * value:.1f} ms"
    )


def _spread(found: dict) -> str:
    return f"{_seconds(found['median'])} ({_seconds(found['low'])} to {_seconds(found['high'])}, n = {found['n']})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _predicted(record: dict, workload: str, workers: int, link: str, method: str) -> dict:
    wanted = {"workload": workload, "workers": workers, "link": link, "method": method}
    (one,) = [p for p in record["model"]["predicted"] if wanted.items() <= p.items()]
    return one


def step_rows(record: dict, workload: str, source: dict, workers: int) -> list[list[str]]:
    rows = []
    for link in (name for name in LINKS if name in source):
        for method, one in source[link].items():
            said = _predicted(record, workload, workers, link, method)["seconds"]
            rows.append(
                [
                    link,
                    str(workers),
                    method,
                    _spread(one["seconds"]),
                    _seconds(said),
                    f"{one['bytes']['median']:,.0f}",
                    f"{one['payload']:,}",
                ]
            )
    return rows


def markdown(record: dict) -> str:
    """The tables."""
    blocks = []
    if "link" in record["parts"]:
        rows = [
            [
                name,
                f"{1e3 * f['round_trip_seconds']:.2f} ms",
                f"{f['bits_a_second'] / 1e6:,.1f} Mbit/s",
                f"{f['queue_bytes']:,.0f}",
            ]
            for name, f in _found(record, "link").items()
        ]
        blocks += [
            "**The link**, as a plain TCP connection finds it:",
            _table(["link", "there and back", "rate", "queue, bytes"], rows),
        ]
    if record.get("model"):
        mlp, smollm2 = _found(record, "mlp"), _found(record, "smollm2")
        head = [
            "link",
            "workers",
            "method",
            "a step, measured",
            "predicted",
            "bytes a step at the interface",
            "`payload`",
        ]
        limited = smollm2.get("100 Mbit/s, 50 ms")
        if limited:
            ours, theirs = (
                limited[method]["seconds"]["median"] for method in ("K = 1", "backprop")
            )
            compute = smollm2["apart"]["backprop"]["seconds"]["median"]
            _, sent = exchange(limited["backprop"]["collectives"][1:], 2, 0)
            least = seconds(compute, 2, sent, *LINKS["100 Mbit/s, 50 ms"])
            blocks.append(
                "**135M parameters** (the shapes of SmolLM2, 4 x 64 tokens in all). Over 100 Mbit/s, 50 ms a step of ours is "
                f"{theirs / ours:.0f} times as fast as backprop's. With an all-reduce that kept the line full from its first byte to its last, "
                f"backprop would take {_seconds(least)}, and ours would be {least / ours:.0f} times as fast."
            )
        blocks.append(_table(head, step_rows(record, "smollm2", smollm2, 2)))
        rows = [row for w in ("2", "4") for row in step_rows(record, "mlp", mlp[w], int(w))]
        blocks += ["**MLP 784-1024-1024-10**, batch 64 in all:", _table(head, rows)]
        blocks.append(
            f"Gloo and TCP put {record['model']['bytes_around_a_message']:,.0f} bytes around the message of one round."
        )
    if "scaling" in record["parts"]:
        kinds = {"2": "2 processes", "2 apart": "2 that exchange nothing", "4": "4 processes"}
        rows = [
            [
                name,
                _spread(f["seconds"]["1"]),
                *(f"{_fraction(f['of_ideal'][kind])}" for kind in kinds),
            ]
            for name, f in _found(record, "scaling").items()
        ]
        blocks += [
            "**Two cores against one**, the same batch; parts of the ideal, which is twice as fast:",
            _table(["workload", "1 process", *kinds.values()], rows),
        ]
    if record.get("model"):
        blocks += _projection_blocks(record)
    for part, found in record["parts"].items():
        if found["environment"]["note"]:
            blocks.append(f"Note on the part `{part}`: {found['environment']['note']}")
    return "\n\n".join(blocks) + "\n"


def _fraction(found: dict) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _projection_blocks(record: dict) -> list[str]:
    rows = []
    for p in record["model"]["projected"]:
        extrapolated = "" if p["update_measured"] else " (extrapolated)"
        ours, theirs = p["ours"], p["backprop"]
        rows.append(
            [
                TITLES[p["workload"]],
                f"{p['workers']:,}",
                p["link"],
                _seconds(ours["compute"]) + extrapolated,
            ]
            + [
                _seconds(x)
                for x in (ours["ring"], ours["doubling"], theirs["ring"], theirs["doubling"])
            ]
            + [_seconds(ours["doubling"] / rate_factor(p["parameters"], p["workers"]))]
        )
    head = [
        "workload",
        "workers",
        "link, 50 ms",
        "ours: compute",
        "ours, ring",
        "ours, doubling",
        "backprop, ring",
        "backprop, doubling",
        "ours, doubling, for the progress of a step of backprop",
    ]
    blocks = [
        "**Projected**, each worker with a tangent of its own (K = 1, so K W = W):",
        _table(head, rows),
    ]
    sizes = {p["workload"]: p["parameters"] for p in record["model"]["projected"]}
    rows = [
        [
            f"{w:,}",
            str(k),
            f"{k * w:,}",
            *(f"1/{1 / rate_factor(n, k * w):,.0f}" for n in sizes.values()),
        ]
        for w in (1, *WORKERS)
        for k in (1, 64)
    ]
    head = ["workers W", "tangents K", "K W", *(f"{n:,} parameters" for n in sizes.values())]
    return [
        *blocks,
        "**The rate**, as a part of what the gradient allows, 1 / (1 + n / (K W)):",
        _table(head, rows),
    ]


def write_markdown(record: dict, page: Path) -> None:
    """Writes the tables between the marks of a page."""
    text = page.read_text() if page.exists() else ""
    if BEGIN not in text or END not in text:
        raise records.RecordError(
            f"{page} lacks the marks {BEGIN} and {END}. Add them where the tables shall be."
        )
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    records.write(page, f"{head}\n\n{markdown(record)}\n{tail}".encode())
