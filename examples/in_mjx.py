"""The floor under a ball, from the way it bounces: system identification through contact in MJX.

The forces of a contact are found by a solver that iterates in a `while_loop`, so that `jax.grad`
refuses a simulation. `forward_mode` lets it through. It takes a minute to compile.
"""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jax import lax
from mujoco import mjx
from scipy.optimize import minimize

import prograde as pg

jax.config.update("jax_enable_x64", True)
model = mjx.put_model(
    mujoco.MjModel.from_xml_string("""
<mujoco>
  <option timestep="0.01" iterations="4"/>
  <worldbody>
    <geom type="plane" size="5 5 .1"/>
    <body pos="0 0 0.3"><freejoint/><geom type="sphere" size="0.1"/></body>
  </worldbody>
</mujoco>""")
)


@pg.forward_mode
def heights(log_params):
    """The heights of the ball, dropped on a floor of this time constant and damping."""
    floor = jnp.broadcast_to(jnp.exp(log_params), model.geom_solref.shape)
    made = model.replace(geom_solref=floor)

    def step(data, _):
        data = mjx.step(made, data)
        return data, data.qpos[2]

    return lax.scan(step, mjx.make_data(model), length=60)[1]


truth = np.log([0.05, 0.3])
data = heights(truth) + 0.005 * jax.random.normal(jax.random.key(0), 60)
misfit = lambda log_params: jnp.mean(((heights(log_params) - data) / 0.005) ** 2)
value_and_grad = jax.jit(jax.value_and_grad(misfit))
start = truth + np.array([0.15, -0.2])
found = minimize(
    lambda p: jax.tree.map(np.asarray, value_and_grad(p)), start, jac=True, method="L-BFGS-B"
)
print(f"misfit in squares of the noise: {value_and_grad(start)[0]:.1f}, then {found.fun:.2f}")
for name, value in zip(("time constant", "damping"), np.exp(found.x), strict=True):
    print(f"{name}: {value:.3f}")
assert found.fun < 1.5
assert np.all(np.abs(found.x - truth) < 0.1)
