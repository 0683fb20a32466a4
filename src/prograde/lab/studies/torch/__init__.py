"""PyTorch modules: a step by `prograde.torch` compared with PyTorch's own backprop."""
