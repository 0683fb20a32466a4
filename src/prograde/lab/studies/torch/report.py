"""The report of `prograde torch`, from records alone."""

from typing import Any

from prograde.lab.measure.timing import ratio_quartiles
from prograde.lab.report import Report, Section, Table
from prograde.lab.report.words import MISSING, made_on, milliseconds, warning
from prograde.lab.store import Store

_INTRODUCTION = "A training step of PyTorch modules, by prograde.torch and by PyTorch itself."
_TERMS = (
    "All methods take turns in one run; PyTorch's own run in a process without JAX. A time is a "
    "median, and a ratio is the median of the ratios of the rounds. A step is the estimate, or "
    "the loss and its backward pass, and SGD. The first step of prograde.torch includes "
    "compilation and the comparison with PyTorch's own loss. Freed memory stays with the processes."
)
_TITLES = {
    "mlp": "MLP 784-1024-1024-10, batch 64",
    "llama": "Llama 4 x 256, 4 x 128 tokens",
    "minilm": "MiniLM, classification, 8 x 64 tokens",
}
_METHODS = {
    "torch-bare": "PyTorch, loss alone",
    "torch-backprop": "PyTorch, backprop",
    "torch-compiled": "PyTorch, backprop by `torch.compile`",
    "prograde": "`value_and_grad`, rank one, `torch.optim.SGD`",
    "prograde-whole": "`TrainStep`, rank one, `optax.sgd`",
    "jax-alone": "the same function and estimator in JAX alone",
    "jax-backprop": "`value_and_grad`, `Backprop()`, `torch.optim.SGD`",
}
TARGETS = {"mlp": 0.60, "llama": 0.40, "minilm": 0.45}
"""The ratio to PyTorch's eager backprop that a step is meant to reach."""


def report(stores: list[Store]) -> Report:
    """Shows each store in a section."""
    return Report("PyTorch modules", _INTRODUCTION, _TERMS, list(map(_section, stores)))


def _section(store: Store) -> Section:
    content: list[Any] = []
    busy = []
    for name, title in _TITLES.items():
        if name not in store:
            continue
        record = store.read(name)
        busy.append(record["busy"])
        found = record["methods"]
        columns = ["step", "ms", "over eager backprop", "over `torch.compile`", "first step, s"]
        rows = [_row(label, method, found) for method, label in _METHODS.items() if method in found]
        content += [_sentence(name, title, found), Table(title, columns, rows)]
    name = store.directory.resolve().name
    content += filter(None, [warning(max(busy, default=None))])
    return Section(name, "PyTorch modules", content, made_on(store.manifest), store.manifest)


def _ratio(method: str, base: str, found: dict[str, Any]) -> str:
    if base not in found:
        return MISSING
    ratio = ratio_quartiles(found[method]["rounds"], found[base]["rounds"])
    return f"{ratio['median']:.2f}"


def _row(label: str, method: str, found: dict[str, Any]) -> list[str]:
    return [
        label,
        milliseconds(found[method]["seconds"]["median"]),
        _ratio(method, "torch-backprop", found),
        _ratio(method, "torch-compiled", found),
        MISSING if method.startswith("torch") else f"{found[method]['first']:.1f}",
    ]


def _sentence(name: str, title: str, found: dict[str, Any]) -> str:
    ratio = found["prograde"]["ratio"]["median"]
    reached = "reached" if ratio <= TARGETS[name] else "missed"
    jax = found["jax-backprop"]["ratio"]["median"]
    bridge = ratio_quartiles(found["prograde"]["rounds"], found["jax-alone"]["rounds"])["median"]
    return (
        f"{title}: a step takes {ratio:.2f} of eager backprop (target: {TARGETS[name]:.2f}, "
        f"{reached}). JAX's own backprop of the same module takes {jax:.2f}: the difference "
        f"between {jax:.2f} and 1 is XLA's, the rest is the method's. The step takes "
        f"{bridge:.2f} of the time of the same function and estimator in JAX alone."
    )
