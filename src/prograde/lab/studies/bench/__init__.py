"""`prograde bench`: what a training step costs, by method, in JAX and in PyTorch."""

MODELS = ("logreg", "mlp", "mlp-512", "cnn", "resnet", "transformer", "smollm2")
"""The names of `prograde.lab.models.workloads.WORKLOADS`, which cannot be imported as quickly."""
