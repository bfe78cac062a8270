"""A training step as one function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._jaxpr import _compat
from kfac_jax._utils import arguments, schedules
from kfac_jax.curvature import Curvature
from kfac_jax.devices import OverAxis, Sharing, checked
from kfac_jax.operator.structures import SampleSpace
from kfac_jax.optimization.checks import check_plan, check_transformation
from kfac_jax.optimization.health import kfac_state
from kfac_jax.optimization.loss import loss_at, loss_of


def make_step(
    curvature: Curvature,
    tx: optax.GradientTransformation,
    *,
    statistics_every: int | optax.Schedule = 1,
    devices: Sharing | None = None,
) -> Callable[..., tuple[optax.Params, Any, Any]]:
    """A training step: value, gradient and statistics, update, new parameters.

    It is pure: stage it by `jax.jit`, scan over it, map it over seeds. It makes three
    calls, which a program of its own may make instead::

        value, grads, statistics = curvature.value_grad_and_statistics(
            params, *args, rng=key, factors=factors)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=args)
        params = optax.apply_updates(params, updates)

    with the `factors` of the state (only `blocks.Eigen` and fits of `Kronecker` use
    them), and with `grad=` and `value_fn=` for line searches of optax in a chain.

    Args:
      curvature: the plan.
      tx: `kfac(curvature, ...)`, `scale_by_kfac(curvature, ...)`, or an `optax.chain`
        or other wrapper with one of them in it.
      statistics_every: k, a number or a schedule of the step; the first step and every
        k-th after it gather statistics, and the others cost a gradient and the update,
        and the rules that evaluate the loss if there are any (docs/performance.md has
        the price). Lower `decay` in `kfac` with it, to 0.8 for k = 5.
      devices: the `devices` of `tx`, if that is an `OverAxis`. Then every device runs
        the step on its part of the batch; devices draw different samples, and their
        gradients are averaged.

    Returns:
      `step(params, state, key, *args) -> params, state, value`. The value is the loss
      function's, `(loss, aux)` with `has_aux`; the first state is `tx.init(params)`.

    Raises:
      TypeError: if an argument is of the wrong type; by the step, if the state is not
        one of K-FAC.
      ValueError: if k is no whole number of at least 1, or for an `optax.MultiSteps`,
        which does not add up statistics: see `multi_steps`; in the sample space also
        for a `statistics_every` other than 1.

    >>> import jax, jax.numpy as jnp, kfac_jax
    >>> def loss_fn(w, x, y):
    ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
    >>> w, x, y = jnp.ones((3, 2)), jnp.eye(3), jnp.zeros((3, 2))
    >>> curvature = kfac_jax.make_curvature(loss_fn, w, x, y)
    >>> tx = kfac_jax.kfac(curvature)
    >>> step = jax.jit(kfac_jax.make_step(curvature, tx))
    >>> w, state, first = step(w, tx.init(w), jax.random.key(0), x, y)
    >>> w, state, second = step(w, state, jax.random.key(1), x, y)
    >>> bool(second < first)
    True
    """
    check_plan(curvature)
    check_transformation(tx)
    if isinstance(getattr(tx.update, "__self__", tx), optax.MultiSteps):
        raise ValueError(
            "optax.MultiSteps hands on the statistics of the last micro-batch alone; "
            "got one as tx. Pass kfac_jax.multi_steps(curvature, tx, every=k), which "
            "adds them up."
        )
    sample_space = isinstance(curvature.structure, SampleSpace)
    if sample_space and statistics_every != 1:
        raise ValueError(
            "In the sample space each step needs its own rows: expected "
            f"statistics_every=1, got {statistics_every!r}."
        )
    if not callable(statistics_every):
        arguments.count("statistics_every", statistics_every, 1)
    checked(devices)
    axis = devices.axis if isinstance(devices, OverAxis) else None
    update = optax.with_extra_args_support(tx).update
    # Factors are passed only if statistics depend on them. (With `state_axes` a device
    # has only rows of others.)
    wanted = any(group.moves for group in curvature.groups)

    def over_devices(loss: Array) -> Array:
        return loss if axis is None else jax.lax.pmean(loss, axis)

    def step(params: optax.Params, state: Any, key: Array, *args: Any) -> Any:
        own = None if sample_space else kfac_state(state)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))

        def gather() -> Any:
            return curvature.value_grad_and_statistics(
                params, *args, rng=key, factors=own.factors if wanted and own else None
            )

        if own is None or statistics_every == 1:
            value, grads, statistics = gather()
        else:
            # The gradient is outside of the branch. Inside, XLA could not share its
            # forward pass with the quadratic model's, and it runs convolutions in
            # branches slowly on CPUs.
            value, grads = curvature.value_and_grad(params, *args)
            every = jnp.asarray(schedules.at(statistics_every, own.step), jnp.int32)
            statistics = jax.lax.cond(
                own.step % every == 0,
                lambda: gather()[2],
                lambda: curvature.zero_statistics(params),
            )

        def objective(params: optax.Params, statistics: Any, args: Any) -> Array:
            del statistics  # optax's line searches pass whatever update gets
            return over_devices(loss_at(curvature, params, args))

        if axis is not None:
            grads = _mean(grads, loss_of(value), axis)
        updates, state = update(
            grads,
            state,
            params,
            statistics=statistics,
            value=over_devices(loss_of(value)),
            args=args,
            grad=grads,
            value_fn=objective,
        )
        return optax.apply_updates(params, updates), state, value

    return step


def _mean(grads: optax.Updates, loss: Array, axis: Any) -> optax.Updates:
    """Over devices; a division where `shard_map` has summed gradients already.

    A `shard_map` that checks what varies has summed them already: then the loss varies
    and gradients do not, and they are only divided by the number of devices.
    """
    names = set(axis) if isinstance(axis, tuple) else {axis}
    checked = bool(names & _compat.varying(loss))

    def mean(x: Array) -> Array:
        if checked and not names & _compat.varying(x):
            return x / jax.lax.axis_size(axis)
        return jax.lax.pmean(x, axis)

    return jax.tree.map(mean, grads)
