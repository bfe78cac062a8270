"""Exact Fisher diagonals of parameters without a layer, by forward mode.

Such a parameter enters the network through a function that no block describes, like α
in `α² / (α + r)`. Entry i of its Fisher diagonal is `Σ_n ‖B_nᵀ J_n e_i‖²` over the
cases n. That takes one push-forward of `e_i` for each entry.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import axis_types
from kfac_jax._jaxpr.differentiation import has_forward_mode
from kfac_jax._jaxpr.interpreter import Program, run
from kfac_jax.distributions import RegisteredLoss
from kfac_jax.plan.group import Factors
from kfac_jax.plan.layer import Layer

MOST_ENTRIES = 32
"""The most entries of all such parameters together; the smallest parameters come first.
One push costs up to a forward pass, and most parameters of this kind are a few numbers.
The diagonals of all others are estimated with random signs."""


def exact_diagonals(
    layers: Sequence[Layer],
    program: Program,
    leaves: Sequence[Array],
    data: Sequence[Any],
) -> Factors:
    """The diagonals of some layers, if the program has a forward mode.

    Args:
      layers: layers without taps.
      program: the program up to the registered losses.
      leaves: the parameters.
      data: the program's further inputs.

    Returns:
      The statistics of the layers that are small enough, by layer name.
    """
    small = by_entries(layers, program)
    if not small:
        return {}
    places = [*dict.fromkeys(leaf for layer in small for leaf in layer.leaves)]

    def outputs(own: list[Array]) -> tuple[list[Array], list[RegisteredLoss]]:
        replaced = dict(zip(places, own, strict=True))
        inputs = [replaced.get(i, leaf) for i, leaf in enumerate(leaves)]
        losses = run(program, [*inputs, *data], None)[1]
        return [loss.z for loss in losses], losses

    own = [leaves[i] for i in places]
    _, push, losses = jax.linearize(outputs, own, has_aux=True)
    explicit = axis_types.explicit(push, own)

    def diagonals(losses: Sequence[RegisteredLoss], own: Sequence[Array]) -> Any:
        def square(tangents: list[Array]) -> Array:
            roots = [
                loss.multiply_root_transpose(dz)
                for loss, dz in zip(losses, explicit(tangents), strict=True)
            ]
            return sum(
                (jnp.square(x).sum().astype(float) for x in roots), jnp.zeros((), float)
            )

        squares = dict(zip(places, _by_entries(square, own), strict=True))
        result: Factors = {}
        for layer in small:
            matrix = layer.to_matrix([squares[i] for i in layer.leaves])
            result[layer.name] = {"diagonal": matrix.astype(layer.dtype)}
        return result

    return axis_types.auto(diagonals)(losses, own)


def by_entries(layers: Sequence[Layer], program: Program) -> list[Layer]:
    """Those that have their diagonal from here: the smallest, with a forward mode."""
    return _small(layers) if has_forward_mode(program.graph) else []


def _small(layers: Sequence[Layer]) -> list[Layer]:
    """The smallest layers, as many as have at most `MOST_ENTRIES` together."""
    sizes = [sum(map(math.prod, layer.shapes)) for layer in layers]
    order = sorted(range(len(layers)), key=lambda i: sizes[i])
    totals = itertools.accumulate(sizes[i] for i in order)
    pairs = zip(order, totals, strict=True)
    return [layers[i] for i, total in pairs if total <= MOST_ENTRIES]


def _by_entries(
    function: Callable[[list[Array]], Array], arrays: Sequence[Array]
) -> list[Array]:
    """A function's values at all unit vectors, shaped like the arrays."""
    zeros = [jnp.zeros_like(x) for x in arrays]
    results: list[Array] = []
    for place, zero in enumerate(zeros):

        def at(entry: Array, place: int = place, zero: Array = zero) -> Array:
            unit = zero.reshape(-1).at[entry].set(1).reshape(zero.shape)
            return function([*zeros[:place], unit, *zeros[place + 1 :]])

        if zero.size == 1:
            found = at(jnp.zeros((), int))
        else:
            found = jax.lax.map(at, jnp.arange(zero.size))
        results.append(found.reshape(zero.shape))
    return results
