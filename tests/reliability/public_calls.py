"""A valid call of every public function, and which wrong values its arguments may get.

`test_public_signatures` calls each with every wrong value for every argument, and wants
an error that names the argument, what is expected and what came. What is legal after
all, or shows an error of the user's own function, is declared here with the reason.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import kfac_jax
from kfac_jax import distributions, initializers, linalg, losses

Reasons = Mapping[str, Mapping[str, str]]
"""By argument: names of wrong values, separated by spaces, and a reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A valid call.

    Attributes:
      function: what is called.
      arguments: by name; a tuple for `*args`.
      legal: what is no mistake. It must not raise.
      own: arguments of which errors of the user's own function tell, and why.
      skipped: what is not tried.
      words: how errors call an argument, where not by its name.
      typos: keywords that may be misspelt: the function takes any.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    legal: Reasons = dataclasses.field(default_factory=dict)
    own: Mapping[str, str] = dataclasses.field(default_factory=dict)
    skipped: Reasons = dataclasses.field(default_factory=dict)
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)
    typos: Mapping[str, str] = dataclasses.field(default_factory=dict)


# What is legal, and why.
OPTIONAL = {"none": "it can be left out"}
NUMBER = {"fraction": "a number"}
SIGNED = {"fraction negative": "a number of any sign"}
NAN = {"nan": "not finite counts as 1"}
ANY_NUMBER = {"fraction negative nan bool integers": "any number, or NaN where unknown"}
SCHEDULE = {"fraction": "a number", "function": "a schedule of the step"}
FLAG = {"bool": "a bool"}
INTEGERS = {"integers": "JAX promotes them"}
STATES = {
    "integers complex inner_text inner_shape": "leaves of states are another test's"
}
OF_LOSS = "what the loss function cannot do with it, it says itself"


def call(function: Callable[..., Any], _: Any = None, /, **arguments: Any) -> Call:
    """A call of which all wrong values are refused."""
    return Call(function=function, arguments=arguments)


def allowing(entry: Call, **rest: Any) -> Call:
    """That call, with what it may get."""
    return dataclasses.replace(entry, **rest)


# ------------------------------------------------------------------------- one problem

W = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
X, Y = jnp.ones((4, 3)), jnp.zeros((4, 2))
KEY = jax.random.key(0)
LOGITS, LABELS, ONE_HOT = jnp.ones((4, 3)), jnp.zeros(4, int), jnp.eye(4, 3)
MATRIX = 2.0 * jnp.eye(3)


def loss_fn(params, x, y):
    z = x @ params["w"] + params["b"][None]
    return losses.squared_error(z, y).sum(-1).mean()


def logcosh(output, target):
    return jnp.log(jnp.cosh(output - target)).sum()


@functools.cache
def plan() -> Any:
    return kfac_jax.make_curvature(loss_fn, W, X, Y)


@functools.cache
def rows_plan() -> Any:
    space = kfac_jax.SampleSpace()
    return kfac_jax.make_curvature(loss_fn, W, X, Y, structure=space)


@functools.cache
def inputs_plan() -> Any:
    return kfac_jax.make_curvature(loss_fn, W, X, Y, estimation_mode="inputs")


@functools.cache
def gathered() -> Any:
    return plan().value_grad_and_statistics(W, X, Y, rng=KEY)


@functools.cache
def operator() -> Any:
    factors = plan().init_factors(W)
    factors = plan().update_factors(factors, gathered()[2], 1)
    return plan().approximation(factors)


def mesh() -> Any:
    kinds = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((1,), ("data",), axis_types=kinds, devices=jax.devices()[:1])


# -------------------------------------------------------------------- plans and updates


