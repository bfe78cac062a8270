"""Options of `Optimizer`: what they do, what is refused."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from tests.compat.optimizer_problem import (
    ADAPTIVE,
    BATCH,
    EXACT,
    KEY,
    PARAMS,
    RATES,
    VALUE_AND_GRAD,
    loss_fn,
    train,
)
from tests.helpers import models


def test_another_function_for_the_curvature():
    def estimator(params, batch):
        z = models.mlp(params, batch[0])
        kfac_jax.register_squared_error_loss(z)
        return z.sum()

    optimizer = kfac_jax.Optimizer(
        VALUE_AND_GRAD, value_func_for_estimator=estimator, **EXACT
    )
    _, state, stats = train(optimizer, PARAMS, [BATCH], **RATES)
    np.testing.assert_allclose(stats[0]["loss"], loss_fn(PARAMS, BATCH))
    # squared errors have the Fisher 2 I of each case
    factor = state.estimator_state.factors["layer1"]["output"]
    np.testing.assert_allclose(factor, 2 * np.eye(4), atol=1e-12)


def test_generic_blocks_only():
    for options in (
        {"register_only_generic": True},
        {"auto_register_kwargs": {"register_only_generic": True}},
    ):
        optimizer = kfac_jax.Optimizer(VALUE_AND_GRAD, **EXACT, **options)
        _, _, stats = train(optimizer, PARAMS, [BATCH] * 2, **RATES)
        assert {layer.kind for layer in optimizer.curvature.layers} == {"generic"}
        assert stats[1]["loss"] < stats[0]["loss"]


def test_batches_are_processed_and_measured():
    optimizer = kfac_jax.Optimizer(
        VALUE_AND_GRAD,
        batch_process_func=lambda batch: batch["data"],
        batch_size_extractor=lambda batch: batch["size"],
        debug=True,
        **EXACT,
    )
    batch = {"data": BATCH, "size": 5}
    _, _, stats = train(optimizer, PARAMS, [batch], **RATES)
    assert int(stats[0]["data_seen"]) == 5


def test_norms():
    optimizer = kfac_jax.Optimizer(
        VALUE_AND_GRAD,
        include_norms_in_stats=True,
        include_per_param_norms_in_stats=True,
        norm_constraint=1e-4,
        invalid_metric_value=-1.0,
        **EXACT,
    )
    params, state, (stats,) = train(optimizer, PARAMS, [BATCH], **RATES)
    grads = jax.grad(loss_fn)(PARAMS, BATCH)
    np.testing.assert_allclose(stats["grad_norm"], optax.tree.norm(grads))
    np.testing.assert_allclose(stats["param_norm"], optax.tree.norm(params))
    np.testing.assert_allclose(stats["update_norm"], optax.tree.norm(state.velocities))
    np.testing.assert_allclose(stats["precon_grad_norm"] * 0.1, stats["update_norm"])
    norm = jnp.linalg.norm(grads["layer1"]["w"])
    np.testing.assert_allclose(stats["grad_norm(layer1/w)"], norm)
    assert stats["learning_rate"] == 0.1
    assert stats["rho"] == stats["new_loss"] == -1.0
    # α² Δᵀ∇h, of which the update has what the constraint leaves
    delta = jax.tree.map(jnp.subtract, params, PARAMS)
    constrained = -0.1 * optax.tree.vdot(delta, grads)
    square = stats["scaled_grad_norm_sq"]
    np.testing.assert_allclose(constrained, np.sqrt(1e-4 * square))
    assert square > 1e-4


def test_norms_take_no_second_preconditioning():
    def products(**options):
        optimizer = kfac_jax.Optimizer(VALUE_AND_GRAD, **EXACT, **options)
        step = lambda state: optimizer.step(  # noqa: E731
            PARAMS, state, KEY, batch=BATCH, **RATES
        )
        state = optimizer.init(PARAMS, KEY, BATCH)
        text = jax.jit(step).lower(state).compile().as_text()
        return len(re.findall(r"\[\d+,\d+\]\S* dot\(", text))  # of matrices

    without = products()
    assert without > 0
    assert products(norm_constraint=1e-3) == without
    assert products(include_norms_in_stats=True) == without


def test_printing_tells_what_each_parameter_got():
    optimizer = kfac_jax.Optimizer(VALUE_AND_GRAD, **EXACT)
    assert "its plan is made by the first init or step" in repr(optimizer)
    with pytest.raises(ValueError, match="The plan is made when arguments are first"):
        _ = optimizer.curvature
    optimizer.init(PARAMS, KEY, BATCH)
    assert "layer0/w" in repr(optimizer)
    assert optimizer.curvature.loss_fn(PARAMS, BATCH)[0] == loss_fn(PARAMS, BATCH)


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_exact_inverses": True}, "does not offer use_exact_inverses"),
        ({"use_step_rejection": True}, "does not offer use_step_rejection"),
        ({"precon_power": -0.5}, "approximation(factors).power"),
        ({"custom_estimator_ctor": object}, "does not offer custom_estimator_ctor"),
        ({"precon_damping_mult": 2.0}, "SeparateDamping"),
        ({"regularized_parameters_path_exclusions": "b"}, "l2_reg=0"),
        ({"use_adaptive_momentum": True}, "with a given learning rate"),
        ({"use_adaptive_damping": True}, "needs initial_damping"),
        (ADAPTIVE | {"norm_constraint": 1.0}, "limits a given learning rate"),
        (ADAPTIVE | {"momentum_schedule": lambda t: 0.9}, "at most one way to choose"),
        (
            {"auto_register_kwargs": {"patterns": ()}},
            "options of the published matcher",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kfac_jax.Optimizer(VALUE_AND_GRAD, **(EXACT | options))


def test_a_number_is_no_schedule():
    with pytest.raises(TypeError, match="must be a function of the step, or None"):
        kfac_jax.Optimizer(VALUE_AND_GRAD, learning_rate_schedule=0.1)


def test_unneeded_options_are_accepted():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac_jax.Optimizer(
            VALUE_AND_GRAD,
            distributed_inverses=False,
            distributed_precon_apply=False,
            should_vmap_estimator_samples=True,
            auto_register_kwargs={"graph_patterns": ()},
        )
    with pytest.warns(UserWarning, match="has no patterns to skip"):
        kfac_jax.Optimizer(VALUE_AND_GRAD, patterns_to_skip=("scale_and_shift",))


def test_each_rate_in_one_way():
    optimizer = kfac_jax.Optimizer(
        VALUE_AND_GRAD, learning_rate_schedule=lambda t: 0.1, **EXACT
    )
    step = functools.partial(optimizer.step, PARAMS, None, KEY)
    with pytest.raises(ValueError, match="one of data_iterator and batch; got neither"):
        step()
    with pytest.raises(ValueError, match="one of data_iterator and batch; got both"):
        step(iter([BATCH]), BATCH)
    with pytest.raises(ValueError, match="Nothing chooses the momentum"):
        step(batch=BATCH, damping=1.0)
    with pytest.raises(ValueError, match="expected step without learning_rate="):
        step(batch=BATCH, **RATES)


def test_a_batch_without_cases_needs_an_extractor():
    optimizer = kfac_jax.Optimizer(VALUE_AND_GRAD, **EXACT)
    state = optimizer.init(PARAMS, KEY, BATCH)
    with pytest.raises(ValueError, match="leading axis of cases"):
        optimizer.step(PARAMS, state, KEY, batch={"size": 3, "z": BATCH}, **RATES)
