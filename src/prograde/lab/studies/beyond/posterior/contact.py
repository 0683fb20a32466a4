"""What it takes to trace and compile a gradient through contact in MJX."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mujoco  # pyright: ignore[reportMissingImports]
from jax import lax
from jaxtyping import Array
from mujoco import mjx  # pyright: ignore[reportMissingImports]

import prograde as pg
from prograde.lab.display import Display

OURS, JACFWD = "jax.grad of forward_mode", "jax.jacfwd"
CHECK = "check of it"
STEPS = 20
_WORLD = """
<mujoco>
  <option timestep="0.005" iterations="4"/>
  <worldbody>
    <geom type="plane" size="5 5 .1"/>
    <body pos="0 0 0.12"><freejoint/><geom type="sphere" size="0.1"/></body>
  </worldbody>
</mujoco>"""


def sphere_on_a_plane() -> Callable[[Array], Array]:
    """The height of a sphere after `STEPS` steps, the last ones in contact, by its velocity."""
    world: Any = mujoco
    model = mjx.put_model(world.MjModel.from_xml_string(_WORLD))
    start = mjx.make_data(model)

    def height(velocity):
        data = start.replace(qvel=start.qvel.at[:3].set(velocity))
        return lax.scan(lambda d, _: (mjx.step(model, d), None), data, length=STEPS)[0].qpos[2]

    return height


def measure(display: Display) -> dict[str, Any]:
    """Compiles each program once."""
    height, velocity, h = sphere_on_a_plane(), jnp.array([0.1, 0.0, -1.0]), 1e-5
    programs: dict[str, Callable] = {
        "the height alone": height,
        OURS: jax.grad(pg.forward_mode(height)),
        JACFWD: jax.jacfwd(height),
    }
    seconds, ready = {}, {}
    with display.stage("a sphere in MJX: compiling", len(programs) + 1):
        for name, program in programs.items():
            begin = time.perf_counter()
            ready[name] = jax.jit(program).lower(velocity).compile()
            seconds[name] = time.perf_counter() - begin
            display.advance(1, name)
        begin = time.perf_counter()
        report = pg.check(height, velocity, estimator=pg.ForwardJacobian())
        seconds[CHECK] = time.perf_counter() - begin
        display.advance(1, CHECK)
    heights = ready["the height alone"]
    differences = jnp.stack(
        [(heights(velocity + h * e) - heights(velocity - h * e)) / (2 * h) for e in jnp.eye(3)]
    )
    gradient = ready[OURS](velocity)
    return {
        "compile_seconds": seconds,
        "gradient": gradient.tolist(),
        "error": float(jnp.max(jnp.abs(gradient - differences))),
        "checked": report.ok,
    }
