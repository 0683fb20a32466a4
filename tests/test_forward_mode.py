"""`forward_mode`: derivatives of any order, in any mode, equal those known in closed form."""

import functools

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import prograde as pg


def cube_root(a):
    """A loop of unknown length, which reverse mode refuses."""
    far = lambda x: jnp.abs(x**3 - a) > 1e-13 * a
    return lax.while_loop(far, lambda x: x - (x**3 - a) / (3 * x**2), a)


def scanned(f):
    """A recurrence through `f`, which needs the derivative inside a scan."""
    return lambda xs: lax.scan(lambda c, x: (c + f(x) * c, None), 1.0, xs)[0]


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


wrapped = pg.forward_mode(cube_root)
exact = lambda a: a ** (1 / 3)
A, XS = 2.0, np.array([2.0, 3.0])

DERIVATIVES = {
    "grad": lambda f: jax.grad(f)(A),
    "jitted grad": lambda f: jax.jit(jax.grad(f))(A),
    "value_and_grad": lambda f: jax.value_and_grad(f)(A),
    "jvp": lambda f: jax.jvp(f, (A,), (3.0,)),
    "vjp": lambda f: jax.vjp(f, A)[1](2.0),
    "jacrev": lambda f: jax.jacrev(lambda a: jnp.stack([f(a), f(a) ** 2]))(A),
    "hessian": lambda f: jax.hessian(f)(A),
    "grad of grad": lambda f: jax.grad(jax.grad(f))(A),
    "jvp of jvp": lambda f: jax.jvp(lambda a: jax.jvp(f, (a,), (1.0,))[1], (A,), (1.0,)),
    "jvp of grad": lambda f: jax.jvp(jax.grad(f), (A,), (1.0,)),
    "grad of jvp by the tangent": lambda f: jax.grad(lambda v: jax.jvp(f, (A,), (v,))[1])(1.0),
    "third derivative": lambda f: jax.grad(jax.grad(jax.grad(f)))(A),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(XS),
    "grad of vmap": lambda f: jax.grad(lambda xs: jax.vmap(f)(xs).prod())(XS),
    "hessian of vmap": lambda f: jax.jit(jax.hessian(lambda xs: jax.vmap(f)(xs).prod()))(XS),
    "grad of scan": lambda f: jax.grad(scanned(f))(XS),
    "hessian of scan": lambda f: jax.hessian(scanned(f))(XS),
    "grad of cond": lambda f: jax.grad(lambda a: lax.cond(a > 1, f, jnp.sin, a))(A),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(lambda a: jnp.sin(f(a))))(A),
    "hessian of checkpoint": lambda f: jax.hessian(jax.checkpoint(lambda a: jnp.sin(f(a))))(A),
    "checkpoint of vmap": lambda f: jax.grad(
        jax.checkpoint(lambda xs: jnp.sin(jax.vmap(f)(xs)).sum())
    )(XS),
    "checkpoint in scan": lambda f: jax.grad(
        lambda xs: lax.scan(jax.checkpoint(lambda c, x: (c + f(x) * c, None)), 1.0, xs)[0]
    )(XS),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_every_derivative_equals_that_of_the_root(name):
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(cube_root)(A)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-10),
        DERIVATIVES[name](wrapped),
        DERIVATIVES[name](exact),
    )


def test_values_that_are_closed_over_are_differentiated():
    def loss(scale, a):
        inner = pg.forward_mode(lambda a: cube_root(scale * a))
        return inner(a) * scale

    for argnum in (0, 1):
        got = jax.grad(loss, argnum)(3.0, A)
        want = jax.grad(lambda scale, a: exact(scale * a) * scale, argnum)(3.0, A)
        np.testing.assert_allclose(got, want, rtol=1e-12)


def trajectory(params, n, offset, *, power):
    """Trees, an integer that must be concrete, a text that passes through, two dtypes."""
    assert n == 3
    root = cube_root(params["a"])
    states = jnp.stack([(root * params["b"] + offset) ** power for _ in range(n)])
    return {"states": states, "low": states.astype(jnp.float32), "n": n, "name": "run"}, "aux"


