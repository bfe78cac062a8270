"""Gradients as products of inputs and output gradients, and their preconditioning.

A dense layer's gradient over `r` cases is `V = Xᵀ dY`, of rank r. With few cases
`A⁻¹ V G⁻¹ = (A⁻¹ Xᵀ) (dY G⁻¹)` takes fewer multiply-adds on the right than on the left
(Martens & Grosse 2015, section 8 and appendix C).
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax.plan import Layer

Products = dict[str, tuple[Array, Array]]
"""By layer name, X `[r, i]` and dY `[r, o]`."""


def zeros(layers: Sequence[Layer]) -> Products:
    """Zeros, with as many rows as in the plan's batch."""
    return {
        layer.name: (
            jnp.zeros((layer.product_rows, layer.shape.inputs), layer.dtype),
            jnp.zeros((layer.product_rows, layer.shape.outputs), layer.dtype),
        )
        for layer in layers
        if layer.product_rows
    }


def check(layers: Sequence[Layer], products: Products) -> None:
    """Raises ValueError unless the layers and lengths of rows are this plan's."""
    expected = {
        x.name: (x.shape.inputs, x.shape.outputs) for x in layers if x.product_rows
    }
    got = {name: tuple(jnp.shape(x)[-1] for x in xs) for name, xs in products.items()}
    # where a custom derivative rule decides about gradients there are none
    if got and got != expected:
        raise ValueError(
            f"statistics.products must have rows of lengths {expected}; got {got}. Use "
            "what this very plan returned."
        )


def negative(products: Products) -> Products:
    """The products of the negative gradients."""
    return {name: (x, -dy) for name, (x, dy) in products.items()}


def solve(
    layers: Sequence[Layer],
    inverses: Mapping[str, Mapping[str, Array]],
    vectors: Mapping[str, Array],
    products: Products,
) -> dict[str, Array]:
    """Applies inverses to vectors that may be the given products.

    Args:
      layers: those whose vectors may be products.
      inverses: `A⁻¹` and `G⁻¹` as "input" and "output", by layer name.
      vectors: V `[i, o]`, by layer name.
      products: X and dY.

    Returns:
      `A⁻¹ V G⁻¹` by layer name, from X and dY if all vectors are their products.
    """
    names = [x.name for x in layers if x.name in vectors and x.name in products]
    if not names:
        return {}

    def by_rows() -> dict[str, Array]:
        return {
            name: (products[name][0] @ inverses[name]["input"]).T
            @ (products[name][1] @ inverses[name]["output"])
            for name in names
        }

    def by_matrix() -> dict[str, Array]:
        return {
            name: inverses[name]["input"] @ vectors[name] @ inverses[name]["output"]
            for name in names
        }

    same = [_is_product(vectors[name], *products[name]) for name in names]
    return jax.lax.cond(jnp.stack(same).all(), by_rows, by_matrix)


def _is_product(v: Array, x: Array, dy: Array) -> Array:
    """Whether `V = Xᵀ dY`, seen from the left by one vector of random signs.

    `uᵀ V = (X u)ᵀ dY` takes about as long as reading V, X and dY once.
    """
    u = jax.random.rademacher(jax.random.key(0), (len(v),), v.dtype)
    given, made = u @ v, (x @ u) @ dy
    tolerance = jnp.sqrt(jnp.asarray(jnp.finfo(v.dtype).eps, v.dtype))
    return jnp.linalg.norm(made - given) <= tolerance * jnp.linalg.norm(given)
