"""The environment in which operations of PyTorch run as operations of JAX: torchax, completed.

torchax gives each operation its meaning in JAX. What it leaves out here is what a derivative needs:
`torch.no_grad` and `detach` stop tangents, `.data` and `detach` share memory with their source,
tensors from outside become constants, and what cannot be traced is refused with a remedy.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from prograde.torch import _operations, _refusals
from prograde.torch._arrays import to_jax


def _add_missing_overloads() -> None:
    """Overloads for named tensors that torchax 0.0.13 names and PyTorch 2.13 no longer has.

    Stand-ins let it be imported. No operation ever dispatches to them.
    """
    names = {
        "all": ("dimname", "dimname_out"),
        "index_add": ("dimname",),
        "index_copy": ("dimname",),
        "index_copy_": ("dimname",),
        "index_fill": ("Dimname_Scalar", "Dimname_Tensor"),
        "index_fill_": ("Dimname_Scalar", "Dimname_Tensor"),
        "norm": (
            "names_ScalarOpt_dim",
            "names_ScalarOpt_dim_dtype",
            "names_dtype_out",
            "names_out",
        ),
        "prod": ("dim_Dimname",),
        "std": ("correction_names", "correction_names_out", "names_dim", "names_out"),
        "std_mean": ("correction_names", "names_dim"),
        "unbind": ("Dimname",),
    }
    for operation, overloads in names.items():
        packet = getattr(torch.ops.aten, operation)
        for overload in set(overloads) - set(packet.overloads()):
            packet.__dict__[overload] = f"aten::{operation}.{overload} (absent)"


def _imported() -> Any:
    """torchax, imported without its effects on the rest of PyTorch.

    Its device would count as an accelerator, on which `torch.compile` fails and which trainers
    choose, and fused attention would be off.
    """
    try:
        _add_missing_overloads()
        fast = torch.backends.mha.get_fastpath_enabled()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchax
            import torchax.device_module
        torch.backends.mha.set_fastpath_enabled(fast)
        torchax.device_module.is_available = lambda: False
    except ImportError as error:
        raise ImportError(
            f"prograde.torch needs {error.name}: pip install 'prograde[torch]'"
        ) from None
    return torchax


torchax = _imported()

from torchax import tensor as tensors  # noqa: E402
from torchax.view import View, ViewInfo, ViewInfoType  # noqa: E402

TRACED = (tensors.Tensor, View)
"""The classes of tensors that hold arrays of JAX."""


class _Detached(ViewInfo):
    """A view of a whole tensor that shares its memory, and has no tangent."""

    def __init__(self):
        super().__init__(ViewInfoType.INVALID)

    def transform_tensor(self, jax_array: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(jax_array)

    def update_tensor(self, new_value: jax.Array, jax_array: jax.Array) -> jax.Array:
        return jnp.broadcast_to(new_value, jax_array.shape).astype(jax_array.dtype)

    def calculate_output_shape(self, source: jax.Array) -> list[int]:
        return list(source.shape)


def _detach(x: Any) -> View:
    return View(x, _Detached(), x._env)


def _set_data(x: Any, other: Any) -> None:
    x.apply_jax_(lambda _: other.jax())


@jax.custom_jvp
def _assigned(old: jax.Array, new: jax.Array) -> jax.Array:
    """The new value with the old tangent: what an operation in place does under `no_grad`."""
    del old
    return new


_assigned.defjvps(lambda t, ans, old, new: t, None)


class _FunctionMode(tensors.XLAFunctionMode):
    """Tensors from outside become traced constants before PyTorch's own code sees them.

    Dropout is left out here, if it is: what torchax has no rule for goes on in PyTorch's own code.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.env.with_constants(func, args, kwargs or {})
        if not self.env.dropout:
            args, kwargs = _operations.without_dropout(func, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)


