"""The modules of `prograde torch`, their losses and a batch for each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """A module in training mode, its loss and a batch."""

    title: str
    module: nn.Module
    loss: Callable[..., torch.Tensor]
    batch: tuple[Any, ...]


def _mlp() -> Case:
    module = nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
    batch = torch.randn(64, 784), torch.randint(0, 10, (64,))
    title = "MLP 784-1024-1024-10, batch 64"
    return Case(title, module, lambda m, x, y: F.cross_entropy(m(x), y), batch)


def _llama() -> Case:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    ids = torch.randint(0, 1000, (4, 128))
    module = transformers.LlamaForCausalLM(config)
    title = "Llama, 4 layers of width 256, 4 x 128 tokens"
    return Case(title, module, lambda m, ids: m(input_ids=ids, labels=ids).loss, (ids,))


def _minilm() -> Case:
    import transformers

    config = transformers.BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    batch = {
        "input_ids": torch.randint(0, config.vocab_size, (8, 64)),
        "attention_mask": torch.ones(8, 64, dtype=torch.long),
        "labels": torch.randint(0, 2, (8,)),
    }
    module = transformers.BertForSequenceClassification(config)
    title = "MiniLM (BERT, 6 layers of width 384), classification, 8 x 64 tokens"
    return Case(title, module, lambda m, batch: m(**batch).loss, (batch,))


def case(name: str) -> Case:
    """A module by its name; the same weights and batch in every process."""
    torch.manual_seed(0)
    made = {"mlp": _mlp, "llama": _llama, "minilm": _minilm}[name]()
    made.module.train()
    return made
