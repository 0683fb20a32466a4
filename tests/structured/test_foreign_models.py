"""Models in the style of other people's code: along the tangents that were drawn, prograde returns
what jax.jvp returns."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LONG
from comparisons import close, dense, floats
from foreign_models import (
    STATEFUL,
    STATELESS,
    Draw,
    eqx_cnn,
    eqx_lstm,
    eqx_unet,
    eqx_vit,
    experts_by_ragged_dot,
    haiku_autoencoder,
    haiku_layer_stack,
    haiku_lstm,
    haiku_mlp,
    haiku_transformer,
    llama_by_einsum,
    llama_by_einsum_in_scan,
    llama_by_reshape,
    llama_by_reshape_in_scan,
    nnx_experts,
    nnx_rnn,
    nnx_scan_over_layers,
)

import prograde as pg

# relative to a model's largest directional derivative, and to the largest entry of a leaf's
# gradient: where the terms of two tangents cancel, their rounding does not
TOLERANCE = 5e-5

ONE_BY_ONE = [
    experts_by_ragged_dot
]  # jax.vmap has no rule for a ragged product with a batch of weights
CASES = [
    *(
        (model, pg.WeightPerturbation(pg.LowRank(1), 2, 1 if model in ONE_BY_ONE else None))
        for model in STATELESS
    ),
    *(
        (model, pg.WeightPerturbation(pg.LowRank(2), 2))
        for model in (eqx_cnn, haiku_lstm, llama_by_reshape)
    ),
    *((model, pg.WeightPerturbation(pg.Normal(), 2)) for model in (nnx_experts, haiku_lstm)),
    *((model, pg.WeightPerturbation(pg.LowRank(1), 3)) for model in STATEFUL),
    *((model, pg.WeightPerturbation(pg.LowRank(1), 3, chunk=2)) for model in STATEFUL),
]

SECOND = [
    *(eqx_lstm, eqx_vit, eqx_unet, nnx_rnn, nnx_scan_over_layers, haiku_mlp, haiku_transformer),
    *(haiku_autoencoder, haiku_layer_stack, llama_by_reshape_in_scan),
    *(llama_by_einsum, llama_by_einsum_in_scan),
]
each_case = pytest.mark.parametrize(
    ("model", "estimator"),
    # every kind of model once; a second of its kind, distribution or number of chunks is long
    [
        pytest.param(
            model,
            estimator,
            marks=LONG if model in SECOND or any(model is m for m, _ in CASES[:i]) else (),
        )
        for i, (model, estimator) in enumerate(CASES)
    ],
    ids=[f"{model.__name__}-{e.tangents}-{e.num_tangents}-{e.chunk}" for model, e in CASES],
)


@pytest.fixture(autouse=True)
def keys_may_be_used_again():
    """The same key of dropout goes to the estimate, to each of its chunks, and to the plain runs it
    is compared with."""
    with jax.debug_key_reuse(False):
        yield


@functools.cache
def plain(model, seed):
    """A model, its loss, and the loss along a given dense tangent by `jax.jvp`."""
    params, loss, args = model(Draw(jax.random.key(seed)))

    @eqx.filter_jit
    def along(params, args, tangents):
        part, rest = eqx.partition(params, eqx.is_inexact_array)
        of_part = lambda part: loss(eqx.combine(part, rest), *args)
        return jax.jvp(of_part, (part,), (tangents,), has_aux=model in STATEFUL)

    return params, args, loss, along


@functools.cache
def training(model, estimator, seed):
    """A training step that also returns the tangents it took, and a list that grows with every
    trace of the loss."""
    loss, traces = plain(model, seed)[2], []

    def counted(params, *args):
        traces.append(None)
        return loss(params, *args)

    @eqx.filter_jit
    def step(key, params, args):
        result = estimator.estimate(counted, key, None, params, *args, has_aux=model in STATEFUL)
        sample = lambda i: dense(
            estimator.tangents.sample(key, floats(params), i, estimator.num_tangents)
        )
        updated = eqx.apply_updates(params, jax.tree.map(lambda g: -1e-3 * g, result.grads))
        return result, jax.vmap(sample)(jnp.arange(estimator.num_tangents)), updated

    return step, traces


@each_case
def test_estimate_equals_plain_jvp_along_the_dense_twins(model, estimator, seed, key):
    params, args, _, along = plain(model, seed)
    result, tangents, _ = training(model, estimator, seed)[0](key, params, args)
    tangents = [
        jax.tree.map(lambda v: np.asarray(v[k]), tangents) for k in range(estimator.num_tangents)
    ]
    runs = [along(params, args, v) for v in tangents]
    directional = np.asarray([run[1] for run in runs], np.float64)
    grads = jax.tree.map(
        lambda *v: np.tensordot(directional, np.asarray(v, np.float64), 1) / len(v), *tangents
    )
    assert np.abs(directional).max() > 1e-3
    close(result.value, runs[0][0], 1e-5)
    close(result.directional, directional, TOLERANCE)
    close(result.grads, grads, TOLERANCE, scale=np.abs(directional).max())


@each_case
def test_step_with_new_key_and_new_params_does_not_compile_again(model, estimator, seed, key):
    params, args, *_ = plain(model, seed)
    step, traces = training(model, estimator, seed)
    params = step(key, params, args)[-1]
    before = len(traces)
    result = step(jax.random.fold_in(key, 1), params, args)[0]
    assert len(traces) == before > 0
    assert np.isfinite(result.value)


@pytest.mark.parametrize("chunk", [None, pytest.param(2, marks=LONG)])
@pytest.mark.parametrize("model", STATEFUL, ids=lambda m: m.__name__)
def test_tangents_share_one_dropout_mask_and_one_update_of_the_state(model, chunk, seed, key):
    params, args, loss, _ = plain(model, seed)
    step, _ = training(model, pg.WeightPerturbation(pg.LowRank(1), 3, chunk), seed)
    aux = step(key, params, args)[0].aux
    _, expected = eqx.filter_jit(loss)(params, *args)
    assert jax.tree.structure(aux) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(aux), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            close(leaf, other, 1e-5)
        else:  # counters and keys
            assert leaf.dtype == other.dtype
            assert jnp.all(leaf == other)
    mask = np.asarray(aux["dropped"]) == 0
    np.testing.assert_array_equal(mask, np.asarray(expected["dropped"]) == 0)
    assert 0 < mask.mean() < 1
    old, new = (
        jax.tree.leaves(eqx.filter(state, eqx.is_inexact_array))
        for state in (args[0], aux["state"])
    )
    assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(old, new, strict=True))