class Environment(tensors.Environment):
    """torchax's environment, with the meaning that PyTorch's own autograd gives to a program."""

    def __init__(self):
        super().__init__()
        self._function_mode = _FunctionMode(self)
        self.constants: list[torch.Tensor] = []  # tensors from outside that the trace has met
        self.draws = 0  # how often random numbers were drawn
        self.dropout = True

    def dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        _refusals.refuse(func, args, kwargs)
        if torch.is_grad_enabled():
            return super().dispatch(func, types, args, kwargs)
        target = args[0] if args and _in_place(func) and isinstance(args[0], TRACED) else None
        before = None if target is None else target.jax()
        out = super().dispatch(func, types, args, kwargs)
        if target is None:
            return tree_map_only(TRACED, self._constant, out)
        after = target.jax()
        if before.shape == after.shape and before.dtype == after.dtype:
            after = _assigned(before, after)
            if isinstance(target, View):
                target.update(after)
            else:
                target._elem = after
        return out

    def _constant(self, x: Any) -> Any:
        """What an operation returned under `no_grad`: a view stays a view of the same memory."""
        if isinstance(x, View):
            return _detach(x)
        return tensors.Tensor(jax.lax.stop_gradient(x.jax()), self)

    def _should_use_torchax_tensor(self, device: Any) -> bool:
        if device is None:
            return self.enabled
        return super()._should_use_torchax_tensor(device)

    def _constant_array(self, x: torch.Tensor) -> Any:
        if x.requires_grad:
            raise _refusals.Refused(
                f"the loss uses a tensor of shape {tuple(x.shape)} that requires grad and is no "
                "parameter of the module, so that it would get no gradient. Register it as a "
                "parameter of the module, pass it as part of the batch, or detach it."
            )
        self.constants.append(x)
        return to_jax(x, f"a constant of shape {tuple(x.shape)}")

    def with_constants(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments in which tensors from outside meet traced ones: as constants.

        Those without axes stay, as they count like numbers where dtypes are promoted.
        """
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(x, TRACED) for x in leaves):
            return args, kwargs
        if (
            _in_place(func)
            and isinstance(args[0], torch.Tensor)
            and not isinstance(args[0], TRACED)
        ):
            raise _refusals.Refused(
                f"the loss writes to a tensor from outside at {_refusals.place()}, which would be "
                "lost. Register it as a buffer of the module."
            )

        def constant(x: torch.Tensor) -> torch.Tensor:
            if isinstance(x, TRACED) or x.ndim == 0:
                return x
            return tensors.Tensor(self._constant_array(x), self)

        return tree_map_only(torch.Tensor, constant, (args, kwargs))

    def t2j_iso(self, torchtensors: Any) -> Any:
        def unwrap(x: torch.Tensor) -> Any:
            if isinstance(x, TRACED):
                return x.jax()
            array = self._constant_array(x)
            return x.item() if x.ndim == 0 else array

        return tree_map_only(torch.Tensor, unwrap, torchtensors)

    def t2j_copy(self, args: Any) -> Any:
        return tree_map_only(torch.Tensor, self._constant_array, args)

    def get_and_rotate_prng_key(self, generator: torch.Generator | None = None) -> jax.Array:
        self.draws += 1
        return super().get_and_rotate_prng_key()

    def wrap(self, tree: Any) -> Any:
        """Arrays of JAX in a tree as tensors that can be traced."""
        return jax.tree.map(
            lambda x: tensors.Tensor(x, self) if isinstance(x, jax.Array) else x, tree
        )

    @contextlib.contextmanager
    def tracing(self, key: jax.Array, dropout: bool) -> Iterator[None]:
        """Within, operations on tensors are traced, and random numbers come from `key`."""
        self.constants, self.draws, self.dropout = [], 0, dropout
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with self, self.override_property(prng=key):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            self.dropout = True


def _in_place(func: Any) -> bool:
    """Whether an operation changes its first argument."""
    schema = getattr(func, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = getattr(func, "__name__", "")
    return (
        name == "__setitem__"
        or (name.endswith("_") and not name.startswith("__"))
        or (
            name.startswith("__i")
            and name.endswith("__")
            and name not in ("__invert__", "__index__")
        )
    )


def _created() -> Environment:
    for kind in TRACED:
        kind.detach = _detach
    tensors.Tensor.data = property(_detach, _set_data)
    View.data = property(_detach, _set_data)
    tensors.Tensor.type_as = lambda self, other: self.to(other.dtype)
    created = Environment()
    _operations.register(created)
    torchax._env = created
    return created


environment = _created()
"""The one environment: torchax finds it where it looks for its own."""
