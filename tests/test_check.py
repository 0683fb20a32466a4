"""What `check` reports, against programs of which the answer is known.

And functions with a custom reverse rule.
"""

import re

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import site_models
from jax import lax
from jax.experimental.ode import odeint

import prograde as pg
from prograde._costs import live_bytes, multiply_adds


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(
    lambda x: (doubled(x), None), lambda residual, cotangent: (cotangent,)
)  # not the derivative of its code


def in_a_scan(params, x):
    return jnp.mean(lax.scan(lambda h, w: (doubled(h @ w), None), x, params["w"])[0])


def on_data_alone(params, x):
    return jnp.mean(lax.scan(lambda h, w: (h @ w + doubled(x), None), doubled(x), params["w"])[0])


PARAMS = {"w": jnp.ones((3, 4, 4)) / 4}
X = jnp.ones((2, 4))


def test_a_custom_vjp_in_the_way_is_named_with_its_place():
    report = pg.check(in_a_scan, PARAMS, X)
    assert not report.ok
    assert report.cost_ratio is None
    (name,) = report.blocking
    line = in_a_scan.__code__.co_firstlineno + 1
    assert name.startswith("doubled (")
    assert f"test_check.py:{line}:" in name
    assert "BLOCKED by doubled" in str(report)


@pytest.mark.parametrize("jit", [False, True])
def test_the_estimate_refuses_it_with_the_same_words(jit, key):
    estimate = lambda key, params: pg.value_and_grad(in_a_scan, pg.WeightPerturbation())(
        key, params, X
    )
    with pytest.raises(TypeError, match=r"doubled \(.*test_check.py:\d+.*custom_vjp='inline'"):
        (jax.jit(estimate) if jit else estimate)(key, PARAMS)


@pytest.mark.parametrize("jit", [False, True])
def test_inline_differentiates_the_code_of_the_function(jit, key):
    estimator = pg.WeightPerturbation(pg.Basis(), num_tangents=48, custom_vjp="inline")
    grad_fn = pg.value_and_grad(in_a_scan, estimator)
    grads = (jax.jit(grad_fn) if jit else grad_fn)(key, PARAMS, X)[1]
    plain = lambda params, x: jnp.mean(
        lax.scan(lambda h, w: (2 * (h @ w), None), x, params["w"])[0]
    )
    np.testing.assert_allclose(grads["w"], jax.grad(plain)(PARAMS, X)["w"], rtol=1e-5)
    assert not np.allclose(
        grads["w"], jax.grad(in_a_scan)(PARAMS, X)["w"]
    )  # the rule of the test is another
    report = pg.check(
        in_a_scan, PARAMS, X, estimator=pg.WeightPerturbation(custom_vjp="inline"), memory=False
    )
    assert report.ok
    assert report.bypassed[0].startswith("doubled (")


def test_a_custom_vjp_that_no_tangent_reaches_is_in_nobodys_way(key):
    assert pg.check(on_data_alone, PARAMS, X, memory=False).ok
    value, _ = jax.jit(pg.value_and_grad(on_data_alone, pg.WeightPerturbation()))(key, PARAMS, X)
    np.testing.assert_allclose(value, on_data_alone(PARAMS, X), rtol=1e-6)


def test_tangents_that_never_arrive_are_named():
    def loss(params):
        stopped = jnp.sum(lax.stop_gradient(params["stopped"]))
        chosen = jnp.sum(params["table"]) * params["scores"].argmax()
        rounded = jnp.sum(params["rounded"].astype(int))
        last = lax.scan(lambda c, w: (c + jnp.sum(w), None), 0.0, params["scanned"])[0]
        return stopped + chosen + rounded + last

    names = ["rounded", "scanned", "scores", "stopped", "table", "unused"]
    report = pg.check(loss, {name: jnp.ones((4, 5)) for name in names}, memory=False)
    assert report.always_zero == tuple(
        f"params['{n}']" for n in ("rounded", "scores", "stopped", "unused")
    )


