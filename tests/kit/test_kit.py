"""What authors of estimators build from: the loop over tangents, groups, memory, names, and
errors."""

import ast
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prograde as pg
from prograde import kit

SOURCE = Path(pg.__file__).parent
OWNERS = ("kit", "estimators", "tangents")


def test_nobody_else_imports_a_private_name():
    """Modules outside of kit, estimators and tangents import from their public modules alone."""
    private = tuple(f"prograde.{owner}._" for owner in OWNERS)
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] in OWNERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith(private), f"{path} imports {node.module}"
                if node.module.split(".")[1:2] in [[owner] for owner in OWNERS]:
                    names = [alias.name for alias in node.names if alias.name.startswith("_")]
                    assert not names, f"{path} imports {names} of {node.module}"


def test_every_public_name_has_an_example():
    for name in kit.__all__:
        thing = getattr(kit, name)
        if not isinstance(thing, type | type(ast.walk)) or name in ("Tangent", "LowRankTangent"):
            continue
        if thing.__module__.startswith(tuple(f"prograde.{owner}" for owner in OWNERS)):
            assert ">>>" in (thing.__doc__ or ""), f"{name} has no example"


@pytest.mark.parametrize(
    ("num_tangents", "size", "first"), [(1, 1, 0), (5, 2, 0), (6, 3, 6), (4, 9, 0), (7, 3, 14)]
)
def test_chunks_visit_every_index_once_and_padding_can_be_left_out(num_tangents, size, first):
    last = first + num_tangents

    def step(carry, indices):
        assert len(indices) <= size
        counted = jnp.where(indices < last, indices + 1, 0)
        total = jnp.sum(counted) if carry is None else carry + jnp.sum(counted)
        return total, indices[0], {"square": indices**2}

    total, shared, each = kit.in_chunks(step, None, num_tangents, size, first)
    indices = np.arange(first, last)
    assert (int(total), int(shared)) == (int((indices + 1).sum()), first)
    np.testing.assert_array_equal(each["square"], indices**2)


def test_chunks_of_a_function_that_branches_on_values_run_one_by_one():
    flag = jnp.asarray(1)

    def step(carry, indices):
        return carry + (indices.sum() if flag > 0 else 0), None, indices

    total, _, each = kit.in_chunks(step, jnp.asarray(0), 7, 2)
    assert int(total) == sum(range(8))  # the last chunk has one index of padding
    assert each.tolist() == list(range(7))


def tangents_at_once(fun, params, num_tangents, chunk=None):
    along = jax.vmap(lambda i: jax.jvp(fun, (params,), (params + i,)))
    return kit.tangents_at_once(chunk, num_tangents, fun, params, along, least=2**25)


def test_a_chunk_takes_no_more_memory_than_the_run_itself_or_the_parameters():
    """With the default each tangent's intermediate results count, those that are returned too."""
    assert tangents_at_once(jnp.sin, jnp.ones(8), 1000) == 1000  # everything fits into 32 MiB
    assert tangents_at_once(jnp.sin, jnp.ones(8), 1000, chunk=7) == 7
    assert tangents_at_once(jnp.sin, jnp.ones(8), 5, chunk=7) == 5
    # 4 MiB for the tangent of the parameters and 4 MiB for that of the result
    assert 2 <= tangents_at_once(jnp.sin, jnp.ones(2**20), 100) <= 8

    def saves(p):  # a loop that returns 16 MiB
        return jax.lax.scan(lambda h, _: (h * p[0], h + p[1] * jnp.ones(2**12)), p[2], None, 2**10)

    assert tangents_at_once(saves, jnp.ones(3), 3) < 3


