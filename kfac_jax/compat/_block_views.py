"""What blocks of a plan's layers are, as dense matrices and as parts of vectors.

Within a block parameters are in their order in the tree, so that "b" comes before "w".
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._factors import Factors
from kfac_jax.layers import Layer


def dense_blocks(layers: Sequence[Layer], factors: Factors) -> tuple[Array, ...]:
    """The blocks, `[p, p]` each."""
    return tuple(_dense(layer, factors[layer.name]) for layer in layers)


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