def test_dense_fallbacks_are_named_with_primitive_shape_and_place():
    def loss(params, x):
        h = x @ params["plain"]
        return jnp.mean(h @ jnp.exp(params["exponential"])) + jnp.sum(params["decayed"] ** 2)

    params = {name: jnp.ones((6, 6)) for name in ("decayed", "exponential", "plain")}
    report = pg.check(loss, params, jnp.ones((3, 6)), memory=False)
    assert {path: f.shape for path, f in report.dense} == dict.fromkeys(
        ("params['decayed']", "params['exponential']"), (6, 6)
    )
    assert dict(report.dense)["params['exponential']"].primitive == "exp"
    line = loss.__code__.co_firstlineno + 2
    assert all(f"test_check.py:{line}" in f.source for _, f in report.dense)


def test_only_what_is_formed_is_listed():
    def loss(w, x):
        return jnp.mean(x @ lax.stop_gradient(w) @ w.T), w  # and w as auxiliary output

    assert (
        pg.check(loss, jnp.ones((6, 6)), jnp.ones((3, 6)), has_aux=True, memory=False).dense == ()
    )
    for function, name in (
        (lambda w: jnp.sum(jax.nn.relu(w.T)), "relu"),
        (lambda w: w.ravel() @ jnp.ones(36), "reshape"),
    ):
        assert [
            f.primitive for _, f in pg.check(function, jnp.ones((6, 6)), memory=False).dense
        ] == [name]


@pytest.mark.parametrize("jit", [False, True])
def test_a_fallback_inside_jit_is_found_again_on_the_second_look(jit):
    function = lambda w, x: jnp.mean(x @ jnp.exp(w))
    loss = jax.jit(function) if jit else function
    for _ in range(2):
        report = pg.check(loss, jnp.ones((6, 6)), jnp.ones((3, 6)), memory=False)
        assert [f.primitive for _, f in report.dense] == ["exp"]


def test_cost_ratio_is_that_of_the_products():
    """Two square layers: the first has no tangent at its input. 2 of 2 products, 1 of 2 tangents.

    And the rest is small.
    """
    n, batch = 256, 128
    loss = lambda params, x: jnp.mean(jnp.tanh(x @ params[0]) @ params[1])
    params, x = (
        [jax.ShapeDtypeStruct((n, n), jnp.float32)] * 2,
        jax.ShapeDtypeStruct((batch, n), jnp.float32),
    )
    report = pg.check(loss, params, x, memory=False)
    assert 1.5 < report.cost_ratio < 1.6
    dense = pg.check(
        loss, params, x, estimator=pg.WeightPerturbation(pg.Rademacher()), memory=False
    )
    assert (
        2.5 < dense.cost_ratio < 2.8
    )  # the first layer has a product of its tangent now, the second two
    many = pg.check(loss, params, x, estimator=pg.WeightPerturbation(num_tangents=4), memory=False)
    assert 1 + 4 * 0.5 < many.cost_ratio < 1 + 4 * (report.cost_ratio - 1) + 0.05


def test_multiply_adds_by_hand():
    count = lambda f, *shapes: multiply_adds(
        jax.make_jaxpr(f)(*(jnp.zeros(s) for s in shapes)).jaxpr
    )
    assert count(lambda x, w: x @ w, (3, 4), (4, 5)) == 3 * 4 * 5
    assert (
        count(lambda x, w: lax.scan(lambda h, w: (h @ w, None), x, w)[0], (3, 4), (7, 4, 4))
        == 7 * 3 * 4 * 4
    )
    assert count(lambda x: lax.cond(True, lambda: x @ x, lambda: x), (4, 4)) == 4**3
    kernel = dict(window_strides=(1,), padding="VALID", dimension_numbers=("NHC", "HIO", "NHC"))
    conv = lambda x, w: lax.conv_general_dilated(x, w, **kernel)
    assert count(conv, (2, 10, 3), (4, 3, 5)) == 2 * 7 * 5 * 4 * 3
    assert count(jax.jit(lambda x: jnp.sum(x + 1)), (6,)) == 6 + 6


