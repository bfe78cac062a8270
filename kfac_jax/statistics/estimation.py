"""The cotangents that each mode pulls back from the registered outputs.

Let `F_R = B Bᵀ` be the Fisher over the outputs. A random cotangent u with `E[u uᵀ] =
F_R`, pulled back to the layers, gives unbiased second moments of the curvature; a set
of cotangents with `Σ u uᵀ = F_R` gives terms that add up to them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.loops import sum_over
from kfac_jax._jaxpr.states import Examples, Lost, State
from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.distributions import RegisteredLoss

Pull = Callable[[list[Array]], Any]


class Cases(NamedTuple):
    """How the cases are arranged in the leading axis of a registered output."""

    outer: int
    size: int
    inner: int

    def split(self, z: Array) -> Array:
        """`[N, positions and outputs]`."""
        parts = z.reshape(self.outer, self.size, self.inner, -1)
        return jnp.moveaxis(parts, 1, 0).reshape(self.size, -1)

    def join(self, rows: Array, like: Array) -> Array:
        """Inverts `split`."""
        parts = rows.reshape(self.size, self.outer, self.inner, -1)
        return jnp.moveaxis(parts, 0, 1).reshape(like.shape)


def _random_roots(losses: Sequence[RegisteredLoss], key: Array) -> list[Array]:
    """`B r` for random r with covariance I, nowhere exactly zero unless B is.

    Curvature propagation takes random signs for r. The variance of a second moment
    grows with `E r⁴ ≥ (E r²)² = 1`, and signs reach this bound. But signs can cancel:
    `B (1, 1)` is zero for two equal probabilities, and a row whose gradient is zero
    counts as masked. So the signs are multiplied by magnitudes with `r²` uniform on
    [½, 1½]. Then `B r` is zero with probability zero, and `E r⁴ = 1 + 1/12` (for normal
    r it is 3).
    """
    keys = jax.random.split(key, len(losses))
    return [
        loss.multiply_root(_nearly_signs(k, loss.z))
        for loss, k in zip(losses, keys, strict=True)
    ]


def _nearly_signs(key: Array, z: Array) -> Array:
    u = jax.random.uniform(key, z.shape, wide_dtype(z.dtype), -1.0, 1.0)
    return jnp.copysign(jnp.sqrt(0.5 + jnp.abs(u)), u)


def random_cotangents(
    losses: Sequence[RegisteredLoss], mode: str, key: Array
) -> list[Array]:
    """One random set of cotangents with covariance `F_R`."""
    if mode != "fisher_gradients":
        return _random_roots(losses, key)
    keys = jax.random.split(key, len(losses))
    return [loss.sample_gradient(k) for loss, k in zip(losses, keys, strict=True)]


def random_signs(cotangents: Sequence[Array], key: Array) -> list[Array]:
    """Gives each case a random sign, so that different cases are uncorrelated."""
    keys = jax.random.split(key, len(cotangents))
    return [
        u * jax.random.rademacher(k, (len(u), *[1] * (u.ndim - 1)), u.dtype)
        for u, k in zip(cotangents, keys, strict=True)
    ]


def target_cotangents(losses: Sequence[RegisteredLoss]) -> list[Array]:
    """The gradients at the registered targets.

    Args:
      losses: the registered losses.

    Returns:
      One cotangent for each.

    Raises:
      ValueError: if a loss was registered without targets.
    """
    if not all(loss.data for loss in losses):
        raise ValueError(
            'estimation_mode="fisher_empirical" needs the targets, but a loss was '
            "registered without them. Pass targets to the register function."
        )
    return [loss.target_gradient() for loss in losses]


def only_column(
    losses: Sequence[RegisteredLoss], states: Sequence[State], independent_cases: bool
) -> list[Array] | None:
    """The only column of B, if each example has a single output; None otherwise."""
    if len(losses) > 1:
        return None
    outer, _, inner = within(losses[0], states[0], independent_cases)
    if outer * inner * math.prod(losses[0].z.shape[1:]) > 1:
        return None
    return [losses[0].multiply_root(jnp.ones_like(losses[0].z))]


def within(loss: RegisteredLoss, state: State, independent_cases: bool) -> Cases:
    """How the leading axis of an output is divided: `outer × examples × inner`."""
    cases = len(loss.z)
    if state is None or (independent_cases and isinstance(state, Lost)):
        return Cases(1, cases, 1)
    if isinstance(state, Examples) and state.axis == 0:
        return Cases(state.outer, state.size, state.inner)
    # not known: as if all cases were positions of one example
    return Cases(1, 1, cases)


def sum_over_outputs(
    losses: Sequence[RegisteredLoss],
    states: Sequence[State],
    pull: Pull,
    independent_cases: bool,
) -> Any:
    """Sums `pull` over the columns of B.

    Cases of one example (the tokens of a sequence) share hidden values, at which their
    cotangents would add up and mix. So each position and output has a pull-back of its
    own. Different examples share nothing, so one pull-back does all of them.

    Args:
      losses: the registered losses.
      states: for each loss, where the examples are in its output.
      pull: pulls cotangents back.
      independent_cases: whether cases count as examples where these are not known.

    Returns:
      The sum.
    """
    total: Any = None
    zeros = [jnp.zeros_like(loss.z) for loss in losses]
    for index, (loss, state) in enumerate(zip(losses, states, strict=True)):
        size = math.prod(loss.z.shape[1:])
        divided = within(loss, state, independent_cases)
        outer, _, inner = divided

        def column(
            c: Array,
            loss: RegisteredLoss = loss,
            divided: tuple[int, int, int] = divided,
            index: int = index,
            size: int = size,
        ) -> Any:
            place, entry = c // size, c % size
            outer, examples, inner = divided
            at_place = jnp.arange(outer * inner).reshape(outer, 1, inner) == place
            case = jnp.broadcast_to(at_place, (outer, examples, inner)).reshape(-1, 1)
            one = case & (jnp.arange(size) == entry)[None, :]
            u = loss.multiply_root(one.reshape(loss.z.shape).astype(loss.z.dtype))
            return pull([*zeros[:index], u, *zeros[index + 1 :]])

        part = sum_over(column, outer * inner * size)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total
