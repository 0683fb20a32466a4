"""What the tests of `prograde.lm` share."""

import jax
import pytest


@pytest.fixture(autouse=True)
def keys_may_be_used_again():
    with jax.debug_key_reuse(False):
        yield
