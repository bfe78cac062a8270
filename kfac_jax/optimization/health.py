"""Diagnostics of a training run."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np

from kfac_jax._utils import arguments
from kfac_jax.optimization.state import KFACState


def kfac_state(state: Any) -> KFACState:
    """Finds the state of K-FAC in the state of an optax transformation.

    Args:
      state: the state of `kfac`, `scale_by_kfac`, or a chain or wrapper around one.

    Returns:
      The first `KFACState`.

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
    """The result of `health`."""

    ok: bool  # whether the run trains
    message: str  # the likely cause if not, and what to change; empty if it does


_RISE = 100.0
"""The largest ratio of a loss to its lowest running mean that is not reported."""

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
      state: the state of `kfac` or `scale_by_kfac`, or of a chain with one of them in
        it. Its arrays may have leading axes for several seeds or devices; the worst of
        them counts. The loss is known if `update` got `value=`, as from `make_step`.

    Returns:
      Whether the run trains and, if not, the likely cause and the argument to change.

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
