"""The cost model of a step over a link.

    seconds = compute + 2 delay rounds + 8 bytes / rate

`compute` is the time of one worker for its part of the batch without any exchange. In each round a
worker waits until its neighbour is ready, and then for the data, which takes two delays. A ring of
W workers gathers in W - 1 rounds, in which each worker passes on W - 1 messages. It sums an array
of b bytes in 2 (W - 1) rounds and 2 b (W - 1) / W bytes. XLA sums the arrays one after the other.
The model has no fitted constants. Rounds and bytes are counted in the compiled step, and the bytes
that Gloo and TCP add to a message are counted at the interface. Delay and rate are the relay's.
"""

import math
import re
from typing import Any

DELAY = 0.025
RATES = {"10 Mbit/s": 10e6, "100 Mbit/s": 100e6, "1 Gbit/s": 1e9}
LINKS = {f"{name}, 50 ms": (rate, DELAY) for name, rate in RATES.items()} | {
    "unlimited": (math.inf, 0.0)
}
WORKERS = (2, 64, 4096)

Found = dict[str, Any]  # the figures of a part


def arrays(collective: str) -> list[int]:
    """Returns the bytes of the float32 arrays that a collective of the compiled step returns."""
    shapes = re.findall(r"f32\[([\d,]*)\]", collective)
    return [4 * math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]


def exchange(collectives: list[str], workers: int, around: float) -> tuple[int, float]:
    """Returns the rounds of a step, and the bytes that each worker sends.

    **Arguments:** `around`: bytes that Gloo and TCP add to each message of a gather.
    """
    rounds, sent = 0, 0.0
    for collective in collectives:
        for size in arrays(collective):
            if collective.startswith("all-gather"):
                rounds += workers - 1
                sent += (workers - 1) * (size / workers + around)
            else:
                rounds += 2 * (workers - 1)
                sent += 2 * size * (workers - 1) / workers
    return rounds, sent


def seconds(compute: float, rounds: float, sent: float, rate: float, delay: float) -> float:
    """Returns the seconds of a step by the model."""
    return compute + 2 * delay * rounds + 8 * sent / rate


def rate_factor(parameters: int, tangents: int) -> float:
    """Returns the learning rate that the tangents allow, over that of the exact gradient.

    It is 1 / (1 + n / (K W)) for n parameters and K tangents on each of W workers.
    """
    return 1 / (1 + parameters / tangents)


def bytes_around(mlp: Found) -> float:
    """Returns the bytes that Gloo and TCP add to the message of one round."""
    alone = mlp["2"]["100 Mbit/s, 50 ms"]["K = 1"]
    return alone["bytes"]["median"] - alone["payload"]


def predicted(source: Found, workers: int, around: float) -> dict[tuple[str, str], float]:
    """Predicts the seconds of each measured step, by link and method.

    **Arguments:** `source`: the steps by link and method, and those that exchange nothing, which
    are called "apart".
    """
    found = {}
    for link, methods in source.items():
        if link == "apart":
            continue
        for method, one in methods.items():
            compute = source["apart"][method]["seconds"]["median"]
            rounds, sent = exchange(one["collectives"], workers, around)
            found[link, method] = seconds(compute, rounds, sent, *LINKS[link])
    return found


def line_kept_full(smollm2: Found) -> float:
    """Returns the time of backprop at 100 Mbit/s, 50 ms, if its all-reduce used the full rate."""
    link = "100 Mbit/s, 50 ms"
    compute = smollm2["apart"]["backprop"]["seconds"]["median"]
    _, sent = exchange(smollm2[link]["backprop"]["collectives"][1:], 2, 0)
    return seconds(compute, 2, sent, *LINKS[link])


def projected(source: Found, updates: Found, workers: int, around: float) -> list[dict[str, Any]]:
    """Projects a step on each link to many workers, each with its own tangent.

    "ring" is the present exchange. "doubling" is an exchange of log2 W rounds (2 log2 W for a sum)
    that joins the arrays of a gradient into one. The time of the update from W tangents is
    measured, or extrapolated from the largest measured number of tangents (`update_measured`).
    """
    ours, theirs = (source["unlimited"][method] for method in ("K = 1", "backprop"))
    one_update = updates["1"]["median"]
    own = max(0.0, source["apart"]["K = 1"]["seconds"]["median"] - one_update)
    known = [int(t) for t in updates if int(t) <= workers]
    measured = workers in known or workers == 2
    if workers == 2:
        update = one_update
    else:  # in proportion to the largest measured number of tangents
        update = updates[str(max(known))]["median"] * workers / max(known)
    of_backprop = source["apart"]["backprop"]["seconds"]["median"]
    doubling_rounds = math.ceil(math.log2(workers))
    found = []
    for link, rate in RATES.items():
        rounds, sent = exchange([f"all-gather f32[{workers},2]"], workers, around)
        # messages double in size, so that there are fewer of them
        less = sent - around * (rounds - doubling_rounds)
        compute = own + update
        row = {
            "workers": workers,
            "link": link,
            "parameters": ours["parameters"],
            "update": update,
            "update_measured": measured,
            "ours": {
                "compute": compute,
                "ring": seconds(compute, rounds, sent, rate, DELAY),
                "doubling": seconds(compute, doubling_rounds, less, rate, DELAY),
            },
        }
        rounds, sent = exchange(theirs["collectives"][1:], workers, around)
        row["backprop"] = {
            "compute": of_backprop,
            "ring": seconds(of_backprop, rounds, sent, rate, DELAY),
            "doubling": seconds(of_backprop, 2 * doubling_rounds, sent, rate, DELAY),
        }
        found.append(row)
    return found
