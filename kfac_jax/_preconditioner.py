"""Inverses of the damped factors: their state, their refresh, their application."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax.approximation import invert, layer_leaves, layer_vectors
from kfac_jax.blocks import Block
from kfac_jax.curvature import Factors
from kfac_jax.layers import Layer


def _blocks(layers: Sequence[Layer]) -> dict[str, Block]:
    return {layer.name: layer.block for layer in layers if layer.block is not None}


def _zero_factors(layer: Layer) -> dict[str, Array]:
    return {n: jnp.zeros(s, layer.dtype) for n, s in layer.factor_shapes.items()}


def init_inverses(layers: Sequence[Layer]) -> Factors:
    """Identities: until the first refresh succeeds, steps follow the gradient."""
    result: Factors = {}
    for layer in layers:
        block = layer.block
        if block is None:
            result[layer.name] = {}
            continue
        one = jnp.ones((), layer.dtype)
        shapes = jax.eval_shape(block.damp, _zero_factors(layer), one)
        result[layer.name] = {
            name: (
                jnp.ones(s.shape, s.dtype)
                if name in block.elementwise
                else jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=s.dtype), s.shape)
            )
            for name, s in shapes.items()
        }
    return result


def refresh_inverses(
    layers: Sequence[Layer], factors: Factors, old: Factors, damping: Array
) -> tuple[Factors, Array]:
    """Inverts the damped factors.

    A layer whose inverse is not finite keeps the old one.

    Args:
      layers: the plan's layers.
      factors: the moving averages.
      old: the inverses so far.
      damping: λ + η.

    Returns:
      The inverses, and how many layers failed.
    """
    blocks = _blocks(layers)
    damped = {
        layer.name: layer.block.damp(factors[layer.name], damping.astype(layer.dtype))
        for layer in layers
        if layer.block is not None
    }
    new = invert(blocks, damped)
    result: Factors = {}
    failed = jnp.zeros((), jnp.int32)
    for layer in layers:
        name = layer.name
        if name not in new:
            result[name] = old[name]
            continue
        finite = blocks[name].all_finite(new[name])
        result[name] = {
            part: jnp.where(finite, value, old[name][part]).astype(
                old[name][part].dtype
            )
            for part, value in new[name].items()
        }
        failed += (~finite).astype(jnp.int32)
    return result, failed


def precondition(
    layers: Sequence[Layer], inverses: Factors, leaves: Sequence[Array | None]
) -> list[Array | None]:
    """Applies the inverses to a vector's leaves.

    Leaves without a block stay as they are.

    Args:
      layers: the plan's layers.
      inverses: from `refresh_inverses`.
      leaves: the vector's leaves; None where hidden by a mask.

    Returns:
      The leaves of the product.
    """
    blocks = _blocks(layers)
    dtypes = {layer.name: layer.dtype for layer in layers}
    vectors = layer_vectors(layers, leaves)
    solved = {
        name: blocks[name].solve(inverses[name], v.astype(dtypes[name]))
        for name, v in vectors.items()
    }
    return layer_leaves(layers, solved, leaves)
