"""The benchmark's workloads in PyTorch: a process that takes steps on request.

`TorchSide` starts it. A file holds parameters, state and batches of JAX, so that both compute the
same losses. Convolution kernels and stacked layers have another layout in PyTorch; this module
converts them once.
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false

import contextlib
import functools
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from prograde.lab.measure.memory import keep_freed_memory, resident_memory
from prograde.lab.processes.requests import serve
from prograde.lab.store import cores
from prograde.lab.studies.bench.methods import LEARNING_RATE

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

# PyTorch is not a dependency. Without it, nothing here is called.
with contextlib.suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

Arrays = dict[str, Tensor]  # "layers/3/up/w" -> array
Loss = Callable[..., Tensor]  # (params, state, *batch) -> loss; the state changes in place


def _dense(p: Arrays, name: str, x: Tensor) -> Tensor:
    return torch.addmm(p[f"{name}/b"], x, p[f"{name}/w"])


def _logreg(p: Arrays, state: Arrays, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_dense(p, "out", images.flatten(1)), labels)


def _mlp(p: Arrays, state: Arrays, images: Tensor, labels: Tensor) -> Tensor:
    h = torch.relu(_dense(p, "hidden1", images.flatten(1)))
    h = torch.relu(_dense(p, "hidden2", h))
    return F.cross_entropy(_dense(p, "out", h), labels)


def _cnn(p: Arrays, state: Arrays, images: Tensor, labels: Tensor) -> Tensor:
    h = images[:, None]
    for first, second in (("conv1", "conv2"), ("conv3", "conv4")):
        h = torch.relu(F.conv2d(h, p[f"{first}/w"], p[f"{first}/b"]))
        h = torch.relu(F.conv2d(h, p[f"{second}/w"], p[f"{second}/b"]))
        h = F.max_pool2d(h, 2)
    h = h.permute(0, 2, 3, 1).flatten(1)  # channels last, as the dense layer expects them
    h = torch.relu(_dense(p, "hidden1", h))
    h = torch.relu(_dense(p, "hidden2", h))
    return F.cross_entropy(_dense(p, "out", h), labels)


def _batch_norm(p: Arrays, state: Arrays, norm: str, running: str, x: Tensor) -> Tensor:
    statistics = state[f"{running}/mean"], state[f"{running}/var"]
    return F.batch_norm(x, *statistics, p[f"{norm}/scale"], p[f"{norm}/bias"], training=True)


def _resnet(stages: int) -> Loss:
    def loss(p: Arrays, state: Arrays, images: Tensor, labels: Tensor) -> Tensor:
        h = F.conv2d(images.permute(0, 3, 1, 2), p["stem/conv"], padding=1)
        h = torch.relu(_batch_norm(p, state, "stem/norm", "stem", h))
        for name in (f"stage{i}{block}" for i in range(stages) for block in "ab"):
            stride = 2 if name[-1] == "a" and name != "stage0a" else 1
            x = F.conv2d(h, p[f"{name}/conv1"], stride=stride, padding=1)
            x = torch.relu(_batch_norm(p, state, f"{name}/norm1", f"{name}/norm1", x))
            x = F.conv2d(x, p[f"{name}/conv2"], padding=1)
            x = _batch_norm(p, state, f"{name}/norm2", f"{name}/norm2", x)
            if stride == 2:
                h = F.conv2d(h, p[f"{name}/shortcut"], stride=stride)
                h = _batch_norm(p, state, f"{name}/norm3", f"{name}/norm3", h)
            h = torch.relu(x + h)
        return F.cross_entropy(_dense(p, "out", h.mean((2, 3))), labels)

    return loss


def _split_heads(x: Tensor, batch: int, heads: int) -> Tensor:
    return x.view(batch, -1, heads, x.shape[-1] // heads).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    return mixed.transpose(1, 2).flatten(2).flatten(0, 1)


def _transformer(layers: int, width: int, heads: int, batch: int) -> Loss:
    def norm(p: Arrays, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), p[f"{name}/scale"], p[f"{name}/bias"])

    def loss(p: Arrays, state: Arrays, tokens: Tensor) -> Tensor:
        h = (F.embedding(tokens[:, :-1], p["tokens"]) + p["positions"]).flatten(0, 1)
        for i in range(layers):
            qkv = _dense(p, f"layers/{i}/qkv", norm(p, f"layers/{i}/norm1", h))
            q, k, v = (_split_heads(x, batch, heads) for x in qkv.split(width, -1))
            h = h + _dense(p, f"layers/{i}/out", _attention(q, k, v))
            x = _dense(p, f"layers/{i}/up", norm(p, f"layers/{i}/norm2", h))
            h = h + _dense(p, f"layers/{i}/down", F.gelu(x, approximate="tanh"))
        return F.cross_entropy(norm(p, "norm", h) @ p["head"], tokens[:, 1:].flatten())

    return loss


def _smollm2(layers: int, width: int, queries: int, keys: int, batch: int, length: int) -> Loss:
    half = width // queries // 2
    angles = torch.arange(length)[:, None] * 100_000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: Tensor) -> Tensor:
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def norm(scale: Tensor, x: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), scale, 1e-5)

    def loss(p: Arrays, state: Arrays, tokens: Tensor, labels: Tensor) -> Tensor:
        h = F.embedding(tokens, p["embedding"]).flatten(0, 1)
        for i in range(layers):
            layer = {name: p[f"layers/{i}/{name}"] for name in _SMOLLM2_LEAVES}
            x = norm(layer["norm1"], h)
            q, k = (
                rotate(_split_heads(x @ layer["q"], batch, queries)),
                rotate(_split_heads(x @ layer["k"], batch, keys)),
            )
            h = torch.addmm(
                h, _attention(q, k, _split_heads(x @ layer["v"], batch, keys)), layer["o"]
            )
            x = norm(layer["norm2"], h)
            h = torch.addmm(h, F.silu(x @ layer["gate"]) * (x @ layer["up"]), layer["down"])
        last = norm(p["norm"], h.view(batch, length, width)[:, -1])
        return F.cross_entropy(last @ p["embedding"].T, labels)

    return loss


_SMOLLM2_LEAVES = ("norm1", "q", "k", "v", "o", "norm2", "gate", "up", "down")


def _wide(p: Arrays, state: Arrays, x: Tensor) -> Tensor:
    for i in range(len(p)):
        x = torch.relu(x @ p[f"layer{i}/w"])
    return (x * x).mean()


def loss_of(name: str, sizes: dict[str, int]) -> Loss:
    """Returns the loss of a workload of these sizes."""
    if name == "resnet":
        return _resnet(sizes["stages"])
    if name == "transformer":
        return _transformer(sizes["layers"], sizes["width"], sizes["heads"], sizes["batch"])
    if name == "smollm2":
        return _smollm2(
            *(sizes[k] for k in ("layers", "width", "queries", "keys", "batch", "length"))
        )
    if name.startswith("wide"):
        return _wide
    return {"logreg": _logreg, "mlp": _mlp, "mlp-512": _mlp, "cnn": _cnn}[name]


def arrays_of(file: Any) -> tuple[Arrays, Arrays, list[list[Tensor]]]:
    """Reads parameters, state and batches of `save_arrays`, in the layouts of PyTorch."""
    params, state, batches = {}, {}, {}
    for path, array in file.items():
        kind, name = path.split("/", 1)
        tensor = torch.from_numpy(np.array(array))
        if kind == "batch":
            batches.setdefault(int(name.split("/")[0]), []).append(
                tensor.long() if tensor.dtype == torch.int32 else tensor
            )
        elif kind == "state":
            state[name] = tensor
        elif name.startswith("layers/"):
            # each layer is a leaf, because the gradient of a slice is as large as the whole stack
            for i, part in enumerate(tensor):
                params[name.replace("layers/", f"layers/{i}/", 1)] = part.clone()
        elif tensor.ndim == 4:
            params[name] = tensor.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        else:
            params[name] = tensor
    return params, state, [batches[i] for i in sorted(batches)]


class Worker:
    """The methods of PyTorch. Each is one plain SGD step, in place."""

    def __init__(self, name: str, sizes: dict[str, int], arrays: str):
        with np.load(arrays, allow_pickle=False) as file:
            self.params, self.state, self.batches = arrays_of(file)
        self.loss = loss_of(name, sizes)
        # the leaves share the memory of the parameters
        self.leaves = {k: w.detach().requires_grad_() for k, w in self.params.items()}
        self.methods: dict[str, Callable[[list[Tensor]], Tensor]] = {
            "torch-bare": self._bare,
            "torch-backprop": lambda batch: self._backprop(self.loss, batch),
            "torch-backprop-compiled": lambda batch: self._backprop(self.compiled, batch),
            "torch-jvp": self._jvp,
        }

    @functools.cached_property
    def compiled(self) -> Loss:
        """The loss, compiled by torch.compile."""
        return torch.compile(self.loss)

    def _bare(self, batch: list[Tensor]) -> Tensor:
        with torch.inference_mode():
            return self.loss(self.params, self.state, *batch)

    def _backprop(self, loss: Loss, batch: list[Tensor]) -> Tensor:
        value = loss(self.leaves, self.state, *batch)
        gradients = torch.autograd.grad(value, list(self.leaves.values()))
        with torch.no_grad():
            torch._foreach_add_(list(self.leaves.values()), gradients, alpha=-LEARNING_RATE)
        return value.detach()

    def _jvp(self, batch: list[Tensor]) -> Tensor:
        tangents = {name: torch.randn_like(w) for name, w in self.params.items()}
        # only the plain attention kernel has a forward-mode derivative
        with sdpa_kernel(SDPBackend.MATH):
            value, slope, *_ = torch.func.jvp(
                lambda p: self.loss(p, self.state, *batch), (self.params,), (tangents,)
            )
        rate = -LEARNING_RATE * slope.item()
        torch._foreach_add_(list(self.params.values()), list(tangents.values()), alpha=rate)
        return value

    def steps(self, method: str, count: int) -> tuple[float, float]:
        """Takes `count` steps; returns the seconds and the last loss."""
        step, value = self.methods[method], torch.zeros(())
        begin = time.perf_counter()
        for i in range(count):
            value = step(self.batches[i % len(self.batches)])
        return time.perf_counter() - begin, value.item()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carries out one request."""
        method = request["method"]
        seconds, value = self.steps(method, request.get("count", 1))
        if request["do"] == "memory":
            return resident_memory(lambda: self.steps(method, 3))
        if request["do"] == "compile":
            seconds_or_none = seconds if method.endswith("compiled") else None
            return {"compile_seconds": seconds_or_none, "temp_bytes": None, "first_loss": value}
        return {"seconds": seconds, "loss": value}


def main() -> None:
    """Answers requests until standard input ends."""
    warnings.simplefilter("ignore")
    workers: list[Worker] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] != "start":
            return workers[0].answer(request)
        if request["keep_memory"]:
            keep_freed_memory()
        torch.set_num_threads(cores())
        torch.manual_seed(0)
        workers.append(Worker(request["name"], request["sizes"], request["arrays"]))
        return {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "methods": list(workers[0].methods),
        }

    serve(lambda: answer)


if __name__ == "__main__":
    main()
