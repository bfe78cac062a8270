"""Ways to train a network to solve an equation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from jax import Array
from pde_problems import Params, Problem

import kfac_jax

KEY = jax.random.key(0)


class Method(NamedTuple):
    """How a method starts and steps."""

    init: Callable[[Params], Any]
    step: Callable[..., tuple[Params, Any, Array]]
    """`(params, state, key, inside, edge) -> params, state, loss`."""

    resamples: bool = True  # whether each step has points of its own


def kfac(problem: Problem, params: Params, blocks: Any = None) -> Method:
    """K-FAC, of which nothing is chosen but blocks."""
    curvature = kfac_jax.make_curvature(
        problem.loss, params, *problem.points(KEY), blocks=blocks
    )
    tx = kfac_jax.kfac(curvature)
    return Method(tx.init, kfac_jax.make_step(curvature, tx))


def natural(problem: Problem, params: Params, momentum: Any) -> Method:
    """The exact natural gradient in the sample space, with an adaptive λ."""
    curvature = kfac_jax.make_curvature(
        problem.loss,
        params,
        *problem.points(KEY),
        structure=kfac_jax.SampleSpace(),
        estimation_mode="ggn_exact",
    )
    rule = kfac_jax.LevenbergMarquardt(1.0, every=1, factor=0.7)
    tx = kfac_jax.natural_gradient(curvature, kfac_jax.QuadraticModel(), rule, momentum)
    return Method(tx.init, kfac_jax.make_step(curvature, tx))


def adam(problem: Problem, params: Params, rate: float = 3e-3) -> Method:
    """Adam at a constant rate."""
    del params
    tx = optax.adam(rate)

    def step(
        params: Params, state: Any, key: Array, *points: Array
    ) -> tuple[Params, Any, Array]:
        del key
        loss, grads = jax.value_and_grad(problem.loss)(params, *points)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return Method(tx.init, step)


def lbfgs(problem: Problem, params: Params) -> Method:
    """L-BFGS with its line search, which needs the same points in each step."""
    del params
    tx = optax.lbfgs(memory_size=20)

    def step(
        params: Params, state: Any, key: Array, *points: Array
    ) -> tuple[Params, Any, Array]:
        del key

        def loss_fn(params: Params) -> Array:
            return problem.loss(params, *points)

        loss, grads = optax.value_and_grad_from_state(loss_fn)(params, state=state)
        updates, state = tx.update(
            grads, state, params, value=loss, grad=grads, value_fn=loss_fn
        )
        return optax.apply_updates(params, updates), state, loss

    return Method(tx.init, step, resamples=False)


METHODS: dict[str, Callable[[Problem, Params], Method]] = {
    "kfac": kfac,
    "kfac-sum": partial(kfac, blocks={"dense": kfac_jax.blocks.KroneckerSum()}),
    "natural": partial(natural, momentum=0.0),
    "spring": partial(natural, momentum=kfac_jax.Spring(0.9)),
    "adam": adam,
    "lbfgs": lbfgs,
}
