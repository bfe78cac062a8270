"""Loops whose body is compiled once, however many steps they have."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import _compat


def sum_over(function: Callable[[Array], Any], count: int) -> Any:
    """Sums a function of 0, ..., count - 1 in one compiled loop."""
    if count == 1:
        return function(jnp.zeros((), int))
    shapes = jax.eval_shape(function, jnp.zeros((), int))
    start = jax.tree.map(_compat.zeros, shapes)

    def body(total: Any, c: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(c)), None

    return jax.lax.scan(body, start, jnp.arange(count))[0]
