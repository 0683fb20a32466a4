"""What a program traced by JAX cannot do: refused with the line of the user and a remedy."""

import contextlib
import importlib.util
import os
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import torch
import torch.utils.checkpoint


class Refused(TypeError):
    """A loss in PyTorch does what a traced program cannot do."""


_READS_VALUES = (
    "Values are not known when the loss is traced. Use torch.where in place of `if`, compute what "
    "the loss needs in tensors, and pass numbers that decide as part of the batch."
)
_VALUES = {
    "__bool__": "branches on the value of a tensor",
    "__int__": "turns a tensor into a Python number",
    "__float__": "turns a tensor into a Python number",
    "__complex__": "turns a tensor into a Python number",
    "__index__": "turns a tensor into a Python number",
    "item": "turns a tensor into a Python number",
    "tolist": "turns a tensor into a list",
    "numpy": "turns a tensor into an array of numpy",
    "__array__": "turns a tensor into an array of numpy",
    "_local_scalar_dense": "turns a tensor into a Python number",
    "equal": "compares tensors as a Python bool",
    "allclose": "compares tensors as a Python bool",
    "is_nonzero": "branches on the value of a tensor",
}
_READS_SHAPES = (
    "Shapes have to be known when the loss is traced. Keep the full shape and give what is left "
    "out the weight zero, such as torch.where(mask, x, 0), or ignore_index in a cross entropy."
)
_SHAPES = {
    "nonzero": "asks where a tensor is not zero",
    "argwhere": "asks where a tensor is not zero",
    "masked_select": "selects by a boolean mask",
    "unique": "asks for the unique values of a tensor",
    "_unique2": "asks for the unique values of a tensor",
    "unique_dim": "asks for the unique values of a tensor",
    "unique_consecutive": "asks for the unique values of a tensor",
    "_pack_padded_sequence": "packs sequences by their lengths",
    "bincount": "counts values",
    "histc": "counts values",
}
_NO_BACKWARD = (
    "Forward mode has no backward pass. Leave it out of the loss, or compute the derivative with "
    "prograde.torch.functionalize and JAX."
)
_BACKWARD = {
    "backward": "calls backward",
    "grad": "calls torch.autograd.grad",
    "register_hook": "registers a hook of the backward pass",
    "register_post_accumulate_grad_hook": "registers a hook of the backward pass",
}


def place(frames: Any = None) -> str:
    """The line of the user, `file:line (function)`: the innermost outside of the libraries."""
    frames = traceback.extract_stack() if frames is None else frames
    for frame in reversed(list(frames)):
        if not frame.filename.startswith(_LIBRARIES) and not (
            frame.filename.startswith(_STANDARD) and "site-packages" not in frame.filename
        ):
            return f"{frame.filename}:{frame.lineno} ({frame.name})"
    return "an unknown place"


_STANDARD = (os.path.dirname(os.__file__), "<frozen")
_LIBRARIES = tuple(
    os.path.join(os.path.dirname(importlib.util.find_spec(name).origin), "")
    for name in ("torch", "torchax", "jax", "equinox", "prograde")
)


def refuse(func: Any, args: Any, kwargs: Any) -> None:
    """Raises for an operation that a traced program cannot do."""
    name = name_of(func)
    for table, remedy in (
        (_VALUES, _READS_VALUES),
        (_SHAPES, _READS_SHAPES),
        (_BACKWARD, _NO_BACKWARD),
    ):
        if name in table and _is_traced(args):
            raise Refused(f"the loss {table[name]} at {place()}. {remedy}")
    if kwargs and kwargs.get("generator") is not None:
        raise Refused(
            f"the loss draws from a torch.Generator at {place()}, which would give the same ones "
            "at every step. Leave the generator out: they then come from the key of the step."
        )
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise Refused(
            f"the loss runs under torch.autocast at {place()}, which would be ignored. Leave it "
            "out, and call module.bfloat16() for half precision."
        )


def _is_traced(args: Any) -> bool:
    from prograde.torch._environment import TRACED

    return any(isinstance(x, TRACED) for x in torch.utils._pytree.tree_leaves(args))


def name_of(func: Any) -> str:
    if isinstance(func, torch._ops.OpOverload):
        return func.overloadpacket.__name__
    return getattr(func, "__name__", "")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns what libraries raise in a trace into errors that say where, and what to do."""
    try:
        yield
    except Refused:
        raise
    except jax.errors.NonConcreteBooleanIndexError as error:
        where = place(traceback.extract_tb(error.__traceback__))
        raise Refused(f"the loss selects by a boolean mask at {where}. {_READS_SHAPES}") from error
    except jax.errors.ConcretizationTypeError as error:
        where = place(traceback.extract_tb(error.__traceback__))
        raise Refused(f"the loss uses the value of a tensor at {where}. {_READS_VALUES}") from error
    except UserWarning as error:
        where = place(traceback.extract_tb(error.__traceback__))
        raise Refused(
            f"the loss computes in 64 bits at {where}, which JAX would round to 32. Run "
            "jax.config.update('jax_enable_x64', True) before anything else, or use float32. "
            f"({error})"
        ) from None
    except Exception as error:
        where = place(traceback.extract_tb(error.__traceback__))
        if type(error).__name__ == "OperatorNotFound" or "torchax Tensors can only" in str(error):
            raise Refused(
                f"the loss calls an operation at {where} that torchax cannot express in JAX: "
                f"{error}. Compute it by other operations."
            ) from error
        error.add_note(f"This was raised while the loss was traced, at {where}.")
        raise


_TRACING = threading.local()
_apply = torch.autograd.Function.apply.__func__
_CHECKPOINT = torch.utils.checkpoint.CheckpointFunction


class _Context:
    """What the forward of a `torch.autograd.Function` is given where nothing is saved."""

    needs_input_grad = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _traced_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.autograd.Function.apply` in a thread that traces: refused, or its forward as code."""
    inline = getattr(_TRACING, "inline", None)
    if inline is None:
        return _apply(cls, *args, **kwargs)
    if cls is _CHECKPOINT:
        function, _, *rest = args
        return function(*rest)
    if not inline:
        raise Refused(
            f"the loss calls {cls.__module__}.{cls.__qualname__} at {place()}, a "
            "torch.autograd.Function, whose backward forward mode cannot use. Compute it by plain "
            "operations, or pass functions='inline' to differentiate the code of its forward and "
            "ignore its backward."
        )
    if cls.setup_context is not torch.autograd.Function.setup_context:
        return cls.forward(*args, **kwargs)
    return cls.forward(_Context(), *args, **kwargs)


@contextlib.contextmanager
def functions_traced(inline: bool) -> Iterator[None]:
    """Within, this thread refuses each `torch.autograd.Function`, or runs its forward as code."""
    torch.autograd.Function.apply = classmethod(_traced_apply)
    _TRACING.inline = inline
    try:
        yield
    finally:
        _TRACING.inline = None
        torch.autograd.Function.apply = classmethod(_apply)


def refuse_hooks(module: torch.nn.Module) -> None:
    """Raises where a module or a parameter has hooks of the backward pass."""
    for name, part in module.named_modules():
        if part._backward_hooks or part._backward_pre_hooks:
            raise Refused(
                f"the module {name or type(module).__name__!r} has hooks of the backward pass, "
                "which would not be called. Remove them."
            )
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise Refused(
                f"the parameter {name!r} has hooks of the backward pass, which would not be "
                "called. Change its .grad after the step instead."
            )
