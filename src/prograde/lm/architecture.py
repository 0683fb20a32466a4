"""What a Llama-family decoder is made of, read from config.json or from the header of a GGUF file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SUPPORTED = ("llama", "mistral", "qwen2")


class ModelError(RuntimeError):
    """A model that cannot be loaded, or not as asked; the message says why and what would do."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder.

    **Fields:** `width` of the residual stream; `head_size` of each of `num_heads` query heads, of which as many share one of `num_kv_heads`
    key and value heads; `hidden`, the width of the feed-forward layers; `rope_theta`, the base of the rotary positions, and
    `rope_scaling`, the `llama3` rule as (factor, low, high, original length) where there is one; `norm_eps`; `tied`, whether the output layer is the embedding;
    `attention_bias`, whether queries, keys and values have biases; `context`, the longest text it was trained for, in tokens.

    **Source:** arXiv 2302.13971 (Llama), arXiv 2305.13245 (grouped-query attention), arXiv 2104.09864 (RoPE).

    Examples:
        >>> from prograde.lm import Architecture
        >>> tiny = Architecture(vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=128)
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

    def __post_init__(self):
        if not self.head_size:
            object.__setattr__(self, "head_size", self.width // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_heads={self.num_heads} and num_kv_heads={self.num_kv_heads}: the second must divide the first."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Architecture":
        """From what a Hugging Face directory has as config.json."""
        kind = config.get("model_type")
        # what follows changes the computation, and is not implemented
        different = {
            "hidden_act": ("silu", None),
            "mlp_bias": (False, None),
            "use_sliding_window": (False, None),
            "quantization_config": (None,),
        }
        _check_kind(kind)
        for name, allowed in different.items():
            if config.get(name) not in allowed:
                raise ModelError(f"config.json has {name}={config[name]!r}, which is not supported; {allowed[0]!r} is.")
        try:
            scaling = _scaling(config.get("rope_scaling") or config.get("rope_parameters") or {})
            theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
            return cls(
                vocab_size=config["vocab_size"],
                width=config["hidden_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=config["num_attention_heads"],
                num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
                hidden=config["intermediate_size"],
                head_size=config.get("head_dim") or 0,
                rope_theta=float(theta),
                rope_scaling=scaling,
                norm_eps=config.get("rms_norm_eps", 1e-6),
                tied=config.get("tie_word_embeddings", False),
                attention_bias=config.get("attention_bias", kind == "qwen2"),
                context=config.get("max_position_embeddings", 2048),
            )
        except KeyError as error:
            raise ModelError(f"config.json has no {error.args[0]!r}.") from None

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], tied: bool, attention_bias: bool) -> "Architecture":
        """From the header of a GGUF file; whether the head is tied, and biases exist, show its tensors."""
        kind = fields.get("general.architecture")
        _check_kind(kind)
        given = {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
        try:
            heads = given["attention.head_count"]
            return cls(
                vocab_size=given.get("vocab_size") or len(fields["tokenizer.ggml.tokens"]),
                width=given["embedding_length"],
                num_layers=given["block_count"],
                num_heads=heads,
                num_kv_heads=given.get("attention.head_count_kv", heads),
                hidden=given["feed_forward_length"],
                head_size=given.get("attention.key_length", 0),
                rope_theta=float(given.get("rope.freq_base", 10000.0)),
                norm_eps=float(given["attention.layer_norm_rms_epsilon"]),
                tied=tied,
                attention_bias=attention_bias,
                context=given.get("context_length", 2048),
            )
        except KeyError as error:
            raise ModelError(f"the header has no {error.args[0]!r}.") from None

    def to_config(self) -> dict[str, Any]:
        """A config.json that `transformers` reads."""
        scaling = self.rope_scaling and {
            "rope_type": "llama3",
            "factor": self.rope_scaling[0],
            "low_freq_factor": self.rope_scaling[1],
            "high_freq_factor": self.rope_scaling[2],
            "original_max_position_embeddings": int(self.rope_scaling[3]),
        }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
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
            "attention_bias": self.attention_bias,
            "max_position_embeddings": self.context,
            "hidden_act": "silu",
        }


def _check_kind(kind: str | None) -> None:
    if kind not in SUPPORTED:
        raise ModelError(f"the architecture {kind!r} is not supported. Supported: {', '.join(SUPPORTED)}.")


def _scaling(given: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"config.json has rope_scaling {kind!r}, which is not supported; 'llama3' is.")
    names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    low = [float(given[name]) for name in names]
    return low[0], low[1], low[2], low[3]
