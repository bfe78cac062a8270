"""Valid calls of what programs for the existing library use; see `public_calls`."""

import functools
import inspect

import jax
from public_calls import (
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

import kfac_jax

BATCH = (X, Y)
RATES = {"learning_rate": 0.1, "momentum": 0.9, "damping": 1e-3}


def of_batch(params, batch):
    return loss_fn(params, *batch)


def defaults(function, **given):
    """The arguments of a valid call: those given, and the defaults of others."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: given.get(p.name, p.default) for p in parameters}


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
        **{
            name: OPTIONAL | {"function": "a function"} for name in functions.split()
        },
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
    product = {
        "state": state,
        "parameter_structured_vector": W,
        "identity_weight": 0.1,
        "exact_power": False,
        "use_cached": False,
        "pmap_axis_name": None,
        "norm_to_scale_identity_weight_per_block": None,
    }
    multiply = {
        "legal": {
            "identity_weight": NUMBER,
            "exact_power": FLAG,
            "norm_to_scale_identity_weight_per_block": OPTIONAL,
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
            skipped={"rng": ANYTHING, "cache_eigenvalues": ANYTHING},
            legal={
                "exact_powers_to_cache": OPTIONAL
                | SIGNED
                | {"nan list": "a power, or several"},
                "approx_powers_to_cache": OPTIONAL
                | SIGNED
                | {"nan list": "a power, or several"},
                "func_args": INTEGERS,
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
            skipped={
                "state": STATES,
                "identity_weight": ANYTHING,
                "batch_size": ANYTHING,
                "pmap_axis_name": ANYTHING,
            },
            legal={
                "ema_old": SIGNED | {"nan": "a number"},
                "ema_new": SIGNED | {"nan": "a number"},
                "estimation_mode": OPTIONAL,
                "func_args": INTEGERS,
                "rng": {"none": "the default mode here needs none"},
            },
        ),
        "BlockDiagonalCurvature.sync": allowing(
            call(made.sync, state=state, pmap_axis_name=None),
            skipped={"state": STATES, "pmap_axis_name": ANYTHING},
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
                norm_to_scale_identity_weight_per_block=None,
            ),
            legal={
                "identity_weight": NUMBER,
                "approx_powers": OPTIONAL
                | SIGNED
                | {"nan list": "a power, or several"},
                "norm_to_scale_identity_weight_per_block": OPTIONAL,
            },
            skipped={
                "state": STATES,
                "exact_powers": ANYTHING,
                "eigenvalues": ANYTHING,
                "pmap_axis_name": ANYTHING,
            },
            words={"approx_powers": "powers"},
        ),
        "BlockDiagonalCurvature.multiply_matpower": allowing(
            call(made.multiply_matpower, **product, power=-1),
            **multiply | {"legal": {**multiply["legal"], "power": SIGNED}},
        ),
        "BlockDiagonalCurvature.multiply_inverse": allowing(
            call(made.multiply_inverse, **product), **multiply
        ),
        "BlockDiagonalCurvature.multiply": allowing(
            call(made.multiply, **product), **multiply
        ),
        "BlockDiagonalCurvature.to_dense_matrix": allowing(
            call(made.to_dense_matrix, state=state), **of_state
        ),
        "BlockDiagonalCurvature.to_diagonal_block_dense_matrix": allowing(
            call(made.to_diagonal_block_dense_matrix, state=state), **of_state
        ),
        "BlockDiagonalCurvature.undamped_diagonal": allowing(
            call(made.undamped_diagonal, state=state), **of_state
        ),
        "BlockDiagonalCurvature.approximation": allowing(
            call(made.approximation, state=state), **of_state
        ),
        "ImplicitExactCurvature": allowing(
            call(
                kfac_jax.ImplicitExactCurvature,
                **defaults(kfac_jax.ImplicitExactCurvature, func=of_batch),
            ),
            legal={"func": {"function": "any function"}},
            skipped={"batch_size_extractor": ANYTHING},
        ),
        **{
            f"ImplicitExactCurvature.{name}": allowing(
                call(
                    getattr(exact, name), **arguments, parameter_structured_vector=W
                ),
                own=own,
                legal={"func_args": INTEGERS},
                words={"parameter_structured_vector": r"v\b|vector"},
            )
            for name in ("multiply_fisher", "multiply_ggn", "multiply_hessian")
        },
        "OptaxPreconditioner": allowing(
            call(
                kfac_jax.OptaxPreconditioner,
                **defaults(
                    kfac_jax.OptaxPreconditioner, value_func=of_batch, damping=0.1
                ),
            ),
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
            skipped={"rng": ANYTHING},
            legal={"func_args": INTEGERS},
        ),
        "OptaxPreconditioner.maybe_update": allowing(
            call(precondition.maybe_update, state=of_optax, **arguments, rng=KEY),
            own=own,
            skipped={"state": STATES},
            legal={"func_args": INTEGERS},
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
