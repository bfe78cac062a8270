"""A training step as one function, and what to look at while it trains."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np
import optax
from jax import Array

from kfac_jax import devices as devices_lib
from kfac_jax._jaxpr import _compat
from kfac_jax._utils import arguments
from kfac_jax.curvature import Curvature
from kfac_jax.devices import Distribution, OverAxis
from kfac_jax.optimization.checks import check_plan
from kfac_jax.optimization.step import KFACState, loss_of

Params = Any


def make_step(
    curvature: Curvature,
    tx: optax.GradientTransformation,
    *,
    statistics_every: int = 1,
    devices: Distribution | None = None,
) -> Callable[..., tuple[Params, Any, Any]]:
    """A training step: value, gradient and statistics, update, new parameters.

    It is pure: stage it by `jax.jit`, scan over it, map it over seeds. It makes three
    calls, which a program of its own may make instead::

        value, grads, statistics = curvature.value_grad_and_statistics(
            params, *args, rng=key, factors=factors)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=args)
        params = optax.apply_updates(params, updates)

    with the `factors` of the state (only `blocks.Eigen` uses them).

    Args:
      curvature: the plan.
      tx: `kfac(curvature, ...)`, `scale_by_kfac(curvature, ...)`, or an `optax.chain`
        or other wrapper with one of them in it.
      statistics_every: k; the first step and every k-th after it gather statistics, and
        the others cost a gradient and the update, with the rules that evaluate the
        loss if there are any (docs/performance.md has the price). Lower `decay` in
        `kfac` with it, to 0.8 for 5.
      devices: what `tx` got, if that is an `OverAxis`, for a step that every device
        runs on its part of the batch: samples then differ between devices, and
        gradients are their means.

    Returns:
      `step(params, state, key, *args) -> params, state, value`. The value is the loss
      function's, `(loss, aux)` with `has_aux`; the first state is `tx.init(params)`.

    Raises:
      TypeError: if an argument is of the wrong type; by the step, if the state is not
        one of K-FAC.
      ValueError: if k is no whole number of at least 1.

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
    if not hasattr(tx, "init") or not callable(getattr(tx, "update", None)):
        raise TypeError(
            "tx must be an optax transformation with kfac or scale_by_kfac in it; got "
            f"{arguments.shown(tx)}. Pass kfac_jax.kfac(curvature)."
        )
    arguments.count("statistics_every", statistics_every, 1)
    devices_lib.check(devices, "devices")
    axis = devices.axis if isinstance(devices, OverAxis) else None
    update = optax.with_extra_args_support(tx).update

    def step(params: Params, state: Any, key: Array, *args: Any) -> Any:
        own = kfac_state(state)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))

        def gather() -> Any:
            return curvature.value_grad_and_statistics(
                params, *args, rng=key, factors=own.factors
            )

        if statistics_every == 1:
            value, grads, statistics = gather()
        else:
            # the gradient is not in a branch: there XLA would not share its forward
            # pass with the quadratic model's, and be slow at convolutions on CPUs
            value, grads = curvature.value_and_grad(params, *args)
            statistics = jax.lax.cond(
                own.step % statistics_every == 0,
                lambda: gather()[2],
                lambda: curvature.zero_statistics(params),
            )
        if axis is not None:
            grads = _mean(grads, loss_of(value), axis)
        updates, state = update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        return optax.apply_updates(params, updates), state, value

    return step


def _mean(grads: Params, loss: Array, axis: Any) -> Params:
    """Over devices; a division where `shard_map` has summed gradients already.

    It has if it checks what varies: then the loss does, and gradients do not.
    """
    names = set(axis) if isinstance(axis, tuple) else {axis}
    checked = bool(names & _compat.varying(loss))

    def mean(x: Array) -> Array:
        if checked and not names & _compat.varying(x):
            return x / jax.lax.axis_size(axis)
        return jax.lax.pmean(x, axis)

    return jax.tree.map(mean, grads)


