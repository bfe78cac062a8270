"""Imposes an order on computations that do not depend on each other."""

import jax.numpy as jnp
from jax import Array


def known_false_after(x: Array) -> Array:
    """False, computed from x so that XLA cannot know it.

    A computation that uses the result runs after x is computed. An optimization barrier
    does not achieve this, because XLA removes barriers before it schedules.

    >>> bool(known_false_after(jnp.asarray(2.0)))
    False
    """
    return x > jnp.inf