def plans() -> dict[str, Call]:
    statistics = gathered()[2]
    factors = plan().init_factors(W)
    batch = {"params": W, "args": (X, Y)}
    of_loss = {"own": {"args": OF_LOSS}, "legal": {"args": INTEGERS}}
    sampled = {
        "own": {"args": OF_LOSS},
        "legal": {"args": INTEGERS, "factors": OPTIONAL},
    }
    make = call(
        kfac_jax.make_curvature,
        loss_fn=loss_fn,
        **batch,
        has_aux=False,
        estimation_mode="fisher_gradients",
        blocks=None,
        structure=kfac_jax.BlockDiagonal(),
        weight_sharing="expand",
        on_unmatched="warn",
        on_rest="warn",
        num_samples=1,
        statistics_fraction=1.0,
        l2=0.0,
        batch_argnums=(0,),
        independent_cases=False,
        factor_dtype=jnp.bfloat16,
    )
    operators = {
        "matvec": call(operator().matvec, v=W),
        "solve": allowing(
            call(operator().solve, v=W, damping=0.1, damping_mode="factored"),
            legal={"damping": NUMBER},
        ),
        "power": allowing(
            call(
                operator().power, v=W, exponent=-0.5, damping=0.1, damping_mode="exact"
            ),
            legal={"damping": NUMBER, "exponent": SIGNED},
        ),
        "logdet": allowing(
            call(operator().logdet, damping=0.1, damping_mode="exact"),
            legal={"damping": NUMBER},
        ),
        "sample": allowing(
            call(operator().sample, key=KEY, damping=0.1, damping_mode="exact"),
            legal={"damping": NUMBER},
        ),
        "to_dense": call(operator().to_dense),
        "diagonal": call(operator().diagonal),
        "trace": call(operator().trace),
        "eigenvalues": call(operator().eigenvalues),
    }
    return {
        "make_curvature": allowing(
            make,
            own={"params": OF_LOSS, "args": OF_LOSS},
            legal={
                "args": INTEGERS,
                "blocks": OPTIONAL,
                "batch_argnums": OPTIONAL,
                "independent_cases": FLAG,
                "factor_dtype": OPTIONAL,
            },
            skipped={
                "loss_fn": {"function": "what it must return: test_bad_input"},
                "l2": {"fraction": "then the loss must include it: test_bad_input"},
            },
        ),
        "Curvature.value_and_grad": allowing(
            call(plan().value_and_grad, **batch), **of_loss
        ),
        "Curvature.value_grad_and_statistics": allowing(
            call(plan().value_grad_and_statistics, **batch, rng=KEY, factors=factors),
            **sampled,
        ),
        "Curvature.value_and_statistics": allowing(
            call(plan().value_and_statistics, **batch, rng=KEY, factors=factors),
            **sampled,
        ),
        "Curvature.gram": allowing(
            call(rows_plan().gram, **batch, rng=KEY),
            own={"args": OF_LOSS},
            legal={"args": INTEGERS},
        ),
        "Curvature.at": allowing(
            call(plan().at, **batch, rng=KEY),
            own={"args": OF_LOSS},
            legal={"args": INTEGERS},
        ),
        "Curvature.zero_statistics": call(plan().zero_statistics, params=W),
        "Curvature.init_factors": call(plan().init_factors, params=W),
        "Curvature.report": call(plan().report),
        "Curvature.matvec": allowing(
            call(plan().matvec, **batch, v=W, matrix="fisher"), **of_loss
        ),
        "Curvature.quadratic_form": allowing(
            call(plan().quadratic_form, **batch, vectors=[W, W]), **of_loss
        ),
        "Curvature.update_factors": call(
            plan().update_factors,
            factors=factors,
            statistics=statistics,
            step=1,
            decay=0.95,
        ),
        "Curvature.approximation": call(plan().approximation, factors=factors),
        "Curvature.renew_factors": call(plan().renew_factors, factors=factors),
        **{f"Approximation.{k}": v for k, v in operators.items()},
    }


