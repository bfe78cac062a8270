"""The numerical settings all tests run under, set before JAX starts."""

import collections
import gc
import os
from importlib.metadata import version

# Most of a test's time is compilation: a third of it LLVM's optimization, another third
# the newer of two ways to emit loops, between which old releases have the choice.
_FLAGS = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    # Eight devices on few cores: where others compute too, one may come late.
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
]
_JAXLIB = tuple(map(int, version("jaxlib").split(".")[:2]))
if _JAXLIB < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
if _JAXLIB == (0, 12):  # a sixth of the time; an unknown flag would end the process
    _FLAGS.append("--xla_cpu_use_new_xtile_lowering=false")
os.environ["XLA_FLAGS"] = " ".join(_FLAGS).strip()

import jax  # noqa: E402
import pytest  # noqa: E402

# What JAX keeps of each program lives long: looking through all of it as often as
# Python does by default took a tenth of the time.
gc.set_threshold(100_000, 20, 100)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_default_matmul_precision", "highest")  # on GPUs
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import jaxtyping  # noqa: E402

import tests.helpers.typechecking  # noqa: E402, F401  # found by its name below

# Shapes in signatures, which cost nothing elsewhere. Not those of `linalg._checked`,
# which is there to be called with anything.
if os.environ.get("KFAC_JAX_CHECK_SHAPES") != "0":
    inner = [f"kfac_jax.linalg._{name}" for name in "coherence gram psd shared".split()]
    jaxtyping.install_import_hook(
        ["kfac_jax.blocks", *inner], "tests.helpers.typechecking.functions"
    )


@pytest.fixture
def user_settings():
    """What a user's program has, not what other tests do."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        with jax.numpy_rank_promotion("allow"):
            yield


@pytest.fixture
def any_rank():
    """As users write programs: `g * w` of different ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def any_type():
    """What optax and flax rely on."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """Marks the cases that `sampled` leaves out, and takes one part of those chosen.

    With KFAC_JAX_SLOW_PART=0/2 every second of those that it leaves out is "full", too,
    and with 1/2 the others.

    With KFAC_JAX_TEST_PART=0/3 each test function runs every third of its cases, and
    with 1/3 and 2/3 the others. Functions begin in turn, so that the parts are as long.
    """
    counts, slow = collections.Counter(), 0
    part, parts = _part("KFAC_JAX_SLOW_PART")
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is None:
            continue
        if counts[item.function] % mark.args[0]:
            item.add_marker("slow")
            if slow % parts != part:
                item.add_marker("full")
            slow += 1
        counts[item.function] += 1
    result = yield  # pytest chooses by markers
    part, parts = _part("KFAC_JAX_TEST_PART")
    turns = {}  # whose is each function's next case
    kept, left_out = [], []
    for item in items:
        name = _function_of(item)
        turn = turns.get(name, len(turns))
        (kept if turn % parts == part else left_out).append(item)
        turns[name] = turn + 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
    return result


def _part(variable):
    return map(int, os.environ.get(variable, "0/1").split("/"))


def _function_of(item):
    return item.nodeid.partition("[")[0]
