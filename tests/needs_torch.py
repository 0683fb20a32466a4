"""`from needs_torch import torch` skips a file of tests where PyTorch is not installed."""

import importlib.util

import pytest

if not all(map(importlib.util.find_spec, ("torch", "torchax", "transformers"))):
    pytest.skip("PyTorch is not installed: `make test-torch` runs this", allow_module_level=True)

import torch

__all__ = ["torch"]
