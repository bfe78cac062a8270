"""What blocks of a plan's layers are as dense matrices, and what caches lack.

Within a block parameters are in their order in the tree, so that "b" comes before "w".
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax.operator.inverses import refresh
from kfac_jax.plan.group import Factors, Group
from kfac_jax.plan.layer import Layer


def dense_blocks(layers: Sequence[Layer], factors: Factors) -> tuple[Array, ...]:
    """The blocks, `[p, p]` each."""
    return tuple(_dense(layer, factors[layer.name]) for layer in layers)


def with_uncached(
    groups: Sequence[Group],
    cached: Factors,
    inverses: Factors,
    present: Factors,
    damping: Array,
) -> tuple[Factors, Factors]:
    """A cache, with what is never cached: diagonal blocks follow their factors.

    Args:
      groups: the plan's groups.
      cached: the factors in the cache.
      inverses: the inverses in the cache.
      present: the factors.
      damping: the present λ.

    Returns:
      The factors and the inverses.
    """
    following = [x for x in groups if x.in_every_step and not x.moves]
    names = [name for group in following for name in group.names]
    factors = {name: present[name] for name in names}
    old = {name: inverses[name] for name in names}
    found, _ = refresh(following, factors, old, damping)
    return cached | factors, inverses | found


def _dense(layer: Layer, factors: dict[str, Array]) -> Array:
    """A block times unit vectors, with parameters in the order of the tree."""
    order = sorted(range(len(layer.leaves)), key=lambda i: layer.leaves[i])
    sizes = [math.prod(layer.shapes[i]) for i in order]
    ends = list(itertools.accumulate(sizes))

    def column(v: Array) -> Array:
        parts = dict(zip(order, jnp.split(v, ends[:-1]), strict=True))
        shaped = [parts[i].reshape(shape) for i, shape in enumerate(layer.shapes)]
        moved = layer.to_matrix(shaped)
        if layer.block is not None:
            moved = layer.block.matvec(factors, moved)
        results = layer.from_matrix(moved)
        return jnp.concatenate([results[i].reshape(-1) for i in order])

    return jax.vmap(column, out_axes=1)(jnp.eye(ends[-1], dtype=layer.dtype))
