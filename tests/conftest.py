"""Fixtures that every test shares. Seeds are fixed; `--vary-seed` draws a new one, prints it, and
uses it throughout."""

import atexit
import os
import random
import shutil
import signal
import tempfile
from importlib.metadata import version

if "XLA_FLAGS" not in os.environ:
    # Eight devices for tests of sharding. Two choices of code generator halve the time of
    # compiling: most programs here are small, run once, and cost what their compilation costs.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
    )
    if version("jaxlib").startswith("0.10."):  # a later XLA ends the process at a flag that is gone
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # the processes that tests start compile the same programs again and again: one cache for all of
    # them, and none left behind
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="prograde-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell that runs the tests in the background lets all of their processes ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

jax.config.update("jax_debug_key_reuse", True)


def pytest_addoption(parser):
    parser.addoption(
        "--vary-seed", action="store_true", help="use a new seed instead of the fixed one"
    )
    parser.addoption("--seed", type=int, default=0, help="use this seed")


def pytest_configure(config):
    if config.getoption("--vary-seed"):
        config.option.seed = random.SystemRandom().randrange(2**31)


def pytest_report_header(config):
    return f"seed: {config.option.seed}"


@pytest.fixture(scope="session")
def seed(request):
    return request.config.option.seed


@pytest.fixture
def key(seed):
    return jax.random.key(seed)


@pytest.fixture
def strict():
    """No implicit promotion of dtypes or ranks, in the package's code and in the test's."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def compiled_programs(request):
    """Leave programs as they are unless the file says `pytestmark = pytest.mark.optimised`.

    Most files compile many small programs and run each once. What a file compiled is of no use to
    the next one, and takes gigabytes in all.
    """
    optimised = request.node.get_closest_marker("optimised") is not None
    jax.config.update("jax_disable_most_optimizations", not optimised)
    yield
    jax.clear_caches()