def test_trees_static_leaves_and_two_dtypes():
    params = {"a": jnp.asarray(2.0), "b": jnp.arange(1.0, 4.0)}
    fun = pg.forward_mode(trajectory, has_aux=True)

    def loss(fun, params, offset):
        out, aux = fun(params, 3, offset, power=2)
        assert (out["name"], out["n"], aux) == ("run", 3, "aux")
        assert out["low"].dtype == jnp.float32
        return jnp.sum(jnp.sin(out["states"])) + jnp.sum(out["low"].astype(float) ** 2)

    plain = trajectory_without_loop
    got = jax.grad(functools.partial(loss, fun), (0, 1))(params, jnp.ones(3))
    want = jax.grad(functools.partial(loss, plain), (0, 1))(params, jnp.ones(3))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)


def trajectory_without_loop(params, n, offset, *, power):
    states = jnp.stack([(exact(params["a"]) * params["b"] + offset) ** power] * n)
    return {"states": states, "low": states.astype(jnp.float32), "n": n, "name": "run"}, "aux"


def test_a_jvp_runs_the_loop_once_along_one_tangent():
    push = lambda f: lambda x, v: jax.jvp(f, (x,), (v,))
    many = lambda x: jnp.sum(jnp.sin(x) * cube_root(jnp.sum(x**2)))
    x = jnp.arange(1.0, 6.0)
    ours = jax.jit(push(pg.forward_mode(many))).lower(x, x).compile().cost_analysis()
    theirs = jax.jit(push(many)).lower(x, x).compile().cost_analysis()
    assert ours["flops"] <= 1.1 * theirs["flops"]


def test_value_and_gradient_cost_what_forward_jacobian_costs():
    many = lambda x: jnp.sum(jnp.sin(x) * cube_root(jnp.sum(x**2)))
    x = jnp.arange(1.0, 6.0)
    ours = jax.jit(jax.value_and_grad(pg.forward_mode(many))).lower(x).compile().cost_analysis()
    exact = jax.jit(lambda x: pg.value_and_grad(many, pg.ForwardJacobian())(None, x))
    assert ours["flops"] <= 1.05 * exact.lower(x).compile().cost_analysis()["flops"]


def test_inputs_that_nobody_differentiates_by_cost_nothing():
    """With 100,000 numbers beside the one that is differentiated, one tangent runs."""
    data = jnp.ones(100_000)
    fun = pg.forward_mode(lambda a, data: cube_root(a) * jnp.sum(data))
    np.testing.assert_allclose(jax.grad(fun)(A, data), 1e5 * jax.grad(exact)(A), rtol=1e-10)


@pytest.mark.parametrize("chunk", [1, 2, 5, 7])
def test_chunks_give_the_same_jacobian(chunk):
    fun = lambda x: jnp.stack([cube_root(jnp.sum(x**2)), x[0] * x[3], jnp.sin(x).sum()])
    x = jnp.arange(1.0, 6.0)
    want = jax.jacfwd(fun)(x)
    np.testing.assert_allclose(jax.jacrev(pg.forward_mode(fun, chunk=chunk))(x), want, rtol=1e-12)