def test_forward_jacobian_counts_what_a_loop_saves():
    """Three parameters, [200, 20000] predictions saved: the default holds them for one tangent."""
    x = jnp.ones(20_000)

    def loss(p):
        step = lambda h, _: (h * p[0], p[1] * h * x + p[2])
        return jnp.mean(jnp.square(jax.lax.scan(step, jnp.ones(()), None, 200)[1] - 1))

    def temporary(estimator):
        run = jax.jit(lambda p: pg.value_and_grad(loss, estimator)(None, p))
        return run.lower(jnp.ones(3)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(pg.ForwardJacobian()) <= 1.05 * temporary(pg.ForwardJacobian(chunk=1))


def test_groups_are_cut_along_the_first_axis():
    args = (jnp.arange(6.0).reshape(6, 1), {"y": np.arange(6)}, 3.0)
    (x, y, none), rest = kit.in_groups(args, 3)
    assert x.tolist() == [[[0.0], [1.0]], [[2.0], [3.0]], [[4.0], [5.0]]]
    assert y["y"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert (none, rest[2]) == (None, 3.0)


def test_group_ratio_tells_a_mean_from_a_sum():
    w, x = jnp.ones(3), jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    mask = jnp.asarray([1, 1, 1, 1, 1, 0, 0, 0])
    ratio = lambda fun, *args, **kw: kit.group_ratio(fun, w, *args, num_groups=2, **kw)
    per_example = lambda w, x: (x @ w) ** 2
    assert ratio(lambda w, x: jnp.mean(per_example(w, x)), x) == pytest.approx(1)
    assert ratio(per_example, x) == pytest.approx(1)
    assert ratio(lambda w, x: (per_example(w, x), "aux"), x, has_aux=True) == pytest.approx(1)
    assert ratio(lambda w, x: jnp.sum(per_example(w, x)), x) == pytest.approx(0.5)
    weighted = lambda w, x, m: jnp.sum(per_example(w, x) * m) / jnp.sum(m)
    assert abs(ratio(weighted, x, mask) - 1) > 0.05
    assert np.isnan(ratio(lambda w, x: 0.0 * jnp.sum(x @ w), x))


def test_trees_are_taken_apart_and_put_together():
    tree = {"w": jnp.ones(2), "n": 3, "name": "mlp", "act": jnp.tanh, "np": np.ones(2, np.int32)}
    back = kit.unpack(jax.jit(lambda: kit.pack(tree))())
    assert (back["n"], back["name"], back["act"]) == (3, "mlp", jnp.tanh)
    np.testing.assert_array_equal(back["np"], tree["np"])
    floats, rest = kit.checked_floats(tree)
    assert [k for k, v in floats.items() if v is not None] == ["w"]
    assert rest["w"] is None
    assert kit.wide_zeros(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert kit.wide(jnp.ones(2, jnp.float64)).dtype == jnp.float64


@pytest.mark.parametrize(
    ("check", "error", "words"),
    [
        (lambda: kit.check_whole("k", 0), ValueError, "k=0.*at least 1"),
        (lambda: kit.check_whole("k", True), ValueError, "k=True"),
        (lambda: kit.check_whole("k", 2.0), ValueError, "k=2.0"),
        (lambda: kit.check_whole("k", np.int64(2)), ValueError, r"k=np.int64\(2\).*int\(k\)"),
        (lambda: kit.check_positive("h", float("nan")), ValueError, "h=nan"),
        (lambda: kit.check_positive("h", float("inf")), ValueError, "h=inf"),
        (lambda: kit.check_positive("h", 1.5, at_most=1), ValueError, "h=1.5.*at most 1"),
        (lambda: kit.check_choice("c", "a", ("b", "d")), ValueError, "c='a'.*'b', 'd'"),
        (lambda: kit.check_key(0), TypeError, "key=0.*typed PRNG key"),
        (lambda: kit.check_tangents(pg.Normal), TypeError, "tangents=.*Normal"),
    ],
)
def test_errors_name_the_argument_its_value_and_the_remedy(check, error, words):
    with pytest.raises(error, match=words):
        check()


def test_a_finite_loss_with_derivatives_that_are_not_is_named():
    """Outside of `jit`; forward mode makes NaN of sqrt at 0 where reverse mode is finite."""
    loss = lambda p: jnp.sum(jnp.sqrt(jnp.concatenate([jnp.zeros(1), p])))
    params, key = jnp.asarray([1.0, 4.0]), jax.random.key(0)
    for estimator in (pg.WeightPerturbation(pg.Normal(), 3), pg.ForwardJacobian()):
        with pytest.warns(RuntimeWarning, match=r"loss is finite, 3, but \d of \d derivatives"):
            pg.value_and_grad(loss, estimator)(key, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pg.value_and_grad(loss, pg.Backprop())(None, params)
        pg.value_and_grad(lambda p: jnp.sum(jnp.log(-p)), pg.Backprop())(None, params)  # value: NaN
        _, grads = jax.jit(pg.value_and_grad(loss, pg.ForwardJacobian()))(None, params)
    assert np.isnan(grads).all()


@pytest.mark.parametrize(
    "estimator",
    [
        pg.WeightPerturbation(pg.Normal(), 4, chunk=1),
        pg.WeightPerturbation(pg.Normal(), 4, num_groups=2),
        pg.CentralDifference(pg.Normal(), 4, step=0.5),
    ],
    ids=repr,
)
def test_shares_of_the_tangents_and_of_the_batch_make_the_whole(estimator):
    """Concatenated, the derivatives of four workers are those of one, and so is the gradient."""
    w, x = jnp.asarray([1.0, -2.0, 0.5]), jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    loss, key = lambda w, x: (x.astype(w.dtype) @ w) ** 2, jax.random.key(3)
    parts = 2 if estimator.num_groups == 2 else 1
    run = jax.jit(
        lambda share, x: estimator.derivatives(loss, jax.random.clone(key), w, x, share=share)[2],
        static_argnums=0,
    )
    of = lambda share, x: np.asarray(run(share, x))
    shares = [
        np.concatenate(
            [of(pg.Share(t, 2, g, parts), x[4 // parts * g :][: 4 // parts]) for g in range(parts)],
            axis=1,
        )
        for t in range(2)
    ]
    whole = of(None, x)
    np.testing.assert_allclose(np.concatenate(shares), whole, rtol=1e-4)
    assert len(np.unique(whole.round(4))) == whole.size
    found = jax.jit(lambda k: estimator.estimate(loss, k, None, w, x).grads)(key)
    gradient = jax.jit(lambda k: estimator.gradient(k, w, jnp.asarray(whole)))(key)
    np.testing.assert_allclose(gradient, found, rtol=1e-4, atol=1e-5)
