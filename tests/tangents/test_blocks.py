"""A tangent in one block: the same numbers as the tangent that is zero elsewhere, at less cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import prograde as pg
from prograde._structured import is_structured
from prograde.testing import assert_mean


def keys(count):
    return [jax.random.key(i) for i in range(count)]


def arrays(*shapes):
    number = np.random.default_rng(3)
    return [jnp.asarray(number.normal(size=shape) / 2, jnp.float32) for shape in shapes]


def unrolled():
    """Layers in calls, a weight that is transposed, one that is used twice, and a loss for each."""
    names = {"a": {"w": (5, 12), "b": (12,)}, "b": {"w": (12, 5), "b": (5,)}, "c": {"w": (5, 3)}}
    is_shape = lambda x: isinstance(x, tuple)
    shapes, tree = jax.tree.flatten(names, is_leaf=is_shape)
    params, (x,) = tree.unflatten(arrays(*shapes)), arrays((4, 5))

    @jax.jit
    def layer(p, h):
        return jax.nn.relu(h @ p["w"] + p["b"])

    def loss(p, x):
        h = layer(p["b"], layer(p["a"], x))
        return jnp.sum(jnp.tanh(h @ p["c"]["w"]) ** 2, -1) + jnp.sum((h @ p["a"]["w"]) ** 2, -1)

    return params, loss, (x,), {}


def scanned(reverse=False):
    """A stack of layers in a loop, weights before and after it, and an output of every layer."""
    before, w, b, s, after, x = arrays((5, 6), (3, 6, 6), (3, 6), (3,), (6, 2), (4, 5))
    params = {"in": before, "layers": {"w": w, "b": b, "s": s}, "out": after}

    def layer(h, p):
        return jnp.tanh(h @ p["w"] + p["b"]) * p["s"], jnp.sum(h, -1)

    def loss(p, x):
        h, sums = jax.lax.scan(layer, x @ p["in"], p["layers"], reverse=reverse)
        return jnp.sum((h @ p["out"]) ** 2, -1) + jnp.sum(sums**2, 0)

    return params, loss, (x,), {"stacked": ("layers",)}


def recurrent():
    """The same weights at every step of a loop: no part of the program is before a block."""
    *params, x = arrays((3, 6), (6, 6), (6, 2), (2, 4, 3))

    def loss(p, x):
        step = lambda h, x: (jnp.tanh(x @ p[0] + h @ p[1]), None)
        h, _ = jax.lax.scan(step, jnp.zeros((4, 6)), x)
        return jnp.mean((h @ p[2]) ** 2)

    return params, loss, (x,), {}


MODELS = {
    "unrolled": unrolled,
    "scanned": scanned,
    "reversed": lambda: scanned(reverse=True),
    "recurrent": recurrent,
}


def formed(tangent):
    return jax.tree.map(
        lambda v: v.dense() if is_structured(v) else v, tangent, is_leaf=is_structured
    )


def inner(x, y):
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return sum(np.vdot(a, b) for a, b in pairs)


def close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("model", "tangents"),
    [
        ("unrolled", pg.LowRank(1)),
        ("scanned", pg.LowRank(1)),
        ("reversed", pg.LowRank(1)),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (
            ("recurrent", pg.LowRank(1)),
            ("unrolled", pg.Normal()),
            ("scanned", pg.Normal()),
            ("recurrent", pg.LowRank(2)),
        )),
    ],
)  # fmt: skip
def test_gradient_and_step_are_those_of_the_tangent_that_is_zero_elsewhere(model, tangents):
    params, loss, args, options = MODELS[model]()
    num = 2
    estimator = pg.WeightPerturbation(pg.Blocks(tangents, **options), num)
    gradient = jax.jit(jax.grad(lambda p: jnp.mean(loss(p, *args))))(params)
    mean = jax.jit(lambda p: jnp.mean(loss(p, *args)))(params)
    p = estimator.tangents.probability(params)

    @jax.jit
    def of(key):
        value, _, derivatives = estimator.derivatives(loss, key, params, *args)
        grads = estimator.gradient(key, params, derivatives)
        moved = estimator.descend(key, params, derivatives, 0.5)
        vs = jax.vmap(lambda i: formed(estimator.tangents.sample(key, params, i, num)))
        block = estimator.tangents.choice(key, p)
        return value, derivatives[:, 0, 0], grads, moved, vs(jnp.arange(num)), block

    blocks = set()
    for key in keys(24):
        value, derivatives, grads, moved, vs, block = of(key)
        slopes = [inner(gradient, jax.tree.map(lambda v, i=i: v[i], vs)) for i in range(num)]
        wanted = jax.tree.map(
            lambda v, slopes=slopes: np.tensordot(np.asarray(slopes), v, 1) / num, vs
        )
        close((value, derivatives), (mean, np.asarray(slopes)))
        close(grads, wanted)
        close(moved, jax.tree.map(lambda w, g: w - 0.5 * g, params, wanted))
        blocks.add(int(block))
    assert blocks == set(range(len(p)))


def test_blocks_are_parents_stacked_layers_or_what_a_function_says():
    params = scanned()[0] | {"norm": {"scale": jnp.ones(6)}}
    blocks = pg.Blocks(stacked=("layers",))
    layers = tuple(f"['layers'][{i}]" for i in range(3))
    assert blocks.names(params) == ("['in']", *layers, "['norm']", "['out']")
    assert blocks.sizes(params) == (30, 43, 43, 43, 6, 12)
    ends = pg.Blocks(blocks=lambda path: "ends", stacked=("layers",))
    assert ends.names(params) == ("ends", *layers)


@pytest.mark.parametrize("probabilities", ["even", "size", {"['a']": 1, "['b']": 5, "['c']": 2}])
@pytest.mark.parametrize("num", [1, 3])
def test_second_moment_is_the_closed_form(probabilities, num):
    # of signs, whose tangents in a block of n numbers have second moment 1 + (n - 1) / K
    params = unrolled()[0]
    blocks = pg.Blocks(pg.Rademacher(), probabilities=probabilities)
    p, sizes = blocks.probability(params), np.asarray(blocks.sizes(params))
    found = blocks.second_moment_of_mean(params, num)
    wanted = (1 + (sizes - 1) / num) / p
    np.testing.assert_allclose([found[name]["w"] for name in "abc"], wanted, rtol=1e-6)
    if probabilities == "size" and num == 1:  # the choice costs no variance
        np.testing.assert_allclose(wanted, sizes.sum())


@pytest.mark.parametrize("probabilities", ["even", "size", {"['a']": 1, "['b']": 5}])
def test_estimates_are_unbiased_with_the_second_moment(probabilities):
    a, b = arrays((3, 4), (5,))
    gradient = {"a": a, "b": b}
    squared = {k: float(jnp.vdot(g, g)) for k, g in gradient.items()}
    total = sum(squared.values())
    params = jax.tree.map(jnp.zeros_like, gradient)
    estimator = pg.WeightPerturbation(pg.Blocks(probabilities=probabilities), 2)
    moments = estimator.tangents.second_moment_of_mean(params, 2)
    second = sum(moments[k] * squared[k] for k in squared) / total

    def loss(p):
        return jnp.vdot(p["a"], a) + jnp.vdot(p["b"], b)

    @jax.jit
    @jax.vmap
    def of(key):
        g = estimator.gradient(key, params, estimator.derivatives(loss, key, params)[2])
        parts = [jnp.vdot(g[k], gradient[k]) / total for k in gradient]
        square = sum(jnp.vdot(g[k], g[k]) for k in g)
        return jnp.stack([*parts, square / total / second])

    samples = of(jax.random.split(jax.random.key(1), 40_000))
    wanted = [*(squared[k] / total for k in gradient), 1.0]
    assert_mean(samples, wanted, effect=0.2)


def test_choice_has_the_probabilities():
    params = unrolled()[0]
    blocks = pg.Blocks(probabilities={"['a']": 1, "['b']": 5, "['c']": 2})
    p = blocks.probability(params)
    drawn = jax.random.split(jax.random.key(0), 40_000)
    chosen = jax.jit(jax.vmap(lambda key: blocks.choice(key, p)))(drawn)
    assert_mean(np.asarray(chosen)[:, None] == np.arange(3), p, effect=0.03)


def test_layers_of_a_loop_equal_those_of_the_loop_written_out():
    params, loss, args, options = scanned()
    estimator = pg.WeightPerturbation(pg.Blocks(**options))

    def written_out(p, x):
        h, sums = x @ p["in"], 0
        for i in range(3):
            q = jax.tree.map(lambda w: w[i], p["layers"])
            sums, h = sums + jnp.sum(h, -1) ** 2, jnp.tanh(h @ q["w"] + q["b"]) * q["s"]
        return jnp.sum((h @ p["out"]) ** 2, -1) + sums

    found = jax.jit(lambda key: [
        estimator.estimate(of, key, None, params, *args) for of in (loss, written_out)
    ])  # fmt: skip
    for key in keys(12):
        close(*found(key))


def test_what_precedes_the_block_runs_without_a_tangent():
    width, depth = 32, 6
    params = [{"w": jnp.ones((width, width))} for _ in range(depth)]
    stack = {"layers": {"w": jnp.ones((depth, width, width))}}
    x = jnp.ones((256, width))

    def loss(p, x):
        for layer in p:
            x = jnp.tanh(x @ layer["w"])
        return jnp.mean(x**2)

    def loop(p, x):
        return jnp.mean(jax.lax.scan(lambda h, q: (jnp.tanh(h @ q["w"]), None), x, p["layers"])[0])

    full = pg.check(loss, params, x, memory=False).cost_ratio
    for fun, p, blocks in (
        (loss, params, pg.Blocks()),
        (loop, stack, pg.Blocks(stacked=("layers",))),
    ):
        report = pg.check(fun, p, x, estimator=pg.WeightPerturbation(blocks), memory=False)
        # half of the products of the tangent, and what the factors take
        assert report.cost_ratio < 1 + 0.65 * (full - 1)


def named(path):
    return "ends"


def test_replay_gives_the_run_bit_for_bit(tmp_path):
    params, loss, args, options = scanned()
    blocks = pg.Blocks(blocks=named, **options)
    update = pg.replay.Update(pg.WeightPerturbation(blocks, 2), optax.sgd(1.0))
    path, state = tmp_path / "log", update.init(params)
    of = jax.jit(lambda key, p: update.estimator.derivatives(loss, key, p, *args)[::2])
    with pg.replay.ReplayLog.create(path, params, update) as log:
        for step in range(6):
            value, derivatives = of(update.key(3, step), state.params)
            log.append(step, 3, 0.01, value, derivatives)
            state = update(state, step, 3, 0.01, derivatives)
        log.finish(state.params)
    again = pg.replay.replay(pg.replay.ReplayLog.open(path), update, params)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert " at 0x" not in repr(update.estimator)


def test_projection_is_that_in_the_block_and_its_mean_a_multiple_of_the_gradient():
    params, loss, args, _ = unrolled()
    blocks = pg.Blocks(pg.Normal(), probabilities="size")
    estimator = pg.WeightPerturbation(blocks, 3, combine="projection")
    gradient = jax.grad(lambda p: jnp.mean(loss(p, *args)))(params)

    @jax.jit
    def of(key):
        grads = estimator.estimate(loss, key, None, params, *args).grads
        vs = [jax.tree.leaves(blocks.sample(key, params, i, 3)) for i in range(3)]
        return grads, jnp.stack([jnp.concatenate([v.reshape(-1) for v in t]) for t in vs])

    for key in keys(4):
        grads, v = of(key)
        flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
        wanted = np.linalg.pinv(v) @ (v @ flat(gradient))
        np.testing.assert_allclose(flat(grads), wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="probabilities='size'"):
        pg.WeightPerturbation(pg.Blocks(), 3, combine="projection")


def test_groups_of_examples_share_the_block():
    params, loss, args, _ = unrolled()
    estimator = pg.WeightPerturbation(pg.Blocks(), 2, num_groups=2)
    found = jax.jit(lambda key: estimator.estimate(loss, key, None, params, *args))(
        jax.random.key(0)
    )
    halves = [loss(params, half) for half in jnp.split(args[0], 2)]
    assert found.directional.shape == (2, 4)
    np.testing.assert_allclose(found.value, jnp.mean(jnp.stack(halves)), rtol=1e-5)
    assert sum(bool(jnp.any(g["w"] != 0)) for g in found.grads.values()) == 1
    with pytest.raises(ValueError, match="shrunk"):
        pg.WeightPerturbation(pg.Blocks(), 2, num_groups=2, combine="shrunk")


def test_scaled_estimates_keep_their_block():
    params, loss, args, _ = unrolled()
    scales = {"a": 2.0, "b": 0.5, "c": 3.0}
    inside = pg.WeightPerturbation(pg.Blocks())
    found = jax.jit(lambda key: pg.Scaled(inside, scales).estimate(loss, key, None, params, *args))
    alone = jax.jit(lambda key: inside.estimate(loss, key, None, params, *args))
    for key in keys(6):  # (grad . c u) u / c, in one block with one c, is (grad . u) u
        close(found(key).grads, alone(key).grads)


def test_other_estimators_take_the_tangent_as_it_is():
    params, loss, args, options = scanned()
    estimator = pg.CentralDifference(pg.Blocks(**options), step=1e-2)
    exact = pg.WeightPerturbation(estimator.tangents)
    for key in keys(4):
        a, b = (
            jax.jit(lambda key, e=e: e.estimate(loss, key, None, params, *args))(key)
            for e in (estimator, exact)
        )
        np.testing.assert_allclose(a.grads["in"], b.grads["in"], rtol=0.05, atol=0.05)


def test_functions_that_branch_on_values_get_the_tangent_formed():
    def loss(p):
        return jnp.sum(p["w"] ** 2) if p["w"][0, 0] > 0 else jnp.sum(p["w"])

    params = {"w": jnp.ones((5, 4)), "b": jnp.ones(3)}
    found = pg.WeightPerturbation(pg.Blocks()).estimate(loss, jax.random.key(0), None, params)
    assert found.value == 20


def test_a_block_without_probability_is_refused_by_name():
    params = unrolled()[0]
    for given in ({"['a']": 1, "['b']": 0, "['c']": 1}, {"['a']": 1, "['c']": 1}):
        with pytest.raises(ValueError, match=r"block \['b'\] has probability 0"):
            pg.Blocks(probabilities=given).probability(params)
    with pytest.raises(ValueError, match=r"probabilities name \"\['d'\]\""):
        pg.Blocks(probabilities={"['d']": 1}).probability(params)
    for given, words in (
        (np.array([0.5, 0, 0.5]), r"block \['b'\] has probability 0"),
        (jnp.array([0.5, 0.5]), r"shape \(2,\), but the blocks are"),
        (jnp.array([1.0, 2.0, 1.0]), "the sum 4, but an array is taken as it is"),
    ):
        with pytest.raises(ValueError, match=words):
            pg.Blocks(probabilities=given).probability(params)
    with pytest.raises(ValueError, match="'even', 'size'"):
        pg.Blocks(probabilities="odd")
    with pytest.raises(TypeError, match="tuple of names"):
        pg.Blocks(stacked="layers")
    with pytest.raises(ValueError, match="Blocks distribution itself"):
        pg.Blocks(pg.Blocks())
    params = {"layers": {"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))}}
    with pytest.raises(ValueError, match="one first axis"):
        pg.Blocks(stacked=("layers",)).names(params)
