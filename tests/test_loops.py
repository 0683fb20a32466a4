"""Loops of unknown length: their gradients, a bound on them.

And adjoints that forward mode cannot pass, named.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import prograde as pg


def relaxed(w, x):
    """x <- tanh(W x + 1) until it rests; how long that takes depends on W."""
    step = lambda x: jnp.tanh(w @ x + 1.0)
    return lax.while_loop(lambda x: jnp.max(jnp.abs(step(x) - x)) > 1e-13, step, x)


def never_ends(a):
    return lax.while_loop(
        lambda x: jnp.abs(x * x - a) > 1e-5, lambda x: (x + a / x) / 2, jnp.abs(a)
    )


def in_a_scan(a):
    return lax.scan(
        lambda total, x: (total + never_ends(a * x), None), jnp.zeros_like(a), jnp.array([1.0, 2.0])
    )[0]


LINE = never_ends.__code__.co_firstlineno + 1
PROGRAMS = {
    "alone": never_ends,
    "in jit": jax.jit(never_ends),
    "in scan": in_a_scan,
    "in cond": lambda a: lax.cond(a > -10, never_ends, jnp.sin, a),
    "in while": lambda a: lax.fori_loop(
        0, jnp.asarray(a != 0, jnp.int32) + 1, lambda _, x: never_ends(a) + x, a
    ),
    "in remat": jax.checkpoint(never_ends),
    "in vmap": lambda a: jnp.sum(jax.vmap(never_ends)(a * jnp.array([1.0, 2.0]))),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_loop_that_does_not_end_is_named(name):
    """sqrt by Newton's method, which for negative numbers never converges."""
    safe = pg.bounded_loops(PROGRAMS[name], 50)
    with pytest.raises(
        RuntimeError,
        match=rf"while_loop at .*test_loops.py:{LINE}:.* did not end within max_iterations=50",
    ):
        safe(jnp.array(-3.0))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_bound_changes_neither_value_nor_gradient(name):
    both = PROGRAMS[name], pg.bounded_loops(PROGRAMS[name], 50)
    for estimator in (pg.ForwardJacobian(), pg.WeightPerturbation(pg.Normal())):
        of_both = jax.jit(
            lambda key, a, e=estimator: [pg.value_and_grad(f, e)(key, a) for f in both]
        )
        with jax.debug_key_reuse(False):  # the same key on purpose
            bare, safe = of_both(jax.random.key(0), jnp.array(3.0))
        np.testing.assert_allclose(bare, safe, rtol=1e-6)


def test_a_bound_leaves_structured_tangents_and_other_values_as_they_are():
    loss = lambda params, x: (jnp.sum(relaxed(params["w"], x) ** 2), {"note": "as it was", "x": x})
    params, x = {"w": 0.1 * jnp.cos(jnp.arange(36.0)).reshape(6, 6), "name": "w"}, jnp.zeros(6)
    with jax.enable_x64(True):
        params, x = jax.tree.map(
            lambda v: jnp.asarray(v, jnp.float64) if eqx.is_array(v) else v, (params, x)
        )
        estimator = pg.WeightPerturbation(pg.LowRank(1), num_tangents=2)
        grads = [
            eqx.filter_jit(pg.value_and_grad(f, estimator, has_aux=True))(
                jax.random.key(0), params, x
            )
            for f in (loss, pg.bounded_loops(loss, 200))
        ]
        assert grads[1][0][1]["note"] == "as it was"
        np.testing.assert_allclose(grads[0][1]["w"], grads[1][1]["w"], rtol=1e-12)


def test_the_gradient_of_a_loop_is_that_of_finite_differences():
    """Central differences in float64; their error is about 1e-9 of the gradient."""
    with jax.enable_x64(True):
        w = 0.1 * jnp.cos(jnp.arange(9.0, dtype=jnp.float64)).reshape(3, 3)
        loss = lambda w: jnp.sum(relaxed(w, jnp.zeros(3, jnp.float64)) ** 2)
        _, grads = jax.jit(pg.value_and_grad(loss, pg.ForwardJacobian()))(None, w)
        at, basis = jax.jit(loss), np.eye(9).reshape(9, 3, 3)
        differences = np.stack([(at(w + 1e-5 * e) - at(w - 1e-5 * e)) / 2e-5 for e in basis])
        np.testing.assert_allclose(grads.reshape(-1), differences, rtol=1e-7)
        with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
            jax.grad(loss)(w)


def test_the_bound_is_checked():
    with pytest.raises(ValueError, match="max_iterations=0"):
        pg.bounded_loops(never_ends, 0)


def decay(adjoint):
    def loss(rate):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: -rate * y), diffrax.Tsit5(), 0.0, 1.0, 0.1,
            jnp.array(1.0), args=rate,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6), adjoint=adjoint,
        )  # fmt: skip
        return solution.ys[0]

    return loss


@pytest.mark.parametrize(
    "adjoint", [diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint()], ids=repr
)
def test_a_reverse_only_adjoint_is_refused_with_the_argument_to_pass(adjoint):
    report = pg.check(decay(adjoint), jnp.array(2.0), estimator=pg.ForwardJacobian(), memory=False)
    assert not report.ok
    assert len(report.remedies) == len(report.blocking)
    assert "pass adjoint=diffrax.ForwardMode()" in str(report)
    for estimator in (pg.ForwardJacobian(), pg.WeightPerturbation()):
        grad_fn = pg.value_and_grad(decay(adjoint), estimator)
        with pytest.raises(TypeError, match=r"pass adjoint=diffrax.ForwardMode\(\) to diffrax"):
            jax.eval_shape(grad_fn, jax.random.key(0), jnp.array(2.0))


@jax.custom_vjp
def by_hand(y):
    return -y


by_hand.defvjp(lambda y: (-y, None), lambda _, g: (-g,))


def test_a_rule_of_the_users_own_is_not_blamed_on_the_adjoint():
    def loss(rate):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: by_hand(rate * y)), diffrax.Tsit5(), 0.0, 1.0, 0.1,
            jnp.array(1.0), args=rate,
            adjoint=diffrax.ForwardMode(),
        )  # fmt: skip
        return solution.ys[0]

    report = pg.check(loss, jnp.array(2.0), estimator=pg.ForwardJacobian(), memory=False)
    assert all("jax.custom_jvp" in sentence for sentence in report.remedies)
    assert any("by_hand" in name for name in report.blocking)


def test_the_forward_adjoint_is_neither_refused_nor_wrong():
    """d/dk exp(-k) = -exp(-k); the solver's tolerance is 1e-3."""
    loss = decay(diffrax.ForwardMode())
    assert pg.check(loss, jnp.array(2.0), estimator=pg.ForwardJacobian(), memory=False).ok
    _, grads = jax.jit(pg.value_and_grad(loss, pg.ForwardJacobian()))(None, jnp.array(2.0))
    assert float(grads) == pytest.approx(-np.exp(-2), rel=1e-2)


def test_a_checkpointed_loop_is_refused_with_the_argument_to_pass():
    import equinox.internal as eqxi

    def loss(a):
        root = eqxi.while_loop(
            lambda x: jnp.abs(x * x - a) > 1e-5,
            lambda x: (x + a / x) / 2,
            a,
            max_steps=16,
            kind="checkpointed",
        )
        return root

    with pytest.raises(TypeError, match="pass kind='lax' to it"):
        jax.eval_shape(pg.value_and_grad(loss, pg.ForwardJacobian()), None, jnp.array(3.0))
