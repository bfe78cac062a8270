"""Averages of the iterates, as an optax transformation."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._utils import arguments, schedules
from kfac_jax._utils.dtypes import wide_dtype


class AverageIteratesState(NamedTuple):
    """The state of `average_iterates`."""

    num_updates: Array  # [] int32, so far
    averaged_params: optax.Params  # θ̄, like the parameters, in float32 or wider


def average_iterates(
    decay: optax.ScalarOrSchedule = 0.99, *, start: int | Array | None = 1
) -> optax.GradientTransformation:
    """Keeps an exponential average of the parameters: `θ̄ = ξ_k θ̄ + (1 - ξ_k) θ`.

    Put it last in an `optax.chain`: updates pass through unchanged, and θ are the
    parameters after them. With a constant batch size θ̄ is mostly better than θ, which
    jitters around it; where the batch grows it tends to lag. So evaluate both and keep
    the better one.

    The average is read from the state of the chain by
    `optax.tree_utils.tree_get(state, "averaged_params")`. (`optax.ema` averages the
    updates, not the parameters; `optax.incremental_update` is one step of this average,
    for a training loop that keeps it by itself.)

    A refused update of `kfac` is zero: θ̄ moves towards the θ that stayed.

    Args:
      decay: ξ, in [0, 1), a number or a schedule of the step.
      start: k0, the step, counted from 1, at which averaging starts. Until then θ̄ = θ,
        and from then on `ξ_k = min(1 - 1/(k - k0 + 1), ξ)`: an equal average of all
        iterates from k0 on while they are few. None for `ξ_k = ξ` throughout, as in the
        paper's text, with the initial parameters as the first average.

    Returns:
      The transformation. Its update needs `params`.

    Raises:
      TypeError: if `start` is not an integer, or the decay not a number; by `init`, if
        parameters are not real floating point.
      ValueError: if a number is out of its range.

    References:
      Martens & Grosse 2015, section 13, where ξ = 0.99; their program has k0 = 200.
      Polyak & Juditsky 1992.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(1.0), average_iterates())
    >>> params = jnp.asarray(0.0)
    >>> state = tx.init(params)
    >>> for gradient in (-1.0, -3.0, 0.0):
    ...     updates, state = tx.update(jnp.asarray(gradient), state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> averaged = optax.tree_utils.tree_get(state, "averaged_params")
    >>> float(params), round(float(averaged), 6)  # of 1, 4 and 4
    (4.0, 3.0)
    """
    _check(decay, start)

    def init(params: optax.Params) -> AverageIteratesState:
        arguments.real_trees("params", params)
        return AverageIteratesState(
            num_updates=jnp.zeros((), jnp.int32),
            averaged_params=jax.tree.map(_wide_copy, params),
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AverageIteratesState]:
        if params is None:
            raise ValueError(
                "average_iterates averages the parameters: call "
                "tx.update(grads, state, params); expected params, got None."
            )
        _check_trees(updates, state, params)
        k = state.num_updates + 1
        xi = jnp.asarray(schedules.at(decay, state.num_updates), float)
        if start is not None:
            since = k - jnp.asarray(start, k.dtype) + 1
            xi = jnp.minimum(1.0 - 1.0 / jnp.maximum(since, 1).astype(xi.dtype), xi)

        def move(average: Array, p: Array) -> Array:
            weight = xi.astype(average.dtype)
            return weight * average + (1 - weight) * p.astype(average.dtype)

        moved = optax.apply_updates(params, updates)
        averaged = jax.tree.map(move, state.averaged_params, moved)
        return updates, AverageIteratesState(k, averaged)

    return optax.GradientTransformation(init, update)


def _check_trees(updates: Any, state: Any, params: Any) -> None:
    """Raises unless the trees of an update fit together."""
    arguments.instance(
        "state",
        state,
        AverageIteratesState,
        "the state of average_iterates, from its init",
    )
    arguments.floating_trees("params", params)
    arguments.real_trees("updates", updates)
    arguments.real_trees("state", state.averaged_params)
    given = _shapes(params)
    others = {
        "updates": _shapes(updates),
        "the average in the state": _shapes(state.averaged_params),
    }
    for name, found in others.items():
        if found != given:
            raise ValueError(
                f"params must have the structure and shapes of {name}: expected "
                f"{found}, got {given}."
            )


def _shapes(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [jnp.shape(x) for x in leaves]


def _wide_copy(p: Any) -> Array:
    """A copy in float32 or wider: θ and θ̄ may both be donated."""
    dtype = arguments.dtype_of(p)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            "average_iterates expects params of real floating point; got "
            f"{arguments.shown(p)}. Hide others by optax.masked."
        )
    return jnp.array(p, wide_dtype(dtype))


def _check(decay: Any, start: Any) -> None:
    schedules.check("decay", decay, 0.0, 1.0, symbol="ξ")
    if start is None:
        return
    arguments.integer("start (k0)", start, arrays=True)
    if isinstance(start, numbers.Integral) and int(start) < 1:
        raise ValueError(
            f"start (k0) counts steps from 1, so it must be at least 1; got {start}."
        )
