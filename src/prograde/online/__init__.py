"""Learning from a stream: the tangent of a recurrent state is carried with the state.

Nothing is unrolled, so the memory does not grow with the length of the stream.

- `_learner`: the interface of a learner, what it carries, and the checks that all share;
- `rtrl`, `dodge`, `uoro`: one algorithm each;
- `keep`: which part of a sparse influence `RTRL` keeps; `_sparsity`, `_colouring` and
  `_sparse_influence`: how it is found, laid out and carried;
- `directions`: guesses for `DODGE`;
- `_learn`: a loop over a chunk of a stream, which stops before a faulty step; `_every`: one update
  for several steps.

**Source:** arXiv 1702.05043 compares the algorithms. Each class names its own source.

Examples:
    >>> import jax, jax.numpy as jnp, prograde as pg
    >>> def cell(w, state, x):                       # any (params, state, input) -> (state, output)
    ...     state = jnp.tanh(w * state + x)
    ...     return state, state
    >>> learner = pg.online.RTRL(cell, lambda output, target: (output - target) ** 2)
    >>> carry = learner.init(jnp.array(0.5), jnp.array(0.0))
    >>> for x in (0.1, 0.2, 0.3):
    ...     carry, loss, grads = learner.step(jax.random.key(0), carry, x, 0.0)
"""

from prograde.online._every import Every
from prograde.online._learn import StreamError, learn
from prograde.online._learner import Carry, OnlineLearner
from prograde.online._plan import Plan
from prograde.online.directions import Guess, Momentum, PastWindow, TruncatedBackprop
from prograde.online.dodge import DODGE
from prograde.online.keep import OwnLayer, SnAp
from prograde.online.rtrl import RTRL
from prograde.online.uoro import UORO

__all__ = [
    "DODGE",
    "RTRL",
    "UORO",
    "Carry",
    "Every",
    "Guess",
    "Momentum",
    "OnlineLearner",
    "OwnLayer",
    "PastWindow",
    "Plan",
    "SnAp",
    "StreamError",
    "TruncatedBackprop",
    "learn",
]
