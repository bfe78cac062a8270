"""One optimizer's direction with another's length, as an optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._utils import arguments


class GraftState(NamedTuple):
    """The state of `graft`."""

    direction: Any  # of the transformation that gives directions
    magnitude: Any  # of the one that gives lengths


def graft(
    direction: optax.GradientTransformation, magnitude: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Leaf by leaf the direction of one transformation, with the length of another.

    With lengths of Adam, a learning rate and schedule that were tuned for Adam go on
    being right::

        tx = optax.chain(
            kfac_jax.graft(kfac_jax.scale_by_kfac(curvature), optax.scale_by_adam()),
            optax.scale_by_learning_rate(schedule))
        step = kfac_jax.make_step(curvature, tx)

    Args:
      direction: mostly `scale_by_kfac(curvature)`. Its sign is kept, so give one of the
        `scale_by_...` kind and let `optax.scale_by_learning_rate` follow.
      magnitude: for example `optax.scale_by_adam()`. Only the lengths of its leaves are
        used (Frobenius norms).

    Returns:
      The transformation. It hands `params` and all further arguments to both. A leaf
      whose direction is zero gets a zero update.

    Raises:
      TypeError: if an argument is no optax transformation.

    References:
      Agarwal et al. 2020, arXiv:2002.11803.

    >>> import jax.numpy as jnp, optax
    >>> tx = graft(optax.identity(), optax.sign_sgd(1.0))
    >>> updates, _ = tx.update(jnp.asarray([3.0, 4.0]), tx.init(jnp.zeros(2)))
    >>> [round(float(x), 3) for x in updates]  # 3 : 4, and of length √2
    [0.849, 1.131]
    """
    for name, tx in (("direction", direction), ("magnitude", magnitude)):
        if not isinstance(tx, optax.GradientTransformation):
            raise TypeError(
                f"{name} must be an optax transformation, such as "
                "kfac_jax.scale_by_kfac(curvature) or optax.scale_by_adam(); got "
                f"{arguments.shown(tx)}."
            )
    given = optax.with_extra_args_support(direction)
    length = optax.with_extra_args_support(magnitude)

    def init(params: optax.Params) -> GraftState:
        return GraftState(given.init(params), length.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, GraftState]:
        arguments.instance("state", state, GraftState, "the state of graft, from init")
        points, own = given.update(updates, state.direction, params, **extra)
        sized, other = length.update(updates, state.magnitude, params, **extra)
        return jax.tree.map(_resized, points, sized), GraftState(own, other)

    return optax.GradientTransformationExtraArgs(init, update)


def _resized(point: Array, sized: Array) -> Array:
    """The first, as long as the second."""
    before, after = jnp.linalg.norm(point.ravel()), jnp.linalg.norm(sized.ravel())
    ratio = jnp.where(before == 0, 0.0, after / jnp.where(before == 0, 1.0, before))
    return point * ratio.astype(point.dtype)
