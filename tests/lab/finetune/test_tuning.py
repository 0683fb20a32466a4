"""What is trained, the gradients of estimators, the objective and its figures."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prograde import lm
from prograde.lab.data import texts
from prograde.lab.studies.finetune.figures import calibration, figures_of
from prograde.lab.studies.finetune.plan import ESTIMATORS, TRAIN, Plan
from prograde.lab.studies.finetune.tuning import Tuning

TINY = lm.Architecture(
    vocab_size=256, width=32, num_layers=3, num_heads=4, num_kv_heads=2, hidden=64
)
TOKENS = tuple(lm.byte_tokenizer().token_to_id(letter) for letter in "ny")


long = pytest.mark.long


def copied(model):
    return jax.tree.map(jnp.array, model)


def trained(plan, model, examples, steps=6):
    tuning = Tuning(plan, copied(model))
    data = tuning.prepare(examples)
    for step, rows in enumerate(tuning.order(len(examples), 0, steps)):
        batch = tuple(x[rows] for x in data)
        if tuning.update is not None:
            tuning.apply(step, tuning.derivatives(step, batch)[1])
        else:
            tuning.step(step, batch)
    return tuning, data


PARTS = {
    "norm": {},
    "norms": {"layers": "1-2"},
    "attention": {"layers": "1-1"},
    "matrices": {"layers": "0-1"},
    "all": {},
    "lora": {"layers": "1-2"},
    "readout": {"layers": "last-1"},
    "subspace": {"layers": "0-2", "refresh": 2},
}


LAYERS = {
    "norm": [],
    "norms": [1, 2],
    "attention": [1],
    "matrices": [0, 1],
    "all": [0, 1, 2],
    "lora": [1, 2],
    "readout": [2],
    "subspace": [0, 1, 2],
}


def test_every_choice_is_tested():
    assert PARTS.keys() == TRAIN.keys()


@pytest.mark.parametrize(
    "train", [t if t in ("norms", "lora") else pytest.param(t, marks=long) for t in PARTS]
)
def test_only_what_is_trained_changes(train, model, examples, plan_of):
    plan = plan_of(train=train, rate=0.01, tangents=2, **PARTS[train])
    tuning, _ = trained(plan, model, examples, steps=3)
    after, before = jax.tree.map(np.asarray, (tuning.model, model.joined()))
    assert np.isfinite(after.norm).all()
    changed = set()
    changed |= {("last norm", 0)} if (after.norm != before.norm).any() else set()
    changed |= {("embedding", 0)} if (after.embedding != before.embedding).any() else set()
    before = before.segments[0]
    # products are merged, and segments joined, to compare them with the model as it was
    whole = after.segments
    first = 0
    for blocks in whole:
        for field in dataclasses.fields(blocks):
            value, old = getattr(blocks, field.name), getattr(before, field.name)
            if old is None:
                continue
            if isinstance(value, lm.LowRankUpdate):
                value = value.base + value.down @ value.up
            axes = tuple(range(1, value.ndim))
            differs = (value != old[first : first + blocks.count]).any(axes)
            changed |= {(field.name, first + int(i)) for i in np.flatnonzero(differs)}
        first += blocks.count
    matrices = ("query", "key", "value", "output", "gate", "up", "down")
    norms = ("attention_norm", "feed_norm")
    layers = LAYERS[train]
    wanted = {
        "norm": {("last norm", 0)},
        "norms": {("last norm", 0)} | {(n, i) for n in norms for i in layers},
        "attention": {(n, i) for n in matrices[:4] for i in layers},
        "matrices": {(n, i) for n in matrices for i in layers},
        "all": {("last norm", 0), ("embedding", 0)}
        | {(n, i) for n in matrices + norms for i in layers},
        "lora": {(n, i) for n in matrices for i in layers},
        "readout": {("last norm", 0)} | {(n, i) for n in ("output", "down") for i in layers},
        "subspace": {(n, i) for n in matrices for i in layers},
    }[train]
    assert changed == wanted


@pytest.mark.parametrize(
    "train",
    ["norm", "lora", *(pytest.param(t, marks=long) for t in ("norms", "readout"))],
)
def test_states_before_the_trained_layers_change_nothing(train, model, examples, plan_of):
    plan = plan_of(train=train, **({"layers": "1-2"} if train != "norm" else {}))
    tuning = Tuning(plan, model)
    data = tuning.prepare(examples)
    assert tuning.prefix
    lengths = examples.valid.sum(axis=1)
    rows = [int(lengths.argmin()), int(lengths.argmax())]
    assert lengths[rows[0]] < lengths[rows[1]]
    found = tuning.logits(data)[rows]
    alone = jax.jit(lambda tokens: model.logits(model(tokens)[:, -1], np.asarray(TOKENS))[0])
    wanted = [alone(examples.tokens[row][examples.valid[row]][None]) for row in rows]
    if train in ("lora", "readout"):  # their products are zero at first
        assert not any(bool(jnp.any(b.down.down @ b.down.up)) for b in tuning.model.segments[1:])
    np.testing.assert_allclose(found, np.asarray(wanted), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "estimator",
    [e if e in ("weight", "backprop") else pytest.param(e, marks=long) for e in ESTIMATORS],
)
def test_estimators_agree_on_the_gradient(estimator, model, examples, plan_of):
    """Exact for reverse mode; the others come to within five standard errors of the mean."""
    backward = estimator in ("backprop", "checkpointed")
    plan = plan_of(train="norm", estimator=estimator, tangents=1 if backward else 256)
    tuning = Tuning(plan, model)
    data = tuple(x[:8] for x in tuning.prepare(examples))
    loss_fn = tuning.loss_fn(tuning.frozen)
    grads = jax.grad(lambda p: jnp.mean(loss_fn(p, *data)))(tuning.state.params).norm
    params = tuning.state.params

    @jax.jit
    def estimate(key):
        return tuning.estimator.estimate(loss_fn, key, None, params, *data).grads.norm

    if backward:
        np.testing.assert_allclose(estimate(jax.random.key(0)), grads, rtol=2e-4, atol=1e-7)
        return
    found = np.stack([estimate(jax.random.key(i)) for i in range(24)])
    error = found.std(axis=0, ddof=1) / 24**0.5
    # 1.5-SPSA and activity perturbation weight or add noise; the mean still points to the gradient
    scale = np.vdot(found.mean(0), grads) / np.vdot(grads, grads)
    assert scale == pytest.approx(1, abs=0.15) or estimator == "spsa"
    assert np.all(np.abs(found.mean(0) - scale * grads) < 5 * error + 1e-6)


def test_lozo_merges_and_redraws(model, examples, plan_of):
    plan = plan_of(
        train="subspace", layers="0-2", refresh=2, rate=0.01, rank=2, optimizer="momentum"
    )
    tuning, data = trained(plan, model, examples, steps=2)
    before, logits = jax.tree.map(np.array, tuning.model.segments[0].gate), tuning.logits(data)
    rows = next(iter(tuning.order(len(examples), 2, 1)))
    derivatives = jnp.zeros((1, 1, 1))
    tuning.apply(2, derivatives)
    after = tuning.model.segments[0].gate
    assert not jnp.any(after.down)
    assert bool(jnp.any(after.up != before.up))
    np.testing.assert_allclose(after.base, before.base + before.down @ before.up, atol=1e-6)
    np.testing.assert_allclose(tuning.logits(data), logits, rtol=1e-4, atol=1e-4)
    assert len(rows) == 8


def test_readout_directions_are_those_in_which_labels_differ(model, examples, plan_of):
    tuning = Tuning(plan_of(train="readout", layers="2-2"), model)
    up = np.asarray(tuning.model.segments[-1].down.up[0])
    difference = np.asarray(model.embedding[TOKENS[1]] - model.embedding[TOKENS[0]])
    assert up.shape == (1, 32)
    assert abs(float(up[0] @ difference) / np.linalg.norm(difference)) == pytest.approx(1, abs=1e-5)


def test_next_token_loss_is_that_of_all_logits(model):
    tokens = np.random.default_rng(0).integers(0, 256, (3, 9)).astype(np.int32)
    tuning = Tuning(Plan(train="norms", batch_size=3), model)
    data = tuning.prepare(texts.Windows(tokens, ()))
    figures = tuning.evaluate(data)
    logits = np.asarray(jax.jit(lambda t: model.logits(model(t)))(tokens[:, :-1]))
    losses = -np.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
    assert figures["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert figures["accuracy"] == pytest.approx(float((logits.argmax(-1) == tokens[:, 1:]).mean()))


def test_figures_of_four_examples_are_those_on_paper():
    """Margins 0, 2, 1, -1 with the labels 0, 1, 1, 0: every pair is in order."""
    logits = np.asarray([[0.0, 0.0], [0.0, 2.0], [0.0, 1.0], [1.0, 0.0]], np.float32)
    found = figures_of(logits, np.asarray([0, 1, 1, 0]))
    # -log(1/2), log(1 + e^-2), log(1 + e^-1) twice
    wanted = (0.693147180560 + 0.126928011043 + 0.313261687518 * 2) / 4
    assert found["loss"] == pytest.approx(wanted, rel=1e-11)
    assert found["accuracy"] == 1.0
    assert found["auc"] == 1.0
    found = figures_of(logits, np.asarray([1, 1, 0, 0]))  # margins 0, 2 against 1, -1
    assert found["accuracy"] == 0.5
    assert found["auc"] == 0.75


def test_perplexity_is_the_exponential_of_the_loss_of_uniform_logits(model):
    """A head of zeros gives every one of 256 tokens the same probability."""
    blind = eqx.tree_at(lambda m: m.embedding, model, jnp.zeros_like(model.embedding))
    tuning = Tuning(Plan(train="norms", batch_size=2, rate=0.1, steps=1), blind)
    tokens = np.arange(18, dtype=np.int32).reshape(2, 9)
    tokens[0, 3] = 0  # the largest logit, of equals, is the first: it is right once
    figures = tuning.evaluate(tuning.prepare(texts.Windows(tokens, ())))
    assert figures["loss"] == pytest.approx(5.545177444479562, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(256, rel=1e-5)
    assert figures["accuracy"] == pytest.approx(1 / 16)


def test_auc_counts_ties_one_half():
    rng = np.random.default_rng(0)
    margin, labels = rng.integers(0, 5, 40).astype(float), rng.integers(0, 2, 40)
    pairs = margin[labels == 1][:, None] - margin[labels == 0][None]
    wanted = (pairs > 0).mean() + (pairs == 0).mean() / 2
    assert figures_of(np.stack([0 * margin, margin], 1), labels)["auc"] == pytest.approx(wanted)


def test_rates_fall_in_stairs_of_fifty_steps(model, plan_of):
    tuning = Tuning(plan_of(train="norm", rate=0.5, steps=200), model)
    found = [tuning.rate_of(step) for step in (0, 49, 50, 99, 100, 150, 199)]
    assert found == [0.5, 0.5, 0.375, 0.375, 0.25, 0.125, 0.125]
    tuning = Tuning(plan_of(train="norm", rate=0.5, steps=200, constant_rate=True), model)
    assert [tuning.rate_of(step) for step in (0, 199)] == [0.5, 0.5]


def test_every_epoch_is_a_permutation_without_its_rest(model, plan_of):
    """11 rows in batches of 4: an epoch has two steps, and leaves three rows out."""
    tuning = Tuning(plan_of(train="norm", batch_size=4), model)
    steps = list(tuning.order(11, 0, 4))
    for epoch in (steps[:2], steps[2:]):
        seen = np.concatenate(epoch)
        assert len(set(seen.tolist())) == 8
        assert set(seen.tolist()) <= set(range(11))
    assert not np.array_equal(np.concatenate(steps[:2]), np.concatenate(steps[2:]))
    np.testing.assert_array_equal(next(tuning.order(11, 3, 1)), steps[3])  # a resumed run
    written = [[0, 7, 6, 1], [9, 3, 8, 10]]
    assert [rows.tolist() for rows in steps[:2]] == written


def test_calibration_finds_the_least_loss_and_leaves_the_auc():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    logits = np.stack([np.zeros(400), labels + rng.normal(size=400) + 3.0], 1).astype(np.float32)
    offsets = calibration(logits, labels)
    at = lambda delta: figures_of(logits + np.asarray(offsets) + [0, delta], labels)
    assert at(0)["loss"] < min(at(0.05)["loss"], at(-0.05)["loss"])
    assert at(0)["auc"] == figures_of(logits, labels)["auc"]
    assert sum(offsets) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    "train", ["lora", *(pytest.param(t, marks=long) for t in ("norm", "readout"))]
)
def test_quantized_matrices_stay_quantized(train, examples, plan_of):
    gguf = pytest.importorskip("gguf")
    model = lm.Decoder.create(jax.random.key(3), TINY)

    def quantized(stack):
        data = [gguf.quantize(np.asarray(w.T), gguf.GGMLQuantizationType.Q8_0) for w in stack]
        return lm.Quantized.from_gguf(np.stack(data), "Q8_0")

    names = ("query", "key", "value", "output", "gate", "up", "down")
    blocks = model.segments[0]
    blocks = eqx.tree_at(
        lambda b: [getattr(b, n) for n in names],
        blocks,
        [quantized(getattr(blocks, n)) for n in names],
    )
    model = eqx.tree_at(lambda m: m.segments[0], model, blocks)
    tuning, data = trained(plan_of(train=train, rate=0.01), model, examples, steps=2)
    assert np.isfinite(tuning.evaluate(data)["loss"])
    kept = [x for x in jax.tree.leaves(tuning.model) if x.dtype == jnp.uint8]
    assert sum(x.size for x in kept) == sum(
        x.size for x in jax.tree.leaves(blocks) if x.dtype == jnp.uint8
    )
    for refused in ("matrices", "subspace"):
        with pytest.raises(ValueError, match="quantized"):
            Tuning(plan_of(train=refused), model)
