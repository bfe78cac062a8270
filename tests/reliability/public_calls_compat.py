"""Valid calls of what programs for the existing library use; see `public_calls`."""

import functools
import inspect

import jax
import jax.numpy as jnp

import kfac_jax
from kfac_jax import utils
from tests.reliability.public_calls import (
    FLAG,
    INTEGERS,
    KEY,
    NUMBER,
    OF_LOSS,
    OPTIONAL,
    SIGNED,
    STATES,
    Call,
    W,
    X,
    Y,
    allowing,
    call,
    loss_fn,
)

BATCH = (X, Y)
RATES = {"learning_rate": 0.1, "momentum": 0.9, "damping": 1e-3}


def of_batch(params, batch):
    return loss_fn(params, *batch)


def defaults(function, **given):
    """The arguments of a valid call: those given, and the defaults of others."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    return {p.name: given.get(p.name, p.default) for p in named}


@functools.cache
def optimizer():
    made = kfac_jax.Optimizer(jax.value_and_grad(of_batch), debug=True)
    return made, made.init(W, KEY, BATCH)


@functools.cache
def estimator():
    made = kfac_jax.BlockDiagonalCurvature(of_batch)
    state = made.init(KEY, (W, BATCH), approx_powers_to_cache=-1)
    return made, state


@functools.cache
def preconditioner():
    made = kfac_jax.OptaxPreconditioner(of_batch, damping=0.1)
    return made, made.init((W, BATCH), KEY)


BLOCKS = {"layer_tag_to_block_ctor": "(layer_tag_to_block_ctor|tag)"}
ANYTHING = {"*": "accepted, without effect"}


def of_optimizer() -> dict[str, Call]:
    made, state = optimizer()
    flags = (
        "value_func_has_aux value_func_has_state value_func_has_rng "
        "include_damping_in_quad_change multi_device debug register_only_generic "
        "always_use_exact_qmodel_for_damping_adjustment include_norms_in_stats "
        "include_per_param_norms_in_stats use_adaptive_learning_rate"
    )
    functions = (
        "value_func_for_estimator batch_process_func batch_size_extractor "
        "learning_rate_schedule momentum_schedule damping_schedule"
    )
    unused = (
        "forbid_setting_attributes_after_finalize modifiable_attribute_exceptions "
        "distributed_precon_apply distributed_inverses should_vmap_estimator_samples"
    )
    options = (
        "precon_damping_schedule custom_estimator_ctor layer_tag_to_block_ctor "
        "auto_register_kwargs estimation_mode exact_quad_model_matrix_type "
        "norm_to_scale_identity_weight_per_block"
    )
    numbers = "l2_reg min_damping max_damping damping_upper_threshold"
    any_number = (
        "damping_adaptation_decay damping_lower_threshold damping_upper_threshold "
        "min_damping max_damping"
    )
    legal = {
        **{name: FLAG for name in flags.split()},
        **{name: OPTIONAL | {"function": "a function"} for name in functions.split()},
        **{name: OPTIONAL for name in options.split()},
        **{name: NUMBER for name in numbers.split()},
        **{
            name: {"fraction negative nan": "only use_adaptive_damping looks at it"}
            for name in any_number.split()
        },
        "value_and_grad_func": {"function": "any function"},
        "initial_damping": OPTIONAL | NUMBER,
        "norm_constraint": OPTIONAL | NUMBER,
        "invalid_metric_value": {"fraction negative nan": "any number"},
        "pmap_axis_name": {"text": "any name"},
        "regularized_parameters_path_exclusions": OPTIONAL,
        "use_initial_damping_calibration": {},
        "use_automatic_registration": FLAG,
        "precon_damping_mult": {"bool": "it equals 1"},
        "reject_damping_increase_factor": {"bool": "it equals 1"},
    }
    rates = {name: NUMBER | {"negative nan bool": "a number"} for name in RATES}
    return {
        "Optimizer": allowing(
            call(
                kfac_jax.Optimizer,
                **defaults(
                    kfac_jax.Optimizer,
                    value_and_grad_func=jax.value_and_grad(of_batch),
                ),
            ),
            legal=legal,
            words=BLOCKS,
            skipped={name: ANYTHING for name in unused.split()},
        ),
        "Optimizer.init": allowing(
            call(made.init, params=W, rng=KEY, batch=BATCH, func_state=None),
            own={"batch": OF_LOSS, "params": OF_LOSS},
            skipped={
                "func_state": {
                    "negative nan fraction bool complex tree list shape": "not used"
                },
            },
            legal={"func_state": OPTIONAL, "batch": INTEGERS},
        ),
        "Optimizer.step": allowing(
            call(
                made.step,
                **defaults(
                    made.step, params=W, state=state, rng=KEY, batch=BATCH, **RATES
                ),
            ),
            own={"batch": OF_LOSS, "params": OF_LOSS},
            skipped={
                "state": STATES,
                "func_state": {
                    "negative nan fraction bool complex tree list shape": "not used"
                },
                "global_step_int": {"negative nan bool": "a batch needs none"},
            },
            legal={
                "func_state": OPTIONAL,
                "data_iterator": OPTIONAL,
                "batch": INTEGERS,
                "global_step_int": OPTIONAL,
                **rates,
            },
        ),
    }


def estimators() -> dict[str, Call]:
    made, state = estimator()
    precondition, of_optax = preconditioner()
    exact = kfac_jax.ImplicitExactCurvature(of_batch)
    arguments = {"func_args": (W, BATCH)}
    own = {"func_args": OF_LOSS}
    parameters = {"func_args": "(func_args|params|parameters)"}
    short = {"func_args": {"list": "it is too short for the function"}}
    product = {
        "state": state,
        "parameter_structured_vector": W,
        "identity_weight": 0.1,
        "exact_power": False,
        "use_cached": False,
        "pmap_axis_name": None,
        "power": -1,
    }
    multiply = {
        "legal": {
            "identity_weight": NUMBER,
            "exact_power": FLAG,
            "use_cached": FLAG,
            "power": SIGNED,
        },
        "skipped": {"state": STATES, "pmap_axis_name": ANYTHING},
        "words": {"parameter_structured_vector": "vector"},
    }
    of_state = {"skipped": {"state": STATES}}
    unused = (
        "auto_register_tags distributed_multiplies distributed_cache_updates "
        "should_vmap_samples batch_index"
    )
    constructed = {
        "func_and_grad": OPTIONAL,
        "default_estimation_mode": OPTIONAL,
        "layer_tag_to_block_ctor": OPTIONAL,
        "index_to_block_ctor": OPTIONAL,
        "auto_register_kwargs": OPTIONAL,
        "func": {"function": "any function"},
        "params_index": {},
    }
    return {
        "BlockDiagonalCurvature": allowing(
            call(
                kfac_jax.BlockDiagonalCurvature,
                **defaults(kfac_jax.BlockDiagonalCurvature, func=of_batch),
            ),
            legal=constructed,
            words=BLOCKS,
            skipped={name: ANYTHING for name in unused.split()},
        ),
        "BlockDiagonalCurvature.init": allowing(
            call(
                kfac_jax.BlockDiagonalCurvature(of_batch).init,
                rng=KEY,
                **arguments,
                exact_powers_to_cache=None,
                approx_powers_to_cache=-1,
                cache_eigenvalues=False,
            ),
            own=own,
            words=parameters,
            skipped={"rng": ANYTHING, "cache_eigenvalues": ANYTHING} | short,
            legal={
                "exact_powers_to_cache": OPTIONAL
                | SIGNED
                | {"nan list": "a power, or several"},
                "approx_powers_to_cache": OPTIONAL
                | SIGNED
                | {"nan list": "a power, or several"},
            },
        ),
        "BlockDiagonalCurvature.update_curvature_matrix_estimate": allowing(
            call(
                made.update_curvature_matrix_estimate,
                state=state,
                ema_old=0.95,
                ema_new=1.0,
                identity_weight=0.1,
                batch_size=4,
                rng=KEY,
                **arguments,
                estimation_mode=None,
                pmap_axis_name=None,
            ),
            own=own,
            words=parameters,
            skipped={
                **short,
                "state": STATES,
                "identity_weight": ANYTHING,
                "batch_size": ANYTHING,
                "pmap_axis_name": ANYTHING,
            },
            legal={
                "ema_old": SIGNED | {"nan": "a number"},
                "ema_new": SIGNED | {"nan": "a number"},
                "estimation_mode": OPTIONAL,
            },
        ),
        "BlockDiagonalCurvature.update_cache": allowing(
            call(
                made.update_cache,
                state=state,
                identity_weight=0.1,
                exact_powers=None,
                approx_powers=-1,
                eigenvalues=False,
                pmap_axis_name=None,
            ),
            legal={
                "identity_weight": NUMBER,
                "approx_powers": OPTIONAL
                | SIGNED
                | {"nan list": "a power, or several"},
            },
            skipped={
                "state": STATES,
                "exact_powers": ANYTHING,
                "eigenvalues": ANYTHING,
                "pmap_axis_name": ANYTHING,
            },
        ),
        "BlockDiagonalCurvature.multiply_matpower": allowing(
            call(made.multiply_matpower, **product), **multiply
        ),
        "BlockDiagonalCurvature.to_diagonal_block_dense_matrix": allowing(
            call(made.to_diagonal_block_dense_matrix, state=state), **of_state
        ),
        "BlockDiagonalCurvature.approximation": allowing(
            call(made.approximation, state=state), **of_state
        ),
        "ImplicitExactCurvature": allowing(
            call(
                kfac_jax.ImplicitExactCurvature,
                **defaults(kfac_jax.ImplicitExactCurvature, func=of_batch),
            ),
            legal={
                "func": {"function": "any function"},
                "batch_size_extractor": OPTIONAL,
            },
        ),
        **{
            f"ImplicitExactCurvature.{name}": allowing(
                call(getattr(exact, name), **arguments, parameter_structured_vector=W),
                own=own,
                words=parameters | {"parameter_structured_vector": "(v|vector)"},
                skipped=short,
            )
            for name in ("multiply_fisher", "multiply_ggn")
        },
        "OptaxPreconditioner": allowing(
            call(
                kfac_jax.OptaxPreconditioner,
                **defaults(
                    kfac_jax.OptaxPreconditioner, value_func=of_batch, damping=0.1
                ),
            ),
            words=BLOCKS,
            legal={
                "value_func": {"function": "any function"},
                "l2_reg": NUMBER,
                "damping": NUMBER,
                "damping_schedule": OPTIONAL,
                "norm_constraint": OPTIONAL | NUMBER,
                "use_exact_inverses": FLAG,
                "use_sqrt_inv": FLAG,
                "register_only_generic": FLAG,
                "auto_register_kwargs": OPTIONAL,
                "layer_tag_to_block_ctor": OPTIONAL,
                "estimation_mode": {"none": "that of the estimator"},
                "curvature_update_period": {"bool": "it equals 1"},
                "norm_to_scale_identity_weight_per_block": OPTIONAL,
            },
            skipped={
                name: ANYTHING
                for name in (
                    "batch_size_extractor distributed_inverses "
                    "distributed_precon_apply should_vmap_samples pmap_axis_name"
                ).split()
            },
        ),
        "OptaxPreconditioner.init": allowing(
            call(precondition.init, **arguments, rng=KEY),
            own=own,
            words=parameters,
            skipped={"rng": ANYTHING} | short,
        ),
        "OptaxPreconditioner.maybe_update": allowing(
            call(precondition.maybe_update, state=of_optax, **arguments, rng=KEY),
            own=own,
            words=parameters,
            skipped={"state": STATES} | short,
        ),
        "OptaxPreconditioner.get_identity_weight": allowing(
            call(precondition.get_identity_weight, state=of_optax), **of_state
        ),
        "OptaxPreconditioner.increment_count": allowing(
            call(precondition.increment_count, state=of_optax), **of_state
        ),
        "OptaxPreconditioner.apply": allowing(
            call(precondition.apply, updates=W, state=of_optax),
            **of_state,
            words={"updates": "vector"},
        ),
        "OptaxPreconditioner.multiply_curvature": allowing(
            call(precondition.multiply_curvature, updates=W, state=of_optax),
            **of_state,
            words={"updates": "vector"},
        ),
        "OptaxPreconditioner.as_gradient_transform": allowing(
            call(precondition.as_gradient_transform, use_inverse=True),
            skipped={"use_inverse": ANYTHING},
        ),
        "get_default_tag_to_block_ctor": allowing(
            call(kfac_jax.get_default_tag_to_block_ctor, tag_name="dense"),
            legal={"tag_name": {"text": "None for a tag that is not known"}},
        ),
        "set_default_tag_to_block_ctor": allowing(
            call(
                kfac_jax.set_default_tag_to_block_ctor,
                tag_name="dense",
                block_ctor=kfac_jax.DenseTwoKroneckerFactored,
            ),
            skipped={
                "tag_name": {"text": "it would be set for the other tests"},
                "block_ctor": {"*": "refused where it is used: test_compat_modules"},
            },
        ),
    }


def helpers() -> dict[str, Call]:
    numbers = {"negative nan fraction bool complex": "a number is an array"}
    other = {"shape": "an array of any shape", **numbers}
    any_tree = {
        "none": "a tree without leaves",
        "integers list tree inner_shape": "any tree",
        **other,
    }
    devices = jax.local_device_count()
    spread = {"x": jnp.ones((devices, 2))}
    matrix = 2.0 * jnp.eye(2)
    keys = jax.random.split(KEY, devices)
    named = {"axis_name": OPTIONAL | {"text": "any name"}}
    mapped = {
        name: allowing(
            call(getattr(utils, name), obj=W, axis_name=None),
            legal={"axis_name": OPTIONAL | {"text": "not mapped"}},
            skipped={"obj": {"*": "there is no axis, so it is returned as it is"}},
        )
        for name in ("psum_if_pmap", "pmean_if_pmap")
    }
    damped = {
        name: allowing(
            call(getattr(utils, name), factors=(matrix, matrix), damping=0.1),
            legal={"damping": NUMBER},
        )
        for name in ("pi_adjusted_kronecker_factors", "pi_adjusted_kronecker_inverse")
    }
    return {
        "utils.inner_product": allowing(
            call(utils.inner_product, obj1=W, obj2=W, in_float64=False),
            legal={
                "obj1": {"integers complex": "of any type"},
                "obj2": {"integers complex": "of any type"},
                "in_float64": FLAG,
            },
        ),
        "utils.norm": allowing(call(utils.norm, obj=W), legal={"obj": any_tree}),
        "utils.scalar_mul": allowing(
            call(utils.scalar_mul, obj=W, scalar=2.0),
            legal={"obj": any_tree, "scalar": numbers},
            skipped={"scalar": {"shape": "JAX broadcasts, or says why not"}},
        ),
        "utils.product": allowing(
            call(utils.product, iterable_object=(2, 3)),
            skipped={"iterable_object": {"*": "what can be multiplied, Python says"}},
        ),
        "utils.first_dim_is_size": allowing(
            call(utils.first_dim_is_size, size=4, args=(X, Y)),
            legal={"args": {"integers complex shape": "any array"}},
        ),
        "utils.default_batch_size_extractor": allowing(
            call(utils.default_batch_size_extractor, batch=BATCH),
            legal={"batch": {"integers complex tree shape inner_shape": "any tree"}},
        ),
        "utils.psd_inv": call(utils.psd_inv, matrix=matrix),
        **{f"utils.{name}": entry for name, entry in damped.items()},
        "utils.auto_scope_method": allowing(
            call(utils.auto_scope_method, method=loss_fn),
            legal={"method": {"function": "any function"}},
        ),
        "utils.in_pmap": allowing(
            call(utils.in_pmap, axis_name=None),
            legal={"axis_name": OPTIONAL | {"text": "not mapped"}},
        ),
        "utils.wrap_if_pmap": allowing(
            call(utils.wrap_if_pmap, p_func=loss_fn),
            legal={"p_func": {"function": "any function"}},
        ),
        **{f"utils.{name}": entry for name, entry in mapped.items()},
        "utils.replicate_all_local_devices": allowing(
            call(utils.replicate_all_local_devices, obj=W, axis_name=None),
            legal={"obj": any_tree, **named},
        ),
        "utils.broadcast_all_local_devices": allowing(
            call(utils.broadcast_all_local_devices, obj=spread, axis_name=None),
            legal={
                "obj": {
                    "none": "a tree without leaves",
                    "integers complex": "of any type",
                },
                **named,
            },
        ),
        "utils.make_different_rng_key_on_all_devices": call(
            utils.make_different_rng_key_on_all_devices, rng=KEY
        ),
        "utils.p_split": call(utils.p_split, key=keys),
        "utils.p_split_num": call(utils.p_split_num, key=keys, num=2),
        "utils.get_first": allowing(
            call(utils.get_first, obj=spread),
            skipped={"obj": {"*": "what has no axis of devices stays as it is"}},
        ),
    }
