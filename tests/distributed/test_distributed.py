"""Many devices estimate what one estimates alone, and only a few numbers pass between them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import combinations
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import prograde as pg
from prograde.distributed import (
    Distributed,
    ReplicaError,
    StartError,
    agree,
    check_replicas,
    checksums,
    initialize,
    payload,
)
from prograde.estimators import Share

COLLECTIVE = re.compile(
    r"= (.*) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
NUMBERS = re.compile(r"[a-z]+\d+\[([\d,]*)\]")


def loss(params, x, y):
    hidden = jax.nn.relu(x @ params["in"] + params["bias"])
    return jnp.mean((hidden @ params["out"] - y) ** 2, axis=-1)


@pytest.fixture
def problem(key):
    k1, k2, k3 = jax.random.split(key, 3)
    params = {
        "in": jax.random.normal(k1, (48, 256)) / 7,
        "bias": jnp.ones(256),
        "out": jax.random.normal(k2, (256, 64)) / 16,
    }
    x = jax.random.normal(k3, (16, 48))
    return params, x, jnp.sin(x[:, :1]) * jnp.ones(64)


def mesh_of(*shape, names=("workers", "more", "model"), axis_type=AxisType.Auto):
    count = int(np.prod(shape))
    if jax.device_count() < count:
        pytest.skip(f"{jax.device_count()} devices, and {count} are needed")
    types = (axis_type,) * len(shape)
    return jax.make_mesh(shape, names[: len(shape)], types, devices=jax.devices()[:count])


def estimated(estimator, key, problem, params=None):
    """The estimate, and the sizes of all arrays that devices exchange for it."""
    mine, x, y = problem
    run = jax.jit(lambda params, x, y: estimator.estimate(loss, key, None, params, x, y))
    program = run.lower(params or mine, x, y).compile()
    lines = COLLECTIVE.findall(program.as_text())
    found = [shape for line in lines for shape in NUMBERS.findall(line)]
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in found]
    return program(params or mine, x, y), sizes


def assert_close(found, wanted, rtol):
    np.testing.assert_allclose(found.value, wanted.value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found.grads), jax.tree.leaves(wanted.grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(jnp.abs(b).max()))


SEEDED = {
    "rank one": (pg.WeightPerturbation(num_tangents=8), 1e-5),
    "dense": (pg.WeightPerturbation(pg.Rademacher(), num_tangents=8, chunk=2), 1e-5),
    "groups": (pg.WeightPerturbation(num_tangents=8, num_groups=8), 1e-5),
    "projection": (
        pg.WeightPerturbation(pg.Rademacher(), num_tangents=8, combine="projection"),
        1e-5,
    ),
    "1.5-spsa": (pg.CentralDifference(num_tangents=8, step=0.1, curvature_power=0.5), 1e-3),
}
MODES = {
    "same tangents, batch cut": ((8,), {"data": "workers"}),
    "own tangents, same batch": ((8,), {"tangents": "workers"}),
    "both": ((2, 4), {"data": "workers", "tangents": "more"}),
    "two axes of data": ((2, 4), {"data": ("workers", "more")}),
}


@pytest.fixture(scope="module")
def alone():
    """Estimates on one device, each made once: `alone(name, key, problem)`."""
    made = {}

    def call(name, key, problem):
        if name not in made:
            made[name] = estimated(SEEDED[name][0], key, problem)[0]
        return made[name]

    return call


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("rank one", mode) for mode in MODES),
        ("groups", "both"),
        ("1.5-spsa", "both"),
        *(pytest.param(name, "both", marks=pytest.mark.long) for name in ("dense", "projection")),
    ],
)
def test_eight_devices_estimate_what_one_does_and_exchange_scalars(name, mode, key, problem, alone):
    estimator, rtol = SEEDED[name]
    shape, axes = MODES[mode]
    shared, sizes = estimated(Distributed(estimator, mesh_of(*shape), **axes), key, problem)
    alone = alone(name, key, problem)
    assert_close(shared, alone, rtol)
    wanted = alone.directional.reshape(8, estimator.num_groups, -1).mean(axis=2)
    np.testing.assert_allclose(shared.directional.reshape(8, -1), wanted, rtol=rtol, atol=rtol)
    # one exchange, in which each worker has the loss and the derivatives of its share
    workers = int(np.prod(shape))
    assert len(sizes) <= len(shape)
    assert sizes[-1] * 4 <= workers * payload(estimator, problem[0])


@combinations(
    lambda name, axis_type: (name, axis_type.name) in {("rank one", "Explicit"), ("dense", "Auto")},
    name=("rank one", "dense", "groups", "projection"),
    axis_type=(AxisType.Auto, AxisType.Explicit),
)
def test_sharded_weights_get_the_same_tangents_shard_by_shard(name, axis_type, key, problem, alone):
    estimator, rtol = SEEDED[name]
    mesh = mesh_of(2, 2, 2, axis_type=axis_type)
    layout = {"in": P(None, "model"), "bias": P("model"), "out": P("model")}
    sharded = jax.tree.map(
        lambda w, s: jax.device_put(w, NamedSharding(mesh, s)), problem[0], layout
    )
    shared, sizes = estimated(
        Distributed(estimator, mesh, data="workers", tangents="more"), key, problem, sharded
    )
    assert_close(shared, alone(name, key, problem), rtol)
    for name, g in shared.grads.items():
        assert g.sharding.is_equivalent_to(sharded[name].sharding, g.ndim)
    # a step can be taken with them
    jax.jit(lambda w, g: jax.tree.map(jnp.subtract, w, g))(sharded, shared.grads)
    # activations and factors pass between shards; weights and their tangents do not
    assert max(sizes) < min(problem[0]["in"].size, problem[0]["out"].size)


@pytest.mark.parametrize("estimator", [pg.Backprop(), pg.CheckpointedBackprop()])
def test_reverse_mode_takes_the_mean_of_gradients(estimator, key, problem):
    shared, sizes = estimated(Distributed(estimator, mesh_of(8), data="workers"), key, problem)
    alone, _ = estimated(estimator, key, problem)
    assert_close(shared, alone, 1e-5)
    assert sum(sizes) >= payload(estimator, problem[0]) / 8


def test_activity_perturbation_is_the_mean_of_estimates_with_keys_of_their_own(key, problem):
    params, x, y = problem
    estimator = pg.ActivityPerturbation()
    shared, _ = estimated(Distributed(estimator, mesh_of(8), data="workers"), key, problem)
    one = jax.jit(lambda key, x, y: estimator.estimate(loss, key, None, params, x, y).grads)
    parts = [
        one(jax.random.fold_in(key, i), x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2])
        for i in range(8)
    ]
    for name, found in shared.grads.items():
        wanted = sum(part[name] for part in parts) / 8
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_shares_need_no_promotion_of_their_indices(key, strict):
    estimator = pg.WeightPerturbation(num_tangents=2, num_groups=4)
    with jax.enable_x64(True):
        shared = Distributed(estimator, mesh_of(2, 2), data="workers", tangents="more")
        w, x = jnp.ones((6, 5)), jnp.linspace(0, 1, 48).reshape(8, 6)
        squares = lambda w, x: jnp.mean((x @ w) ** 2)
        run = lambda e: jax.jit(
            lambda w, x: e.estimate(squares, jax.random.clone(key), None, w, x).grads
        )(w, x)
        np.testing.assert_allclose(run(shared), run(estimator), rtol=1e-12)


def test_aux_stays_with_its_worker(key, problem):
    params, x, y = problem
    run = lambda params, x, y: (loss(params, x, y), {"first": x[0, 0], "rows": len(x)})
    shared = pg.distributed.value_and_grad(
        run, pg.WeightPerturbation(), mesh_of(8), data="workers", has_aux=True
    )
    (_, aux), _ = jax.jit(shared)(key, params, x, y)
    assert aux["rows"] == 2
    np.testing.assert_array_equal(aux["first"], x[::2, 0])


def test_numbers_of_workers_do_not_depend_on_how_they_are_counted(key, problem):
    """Shares by hand, without a mesh: what `Distributed` concatenates and averages."""
    estimator = SEEDED["rank one"][0]
    params, x, y = problem
    whole = jax.jit(lambda x, y: estimator.derivatives(loss, key, params, x, y)[2])(x, y)

    @jax.jit
    def part(x, y, i, j):
        share = Share(i, 4, j, 2)
        return estimator.derivatives(loss, key, params, x, y, share=share)[2]

    parts = [[part(x[j::2], y[j::2], i, j) for j in range(2)] for i in range(4)]
    found = jnp.concatenate([(a + b) / 2 for a, b in parts])
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)


def test_replicas_that_differ_are_named(problem):
    mesh = mesh_of(4)
    params = problem[0]
    check_replicas(params, mesh, step=10)

    def replicas(which, change):
        copies = [np.array(params["in"]) for _ in range(4)]
        for i in which:
            copies[i][5, 7] = change(copies[i][5, 7])
        placed = [jax.device_put(c, d) for c, d in zip(copies, mesh.devices, strict=True)]
        sharding = NamedSharding(mesh, P())
        return params | {
            "in": jax.make_array_from_single_device_arrays(copies[0].shape, sharding, placed)
        }

    check_replicas(replicas([2], lambda x: x), mesh, step=10)
    one_bit = lambda x: np.nextafter(x, np.float32(np.inf))
    with pytest.raises(
        ReplicaError,
        match=r"after step 10 the parameters of worker 2 differ .* worker 0, 1, 3, in \['in'\]",
    ):
        check_replicas(replicas([2], one_bit), mesh, step=10)
    with pytest.raises(ReplicaError, match="worker 0 differ from those of worker 1, 2, 3"):
        check_replicas(replicas([0], lambda x: -x), mesh, step=10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "complex64", "uint32"])
def test_checksum_sees_every_bit_and_not_the_layout(dtype):
    x = jnp.arange(60).reshape(5, 12).astype(dtype)
    changed = x.at[3, 4].set(jnp.asarray(x[3, 5] if dtype != "bool" else ~x[3, 4]))
    swapped = x[::-1]
    sums = [tuple(checksums(v)[0].tolist()) for v in (x, changed, swapped, x.reshape(12, 5))]
    assert sums[3] == sums[0]  # positions are counted along all axes
    for one in zip(*sums, strict=True):  # each of the two sums by itself
        assert len(set(one[:2])) == 2
        if dtype != "bool":
            assert len(set(one[:3])) == 3
    mesh = mesh_of(4)
    laid_out = jax.device_put(x, NamedSharding(mesh, P(None, "workers")))
    assert tuple(jax.jit(checksums)(laid_out)[0].tolist()) == sums[0]


def test_payload_does_not_depend_on_the_model(problem):
    small, large = problem[0], {"w": jax.ShapeDtypeStruct((10_000, 10_000), jnp.float32)}
    for k in (1, 8, 64):
        estimator = pg.WeightPerturbation(num_tangents=k)
        assert payload(estimator, small) == payload(estimator, large) == 4 * k + 4 <= 8 * k + 64
    assert payload(pg.CentralDifference(curvature_power=0.5), large) == 12
    assert payload(pg.Backprop(), large) == 8 * 10**8 == payload(pg.ActivityPerturbation(), large)


def test_what_cannot_be_shared_is_refused_by_name(key, problem):
    mesh = mesh_of(4)
    params, x, y = problem
    with pytest.raises(
        ValueError, match=r"\['nodes'\] are not among those of the mesh, \['workers'\]"
    ):
        Distributed(pg.WeightPerturbation(), mesh, data="nodes")
    with pytest.raises(ValueError, match="name an axis twice"):
        Distributed(pg.WeightPerturbation(), mesh, data="workers", tangents="workers")
    with pytest.raises(TypeError, match="an estimator is needed"):
        Distributed("backprop", mesh)  # pyright: ignore
    with pytest.raises(ValueError, match="num_tangents=6, but 4 workers share them"):
        Distributed(pg.WeightPerturbation(num_tangents=6), mesh, tangents="workers").estimate(
            loss, key, None, params, x, y
        )
    with pytest.raises(ValueError, match="num_groups=2, but 4 workers share the batch"):
        Distributed(pg.WeightPerturbation(num_groups=2), mesh, data="workers").estimate(
            loss, key, None, params, x, y
        )
    with pytest.raises(ValueError, match=r"\(15, 48\).* among 4 workers"):
        Distributed(pg.WeightPerturbation(), mesh, data="workers").estimate(
            loss, key, None, params, x[:15], y[:15]
        )
    with pytest.raises(TypeError, match="learns from step to step"):
        Distributed(pg.LearnedFeedback(), mesh, data="workers").init(loss, params, x, y)
    with pytest.raises(TypeError, match="more than a seed and a few numbers"):
        Distributed(pg.Backprop(), mesh, data="workers").derivatives(loss, key, params, x, y)
    with pytest.raises(ValueError, match="HOST:PORT of the first process"):
        initialize("no-port-here")
    agree({"anything": 1})  # alone there is nobody to differ from


@pytest.mark.parametrize("mesh", ["workers", None, (8,), jax.devices()], ids=repr)
def test_what_is_no_mesh_is_refused_by_name(mesh, problem):
    for call in (
        lambda: Distributed(pg.WeightPerturbation(), mesh, data="workers"),
        lambda: pg.distributed.value_and_grad(loss, pg.WeightPerturbation(), mesh, data="workers"),
        lambda: check_replicas(problem[0], mesh, step=0),
    ):
        with pytest.raises(TypeError, match=r"mesh=.*, but a jax.sharding.Mesh is needed, such as"):
            call()


def test_axes_that_are_none_of_the_mesh_are_refused_by_name(problem):
    mesh, estimator = mesh_of(2, 4), pg.WeightPerturbation()
    for axes in (0, ("workers", 1), {"workers": 1}, b"workers"):
        with pytest.raises(TypeError, match=r"data=.*, but the name of an axis of the mesh"):
            Distributed(estimator, mesh, data=axes)  # pyright: ignore
        with pytest.raises(TypeError, match=r"axes=.*, but the name of an axis of the mesh"):
            check_replicas(problem[0], mesh, 0, axes=axes)  # pyright: ignore
    with pytest.raises(ValueError, match="data='work', but axes"):
        Distributed(estimator, mesh, data="work")
    with pytest.raises(
        ValueError, match=r"axes='work', but axes \['work'\] are not among those of"
    ):
        check_replicas(problem[0], mesh, 0, axes="work")
    with pytest.raises(ValueError, match=r"tangents=\('more', 'more'\) names an axis twice"):
        Distributed(estimator, mesh, tangents=("more", "more"))


def test_processes_cannot_meet_once_jax_has_run(monkeypatch):
    jax.devices()
    arguments = ("127.0.0.1:9", 2, 1)
    with pytest.raises(StartError, match=r"JAX has run something before initialize.* Call initial"):
        initialize(*arguments)
    monkeypatch.setattr(pg.distributed._processes._service(), "client", object())
    with pytest.raises(StartError, match="initialised before, and can be only once"):
        initialize(*arguments)


def test_numbers_of_processes_from_the_environment_are_whole(monkeypatch):
    monkeypatch.setattr(pg.distributed._processes, "_check_first", lambda: None)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES='two' in the environment, but a whole"):
        initialize("127.0.0.1:9")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinator": 1234}, "coordinator=1234, but HOST:PORT"),
        ({"coordinator": "localhost:http"}, "coordinator='localhost:http', but HOST:PORT"),
        ({"timeout": 0.5}, r"timeout=0\.5"),
        ({"num_processes": 0}, "num_processes=0"),
        ({"process_id": 2}, "process_id=2, but a whole number from 0 to num_processes - 1 = 1"),
        ({"process_id": -1}, "process_id=-1"),
    ],
    ids=repr,
)
def test_numbers_of_processes_that_cannot_be_are_refused(changes, message):
    arguments = {"coordinator": "127.0.0.1:9", "num_processes": 2, "process_id": 1}
    with pytest.raises(ValueError, match=message):
        initialize(**arguments | changes)


def test_payload_counts_arrays_alone():
    params = {"w": jnp.zeros((3, 5)), "n": jnp.arange(4), "f": jnp.tanh, "name": "dense"}
    assert payload(pg.Backprop(), params) == 8 * 15


def test_facts_that_are_not_json_are_refused():
    with pytest.raises(TypeError, match="facts cannot be compared as JSON"):
        agree({"loss": len})
    with pytest.raises(ValueError, match=r"timeout=0\.5"):
        agree({}, timeout=0.5)  # pyright: ignore
