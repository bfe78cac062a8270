"""Wrong values for methods of estimators, as `test_public_signatures` tries them."""

import pytest

import kfac_jax
from tests.reliability import test_public_signatures as signatures
from tests.reliability.public_calls import (
    FLAG,
    INTEGERS,
    KEY,
    NUMBER,
    OF_LOSS,
    OPTIONAL,
    SIGNED,
    STATES,
    W,
    Y,
    allowing,
    call,
)
from tests.reliability.public_calls_compat import (
    ANYTHING,
    BATCH,
    defaults,
    estimator,
    of_batch,
    preconditioner,
)

ARGUMENTS = {"func_args": (W, BATCH)}
FUNC_ARGS = {"func_args": {"list": "it is too short for the function"}}
OF_ARGUMENTS = {
    "own": {"func_args": OF_LOSS},
    "words": {
        "func_args": "(func_args|params|parameters)",
        "parameter_structured_vector": "(v|vector)",
    },
}
POWERS = OPTIONAL | SIGNED | {"nan list": "a power, or several"}
A_NUMBER = SIGNED | {"nan": "a number"}
OF_STATE = {"skipped": {"state": STATES}}


def implicit():
    exact = kfac_jax.ImplicitExactCurvature(of_batch)
    shapes = exact.get_loss_inner_vector_shapes_and_batch_size
    of_arguments = OF_ARGUMENTS | {"skipped": FUNC_ARGS}
    vectors = {"legal": {"loss_inner_vectors": INTEGERS}}
    for name in ("fisher", "ggn"):
        factor = getattr(exact, f"multiply_{name}_factor")
        transpose = getattr(exact, f"multiply_{name}_factor_transpose")
        entry = call(factor, **ARGUMENTS, loss_inner_vectors=(Y,))
        yield allowing(entry, **of_arguments, **vectors)
        entry = call(transpose, **ARGUMENTS, parameter_structured_vector=W)
        yield allowing(entry, **_known(of_arguments, entry))
    yield _only(call(shapes, **ARGUMENTS, mode="fisher"), of_arguments)


def _known(options, entry):
    """The options without those of arguments that a call does not have."""
    return {
        part: {name: x for name, x in of.items() if name in entry.arguments}
        for part, of in options.items()
    }


def _only(entry, options):
    return allowing(entry, **_known(options, entry))


def explicit():
    made = kfac_jax.ExplicitExactCurvature(of_batch)
    state = made.init(KEY, (W, BATCH), -1)
    options = {
        "own": {"func_args": OF_LOSS},
        "words": OF_ARGUMENTS["words"],
        "skipped": FUNC_ARGS
        | {
            "state": STATES,
            **dict.fromkeys(
                "rng batch_size pmap_axis_name eigenvalues cache_eigenvalues "
                "exact_power exact_powers approx_powers".split(),
                ANYTHING,
            ),
        },
        "legal": {
            "identity_weight": NUMBER,
            "ema_old": A_NUMBER,
            "ema_new": A_NUMBER,
            "exact_powers_to_cache": POWERS,
            "approx_powers_to_cache": POWERS,
            "power": SIGNED,
            "use_cached": FLAG,
            **dict.fromkeys(
                ("estimation_mode", "norm_to_scale_identity_weight_per_block"),
                OPTIONAL,
            ),
        },
    }
    given = {
        "rng": KEY,
        **ARGUMENTS,
        "state": state,
        "ema_old": 0.95,
        "ema_new": 1.0,
        "identity_weight": 0.1,
        "batch_size": 4,
        "parameter_structured_vector": W,
        "power": -1,
        "use_cached": False,
        "eigenvalues": False,
    }
    for name in (
        "init sync update_cache update_curvature_matrix_estimate multiply_matpower "
        "to_dense_matrix to_diagonal_block_dense_matrix eigenvalues block_eigenvalues"
    ).split():
        method = getattr(made, name)
        arguments = defaults(method, **given)
        if name == "sync":
            arguments["pmap_axis_name"] = None
        entry = _only(call(method, **arguments), options)
        if name == "update_curvature_matrix_estimate":  # where it is not used
            skipped = {**entry.skipped, "identity_weight": ANYTHING}
            entry = allowing(entry, skipped=skipped)
        yield entry


def block_diagonal():
    made, state = estimator()
    for method in (made.eigenvalues, made.block_eigenvalues):
        entry = call(method, state=state, use_cached=False)
        yield allowing(entry, **OF_STATE, legal={"use_cached": FLAG})


def of_optax():
    made, state = preconditioner()
    yield allowing(
        call(
            made.maybe_update_estimator_curvature,
            state=state,
            **ARGUMENTS,
            rng=KEY,
            decay_old_ema=True,
            sync=True,
        ),
        own={"func_args": OF_LOSS},
        words={"func_args": "(func_args|params|parameters)"},
        skipped={"state": STATES} | FUNC_ARGS,
        legal={"decay_old_ema": FLAG, "sync": FLAG},
    )
    for name in (
        "maybe_update_inverse_cache should_update_estimator_curvature "
        "should_update_inverse_cache should_sync_estimate_curvature "
        "sync_estimator_state"
    ).split():
        yield allowing(call(getattr(made, name), state=state), **OF_STATE)


@pytest.mark.parametrize("entries", [implicit, explicit, block_diagonal, of_optax])
def test_wrong_values_are_refused_with_an_error_that_says_so(entries):
    found = []
    for entry in entries():
        signatures.run(entry, entry.arguments)
        name = entry.function.__name__
        found += [f"{name}: {problem}" for problem in signatures.problems(entry)]
    assert not found, "\n".join(found)