def test_live_bytes_by_hand():
    live = lambda f, *shapes: live_bytes(jax.make_jaxpr(f)(*(jnp.zeros(s) for s in shapes)).jaxpr)
    assert (
        live(lambda x: jnp.sin(jnp.sin(jnp.sin(x))), (100,)) == 2 * 400
    )  # what is read and what is written
    wide = lambda x: jnp.sum(jnp.broadcast_to(x, (50, 100)) * 2)
    assert live(wide, (100,)) == 2 * 50 * 400


def test_a_function_is_traced_once():
    calls = []

    def loss(w, x):
        calls.append(None)
        return jnp.mean((x @ w) ** 2)

    def losses(w, x):
        calls.append(None)
        return jnp.mean((x @ w) ** 2, axis=-1)

    w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
    for estimator in (
        pg.WeightPerturbation(num_tangents=4),
        pg.ForwardJacobian(),
        pg.Scaled(),
        pg.Backprop(),
    ):
        pg.check(loss, w, x, estimator=estimator)
        assert len(calls) == 1
        calls.clear()
    pg.check(losses, w, x, estimator=pg.LearnedFeedback(), memory=False)
    assert len(calls) == 2  # and once with twice the batch


@pytest.mark.parametrize("estimator", [pg.WeightPerturbation(), pg.ForwardJacobian()], ids=repr)
def test_check_and_run_refuse_the_same_however_often_and_in_whatever_order(estimator, key):
    """A function under `jit` is traced once and kept.

    Neither may find what the other left there.
    """
    inner = jax.jit(lambda w: jnp.sin(doubled(w)))
    loss = lambda w: jnp.sum(inner(w))
    for _ in range(2):
        assert (
            len(pg.check(loss, jnp.ones((3, 2)), estimator=estimator, memory=False).blocking) == 1
        )
        with pytest.raises(TypeError, match="doubled"):
            pg.value_and_grad(loss, estimator)(jax.random.clone(key), jnp.ones((3, 2)))


def checkpointed_loop(a):
    return jnp.sum(
        eqxi.while_loop(
            lambda x: jnp.sum(x) < 5,
            lambda x: x + a @ x,
            jnp.ones(3),
            max_steps=16,
            kind="checkpointed",
        )
    )


def ode(a):
    return jnp.sum(odeint(lambda y, t, a: -a @ y, jnp.ones(3), jnp.linspace(0.0, 1.0, 4), a))


def of_experts(a):
    return jnp.sum(lax.ragged_dot(jnp.ones((4, 3)), jnp.stack([a, a]), jnp.array([2, 2])))


def called_back(a):
    shape = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    return jnp.sum(jax.jit(lambda a: jax.pure_callback(lambda a: a, shape, a))(a))