def transformations() -> dict[str, Call]:
    value, grads, statistics = gathered()
    tx = kfac_jax.kfac(plan(), kfac_jax.QuadraticModel())
    scale = kfac_jax.scale_by_kfac(plan())
    average = kfac_jax.average_iterates()
    schedule = {"function": "a schedule of the step"}
    common = {
        "damping": SCHEDULE,
        "decay": schedule,
        "inverse_every": schedule,
        "devices": OPTIONAL,
    }
    update = {"updates": grads, "params": W, "statistics": statistics, "value": value}
    numbers = {"fraction negative nan integers": "a loss, or NaN where it is not known"}
    others = {
        "value": "optax hands one transformation what is for others",
        "args": "optax hands one transformation what is for others",
    }
    return {
        "kfac": allowing(
            call(
                kfac_jax.kfac,
                curvature=plan(),
                learning_rate=0.1,
                momentum=0.9,
                damping=1e-3,
                norm_constraint="auto",
                decay=0.95,
                inverse_every=20,
                factored_damping=None,
                devices=None,
            ),
            legal={
                "learning_rate": SCHEDULE,
                "momentum": OPTIONAL | schedule,
                "norm_constraint": OPTIONAL | SCHEDULE,
                "factored_damping": OPTIONAL,
                **common,
            },
        ),
        "kfac().init": call(tx.init, params=W),
        "kfac().update": allowing(
            call(tx.update, **update, state=tx.init(W), args=(X, Y)),
            legal={"value": numbers, "args": INTEGERS},
            own={"args": OF_LOSS},
            skipped={
                "state": STATES,
                "args": {"list": "it is too short for the loss function"},
            },
            words={"updates": "grads"},
        ),
        "scale_by_kfac": allowing(
            call(
                kfac_jax.scale_by_kfac,
                curvature=plan(),
                damping=1e-3,
                decay=0.95,
                inverse_every=20,
                devices=None,
            ),
            legal=common,
        ),
        "scale_by_inputs": allowing(
            call(
                kfac_jax.scale_by_inputs,
                curvature=inputs_plan(),
                power=-0.5,
                damping=1e-3,
                decay=0.95,
                inverse_every=20,
                devices=None,
            ),
            legal=common,
        ),
        "muon_dimension_numbers": call(
            kfac_jax.muon_dimension_numbers, curvature=plan(), kinds=("dense", "conv")
        ),
        "scale_by_kfac().init": call(scale.init, params=W),
        "scale_by_kfac().update": allowing(
            call(scale.update, **update, state=scale.init(W)),
            legal={"value": numbers | OPTIONAL},
            skipped={"state": STATES, "params": {"*": "it does not use them"}},
            words={"updates": "grads"},
            typos=others | {"params": "it does not use them"},
        ),
        "make_step": allowing(
            call(
                kfac_jax.make_step,
                curvature=plan(),
                tx=tx,
                statistics_every=1,
                devices=None,
            ),
            legal={"devices": OPTIONAL, "statistics_every": schedule},
        ),
        "health": allowing(
            call(kfac_jax.health, state=tx.init(W)), skipped={"state": STATES}
        ),
        "multi_steps": call(kfac_jax.multi_steps, curvature=plan(), tx=tx, every=2),
        "natural_gradient": allowing(
            call(
                kfac_jax.natural_gradient,
                curvature=rows_plan(),
                learning_rate=0.1,
                damping=1e-3,
                momentum=kfac_jax.Spring(0.9),
                norm_constraint=1e-2,
                devices=None,
            ),
            legal={
                "learning_rate": SCHEDULE,
                "damping": SCHEDULE,
                "norm_constraint": SCHEDULE | OPTIONAL,
                "devices": OPTIONAL,
            },
        ),
        "graft": call(kfac_jax.graft, direction=scale, magnitude=average),
        "average_iterates": allowing(
            call(kfac_jax.average_iterates, decay=0.99, start=1),
            legal={"start": OPTIONAL, "decay": schedule},
        ),
        "average_iterates().init": allowing(
            call(average.init, params=W),
            legal={
                "params": {
                    "none": "a tree without leaves",
                    "negative nan fraction list tree shape inner_shape": "any tree",
                }
            },
        ),
        "average_iterates().update": allowing(
            call(average.update, updates=grads, state=average.init(W), params=W),
            legal={"updates": INTEGERS},
            skipped={"state": STATES},
        ),
    }


