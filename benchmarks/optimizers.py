"""The optimizers that `cost.py` measures: a step of each, and what is timed beside it.

K-FAC refreshes its inverses every `INVERSE_EVERY` steps, and the others likewise what
they invert or update: only with the same period can they be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from models import Model, plan
from published_names import IS_PUBLISHED

import kfac_jax

INVERSE_EVERY = 5  # T3 while timing; others follow from it
RATES = {"learning_rate": 1e-4, "momentum": 0.9, "damping": 1.0}
EIGHTH = {"statistics_fraction": 1 / 8}
WHOLE_PERIOD = 20
SHARES = 8

FIXED = {
    f"{name}_schedule": lambda _, value=value: value for name, value in RATES.items()
}
ADAPTIVE = {
    "use_adaptive_learning_rate": True,
    "use_adaptive_momentum": True,
    "use_adaptive_damping": True,
    "initial_damping": 10.0,
}

Step = Callable[[Any, Any, Any], Any]
"""From carry, key and the model's arguments to the next carry."""


class Program(NamedTuple):
    """A step, where it starts, and when it refreshes inverses."""

    step: Step
    carry: Any
    refreshes: Callable[[int], bool] = lambda count: False  # of the count from 1
    compiles_itself: bool = False
    advances: bool = True  # the step returns the next carry, and its own is donated
    plan_seconds: float | None = None


Build = Callable[[Model], Program]


class Case(NamedTuple):
    """What is measured under one name.

    Attributes:
        build: makes the optimizer's step.
        parts: what is timed beside it, in the same process.
        period: after how many steps the same work comes again.
        by_place: whether the steps at each place of the period are told apart, for the
            longest of them; else they are of two kinds, refreshing and ordinary.
    """

    build: Build
    parts: dict[str, Build] = {}  # noqa: RUF012 - is not written to
    period: int = INVERSE_EVERY
    by_place: bool = False


def gradient(model: Model) -> Program:
    """Loss and gradient: the unit."""

    def step(carry: Any, key: Any, args: Any) -> Any:
        return jax.value_and_grad(model.loss_fn)(carry, *args)

    return Program(step, model.params, advances=False)


def with_optax(
    tx: optax.GradientTransformation,
    model: Model,
    refreshes: Callable[[int], bool] = lambda count: False,
) -> Program:
    """An optimizer that takes gradients and nothing else."""

    def step(carry: Any, key: Any, args: Any) -> Any:
        params, state = carry
        grads = jax.grad(model.loss_fn)(params, *args)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Program(step, (model.params, tx.init(model.params)), refreshes)


def kfac(
    model: Model,
    *,
    rules: dict[str, Any] | None = None,
    schedule: Any = INVERSE_EVERY,
    gathers: bool = True,
    differentiates: bool = True,
    **options: Any,
) -> Program:
    """K-FAC, with fixed rates or rules. Statistics or gradients left out are zero."""
    start = time.perf_counter()
    curvature = plan(model, **options)
    plan_seconds = time.perf_counter() - start
    rates = rules or RATES | {"norm_constraint": None}
    tx = kfac_jax.kfac(curvature, inverse_every=schedule, **rates)

    def step(carry: Any, key: Any, args: Any) -> Any:
        params, state = carry
        statistics, value = curvature.zero_statistics(params), None
        if gathers:
            value, grads, statistics = curvature.value_grad_and_statistics(
                params, *args, rng=key
            )
        elif differentiates:
            value, grads = curvature.value_and_grad(params, *args)
        else:
            grads = params
        measured = {"value": value, "args": args} if rules else {}
        updates, state = tx.update(
            grads, state, params, statistics=statistics, **measured
        )
        return optax.apply_updates(params, updates), state

    return Program(
        step,
        (model.params, tx.init(model.params)),
        lambda k: gathers and (k <= 3 or k % INVERSE_EVERY == 0),
        plan_seconds=plan_seconds,
    )


def _adaptive(model: Model) -> Program:
    """All of the paper's rules: T1, T2, T3 = 5, 20, 20, tau_1 = 1/8, tau_2 = 1/4."""
    rules = {
        "learning_rate": kfac_jax.QuadraticModel(fraction=1 / 4),
        "momentum": None,
        "damping": kfac_jax.LevenbergMarquardt(150.0),
        "factored_damping": kfac_jax.SeparateDamping(every=WHOLE_PERIOD),
    }
    return kfac(model, rules=rules, schedule=WHOLE_PERIOD, **EIGHTH)


def _in_shares(model: Model, shares: int) -> Program:
    schedule = kfac_jax.RefreshSchedule(WHOLE_PERIOD, shares=shares)
    return kfac(model, schedule=schedule, **EIGHTH)


def with_optimizer_class(model: Model, options: dict[str, Any]) -> Program:
    """`kfac_jax.Optimizer`, of the published release or of this package."""
    loss_fn = lambda params, batch: model.loss_fn(params, *batch)  # noqa: E731
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss_fn),
        l2_reg=model.l2,
        inverse_update_period=INVERSE_EVERY,
        estimation_mode=model.estimation_mode,
        num_burnin_steps=0,
        **options,
    )

    def step(carry: Any, key: Any, args: Any) -> Any:
        return optimizer.step(*carry, key, batch=args)[:2]

    state = optimizer.init(model.params, jax.random.key(0), model.args)
    start = model.params, state
    return Program(step, start, lambda k: k % INVERSE_EVERY == 1, compiles_itself=True)


def shampoo(model: Model) -> Program:
    """Distributed Shampoo, with the block size that it calls its default."""
    from optax_shampoo.distributed_shampoo import distributed_shampoo

    tx = distributed_shampoo(
        RATES["learning_rate"], 128, preconditioning_compute_steps=INVERSE_EVERY
    )
    return with_optax(tx, model, lambda k: k % INVERSE_EVERY == 1)


def psgd(model: Model) -> Program:
    """PSGD with Kronecker factors, which it updates with a probability: here 0 or 1."""
    from psgd_jax.kron import kron

    def probability(count: Any) -> Any:
        return jnp.where(count % INVERSE_EVERY == 0, 1.0, 0.0)

    tx = kron(
        RATES["learning_rate"], preconditioner_update_probability=probability
    )  # counts from 1
    return with_optax(tx, model, lambda k: k % INVERSE_EVERY == 0)


WITHOUT = {
    "without statistics": partial(kfac, gathers=False),
    "update alone": partial(kfac, gathers=False, differentiates=False),
}
CLASS = {
    "": Case(partial(with_optimizer_class, options=FIXED)),
    "-adaptive": Case(partial(with_optimizer_class, options=ADAPTIVE)),
}

CASES: dict[str, Case] = {
    "gradient": Case(gradient),
    "adamw": Case(partial(with_optax, optax.adamw(1e-4))),
    "sgd": Case(partial(with_optax, optax.sgd(1e-4, 0.9, nesterov=True))),
    "kfac": Case(kfac, WITHOUT),
    "kfac-1/8": Case(partial(kfac, **EIGHTH)),
    "kfac-adaptive": Case(_adaptive, period=WHOLE_PERIOD, by_place=True),
    "kfac-staggered": Case(
        partial(_in_shares, shares=SHARES),
        {"all at once": partial(_in_shares, shares=1)},
        WHOLE_PERIOD,
        by_place=True,
    ),
    "shampoo": Case(shampoo),
    "psgd": Case(psgd),
} | {
    ("published" if IS_PUBLISHED else "front") + suffix: case
    for suffix, case in CLASS.items()
}
"""By name. `kfac_jax.Optimizer` is "published" where that release is installed."""