def test_an_estimator_gives_its_own_gradient():
    estimator = pg.WeightPerturbation(pg.Normal(), num_tangents=3)
    loss = lambda p: jnp.sum(jnp.sin(p["w"]) * cube_root(p["a"]))
    params = {"a": jnp.asarray(2.0), "w": jnp.arange(4.0)}
    key = jax.random.key(7)
    got = jax.grad(pg.forward_mode(loss, estimator=estimator), argnums=1)(key, params)
    leaves = lambda found: [found["a"], found["w"]]
    listed = lambda leaves: loss({"a": leaves[0], "w": leaves[1]})
    _, want = pg.value_and_grad(listed, estimator)(jax.random.key(7), leaves(params))
    jax.tree.map(np.testing.assert_allclose, leaves(got), want)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: pg.forward_mode(3), TypeError, "fun=3"),
        (lambda: pg.forward_mode(jnp.sin, chunk=0), ValueError, "chunk"),
        (lambda: pg.forward_mode(jnp.sin)(1j), TypeError, "real inputs are needed"),
        (lambda: pg.forward_mode(jnp.sin)({"z": np.ones(2) * 1j}), TypeError, "complex128"),
        (lambda: jax.grad(wrapped)(3), TypeError, "real- or complex-valued inputs"),
        (lambda: pg.forward_mode(lambda x: x > 0)(1.0), TypeError, "returns no float array"),
        (lambda: pg.forward_mode(lambda x: "a")(1.0), TypeError, "returns no float array"),
        (lambda: pg.forward_mode(jnp.sin, has_aux=True)(1.0), TypeError, "a pair"),
        (lambda: pg.forward_mode(jnp.sin, argnums=1)(1.0), ValueError, "argnums=1"),
        (
            lambda: jax.grad(pg.forward_mode(jnp.multiply, argnums=0), 1)(1.0, 2.0),
            TypeError,
            "derivative by argument 1 is asked for",
        ),
        (
            lambda: jax.grad(pg.forward_mode(jnp.sum))(jnp.ones(100_000)),
            ValueError,
            "100,000 tangents.*a Jacobian of 0.8 MB.*`chunk`.*`estimator=`.*reverse mode",
        ),
        (
            lambda: pg.forward_mode(jnp.sum, estimator=pg.WeightPerturbation())(3, jnp.ones(2)),
            TypeError,
            "key",
        ),
        (
            lambda: pg.forward_mode(jnp.sin, estimator=pg.WeightPerturbation())(
                jax.random.key(0), jnp.ones(2)
            ),
            TypeError,
            "a scalar is needed",
        ),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_integers_alone_have_a_value_and_no_derivative():
    fun = pg.forward_mode(lambda n: n * 2.0)
    assert fun(3) == 6.0
    tangent = np.zeros((), jax.dtypes.float0)
    assert jax.jvp(fun, (jnp.asarray(3),), (tangent,))[1] == 0


def test_values_of_a_scan_around_it_are_differentiated():
    """The function closes over tracers of a `scan`, of `vmap`, and of `grad` itself."""

    def total(solve):
        slope = lambda a, x: jax.grad(lambda a: solve(a * x))(a)
        summed = lambda a: lax.scan(lambda c, x: (c + slope(a, x), None), 0.0, XS)[0]
        return jax.grad(lambda a: summed(a) + jnp.sum(jax.vmap(lambda x: slope(a, x))(XS)))(A)

    inner = lambda a: pg.forward_mode(lambda b: cube_root(b) + 0 * a)(a)
    np.testing.assert_allclose(total(inner), total(exact), rtol=1e-10)


def test_inside_and_outside_of_shard_map():
    """Data differ between the devices, or a parameter is the same on all and the loss is summed."""
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    xs, split = np.arange(2.0, 10.0), jax.P("i")
    over = lambda f, *ins, out=split: jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=out)
    inside = over(jax.vmap(lambda x: (wrapped(x), jax.grad(wrapped)(x))), split)
    outside = jax.grad(lambda xs: over(jax.vmap(wrapped), split)(xs).sum())
    value, slope = jax.jit(inside)(xs)
    np.testing.assert_allclose(value, jax.vmap(exact)(xs), rtol=1e-12)
    np.testing.assert_allclose(slope, jax.vmap(jax.grad(exact))(xs), rtol=1e-10)
    np.testing.assert_allclose(outside(xs), slope, rtol=1e-12)

    def loss(a, xs):
        return lax.psum(jnp.sum(wrapped(a) * xs), "i")

    summed = jax.jit(jax.grad(over(loss, jax.P(), split, out=jax.P())))(A, xs)
    np.testing.assert_allclose(summed, xs.sum() * jax.grad(exact)(A), rtol=1e-10)


def test_prints_are_passed_and_calls_of_python_are_refused(capfd):
    def printing(a):
        jax.debug.print("at {}", a)
        return cube_root(a)

    np.testing.assert_allclose(jax.grad(pg.forward_mode(printing))(A), jax.grad(exact)(A))
    jax.effects_barrier()
    assert "at 2.0" in capfd.readouterr().out

    def calling(a):
        jax.experimental.io_callback(lambda a: None, None, a)
        return cube_root(a)

    with pytest.raises(TypeError, match=r"io_callback \(.*test_forward_mode.py"):
        jax.grad(pg.forward_mode(calling))(A)


def test_a_custom_reverse_rule_is_named():
    @jax.custom_vjp
    def reversed_only(x):
        return x

    reversed_only.defvjp(lambda x: (x, None), lambda _, g: (g,))
    with pytest.raises(TypeError, match="reversed_only"):
        jax.grad(pg.forward_mode(lambda x: reversed_only(x) ** 2))(1.0)
