"""Learning while the data flows: the tangent of a recurrent state is carried with the state, and nothing is unrolled.

- `_learner`: what every learner is, what it carries, and the checks that all of them make;
- `rtrl`, `dodge`, `uoro`: one algorithm each;
- `directions`: guesses for `DODGE`;
- `_learn`: a loop over a chunk of a stream, which stops before a fault.

**Source:** arXiv 1702.05043 sets the algorithms side by side; each names its own.

Examples:
    >>> import jax, jax.numpy as jnp, prograde as pg
    >>> cell = lambda w, state, x: (jnp.tanh(w * state + x),) * 2            # any (params, state, input) -> (state, output)
    >>> learner = pg.online.RTRL(cell, lambda output, target: (output - target) ** 2)
    >>> carry = learner.init(jnp.array(0.5), jnp.array(0.0))
    >>> for x in (0.1, 0.2, 0.3):
    ...     carry, loss, grads = learner.step(jax.random.key(0), carry, x, 0.0)
"""

from prograde.online._learn import StreamError, learn
from prograde.online._learner import Carry, OnlineLearner
from prograde.online.directions import Guess, Momentum, PastWindow, TruncatedBackprop
from prograde.online.dodge import DODGE
from prograde.online.rtrl import RTRL
from prograde.online.uoro import UORO

__all__ = [
    "DODGE",
    "RTRL",
    "UORO",
    "Carry",
    "Guess",
    "Momentum",
    "OnlineLearner",
    "PastWindow",
    "StreamError",
    "TruncatedBackprop",
    "learn",
]
