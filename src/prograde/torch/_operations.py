"""Operations whose rules in torchax lack something: running statistics, bags, detached padding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

from prograde.torch import _refusals

# Where the probability of dropout stands in the arguments of a function.
_DROPOUT = {
    "dropout": (1, "p"),
    "dropout_": (1, "p"),
    "dropout1d": (1, "p"),
    "dropout2d": (1, "p"),
    "dropout3d": (1, "p"),
    "alpha_dropout": (1, "p"),
    "alpha_dropout_": (1, "p"),
    "feature_dropout": (1, "p"),
    "feature_alpha_dropout": (1, "p"),
    "native_dropout": (1, "p"),
    "scaled_dot_product_attention": (4, "dropout_p"),
    "multi_head_attention_forward": (10, "dropout_p"),
    "lstm": (5, "dropout"),
    "gru": (5, "dropout"),
    "rnn_tanh": (5, "dropout"),
    "rnn_relu": (5, "dropout"),
}


def without_dropout(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of an operation with the probability of dropout set to zero."""
    name = _refusals.name_of(func)
    if name not in _DROPOUT:
        return args, kwargs
    position, keyword = _DROPOUT[name]
    if len(args) > position:
        return (*args[:position], 0.0, *args[position + 1 :]), kwargs
    return args, {**(kwargs or {}), keyword: 0.0} if keyword in (kwargs or {}) else kwargs


def batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Any:
    """`F.batch_norm`, which moves its running statistics; their variance is the unbiased one."""
    axes = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    if training:
        count = x.numel() // x.shape[1]
        if count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input of {x.shape}."
            )
        mean, var = x.mean(axes), x.var(axes, correction=0)
        if running_mean is not None:
            with torch.no_grad():
                running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
                unbiased = var * (count / (count - 1))
                running_var.copy_((1 - momentum) * running_var + momentum * unbiased)
    else:
        mean, var = running_mean, running_var
    out = (x - mean.reshape(shape)) * torch.rsqrt(var.reshape(shape) + eps)
    if weight is not None:
        out = out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


def _torch_batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: Any, eps: float,
    cudnn_enabled: bool = False,
) -> Any:  # fmt: skip
    del cudnn_enabled
    return batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def _instance_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """`F.instance_norm`, which moves its running statistics by those of the mean example."""
    if not use_input_stats:
        return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    axes, shape = [*range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
    mean, var = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    if running_mean is not None:
        count = x[0, 0].numel()
        with torch.no_grad():
            for running, now in ((running_mean, mean), (running_var, var * count / (count - 1))):
                running.copy_((1 - momentum) * running + momentum * now.mean(0).flatten())
    out = (x - mean) * torch.rsqrt(var + eps)
    if weight is not None:
        out = out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


def _torch_instance_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, use_input_stats: bool, momentum: float,
    eps: float, cudnn_enabled: bool = False,
) -> Any:  # fmt: skip
    del cudnn_enabled
    return _instance_norm(x, mean, var, weight, bias, use_input_stats, momentum, eps)


def _embedding(
    weight: Any,
    indices: Any,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """`torch.embedding` without a custom rule: a factored tangent of the table passes it."""
    del sparse
    _refuse_scaled(scale_grad_by_freq)
    out = weight.apply_jax(lambda w, i: jnp.take(w, i, axis=0), _array(indices, weight))
    if padding_idx == -1:
        return out
    padding = torch.as_tensor(indices == padding_idx).unsqueeze(-1)
    return torch.where(padding, out.detach(), out)


def _embedding_bag(
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """`torch.embedding_bag`, whose offsets need not be known when it is traced."""
    del sparse
    _refuse_scaled(scale_grad_by_freq)
    indices, offsets = _array(indices, weight), _array(offsets, weight)
    if include_last_offset:
        offsets = offsets[:-1]
    bags = len(offsets)
    bag = jnp.searchsorted(offsets, jnp.arange(len(indices)), side="right") - 1
    skip = -1 if padding_idx is None else padding_idx % weight.shape[0] if padding_idx != -1 else -1
    kept = indices != skip
    scale = None if per_sample_weights is None else _array(per_sample_weights, weight)

    def of_table(table: jax.Array) -> jax.Array:
        rows = jnp.take(table, indices, axis=0)
        if scale is not None:
            rows = rows * scale[:, None]
        if mode < 2:
            total = jax.ops.segment_sum(jnp.where(kept[:, None], rows, 0), bag, bags)
            if mode == 0:
                return total
            count = jax.ops.segment_sum(kept.astype(table.dtype), bag, bags)
            return total / jnp.maximum(count, 1)[:, None]
        # the first row that holds the largest value, as its derivative is that of this row
        values = jnp.where(kept[:, None], jax.lax.stop_gradient(rows), -jnp.inf)
        is_largest = values == jax.ops.segment_max(values, bag, bags)[bag]
        position = jnp.where(is_largest, jnp.arange(len(indices))[:, None], len(indices))
        first = jax.ops.segment_min(position, bag, bags)
        found = jnp.take_along_axis(rows, jnp.clip(first, 0, len(indices) - 1), axis=0)
        empty = jax.ops.segment_sum(kept.astype(jnp.int32), bag, bags) == 0
        return jnp.where(empty[:, None], 0, found)

    return weight.apply_jax(of_table), None, None, None


def _refuse_scaled(scale_grad_by_freq: bool) -> None:
    if scale_grad_by_freq:
        raise _refusals.Refused(
            f"the loss uses an embedding with scale_grad_by_freq=True at {_refusals.place()}, "
            "which scales the gradient in the backward pass alone. Set it to False."
        )


def _array(x: Any, like: Any) -> jax.Array:
    return like._env.t2j_iso(x)


def register(environment: Any) -> None:
    """Puts these operations in place of those of torchax."""
    functional = torch.nn.functional
    for operation, function in (
        (functional.batch_norm, batch_norm),
        (torch.batch_norm, _torch_batch_norm),
        (functional.instance_norm, _instance_norm),
        (torch.instance_norm, _torch_instance_norm),
        (torch.ops.aten.embedding, _embedding),
        (torch.embedding_bag, _embedding_bag),
        (torch.ops.aten._embedding_bag, _embedding_bag),
        (torch.ops.aten._embedding_bag_forward_only, _embedding_bag),
    ):
        environment.override_op_definition(operation, function)
    detach: Callable[[Any], Any] = lambda x: x.detach()  # noqa: E731
    for operation in (torch.detach, torch.Tensor.detach, torch.ops.aten.detach):
        environment.override_op_definition(operation, detach, is_view_op=True)
