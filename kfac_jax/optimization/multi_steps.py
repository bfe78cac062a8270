"""Several micro-batches for one update, as an optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.curvature import Curvature
from kfac_jax.optimization.checks import check_plan, check_transformation
from kfac_jax.optimization.loss import loss_of
from kfac_jax.statistics.averages import Statistics, check_statistics


class MultiStepsState(NamedTuple):
    """The state of `multi_steps`."""

    micro_step: Array  # []: the micro-batches that have been gathered
    inner: Any  # the state of the transformation
    weight: Array  # []: sums over them: of their numbers of cases,
    grads: Any  # of gradients, in float32 or wider, and
    value: Array  # [], losses, times these numbers,
    statistics: Statistics  # and of statistics
    cases: Array  # [], of the last micro-batch with statistics; 0 before any


def multi_steps(
    curvature: Curvature, tx: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
    """Gathers several micro-batches, and updates once with all of them.

    `optax.MultiSteps` averages gradients, and hands on the other arguments of the last
    micro-batch alone. This averages gradients and losses, and adds up statistics::

        tx = kfac_jax.multi_steps(curvature, kfac_jax.kfac(curvature), every=4)
        step = kfac_jax.make_step(curvature, tx)

    Args:
      curvature: the plan.
      tx: `kfac(curvature, ...)`, `scale_by_kfac(curvature, ...)`, or an `optax.chain`
        or other wrapper with one of them in it.
      every: k, the number of micro-batches that make a batch.

    Returns:
      The transformation. Its updates are zero but for every k-th; `tx` then gets the
      mean gradient and loss over all cases, the sum of statistics, and the further
      arguments of the last micro-batch (`args`, on which the adaptive rules evaluate
      the loss). Statistics tell the number of cases: a micro-batch without them counts
      like the last one that had some.

    Raises:
      TypeError: if an argument is of the wrong type; by `update`, without statistics.
      ValueError: if k is no whole number of at least 1, or for gradients that stay
        products (`gradient_products`), which have no sum.

    >>> import jax, jax.numpy as jnp, kfac_jax
    >>> def loss_fn(w, x, y):
    ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
    >>> w, x, y = jnp.ones((3, 2)), jnp.eye(3), jnp.zeros((3, 2))
    >>> curvature = kfac_jax.make_curvature(loss_fn, w, x, y)
    >>> tx = kfac_jax.multi_steps(curvature, kfac_jax.kfac(curvature), every=2)
    >>> step = jax.jit(kfac_jax.make_step(curvature, tx))
    >>> first, state, _ = step(w, tx.init(w), jax.random.key(0), x, y)
    >>> second, state, _ = step(first, state, jax.random.key(1), x, y)
    >>> bool((first == w).all()), bool((second == first).all())
    (True, False)
    """
    check_plan(curvature)
    arguments.count("every (k)", every, 1)
    check_transformation(tx)
    if any(group.product_rows for group in curvature.groups):
        raise ValueError(
            "multi_steps adds up gradients, and those of gradient_products=True stay "
            "products of one micro-batch. Leave gradient_products out."
        )
    inner = optax.with_extra_args_support(tx)

    def empty(params: optax.Params, state: Any, cases: Array) -> MultiStepsState:
        zeros = lambda x: jnp.zeros_like(x, dtype=wide_dtype(x.dtype))  # noqa: E731
        return MultiStepsState(
            jnp.zeros((), jnp.int32),
            state,
            jnp.zeros((), jnp.float32),
            jax.tree.map(zeros, params),
            jnp.zeros((), float),
            curvature.zero_statistics(params),
            cases,
        )

    def init(params: optax.Params) -> MultiStepsState:
        return empty(params, inner.init(params), jnp.zeros((), jnp.float32))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        statistics: Statistics | None = None,
        value: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, MultiStepsState]:
        what = "the state of multi_steps, from init"
        arguments.instance("state", state, MultiStepsState, what)
        check_statistics(statistics)
        assert statistics is not None
        # a micro-batch without statistics counts like the last one that had some;
        # what came before any had counted as one case each
        known = statistics.weight > 0
        before = jnp.where(state.cases > 0, state.cases, 1.0)
        weight = jnp.where(known, statistics.weight, before)
        factor = jnp.where(known & (state.cases == 0), weight, 1.0)
        loss = jnp.zeros((), float) if value is None else loss_of(value)
        sums = MultiStepsState(
            state.micro_step + 1,
            state.inner,
            factor * state.weight + weight,
            jax.tree.map(
                lambda x, g: (
                    factor.astype(x.dtype) * x
                    + weight.astype(x.dtype) * g.astype(x.dtype)
                ),
                state.grads,
                updates,
            ),
            factor.astype(loss.dtype) * state.value + weight.astype(loss.dtype) * loss,
            jax.tree.map(jnp.add, state.statistics, statistics),
            jnp.where(known, statistics.weight, state.cases),
        )

        def go(sums: MultiStepsState) -> tuple[optax.Updates, MultiStepsState]:
            mean = lambda x: x / sums.weight.astype(x.dtype)  # noqa: E731
            given = {} if value is None else {"value": mean(sums.value)}
            grads = jax.tree.map(
                lambda x, g: mean(x).astype(g.dtype), sums.grads, updates
            )
            result, own = inner.update(
                grads,
                sums.inner,
                params,
                statistics=sums.statistics,
                **given,
                **extra,
            )
            return result, empty(updates, own, sums.cases)

        def wait(sums: MultiStepsState) -> tuple[optax.Updates, MultiStepsState]:
            return jax.tree.map(jnp.zeros_like, updates), sums

        return jax.lax.cond(sums.micro_step == every, go, wait, sums)

    return optax.GradientTransformationExtraArgs(init, update)
