"""A state that is not this plan's is refused, and all that differs is named."""

import functools
import multiprocessing
import pickle
import re
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import pytest
from flax import serialization

import kfac_jax
from tests.helpers import models


@functools.cache
def problem(width=5):
    return models.problem(params=models.dense_params(0, 3, width, 4))


@functools.cache
def plan(width=5, **options):
    p = problem(width)
    return kfac_jax.make_curvature(p.loss_fn, p.params, *p.args, **options)


def state_of(curvature, width=5):
    return kfac_jax.kfac(curvature).init(problem(width).params)


def update(state, curvature=None, distribution=None):
    """A step with the plan; nothing is computed."""
    curvature = curvature or plan()
    params = problem().params
    tx = kfac_jax.kfac(curvature, 0.1, 0.9, 1e-3, devices=distribution)

    def step(state):
        statistics = curvature.zero_statistics(params)
        return tx.update(params, state, params, statistics=statistics)

    return jax.eval_shape(step, state)


def refused(state, **options):
    """What the error lists."""
    with pytest.raises(ValueError, match="not one that init makes for this plan") as e:
        update(state, **options)
    return [line.strip() for line in str(e.value).splitlines()[1:-1]]


def with_factor(state, **parts):
    layer = next(iter(state.factors))
    return state._replace(factors=state.factors | {layer: state.factors[layer] | parts})


def test_its_own_state_is_taken_however_it_was_kept():
    state = state_of(plan())
    update(state)
    update(pickle.loads(pickle.dumps(state)))
    as_dict = serialization.to_state_dict(state)
    update(serialization.from_state_dict(state_of(plan()), as_dict))


def test_numbers_may_be_of_any_type():
    """Users set λ by hand."""
    update(state_of(plan())._replace(damping=jnp.float32(0.5)))


def test_a_state_of_wider_layers_is_refused_with_every_leaf_that_differs():
    lines = refused(state_of(plan(7), 7))
    names = list(state_of(plan()).factors)
    first, second = names
    assert lines == [  # one layer's outputs and the other's inputs
        f"factors/{first}/output: expected float64[5,5], got float64[7,7]",
        f"factors/{second}/input: expected float64[6,6], got float64[8,8]",
        f"inverses/{first}/output: expected float64[5,5], got float64[7,7]",
        f"inverses/{second}/input: expected float64[6,6], got float64[8,8]",
    ]


def test_missing_and_unknown_leaves_are_named():
    state = state_of(plan())
    layer = next(iter(state.factors))
    renamed = {
        "other" if name == layer else name: x for name, x in state.factors.items()
    }
    lines = refused(state._replace(factors=renamed))
    assert f"factors/{layer}/input: expected float64[4,4], got nothing" in lines
    assert "factors/other/input: expected nothing, got float64[4,4]" in lines


def test_another_type_is_refused():
    state = state_of(plan())
    layer = next(iter(state.factors))
    factor = state.factors[layer]["input"].astype(jnp.float32)
    lines = refused(with_factor(state, input=factor))
    assert lines == [f"factors/{layer}/input: expected float64[4,4], got float32[4,4]"]


def test_a_state_with_other_blocks_is_refused():
    other = plan(blocks=kfac_jax.blocks.Diagonal())
    assert any("got nothing" in line for line in refused(state_of(other)))


def test_long_lists_are_cut():
    params = models.dense_params(0, 3, *[6] * 8, 4)
    deep = models.problem(params=params)
    curvature = kfac_jax.make_curvature(deep.loss_fn, params, *deep.args)
    lines = refused(kfac_jax.kfac(curvature).init(params))
    assert len(lines) == 11
    assert lines[-1].startswith("and ")


@models.EIGHT_DEVICES
def test_a_state_of_another_number_of_devices_is_refused():
    over = kfac_jax.OverMesh(models.mesh(2, "data"), state_axes="data")
    assert refused(state_of(plan()), distribution=over)
    spread = kfac_jax.spread_state(plan(), state_of(plan()), over)
    assert refused(spread)


def test_a_checkpoint_without_structure_is_refused():
    as_dict = serialization.to_state_dict(state_of(plan()))
    with pytest.raises(TypeError, match="restored into the structure of that"):
        update(as_dict)


def orbax_refusal(change, path):
    """What orbax says of restoring a state into another plan's."""
    from orbax import checkpoint

    state = state_of(plan())
    other = state_of(plan(7), 7)
    if change == "leaf":
        layer = next(iter(state.factors))
        other = state._replace(factors={**state.factors, "more": state.factors[layer]})
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match=r"factors|shape") as e:
            checkpointer.restore(path, other)
    return str(e.value)


@pytest.mark.parametrize("change", ["shape", "leaf"])
def test_orbax_refuses_to_restore_into_another_plan(change, tmp_path):
    # In a process of its own: orbax leaves coroutines behind where it refuses, and
    # the garbage collector may reach them in the middle of another test.
    pytest.importorskip("orbax.checkpoint")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        said = process.submit(orbax_refusal, change, tmp_path / "checkpoint").result()
    assert re.search("factors|shape", said)