def devices() -> dict[str, Call]:
    over = kfac_jax.OverMesh(mesh())
    state = kfac_jax.kfac(plan()).init(W)
    rows = kfac_jax.OverMesh(mesh(), state_axes="data")
    return {
        "OverAxis": allowing(
            call(kfac_jax.OverAxis, axis="batch", state_axes=()),
            legal={"axis": {"text": "any name"}},
        ),
        "OverMesh": call(kfac_jax.OverMesh, mesh=mesh(), axes=("data",), state_axes=()),
        "sharing_report": call(
            kfac_jax.sharing_report,
            curvature=plan(),
            devices=kfac_jax.OverAxis("batch"),
            axis_sizes={"batch": 8},
        ),
        "spread_state": allowing(
            call(
                kfac_jax.spread_state,
                curvature=plan(),
                state=state,
                devices=over,
            ),
            legal={"devices": {"none": "one device"}},
            skipped={"state": STATES},
        ),
        "whole_state": allowing(
            call(
                kfac_jax.whole_state,
                curvature=plan(),
                state=kfac_jax.spread_state(plan(), state, rows),
                devices=rows,
            ),
            legal={"devices": OPTIONAL},
            skipped={"state": STATES},
        ),
        "state_specs": allowing(
            call(kfac_jax.state_specs, devices=over),
            legal={"devices": OPTIONAL},
        ),
    }


# ------------------------------------------------------------------------------ losses


def registrations() -> dict[str, Call]:
    mask = {"none": "all cases count", "fraction bool": "one number for a case"}
    mask |= {"integers": "0 and 1"}
    weight = {"fraction bool": "a number", "integers": "a number"}
    of_cases = {"targets": OPTIONAL, "weight": weight}
    kept = {name: "it is kept as metadata" for name in ("y", "x", "w", "b")}
    any_place = {"negative nan fraction shape": "where it goes, the layout tells"}
    broadcast = {"negative nan fraction": "it broadcasts"}
    classes = allowing(
        call(
            kfac_jax.register_softmax_cross_entropy_loss,
            logits=LOGITS,
            targets=LABELS,
            mask=jnp.ones(4),
            weight=1.0,
        ),
        legal={**of_cases, "mask": mask},
        words={"logits": "(logits|targets)"},
    )
    bits = allowing(
        call(
            kfac_jax.register_sigmoid_cross_entropy_loss,
            logits=LOGITS,
            targets=LOGITS,
            mask=jnp.ones(4),
            weight=1.0,
        ),
        legal={"weight": weight, "targets": OPTIONAL | INTEGERS, "mask": mask},
        words={"logits": "(logits|output)"},
    )
    real = {"weight": weight, "targets": OPTIONAL | INTEGERS}
    return {
        "register_dense": allowing(
            call(
                kfac_jax.register_dense,
                y=X @ W["w"],
                x=X,
                w=W["w"],
                b=W["b"],
            ),
            legal={"b": OPTIONAL, "x": INTEGERS},
            typos=kept,
        ),
        "register_conv2d": allowing(
            call(
                kfac_jax.register_conv2d,
                y=jnp.ones((1, 5, 5, 2)),
                x=jnp.ones((1, 5, 5, 1)),
                w=jnp.ones((3, 3, 1, 2)),
                b=jnp.ones(2),
            ),
            legal={
                "b": OPTIONAL | any_place,
                "x": INTEGERS | {"shape": "rank four"},
                "y": {"shape": "rank four"},
                "w": {"shape": "rank four"},
            },
            typos=kept,
        ),
        "register_scale_and_shift": allowing(
            call(
                kfac_jax.register_scale_and_shift,
                y=X,
                x=X,
                scale=jnp.ones(3),
                shift=jnp.ones(3),
            ),
            legal={
                "x": INTEGERS | broadcast | {"bool": "it broadcasts"},
                "scale": OPTIONAL | broadcast,
                "shift": OPTIONAL | broadcast,
            },
            typos={**kept, "scale": kept["x"], "shift": kept["x"]},
        ),
        "register_generic": allowing(
            call(kfac_jax.register_generic, w=jnp.ones(3)),
            legal={"w": {"negative nan fraction shape": "a parameter of any shape"}},
        ),
        "register_loss": allowing(
            call(
                kfac_jax.register_loss,
                distribution=distributions.Bernoulli(),
                z=LOGITS,
                data=(LOGITS,),
                mask=jnp.ones(4),
                weight=1.0,
            ),
            legal={
                "mask": mask,
                "weight": weight,
                "data": {"integers complex": "what data are, the distribution says"},
            },
        ),
        "register_softmax_cross_entropy_loss": classes,
        "register_categorical_predictive_distribution": classes,
        "register_sigmoid_cross_entropy_loss": bits,
        "register_multi_bernoulli_predictive_distribution": bits,
        "register_normal_predictive_distribution": allowing(
            call(
                kfac_jax.register_normal_predictive_distribution,
                mean=LOGITS,
                targets=LOGITS,
                variance=0.5,
                weight=1.0,
                mask=jnp.ones(4),
            ),
            legal={**real, "mask": mask, "variance": {"fraction bool": "a number"}},
            words={"mean": "(mean|output)"},
        ),
        "register_squared_error_loss": allowing(
            call(
                kfac_jax.register_squared_error_loss,
                prediction=LOGITS,
                targets=LOGITS,
                weight=1.0,
                mask=jnp.ones(4),
            ),
            legal={**real, "mask": mask},
            words={"prediction": "(prediction|output)"},
        ),
    }


