"""Inverses of the damped factors: their state, their refresh, their application."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import fresh
from kfac_jax._utils.vectors import inner_product
from kfac_jax.blocks import Block
from kfac_jax.devices import Distribution, apply, by_rows, kept
from kfac_jax.operator import linked as linked_lib
from kfac_jax.operator import products as products_lib
from kfac_jax.operator.approximation import invert, layer_leaves, layer_vectors
from kfac_jax.operator.products import Products
from kfac_jax.optimization import by_rows as rows_lib
from kfac_jax.plan import Layer
from kfac_jax.statistics.averages import Factors


def _blocks(layers: Sequence[Layer]) -> dict[str, Block]:
    return {layer.name: layer.block for layer in layers if layer.block is not None}


def init_inverses(layers: Sequence[Layer]) -> Factors:
    """Identities: until the first refresh succeeds, steps follow the gradient."""
    result: Factors = {}
    for layer in layers:
        if layer.link is not None:
            result[layer.name] = linked_lib.init(layer)
            continue
        elementwise = frozenset() if layer.block is None else layer.block.elementwise
        result[layer.name] = {
            name: (
                fresh.full(x.shape, 1.0, x.dtype)
                if name in elementwise
                else fresh.identities(x.shape, x.dtype)
            )
            for name, x in layer.damped.items()
        }
    return result


@jax.named_scope("kfac_inverses")
def refresh_factors(
    layers: Sequence[Layer], factors: Factors, sharing: Distribution | None = None
) -> Factors:
    """Moves factors that are in a basis to the present one.

    Args:
      layers: the plan's layers.
      factors: the moving averages of those that are to be moved, by layer name.
      sharing: devices, each of which moves some layers' factors.

    Returns:
      The factors.
    """
    blocks = _blocks(layers)
    if sharing is None:
        return {name: blocks[name].refresh(part) for name, part in factors.items()}
    costs = {layer.name: float(layer.inversion_cost) for layer in layers}
    names = [(name, _moved(blocks[name], part)) for name, part in factors.items()]
    found = sharing.each(
        [costs[name] for name, _ in names],
        [functools.partial(_refreshed, blocks[name], keys) for name, keys in names],
        list(factors.values()),
    )
    return {
        name: factors[name] | dict(zip(keys, arrays, strict=True))
        for (name, keys), arrays in zip(names, found, strict=True)
    }


def _moved(block: Block, factors: dict[str, Array]) -> list[str]:
    """Which factors a refresh changes; others need not be exchanged."""
    moved: list[str] = []

    def look(factors: dict[str, Array]) -> dict[str, Array]:
        new = block.refresh(factors)
        moved.extend(name for name, x in new.items() if x is not factors[name])
        return new

    jax.eval_shape(look, factors)
    return moved


def _refreshed(
    block: Block, names: Sequence[str], factors: dict[str, Array]
) -> list[Array]:
    new = block.refresh(factors)
    return [new[name] for name in names]


@jax.named_scope("kfac_inverses")
def refresh_inverses(
    layers: Sequence[Layer],
    factors: Factors,
    old: Factors,
    damping: Array,
    sharing: Distribution | None = None,
) -> tuple[Factors, Array]:
    """Inverts the damped factors; of linked layers, computes what takes their place.

    A layer whose inverse is not finite keeps the old one, and so does one without
    factors here.

    Args:
      layers: the plan's layers.
      factors: the moving averages, by layer name.
      old: the inverses so far.
      damping: λ + η.
      sharing: devices that share the inversion, and may keep rows of the inverses.

    Returns:
      The inverses, and how many layers failed. Linked layers fail together.
    """
    blocks = _blocks(layers)
    found, finite = _inverses(layers, blocks, factors, damping, sharing)
    found = kept(sharing, found)
    result = dict(old)
    failed = jnp.zeros((), jnp.int32)
    for name, part in found.items():
        result[name] = {
            key: jnp.where(finite[name], x, old[name][key]).astype(old[name][key].dtype)
            for key, x in part.items()
        }
        failed += (~finite[name]).astype(jnp.int32)
    return result, failed


def _inverses(
    layers: Sequence[Layer],
    blocks: dict[str, Block],
    factors: Factors,
    damping: Array,
    sharing: Distribution | None,
) -> tuple[Factors, dict[str, Array]]:
    """Those of the layers that have factors, and whether they are finite, by name."""
    damped = {
        layer.name: layer.block.damp(factors[layer.name], damping.astype(layer.dtype))
        for layer in layers
        if layer.block is not None and layer.link is None and layer.name in factors
    }
    found: Factors = {}
    finite: dict[str, Array] = {}
    for name, parts in invert(blocks, damped, apply(sharing)).items():
        found[name] = {part: inverse for part, (inverse, _) in parts.items()}
        finite[name] = functools.reduce(
            jnp.logical_and, [part.finite for part in parts.values()]
        )
    linked = [x for x in layers if x.link is not None and x.name in factors]
    if linked:
        joint, together = linked_lib.refresh(linked, factors, damping, sharing)
        found |= joint
        for layer in linked:
            assert layer.link is not None
            finite[layer.name] = together[layer.link.root]
    return found, finite


@jax.named_scope("kfac_precondition")
def precondition(
    layers: Sequence[Layer],
    factors: Factors,
    inverses: Factors,
    leaves: Sequence[Array | None],
    products: Products,
    sharing: Distribution | None = None,
) -> tuple[list[Array | None], Array]:
    """Applies the inverses to a vector's leaves.

    Leaves without a block stay as they are.

    Args:
      layers: the plan's layers.
      factors: the moving averages, of which those that a block carries are used.
      inverses: from `refresh_inverses`.
      leaves: the vector's leaves; None where hidden by a mask.
      products: what some of the vector's matrices may be products of.
      sharing: devices that keep rows of the inverses.

    Returns:
      The leaves of the product, and its squared length (which counts what a mask hides
      of a layer).
    """
    blocks = _blocks(layers)
    dtypes = {layer.name: layer.dtype for layer in layers}
    vectors = layer_vectors(layers, leaves)
    carried = {
        x.name: {n: factors[x.name][n] for n in x.carried_shapes} for x in layers
    }
    linked = [x.name for x in layers if x.link is not None and x.name in vectors]
    wide = {name: v.astype(dtypes[name]) for name, v in vectors.items()}
    if by_rows(sharing):
        solved = rows_lib.solve(layers, inverses, wide, sharing)
        rest = [x for x in layers if x.name not in solved and x.name in wide]
        inverses = rows_lib.whole(rest, inverses, "inverse_shapes", sharing)
    else:
        solved = products_lib.solve(layers, inverses, wide, products)
    solved |= {
        name: blocks[name].solve(carried[name] | inverses[name], v)
        for name, v in wide.items()
        if name not in linked and name not in solved
    }
    if linked:
        joint = {name: wide[name] for name in linked}
        solved |= linked_lib.solve(layers, inverses, joint)
    covered = {i for layer in layers if layer.name in solved for i in layer.leaves}
    rest = [x for i, x in enumerate(leaves) if x is not None and i not in covered]
    everything = [*solved.values(), *rest]
    square = inner_product(everything, everything)
    return layer_leaves(layers, solved, leaves), square
