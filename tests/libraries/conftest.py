"""What these libraries warn of, and keys that they use twice, are theirs."""

import jax
import pytest


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.enable_x64(True), jax.debug_key_reuse(False):
        yield