def loss_functions() -> dict[str, Call]:
    weight = {"weight": {"fraction bool integers": "a number"}}
    weight |= {"mask": {"none": "all cases count", "integers": "0 and 1"}}
    where = {"none": "all classes take part", "bool": "it broadcasts"}

    return {
        "losses.softmax_cross_entropy_with_integer_labels": allowing(
            call(
                losses.softmax_cross_entropy_with_integer_labels,
                logits=LOGITS,
                labels=LABELS,
                axis=-1,
                where=jnp.ones((4, 3), bool),
                mask=jnp.ones(4),
                weight=1.0,
            ),
            legal={"where": where, **weight},
        ),
        "losses.softmax_cross_entropy": allowing(
            call(
                losses.softmax_cross_entropy,
                logits=LOGITS,
                labels=ONE_HOT,
                axis=-1,
                where=jnp.ones((4, 3), bool),
                mask=jnp.ones(4),
                weight=1.0,
            ),
            legal={"where": where, "labels": INTEGERS, **weight},
        ),
        "losses.sigmoid_binary_cross_entropy": allowing(
            call(
                losses.sigmoid_binary_cross_entropy,
                logits=LOGITS,
                labels=LOGITS,
                mask=jnp.ones(4),
                weight=1.0,
            ),
            legal={"labels": INTEGERS, **weight},
            words={"logits": "(logits|output)", "labels": "(labels|targets)"},
        ),
        "losses.squared_error": allowing(
            call(
                losses.squared_error,
                predictions=LOGITS,
                targets=LOGITS,
                mask=jnp.ones(4),
                weight=1.0,
            ),
            legal={"targets": OPTIONAL | INTEGERS, **weight},
            words={"predictions": "(predictions|output)"},
        ),
        "losses.normal_negative_log_likelihood": allowing(
            call(
                losses.normal_negative_log_likelihood,
                mean=LOGITS,
                log_variance=LOGITS,
                targets=LOGITS,
                mask=jnp.ones(4),
                weight=1.0,
            ),
            legal={"targets": INTEGERS, **weight},
        ),
        "losses.convex": allowing(
            call(
                losses.convex,
                per_case_loss=logcosh,
                outputs=LOGITS,
                data=(LOGITS,),
                mask=jnp.ones(4),
                weight=1.0,
            ),
            legal={
                "per_case_loss": {"function": "any function"},
                "data": {"integers complex": "what data are, the function says"},
                **weight,
            },
        ),
        "distributions.Bernoulli": call(distributions.Bernoulli),
        "distributions.Categorical": call(distributions.Categorical),
        "distributions.NormalWithVariance": call(distributions.NormalWithVariance),
        "distributions.Normal": allowing(
            call(distributions.Normal, variance=0.5), legal={"variance": NUMBER}
        ),
        "distributions.Convex": allowing(
            call(distributions.Convex, per_case_loss=logcosh),
            legal={"per_case_loss": {"function": "any function"}},
        ),
    }


# ---------------------------------------------------------------------- small objects


