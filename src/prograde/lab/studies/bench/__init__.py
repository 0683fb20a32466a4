"""`prograde bench`: what a training step costs, by method, in JAX and in PyTorch."""

MODELS = ("logreg", "mlp", "mlp-512", "cnn", "resnet", "transformer", "smollm2")
"""The names of `prograde.lab.models.workloads.WORKLOADS`, which cannot be imported as quickly."""

WIDE = ("wide-1", "wide-8", "wide-16")
"""Models of few rows and large weights, measured where they are named, and on a GPU."""

ON_GPU = ("mlp", "mlp-512", "cnn", "transformer", "smollm2", *WIDE)
"""The models of `prograde bench --device gpu`."""

GPU_METHODS = (
    "bare",
    "prograde-1",
    "prograde-4",
    "prograde-16",
    "blocks-1",
    "blocks-4",
    "backprop",
    "checkpointed",
    "dense-jvp",
    "mezo",
    "torch-bare",
    "torch-backprop",
    "torch-backprop-compiled",
)
"""The methods of `prograde bench --device gpu`."""