def kfac_state(state: Any) -> KFACState:
    """The state of K-FAC within that of an optax transformation.

    Args:
      state: of `kfac`, `scale_by_kfac`, or a chain or wrapper around one.

    Returns:
      The first that there is.

    Raises:
      TypeError: if there is none.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, KFACState))
    found = next((x for x in leaves if isinstance(x, KFACState)), None)
    if found is None:
        raise TypeError(
            "Expected the state of kfac or scale_by_kfac, or of an optax chain with "
            f"one of them in it; got {arguments.shown(state)}. Call "
            "state = tx.init(params) with tx = kfac_jax.kfac(curvature)."
        )
    return found


class Health(NamedTuple):
    """What `health` found."""

    ok: bool  # whether nothing is amiss
    message: str  # what is, and what to change; empty if nothing is


_RISE = 100.0
"""How many times its lowest running mean a loss may be."""

_NOT_FINITE = (
    "The loss was finite and is not: the run diverged, or the batch has values that "
    "are not finite. If batches are sound, raise damping (λ), or lower learning_rate "
    "or norm_constraint if you chose them."
)
_ROSE = (
    "The loss is more than a hundred times its lowest running mean: steps are too "
    "long. Leave learning_rate, momentum and damping at their defaults, or raise "
    "damping (λ), or lower norm_constraint."
)
_REFUSED = (
    "Most updates refused something that was not finite: look at the loss and the "
    "batches."
)


def health(state: Any) -> Health:
    """Tells a run that trains from one that does not, and warns of the latter.

    Call it outside of `jit`, every now and then: it fetches four numbers. Python shows
    each of its warnings once for a line of the program, unless told otherwise.

    Args:
      state: of `kfac` or `scale_by_kfac`, or of a chain with one of them in it; of
        several seeds or devices, if its arrays have leading axes for them, of which the
        worst counts. The loss is known where `update` got `value=`, as by `make_step`.

    Returns:
      Whether the run is well, and if not, the likely cause and the argument to change.

    Raises:
      TypeError: if there is no state of K-FAC, or if it is traced.

    >>> import jax.numpy as jnp, kfac_jax
    >>> def loss_fn(w, x):
    ...     return kfac_jax.losses.squared_error(x @ w).sum(-1).mean()
    >>> w, x = jnp.ones((3, 2)), jnp.eye(3)
    >>> tx = kfac_jax.kfac(kfac_jax.make_curvature(loss_fn, w, x))
    >>> kfac_jax.health(tx.init(w)).ok
    True
    """
    own = kfac_state(state)
    scalars = (own.step, own.info.skipped_updates, own.info.loss, own.info.lowest_loss)
    if any(isinstance(x, jax.core.Tracer) for x in scalars):
        raise TypeError(
            "health looks at numbers, and the state is traced: expected a call outside "
            "of jit, with the state that a step returned."
        )
    steps, skipped, loss, lowest = (
        np.asarray(x, np.float64).ravel() for x in jax.device_get(scalars)
    )
    diverged = np.isfinite(lowest) & ~np.isfinite(loss)
    rose = (lowest > 0) & (loss > _RISE * lowest) & ~diverged
    found = {
        _NOT_FINITE: diverged,
        _ROSE: rose,
        _REFUSED: skipped > 0.5 * steps,
    }
    amiss = [cause for cause, where in found.items() if where.any()]
    for cause in amiss:
        warnings.warn(cause, stacklevel=2)
    if not amiss:
        return Health(True, "")
    worst = int(np.argmax(sum(where.astype(int) for where in found.values())))
    numbers = (
        f"After {steps[worst]:.0f} steps, {skipped[worst]:.0f} of which refused "
        f"something, the loss is {loss[worst]:.3g}; its lowest running "
        f"mean was {lowest[worst]:.3g}."
    )
    return Health(False, " ".join([numbers, *amiss]))