def rules() -> dict[str, Call]:
    shapes = ANY_NUMBER | {"shape": "one of each, of any shape"}
    three = jnp.ones(3)
    return {
        "LevenbergMarquardt": allowing(
            call(
                kfac_jax.LevenbergMarquardt,
                initial=150.0,
                every=5,
                factor=0.5,
                minimum=0.0,
                relative_minimum=1e-3,
                maximum=1e9,
                relative_maximum=10.0,
                lower=0.25,
                upper=0.75,
                trusted_factor=0.25,
                trusted_rate=0.2,
            ),
            legal={
                "initial": NUMBER,
                "factor": OPTIONAL,
                "minimum": NUMBER,
                "relative_minimum": NUMBER,
                "maximum": NUMBER,
                "relative_maximum": NUMBER,
                "upper": NUMBER,
                "trusted_factor": OPTIONAL,
                "trusted_rate": NUMBER,
            },
        ),
        "LevenbergMarquardt.update": allowing(
            call(
                kfac_jax.LevenbergMarquardt().update,
                damping=1.0,
                rho=1.0,
                curvature=1.0,
                learning_rate=0.3,
            ),
            legal=dict.fromkeys(
                ("damping", "rho", "curvature", "learning_rate"), shapes
            ),
        ),
        "QuadraticModel": allowing(
            call(
                kfac_jax.QuadraticModel,
                fraction=1.0,
                largest_momentum=0.95,
                longest=2.0,
            ),
            legal={
                "largest_momentum": OPTIONAL | NUMBER,
                "longest": OPTIONAL | NUMBER,
            },
        ),
        "QuadraticModel.solve": allowing(
            call(
                kfac_jax.QuadraticModel().solve,
                matrix=jnp.eye(2),
                slope=jnp.ones(2),
                momentum=jnp.asarray(0.9),
            ),
            legal={
                "momentum": {
                    "none": "it is chosen",
                    "fraction negative nan integers": "a number",
                }
            },
        ),
        "Refine": allowing(
            call(kfac_jax.Refine, steps=4, fraction=1.0, longest=2.0),
            legal={"longest": OPTIONAL | NUMBER},
        ),
        "RefreshSchedule": allowing(
            call(
                kfac_jax.RefreshSchedule,
                every=20,
                shares=1,
                stale=False,
                phase=0,
                warm_up=3,
            ),
            legal={"stale": FLAG, "every": {"function": "a schedule of the step"}},
        ),
        "RefreshSchedule.turns": call(kfac_jax.RefreshSchedule().turns, step=1),
        "SeparateDamping": allowing(
            call(
                kfac_jax.SeparateDamping,
                initial=1.0,
                every=20,
                factor=0.5,
                minimum=0.0,
                maximum=1e9,
            ),
            legal={
                "initial": OPTIONAL | NUMBER,
                "factor": OPTIONAL,
                "minimum": NUMBER,
                "maximum": NUMBER,
            },
        ),
        "SeparateDamping.candidates": allowing(
            call(kfac_jax.SeparateDamping().candidates, gamma=1.0),
            legal={"gamma": shapes},
        ),
        "SeparateDamping.select": allowing(
            call(kfac_jax.SeparateDamping().select, gammas=three, changes=three),
            legal={"gammas": INTEGERS, "changes": INTEGERS},
        ),
        "ExponentialBatchSize": allowing(
            call(
                kfac_jax.ExponentialBatchSize,
                initial=10,
                final=20,
                steps=5,
                distinct=3,
                multiple_of=1,
            ),
            legal={"distinct": OPTIONAL},
        ),
        "ExponentialBatchSize.__call__": allowing(
            call(kfac_jax.ExponentialBatchSize(10, 20).__call__, step=1),
            legal={"step": {"bool": "Python has it for an integer"}},
        ),
        "BlockDiagonal": call(kfac_jax.BlockDiagonal),
        "SampleSpace": allowing(
            call(kfac_jax.SampleSpace, centered=True), legal={"centered": FLAG}
        ),
        "Spring": call(kfac_jax.Spring, decay=0.9),
        "BlockTridiagonal": call(kfac_jax.BlockTridiagonal),
        "initializers.sparse_normal": allowing(
            call(
                initializers.sparse_normal,
                incoming=15,
                stddev=1.0,
                in_axis=-2,
                out_axis=-1,
                batch_axis=(),
                dtype=jnp.float32,
            ),
            legal={
                "stddev": NUMBER,
                "dtype": OPTIONAL,
            },
        ),
        "initializers.sparse_normal()": allowing(
            call(
                initializers.sparse_normal(),
                key=KEY,
                shape=(4, 3),
                dtype=jnp.float32,
            ),
            legal={"dtype": OPTIONAL},
        ),
    }


