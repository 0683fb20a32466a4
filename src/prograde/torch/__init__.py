"""Forward gradients of PyTorch modules, such as those of transformers.

    step = prograde.torch.value_and_grad(module, loss_fn, estimator)
    loss = step(*batch)                       # fills .grad, as loss.backward() does

The loss is ordinary PyTorch code. It runs in JAX, through torchax, which is imported when it is
first used.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(f"prograde.torch needs {error.name}: pip install 'prograde[torch]'") from None

from prograde.torch._functional import functionalize
from prograde.torch._step import value_and_grad
from prograde.torch._train_step import TrainStep

__all__ = ["TrainStep", "functionalize", "value_and_grad"]
