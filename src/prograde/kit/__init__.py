"""What estimators and distributions of tangents are built from, for authors of new ones.

An estimator is a frozen dataclass that subclasses `Estimator` and implements `estimate`. It wraps
the function in a `Loss`, draws tangents, runs the loss along them, and returns an `Estimate`:

    class OneTangent(Estimator):
        def estimate(self, fun, key, state, params, *args, has_aux=False):
            loss = Loss(fun, params, args, has_aux)
            tangent = Rademacher().sample(key, loss.floats)
            value, directional, aux = loss.along(tangent)
            grads = jax.tree.map(lambda v: directional.mean() * v, tangent)
            return loss.estimate(value, grads, directional[None], aux, state)

- **Estimators**: `Estimator`, `Estimate`, `Loss`; `SeededEstimator` and `Share` for estimates that
  are a function of the key and a few numbers.
- **Tangents**: `TangentDistribution`, and `IndependentEntries` for a distribution that draws every
  entry by itself. A `Tangent` is an array, or a `LowRankTangent` that keeps its factors.
- **Sums**: `weighted_sum`, `inner_products`, `inner_products_with`, `projected`, for tangents with
  a leading axis k.
- **Many tangents**: `tangents_at_once` chooses the size of a chunk from memory, `in_chunks` runs
  the chunks, `in_groups` cuts a batch, `group_ratio` tells whether a loss may be cut.
- **Dtypes**: directional derivatives and sums are kept in `wide_dtype`: float32, or float64 where
  the values are float64. `wide` casts to it, `wide_zeros` starts a sum in it. Gradients are
  returned in the dtype of their parameter, which `Loss.estimate` sees to.
- **Arguments**: `check_whole`, `check_positive`, `check_choice`, `check_tangents` and `check_key`
  raise errors that name the argument, its value, and what is allowed.
- **Trees**: `float_leaves` and `checked_floats` take the float arrays out of any tree; `pack` and
  `unpack` carry anything else through JAX transformations.
"""

from prograde._structured import (
    LowRankTangent,
    Tangent,
    inner_products,
    inner_products_with,
    is_structured,
    projected,
    weighted_sum,
)
from prograde.kit._arguments import (
    check_choice,
    check_key,
    check_positive,
    check_tangents,
    check_whole,
)
from prograde.kit._chunks import in_chunks, tangents_at_once
from prograde.kit._estimator import Estimate, Estimator
from prograde.kit._groups import group_ratio, in_groups
from prograde.kit._loss import Loss, checked_loss, warn_of_tangents
from prograde.kit._seeded import SeededEstimator, Share
from prograde.kit._trees import (
    checked_floats,
    float_leaves,
    pack,
    unpack,
    wide,
    wide_dtype,
    wide_zeros,
)
from prograde.tangents import IndependentEntries, TangentDistribution

__all__ = [
    "Estimate",
    "Estimator",
    "IndependentEntries",
    "Loss",
    "LowRankTangent",
    "SeededEstimator",
    "Share",
    "Tangent",
    "TangentDistribution",
    "check_choice",
    "check_key",
    "check_positive",
    "check_tangents",
    "check_whole",
    "checked_floats",
    "checked_loss",
    "float_leaves",
    "group_ratio",
    "in_chunks",
    "in_groups",
    "inner_products",
    "inner_products_with",
    "is_structured",
    "pack",
    "projected",
    "tangents_at_once",
    "unpack",
    "warn_of_tangents",
    "weighted_sum",
    "wide",
    "wide_dtype",
    "wide_zeros",
]