def blocks() -> dict[str, Call]:
    of_all = {"max_factor_dim": 8192}
    sharing, pi = {"weight_sharing": "expand"}, {"pi": "trace", "exact_scalars": False}
    limit = {"max_factor_dim": {"none": "no limit"}}
    flags = {"gradient_products": FLAG, "exact_scalars": FLAG}
    return {
        "blocks.Diagonal": call(kfac_jax.blocks.Diagonal),
        "blocks.Full": call(kfac_jax.blocks.Full),
        "blocks.Identity": call(kfac_jax.blocks.Identity),
        "blocks.Kronecker": allowing(
            call(
                kfac_jax.blocks.Kronecker,
                **(of_all | sharing | pi),
                gradient_products=False,
                fit="kl",
            ),
            legal=limit | flags,
        ),
        "blocks.KroneckerSum": allowing(
            call(kfac_jax.blocks.KroneckerSum, **(of_all | sharing), pi="trace"),
            legal=limit,
        ),
        "blocks.InputOnly": allowing(
            call(kfac_jax.blocks.InputOnly, **(of_all | sharing)), legal=limit
        ),
        "blocks.TNT": allowing(
            call(kfac_jax.blocks.TNT, **(of_all | pi)),
            legal=limit | {"exact_scalars": FLAG},
        ),
        "blocks.Eigen": allowing(
            call(kfac_jax.blocks.Eigen, **(of_all | sharing), warm_start=False),
            legal={**limit, "warm_start": FLAG},
        ),
    }


def linear_algebra() -> dict[str, Call]:
    pair = (MATRIX, jnp.zeros(()))
    applied = {"function": "what it returns is its own affair"}
    empty = {"none": "one after the other"}
    return {
        "linalg.conditionals": allowing(
            call(linalg.conditionals, parts=[(MATRIX, MATRIX, MATRIX)], each=None),
            legal={"each": empty},
            skipped={"each": applied},
        ),
        "linalg.diagonal": call(linalg.diagonal, x=MATRIX),
        "linalg.eigh": call(linalg.eigh, x=MATRIX),
        "linalg.finite_diagonals": allowing(
            call(linalg.finite_diagonals, groups=[[MATRIX]]),
            legal={"groups": {"inner_shape": "several matrices in one array"}},
        ),
        "linalg.gram": allowing(
            call(linalg.gram, rows=MATRIX, dtype=jnp.float64),
            legal={
                "rows": INTEGERS | {"shape": "of any rank from 2"},
            },
        ),
        "linalg.inverse": call(linalg.inverse, x=MATRIX),
        "linalg.inverse_many": allowing(
            call(linalg.inverse_many, shifted=[pair], apply=None),
            legal={"apply": empty},
            skipped={"apply": applied},
        ),
        "linalg.inverse_root_many": allowing(
            call(linalg.inverse_root_many, shifted=[pair], apply=None),
            legal={"apply": empty},
            skipped={"apply": applied},
        ),
        "linalg.mean_rows": call(linalg.mean_rows, rows=[MATRIX, MATRIX]),
        "linalg.pseudo_inverse": call(linalg.pseudo_inverse, x=MATRIX),
        "linalg.symmetrize": call(linalg.symmetrize, x=MATRIX),
        "linalg.trace_pi": allowing(
            call(linalg.trace_pi, mean_a=jnp.asarray(4.0), mean_g=jnp.asarray(1.0)),
            legal={"mean_a": SIGNED | NAN, "mean_g": SIGNED | NAN},
        ),
        "linalg.turned_basis": call(linalg.turned_basis, x=MATRIX, basis=jnp.eye(3)),
    }
