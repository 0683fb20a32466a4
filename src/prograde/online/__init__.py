"""Learning while the data flows: the tangent of a recurrent state is carried with the state, and nothing is unrolled.

- `_learner`: what every learner is, what it carries, and the checks that all of them make;
- `rtrl`, `dodge`, `uoro`: one algorithm each;
- `directions`: guesses for `DODGE`;
- `_learn`: a loop over a chunk of a stream, which stops before a fault.
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