@pytest.mark.parametrize("tangents", [pg.LowRank(1), pg.Normal()], ids=repr)
@pytest.mark.parametrize(
    ("loss", "advice"),
    [
        (checkpointed_loop, "pass kind='lax'"),
        (ode, "odeint has a rule for reverse mode only: pass custom_vjp='inline'"),
        (of_experts, "Pass chunk=1"),
        (called_back, "in a function with a jax.custom_jvp"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_every_refusal_has_a_place_and_a_remedy_and_check_never_raises(loss, advice, tangents, key):
    """Matrices and vectors, structured tangents and formed ones: one sentence for all."""
    estimator = pg.WeightPerturbation(tangents, num_tangents=2)
    report = pg.check(loss, jnp.eye(3), estimator=estimator)
    assert not report.ok
    assert report.memory is report.cost_ratio is None
    assert advice in str(report)
    (name,) = report.blocking
    assert f"test_check.py:{loss.__code__.co_firstlineno + 1}:" in name or "test_check.py:" in name
    with pytest.raises(TypeError, match=re.escape(advice)) as raised:
        jax.jit(pg.value_and_grad(loss, estimator))(key, jnp.eye(3))
    assert name in str(raised.value)


def test_what_is_refused_can_be_done_as_it_is_advised(key):
    """ragged_dot with chunk=1, and the code of odeint, whose derivative is that of its steps."""
    basis = lambda **kwargs: pg.WeightPerturbation(pg.Basis(), 9, **kwargs)
    _, grads = pg.value_and_grad(of_experts, basis(chunk=1))(key, jnp.eye(3))
    np.testing.assert_allclose(grads, jax.grad(of_experts)(jnp.eye(3)), rtol=1e-5)
    a = jnp.eye(3) + 0.1
    _, grads = pg.value_and_grad(ode, basis(custom_vjp="inline"))(jax.random.key(1), a)
    np.testing.assert_allclose(grads, jax.grad(ode)(a), rtol=1e-3, atol=1e-4)


def test_code_decided_by_the_values_of_parameters_runs_with_tangents_formed(key):
    """It cannot be traced.

    The derivative is exact all the same, and `check`, which has no values, is not asked.
    """
    loss = lambda w: jnp.sum(w**2) if w[0, 0] > 0 else jnp.sum(w)
    w = jnp.arange(1.0, 7.0).reshape(2, 3)
    for tangents in (pg.LowRank(1), pg.Basis()):
        _, grads = pg.value_and_grad(loss, pg.WeightPerturbation(tangents, 6))(key, w)
        if isinstance(tangents, pg.Basis):
            np.testing.assert_allclose(grads, 2 * w, rtol=1e-6)
        key = jax.random.fold_in(key, 1)


@jax.custom_vjp
def safe_sqrt(x):
    return jnp.sqrt(x)


safe_sqrt.defvjp(
    lambda x: (jnp.sqrt(x), x),
    lambda x, g: (jnp.where(x > 0, g / 2 / jnp.sqrt(jnp.where(x > 0, x, 1)), 0),),
)


def test_a_tangent_that_is_not_finite_where_the_value_is_is_reported(key):
    def loss(params):
        return jnp.sum(safe_sqrt(params["at zero"])) + jnp.sum(params["other"])

    params = {"at zero": jnp.array([0.0, 1.0]), "other": jnp.ones(2)}
    inline = pg.ForwardJacobian(custom_vjp="inline")
    report = pg.check(loss, params, estimator=inline, run=True)
    assert report.not_finite == ("params['at zero']",)
    assert not report.ok
    assert "NOT FINITE" in str(report)
    line = loss.__code__.co_firstlineno + 1

    def run(params):
        jax.block_until_ready(jax.jit(pg.value_and_grad(loss, inline))(None, params))
        jax.effects_barrier()

    with pytest.warns(RuntimeWarning, match=rf"safe_sqrt \(.*test_check.py:{line}.*not finite"):
        run(params)
    params = {"at zero": jnp.array([2.0, 1.0]), "other": jnp.ones(2)}
    assert pg.check(loss, params, estimator=inline, run=True).ok
    run(params)
    with pytest.raises(ValueError, match="run=True"):
        pg.check(jnp.sum, jax.ShapeDtypeStruct((3,), jnp.float32), run=True)


def test_a_loss_that_is_no_mean_is_told_where_groups_need_one():
    w, x = jnp.ones((3, 2)), jnp.arange(12.0).reshape(4, 3)
    two = pg.WeightPerturbation(num_groups=2)
    total = lambda w, x: jnp.sum((x @ w) ** 2)
    mean = lambda w, x: jnp.mean((x @ w) ** 2)
    each = lambda w, x: jnp.mean((x @ w) ** 2, axis=-1)
    advice = lambda loss, e: pg.check(loss, w, x, estimator=e, memory=False).advice
    (sentence,) = advice(total, two)
    assert "num_groups=2" in sentence
    assert "mean over the examples" in sentence
    assert advice(mean, two) == advice(each, two) == advice(total, pg.WeightPerturbation()) == ()
    assert len(advice(total, pg.Scaled(two))) == 1


def test_state_and_temporaries_are_told_before_they_are_made():
    """[units x outputs] of each site: here 200 times 300, 400 times 300, and so on.

    Though nothing is allocated.
    """
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    params = {"a": shape(4, 8), "b": shape(8, 6)}

    def losses(params, x):
        h = jnp.tanh(x @ params["a"])  # [batch, time, units]
        return jnp.sum(jnp.square(h @ params["b"]), axis=(1, 2))

    report = pg.check(
        losses, params, shape(2, 5000, 4), estimator=pg.LearnedFeedback(), memory=False
    )
    units, outputs = 5000 * 8, 5000 * 6
    assert report.state_bytes == 4 * units * outputs + 4
    assert "state: 4,800.0 MB" in str(report)
    assert any("ActivityPerturbation" in sentence for sentence in report.advice)
    assert report.largest is not None
    assert report.largest[0] >= 4 * units * outputs
    assert (
        pg.check(
            losses, params, shape(2, 5000, 4), estimator=pg.ActivityPerturbation(), memory=False
        ).state_bytes
        == 0
    )


def test_the_report_says_what_xla_says_of_memory(key):
    loss = lambda w, x: jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w) @ w)
    w, x = jnp.ones((64, 64)), jnp.ones((1024, 64))
    estimator = pg.WeightPerturbation(num_tangents=8)
    report = pg.check(loss, w, x, estimator=estimator, memory="both")
    temporaries = lambda f, *args: (
        jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
    )
    assert abs(report.memory_alone - temporaries(loss, w, x)) < 2**14
    assert abs(report.memory - temporaries(pg.value_and_grad(loss, estimator), key, w, x)) < 2**16
    assert report.memory > report.memory_alone


def test_backprop_is_checked_too():
    report = pg.check(in_a_scan, PARAMS, X, estimator=pg.Backprop())
    assert report.ok
    assert report.blocking == report.dense == ()
    assert 2 < report.cost_ratio < 5


def test_shapes_are_enough_and_other_leaves_pass():
    params = {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32), "activation": jnp.tanh, "steps": 3}
    loss = lambda p, x, flag: jnp.mean(p["activation"](x @ p["w"])) * (2 if flag else 1)
    report = pg.check(loss, params, jax.ShapeDtypeStruct((2, 4), jnp.float32), True)
    assert report.ok
    assert report.num_parameters == 16


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pg.check(jnp.sum, {}), ValueError, "no floating-point array"),
        (lambda: pg.check(jnp.sum, jnp.ones(3, complex)), TypeError, "complex"),
        (lambda: pg.check(lambda w: w, jnp.ones((3, 3))), ValueError, r"shape \(3, 3\)"),
        (
            lambda: pg.check(jnp.sum, jnp.ones(3), estimator=pg.LowRank()),
            TypeError,
            "estimator=LowRank",
        ),
        (
            lambda: pg.WeightPerturbation(custom_vjp="ignore"),
            ValueError,
            "custom_vjp='ignore'.*'inline'",
        ),
        (lambda: pg.WeightPerturbation(num_tangents=True), ValueError, "num_tangents=True"),
        (lambda: pg.WeightPerturbation(chunk=0), ValueError, "chunk=0"),
        (lambda: pg.Separable(rank=0), ValueError, "rank=0"),
        (lambda: pg.Separable(factors=pg.Basis()), ValueError, r"factors=Basis\(\)"),
        (
            lambda: pg.LowRank(rank=9).sample(
                jax.random.key(0), {"w": jnp.ones((8, 6)), "b": jnp.ones(6)}
            ),
            ValueError,
            r"rank=9.*\(8, 6\).*rank <= 3",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_sites_are_listed_and_weights_that_are_used_otherwise_are_named(key):
    params, losses, args = site_models.used_otherwise(key)
    report = pg.check(losses, params, *args, estimator=pg.ActivityPerturbation(), memory=False)
    by_weight = {paths: (shape, has_examples) for paths, shape, has_examples in report.sites}
    assert by_weight[("params['c']",)] is not None
    assert by_weight[("params['branch']",)] == ((3,), False)
    assert "perturbed itself: params['branch'], as [3]" in str(report)
    params, losses, args = site_models.scanned_layers(key)
    report = pg.check(losses, params, *args, estimator=pg.LearnedFeedback(), memory=False)
    assert report.sites == (
        (("params['in']",), (4, 4), True),
        (("params['hidden']['b']", "params['hidden']['w']"), (3, 4, 4), True),
        (("params['out']",), (4, 2), True),
    )
    assert "sites: 3, with 72 numbers to perturb" in str(report)
    assert 2.5 < report.cost_ratio < 20  # drawing signs weighs much in so small a network


def test_a_hand_made_reverse_rule_blocks_every_forward_estimator(key):
    @jax.custom_vjp
    def doubled(x):
        return 2 * x

    doubled.defvjp(lambda x: (2 * x, None), lambda _, ct: (2 * ct,))
    fun = lambda w, x: jnp.sum(doubled(x @ w), axis=-1)
    for estimator in (
        pg.ActivityPerturbation(),
        pg.Guided(),
        pg.ForwardJacobian(),
        pg.LearnedFeedback(),
    ):
        report = pg.check(
            fun, jnp.ones((3, 2)), jnp.ones((4, 3)), estimator=estimator, memory=False
        )
        assert len(report.blocking) == 1
        assert "doubled" in report.blocking[0]
    for estimator in (pg.Backprop(), pg.CentralDifference()):
        assert pg.check(
            fun, jnp.ones((3, 2)), jnp.ones((4, 3)), estimator=estimator, memory=False
        ).ok


def doubling(w):
    far = lambda x: jnp.sum(x) < 5
    return jnp.sum(lax.while_loop(far, lambda x: x + w, jnp.ones(3)))


@pytest.mark.parametrize("estimator", [pg.Backprop(), pg.CheckpointedBackprop()], ids=repr)
def test_a_loop_that_blocks_reverse_mode_is_named_with_the_wrapper(estimator):
    report = pg.check(doubling, jnp.ones(3), estimator=estimator)
    assert not report.ok
    assert report.memory is report.cost_ratio is None
    (name,) = report.blocking
    line = doubling.__code__.co_firstlineno + 2
    assert name.startswith("while (")
    assert f"test_check.py:{line}:" in name
    assert "which reverse mode cannot pass" in str(report)
    assert "pg.forward_mode" in str(report)
    assert pg.check(doubling, jnp.ones(3), estimator=pg.ForwardJacobian()).ok
    wrapped = pg.check(pg.forward_mode(doubling), jnp.ones(3), estimator=estimator)
    assert wrapped.ok


def steps(length, saved):
    """A loop that saves `saved` numbers at each step, for a loss that follows."""
    save = lambda c, w: lax.scan(lambda c, _: (c * w, jnp.full(saved, c)), c, length=length)[1]
    return lambda w: jnp.mean(save(1.0, w[0]) ** 2) + jnp.sum(w)


def test_few_parameters_behind_a_long_loop_are_told_of_the_exact_gradient():
    advice = lambda fun, n, e: " ".join(
        pg.check(fun, jnp.ones(n), estimator=e, memory=False).advice
    )
    long, short = steps(1000, 1), steps(10, 1)
    line = f"test_check.py:{steps.__code__.co_firstlineno + 2}:"
    for estimator in (pg.WeightPerturbation(), pg.Backprop()):
        told = advice(long, 5, estimator)
        assert "ForwardJacobian() computes the gradient by 5 tangents" in told
        assert "pg.forward_mode" in told
        assert line in told
        assert "are few" not in advice(short, 5, estimator)
        assert "are few" not in advice(long, 1000, estimator)
    assert advice(long, 5, pg.ForwardJacobian()) == ""


def test_a_loop_that_saves_much_is_told_the_chunk_that_fits():
    """Each of 20 tangents saves 1000 x 10,000 numbers in float32: 40 MB, of which 6 fit."""
    loss = steps(1000, 10_000)
    shapes = jax.ShapeDtypeStruct((20,), jnp.float32)
    told = lambda e: " ".join(pg.check(loss, shapes, estimator=e, memory=False).advice)
    for estimator in (pg.ForwardJacobian(), pg.WeightPerturbation(num_tangents=20)):
        assert "saves 40 MB, and as much for each of 20 tangents" in told(estimator)
        assert "chunk=6," in told(estimator)
    assert "saves" not in told(pg.ForwardJacobian(chunk=6))
    assert "saves" not in told(pg.WeightPerturbation())
