"""Which of many combinations `make test` runs, and which only `make test-all` runs."""

import itertools

import pytest

LONG = pytest.mark.long


def combinations(short, **axes):
    """Parametrize a test by every combination of `axes`; those that `short` refuses are long.

    `short` is called with one value of each axis, by name.
    """
    cases = [
        pytest.param(*values, marks=() if short(**dict(zip(axes, values, strict=True))) else LONG)
        for values in itertools.product(*axes.values())
    ]
    return pytest.mark.parametrize(list(axes), cases, ids=_name)


def _name(value):
    return getattr(value, "__name__", None) or repr(value)
