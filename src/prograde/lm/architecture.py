"""The sizes of a Llama-family decoder, read from config.json or from the header of a GGUF file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SUPPORTED = ("llama", "mistral", "qwen2")


class ModelError(RuntimeError):
    """A model cannot be loaded or saved as asked. The message says why, and what to do.

    **Source:** none; it names what is wrong with a file.

    Examples:
        >>> from prograde import lm
        >>> try:
        ...     lm.load("no/such/model")
        ... except lm.ModelError as error:
        ...     print(error)
        no/such/model does not exist. Give a directory with config.json, a .gguf file, or smollm2.
    """


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder.

    **Fields:**

    - `vocab_size`, `num_layers`;
    - `width` of the residual stream; `hidden`, the width of the feed-forward layers;
    - `head_size` of each of `num_heads` query heads. Groups of these share one of `num_kv_heads`
      key and value heads. A `head_size` of 0 becomes `width / num_heads`;
    - `rope_theta`, the base of the rotary positions; `rope_scaling`, the `llama3` rule as (factor,
      low, high, original length), or `None`;
    - `norm_eps`; `tied`: the output layer is the embedding; `attention_bias`: queries, keys and
      values have biases;
    - `context`: tokens of the longest text the model was trained for; `window`: how many tokens,
      itself included, a token attends to, or `None` for all before it.

    **Errors:** `ModelError` for values of another type, out of range, or that do not fit each
    other.

    **Source:** arXiv 2302.13971 (Llama), arXiv 2305.13245 (grouped-query attention), arXiv
    2104.09864 (RoPE).

    Examples:
        >>> from prograde.lm import Architecture
        >>> tiny = Architecture(
        ...     vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
        >>> tiny.head_size
        16
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden: int
    head_size: int = 0
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, float, float, float] | None = None
    norm_eps: float = 1e-5
    tied: bool = True
    attention_bias: bool = False
    context: int = 2048
    window: int | None = None

    def __post_init__(self):
        sizes = "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "hidden"
        for name in (*sizes, "context"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ModelError(
                    f"{name}={value!r}, but a whole number, an int, of at least 1 is needed."
                )
        if self.head_size == 0:
            if self.width % self.num_heads:
                raise ModelError(
                    f"width={self.width} and num_heads={self.num_heads}: the second must divide "
                    "the first where no head_size is given."
                )
            object.__setattr__(self, "head_size", self.width // self.num_heads)
        if type(self.head_size) is not int or self.head_size < 2 or self.head_size % 2:
            raise ModelError(
                f"head_size={self.head_size!r}, but an even number of at least 2 is needed: rotary "
                "positions turn pairs."
            )
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_heads={self.num_heads} and num_kv_heads={self.num_kv_heads}: the second must "
                "divide the first."
            )
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ModelError(
                f"window={self.window!r}, but a whole number of at least 1, or None, is needed."
            )
        for name in ("rope_theta", "norm_eps"):
            if not _positive(value := getattr(self, name)):
                raise ModelError(f"{name}={value!r}, but a positive number is needed.")
        for name in ("tied", "attention_bias"):
            if type(value := getattr(self, name)) is not bool:
                raise ModelError(f"{name}={value!r}, but true or false is needed.")
        if self.rope_scaling is not None:
            _check_scaling(self.rope_scaling)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Architecture":
        """Reads the config.json of a Hugging Face directory."""
        kind = config.get("model_type")
        _check_kind(kind)
        # these change the computation in ways that are not implemented
        different = {
            "hidden_act": ("silu", None),
            "mlp_bias": (False, None),
            "use_sliding_window": (False, None),
            "quantization_config": (None,),
            "partial_rotary_factor": (1.0, None),
        }
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        try:
            for name, allowed in different.items():
                if (found := config.get(name, rope.get(name))) not in allowed:
                    raise ModelError(
                        f"config.json has {name}={found!r}, which is not supported; "
                        f"{allowed[0]!r} is."
                    )
            other = config.get("rope_parameters") or {}
            theta = _given(config, "rope_theta", _given(other, "rope_theta", 10000.0))
            heads = config["num_attention_heads"]
            return cls(
                vocab_size=config["vocab_size"],
                width=config["hidden_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=_given(config, "num_key_value_heads", heads),
                hidden=config["intermediate_size"],
                head_size=_given(config, "head_dim", 0),
                rope_theta=_number(theta),
                rope_scaling=_scaling(rope),
                norm_eps=config.get("rms_norm_eps", 1e-6),
                tied=config.get("tie_word_embeddings", False),
                # qwen2 always has biases, mistral never, whatever config.json says
                attention_bias=config.get("attention_bias", False)
                if kind == "llama"
                else kind == "qwen2",
                context=config.get("max_position_embeddings", 2048),
                window=config.get("sliding_window") if kind == "mistral" else None,
            )
        except KeyError as error:
            raise ModelError(
                f"config.json has no {error.args[0]!r}, which a decoder needs."
            ) from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ModelError(f"config.json has a value that makes no sense ({error}).") from None

    @classmethod
    def from_gguf(
        cls, fields: Mapping[str, Any], tied: bool, attention_bias: bool
    ) -> "Architecture":
        """Reads the header of a GGUF file. Its tensors tell `tied` and `attention_bias`."""
        kind = fields.get("general.architecture")
        _check_kind(kind)
        given = {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
        try:
            scaling = given.get("rope.scaling.type", "none")
            if scaling != "none":
                raise ModelError(
                    f"the header has rope.scaling.type={scaling!r}, which is not supported; "
                    "'none' is."
                )
            rotated, heads = given.get("rope.dimension_count"), given["attention.head_count"]
            size = given.get("attention.key_length", given["embedding_length"] // heads)
            if rotated is not None and rotated != size:
                raise ModelError(
                    f"the header has rope.dimension_count={rotated}, which is not the size of a "
                    "head. Other counts are not supported."
                )
            return cls(
                vocab_size=given["vocab_size"]
                if "vocab_size" in given
                else len(fields["tokenizer.ggml.tokens"]),
                width=given["embedding_length"],
                num_layers=given["block_count"],
                num_heads=heads,
                num_kv_heads=given.get("attention.head_count_kv", heads),
                hidden=given["feed_forward_length"],
                head_size=given.get("attention.key_length", 0),
                rope_theta=_short(given.get("rope.freq_base", 10000.0)),
                norm_eps=_short(given["attention.layer_norm_rms_epsilon"]),
                tied=tied,
                attention_bias=attention_bias,
                context=given.get("context_length", 2048),
            )
        except KeyError as error:
            raise ModelError(
                f"the header has no {error.args[0]!r}, which a decoder needs."
            ) from None
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ModelError(f"the header has a value that makes no sense ({error}).") from None

    def to_config(self) -> dict[str, Any]:
        """config.json for `transformers`: mistral with a window, qwen2 with biases, else llama."""
        if self.window is not None and self.attention_bias:
            raise ModelError(
                "window and attention_bias are both set, but no kind of config.json has both."
            )
        kind, name = ("mistral", "Mistral") if self.window is not None else ("llama", "Llama")
        kind, name = ("qwen2", "Qwen2") if self.attention_bias else (kind, name)
        scaling = self.rope_scaling and {
            "rope_type": "llama3",
            "factor": self.rope_scaling[0],
            "low_freq_factor": self.rope_scaling[1],
            "high_freq_factor": self.rope_scaling[2],
            "original_max_position_embeddings": int(self.rope_scaling[3]),
        }
        return {
            "architectures": [f"{name}ForCausalLM"],
            "model_type": kind,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": self.hidden,
            "head_dim": self.head_size,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "sliding_window": self.window,
            "max_position_embeddings": self.context,
            "hidden_act": "silu",
        }


def _check_kind(kind: str | None) -> None:
    if kind not in SUPPORTED:
        raise ModelError(
            f"the architecture {kind!r} is not supported. Supported: {', '.join(SUPPORTED)}. "
            "Others train as models of transformers, by prograde.torch.transformers.Trainer."
        )


def _short(value: float) -> float:
    """The shortest number with this float32: 1e-5, and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _given(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """A value of the configuration; the default where it is missing or null."""
    return default if config.get(name) is None else config[name]


def _positive(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 < value < math.inf
        and float(value) < math.inf
    )


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _check_scaling(scaling: Any) -> None:
    four = isinstance(scaling, tuple) and len(scaling) == 4 and all(map(_positive, scaling))
    if not (four and scaling[1] < scaling[2] and scaling[3] == int(scaling[3])):
        raise ModelError(
            f"rope_scaling={scaling!r}, but four positive numbers (factor, low, high, original "
            "length) are needed, with low below high and a whole length."
        )


def _scaling(given: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(
            f"config.json has rope_scaling {kind!r}, which is not supported; 'llama3' is."
        )
    names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    factor, low, high, original = (_number(given[name]) for name in names)
    return factor, low, high, original
