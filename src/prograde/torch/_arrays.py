"""Tensors as arrays of JAX and back, without copies where memory can be shared."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

_INT32 = torch.iinfo(torch.int32)


def to_jax(tensor: torch.Tensor, name: str) -> jax.Array:
    """A tensor as an array on the same device, which shares its memory where it can.

    Without `jax_enable_x64`, int64 becomes int32. `name` is what errors call the tensor.

    **Errors:** `ValueError` for a device that JAX does not have, float16 on the CPU, float64 or
    complex128 without `jax_enable_x64`, integers beyond int32, sparse and quantized tensors.
    """
    tensor = tensor.detach()
    _check(tensor, name)
    if tensor.dtype == torch.int64 and not jax.config.jax_enable_x64:
        if tensor.numel() and (tensor.min() < _INT32.min or tensor.max() > _INT32.max):
            raise ValueError(
                f"{name} holds integers beyond 32 bits. Run "
                "jax.config.update('jax_enable_x64', True) before anything else."
            )
        tensor = tensor.to(torch.int32)
    if not tensor.numel() or tensor.dtype == torch.bool or tensor.dim() == 0:
        if tensor.dtype == torch.bfloat16:  # numpy has none
            return jax.device_put(tensor.float().cpu().numpy()).astype(jnp.bfloat16)
        return jax.device_put(tensor.cpu().numpy())
    return jnp.from_dlpack(tensor.resolve_conj().resolve_neg().contiguous())


def _check(tensor: torch.Tensor, name: str) -> None:
    device = tensor.device.type
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{name} is sparse or quantized. Call to_dense() or dequantize() first.")
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"{name} is on the device {device!r}, but 'cpu' is needed, or 'cuda' where JAX has "
            "the GPU. Call module.to('cpu')."
        )
    if device == "cuda" and jax.default_backend() not in ("gpu", "cuda", "rocm"):
        raise ValueError(
            f"{name} is on the device 'cuda', but JAX runs on {jax.default_backend()!r}. Install "
            "JAX for the GPU, or call module.to('cpu')."
        )
    if device == "cpu" and tensor.dtype == torch.float16:
        raise ValueError(
            f"{name} has dtype float16 on the CPU, where tangents would overflow and nothing is "
            "gained. Call module.float(), or module.bfloat16()."
        )
    if tensor.dtype in (torch.float64, torch.complex128) and not jax.config.jax_enable_x64:
        raise ValueError(
            f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, which JAX would round "
            "to 32 bits. Run jax.config.update('jax_enable_x64', True) before anything else, or "
            "call module.float()."
        )


def shares_memory(array: jax.Array, tensor: torch.Tensor) -> bool:
    """Whether an array sees what is written to a tensor."""
    return array.nbytes > 0 and array.unsafe_buffer_pointer() == tensor.data_ptr()


def to_torch(array: jax.Array) -> torch.Tensor:
    """An array as a tensor on the same device, which shares its memory."""
    if not array.size or array.dtype == bool:
        return torch.from_numpy(np.array(array))
    return torch.from_dlpack(array)


def split(batch: Any, of_jax: bool = False, copy: bool = False) -> tuple[list[jax.Array], Any]:
    """The tensors of a tree as arrays, and everything else, which can be compared and hashed.

    `joined` puts the two together again. A mapping of another type, such as the `BatchEncoding` of
    transformers, becomes a dict. `of_jax` says whether arrays of JAX may be among the tensors.

    **Errors:** `TypeError` for arrays of numpy or JAX, and for what cannot be hashed.
    """
    leaves, structure = torch.utils._pytree.tree_flatten(_plain(batch))
    arrays, rest = [], []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.clone() if copy else leaf
            arrays.append(to_jax(leaf, f"tensor {i} of the batch"))
            rest.append(None)
        elif of_jax and isinstance(leaf, jax.Array):
            arrays.append(leaf)
            rest.append(None)
        elif isinstance(leaf, np.ndarray | jax.Array):
            raise TypeError(
                f"leaf {i} of the batch is {type(leaf).__module__}.{type(leaf).__name__}, but a "
                "torch.Tensor is needed. Call torch.as_tensor."
            )
        elif getattr(type(leaf), "__hash__", None) is None:
            raise TypeError(
                f"leaf {i} of the batch is {type(leaf).__name__}, but a tensor is needed, or a "
                "constant that can be hashed, such as a number or a string."
            )
        else:
            rest.append((leaf,))
    return arrays, (structure, tuple(rest))


def joined(arrays: Any, rest: Any) -> Any:
    """A tree from its tensors, of any kind, and everything else in it."""
    structure, others = rest
    given = iter(arrays)
    leaves = [next(given) if other is None else other[0] for other in others]
    return torch.utils._pytree.tree_unflatten(leaves, structure)


def _plain(tree: Any) -> Any:
    """The tree with every mapping as a dict."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(_plain, tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map(_plain, tree))
    if hasattr(tree, "keys") and hasattr(tree, "__getitem__"):
        return {name: _plain(tree[name]) for name in tree.keys()}  # noqa: SIM118
    return tree
