"""The cost model of a step over a link.

    seconds = compute + 2 delay rounds + 8 bytes / rate

`compute` is what one worker takes for its part of the batch when it exchanges nothing. In each
round a worker hears that its neighbour is ready and then gets the data, which takes two delays. A
ring of W workers gathers in W - 1 rounds, in which each worker passes on W - 1 messages. It sums an
array of b bytes in 2 (W - 1) rounds and 2 b (W - 1) / W bytes; XLA sums the arrays one after the
other. Nothing is fitted. Rounds and bytes are counted in the compiled step, and the bytes that Gloo
and TCP put around a message are counted at the interface. Delay and rate are those of the relay.
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
    """Bytes of the float32 arrays that a collective of the compiled step returns."""
    shapes = re.findall(r"f32\[([\d,]*)\]", collective)
    return [4 * math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]


def exchange(collectives: list[str], workers: int, around: float) -> tuple[int, float]:
    """Rounds of a step, and bytes from each worker.

    **Arguments:** `around`: bytes that are sent in addition with each message of a gather.
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
    """Seconds of a step, by the model."""
    return compute + 2 * delay * rounds + 8 * sent / rate


def rate_factor(parameters: int, tangents: int) -> float:
    """The learning rate that so many tangents in all allow, over that of the gradient.

    It is 1 / (1 + n / (K W)) for n parameters and K tangents on each of W workers.
    """
    return 1 / (1 + parameters / tangents)


def bytes_around(mlp: Found) -> float:
    """Bytes that Gloo and TCP put around the message of one round."""
    alone = mlp["2"]["100 Mbit/s, 50 ms"]["K = 1"]
    return alone["bytes"]["median"] - alone["payload"]


def predicted(source: Found, workers: int, around: float) -> dict[tuple[str, str], float]:
    """Seconds of each measured step by the model, by link and method.

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
    """Seconds of backprop over 100 Mbit/s, 50 ms, if its all-reduce kept the line full."""
    link = "100 Mbit/s, 50 ms"
    compute = smollm2["apart"]["backprop"]["seconds"]["median"]
    _, sent = exchange(smollm2[link]["backprop"]["collectives"][1:], 2, 0)
    return seconds(compute, 2, sent, *LINKS[link])


def projected(source: Found, updates: Found, workers: int, around: float) -> list[dict[str, Any]]:
    """A step on each link with so many workers, each with a tangent of its own.

    "ring" is the exchange as it is, and "doubling" one of log2 W rounds (2 log2 W for a sum), in
    which the arrays of a gradient are joined into one. The update from W tangents is measured, or
    extrapolated from the largest number of tangents that was (`update_measured`).
    """
    ours, theirs = (source["unlimited"][method] for method in ("K = 1", "backprop"))
    one_update = updates["1"]["median"]
    own = max(0.0, source["apart"]["K = 1"]["seconds"]["median"] - one_update)
    known = [int(t) for t in updates if int(t) <= workers]
    measured = workers in known or workers == 2
    if workers == 2:
        update = one_update
    else:  # the most tangents that were measured, times what is missing
        update = updates[str(max(known))]["median"] * workers / max(known)
    of_backprop = source["apart"]["backprop"]["seconds"]["median"]
    doubling_rounds = math.ceil(math.log2(workers))
    found = []
    for link, rate in RATES.items():
        rounds, sent = exchange([f"all-gather f32[{workers},2]"], workers, around)
        # messages double in size, so that fewer of them have bytes around them
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
