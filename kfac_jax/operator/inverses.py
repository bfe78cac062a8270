"""Inverses of the damped curvature: computed, kept where they fail, applied."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from chex import Numeric
from jax import Array

from kfac_jax._utils.vectors import inner_product
from kfac_jax.devices import ALONE, Devices, Task
from kfac_jax.linalg import Inverted
from kfac_jax.operator import by_rows
from kfac_jax.plan.group import (
    Factors,
    Group,
    Name,
    Products,
    ToInvert,
    Vectors,
    layers_of,
    widened,
)
from kfac_jax.plan.layer import Layer


def initial(groups: Sequence[Group]) -> Factors:
    """Identities: until the first refresh succeeds, steps follow the gradient."""
    found: Factors = {}
    for group in groups:
        found |= group.init_inverses()
    return found


@jax.named_scope("kfac_inverses")
def move(
    groups: Sequence[Group], factors: Factors, devices: Devices = ALONE
) -> Factors:
    """Moves factors that are in a basis to the present one.

    Args:
      groups: those whose factors are to be moved.
      factors: the moving averages, by layer name.
      devices: which share the work.

    Returns:
      All factors of those groups.
    """
    tasks: dict[Name, Task] = {}
    places: dict[Name, list[Name]] = {}
    for group in groups:
        name, own = (group.name, "basis"), {n: factors[n] for n in group.names}
        places[name] = _places(group, own)
        move = functools.partial(_moved, group, places[name])
        tasks[name] = Task(float(group.inversion_cost), move, own)
    result = {name: dict(factors[name]) for g in groups for name in g.names}
    for name, arrays in devices.each(tasks).items():
        for (layer, key), x in zip(places[name], arrays, strict=True):
            result[layer][key] = x
    return result


def _places(group: Group, factors: Factors) -> list[Name]:
    """Which factors a refresh changes; others need not be exchanged."""
    moved = jax.eval_shape(group.move, widened([group], factors))
    return [(name, key) for name, part in moved.items() for key in part]


def _moved(group: Group, places: Sequence[Name], factors: Factors) -> list[Array]:
    new = group.move(widened([group], factors))
    return [new[name][key].astype(factors[name][key].dtype) for name, key in places]


@jax.named_scope("kfac_inverses")
def refresh(
    groups: Sequence[Group],
    factors: Factors,
    old: Factors,
    damping: Array,
    devices: Devices = ALONE,
) -> tuple[Factors, Array]:
    """Inverts the damped factors; a group of which one is not finite keeps the old.

    Args:
      groups: the plan's groups; those without factors here keep the old, too.
      factors: the moving averages, by layer name.
      old: the inverses so far.
      damping: λ + η.
      devices: which share the inversion, and may keep rows of the inverses.

    Returns:
      The inverses, and how many layers failed.
    """
    present = [group for group in groups if group.name in factors]
    found, finite = compute(present, factors, damping, devices)
    found = devices.kept(found)
    result, failed = dict(old), jnp.zeros((), jnp.int32)
    for group in present:
        flag = finite[group.name]
        for name in group.names:
            result[name] = {
                key: jnp.where(flag, x, old[name][key]).astype(old[name][key].dtype)
                for key, x in found[name].items()
            }
            failed += (~flag).astype(jnp.int32)
    return result, failed


def compute(
    groups: Sequence[Group],
    factors: Factors,
    damping: Numeric,
    devices: Devices = ALONE,
) -> tuple[Factors, dict[str, Array]]:
    """Inverts the damped factors, matrices of one size of all groups as one batch.

    Args:
      groups: the groups.
      factors: the moving averages, by layer name.
      damping: λ + η.
      devices: which share the inversion.

    Returns:
      The inverses by layer name, and by group's name whether they are finite.
    """
    factors = widened(groups, factors)
    wanted = {group.name: group.to_invert(factors, damping) for group in groups}
    inverted: dict[Name, Inverted] = {}
    for part in wanted.values():
        for name, (factor, shift) in part.elementwise.items():
            inverse = 1.0 / (factor + shift.astype(factor.dtype))
            inverted[name] = Inverted(inverse, jnp.isfinite(inverse).all())
    of_roots = [wanted[x.name] for x in groups if x.wants_roots]
    others = [wanted[x.name] for x in groups if not x.wants_roots]
    inverted |= devices.inverses(_shifted(others))
    unknown = jnp.asarray(True)  # the group looks at what it makes of roots
    for name, root in devices.roots(_shifted(of_roots)).items():
        inverted[name] = Inverted(root, unknown)
    result: Factors = {}
    finite: dict[str, Array] = {}
    for group in groups:
        part = wanted[group.name]
        own = {name: inverted[name] for name in (*part.elementwise, *part.matrices)}
        arrays, finite[group.name] = group.inverses(own, factors, devices)
        result |= arrays
    return result, finite


def _shifted(parts: Sequence[ToInvert]) -> dict[Name, tuple[Array, Array]]:
    return {
        name: (x, jnp.broadcast_to(s, x.shape[:-2]))
        for part in parts
        for name, (x, s) in part.matrices.items()
    }


@jax.named_scope("kfac_precondition")
def precondition(
    groups: Sequence[Group],
    factors: Factors,
    inverses: Factors,
    leaves: Sequence[Array | None],
    products: Products,
    devices: Devices = ALONE,
) -> tuple[list[Array | None], Array]:
    """Applies the inverses to a vector's leaves.

    Leaves without a block stay as they are.

    Args:
      groups: the plan's groups.
      factors: the moving averages, of which those that are carried are used.
      inverses: from `refresh`.
      leaves: the vector's leaves; None where hidden by a mask.
      products: what some of the vector's matrices may be products of.
      devices: which may keep rows of the inverses.

    Returns:
      The leaves of the product, and its squared length (which counts what a mask hides
      of a layer).
    """
    layers = layers_of(groups)
    vectors = to_vectors(layers, leaves)
    dtypes = {layer.name: layer.dtype for layer in layers}
    wide = {name: v.astype(dtypes[name]) for name, v in vectors.items()}
    solved = by_rows.solve(groups, inverses, wide, devices)
    rest = [x for x in groups if any(n in wide and n not in solved for n in x.names)]
    whole = by_rows.whole(
        {n: s for x in rest for n, s in x.inverse_shapes.items()}, inverses, devices
    )
    solved |= apply(rest, factors, whole, wide, products)
    covered = {i for layer in layers if layer.name in solved for i in layer.leaves}
    others = [x for i, x in enumerate(leaves) if x is not None and i not in covered]
    everything = [*solved.values(), *others]
    square = inner_product(everything, everything)
    return to_leaves(layers, solved, leaves), square


def apply(
    groups: Sequence[Group],
    factors: Factors,
    inverses: Factors,
    vectors: Vectors,
    products: Products,
) -> Vectors:
    """Applies inverses to layers' matrices, class by class of the groups.

    Args:
      groups: the groups.
      factors: the moving averages.
      inverses: by layer name, whole.
      vectors: by layer name.
      products: what some of them may be products of.

    Returns:
      The products by layer name.
    """
    given: Factors = {}
    for group in groups:
        for name, carried in group.carried.items():
            given[name] = {n: factors[name][n] for n in carried} | inverses[name]
    kinds: dict[type[Group], list[Group]] = {}
    for group in groups:
        kinds.setdefault(type(group), []).append(group)
    solved: Vectors = {}
    for kind, members in kinds.items():
        solved |= kind.solve_all(members, given, vectors, products)
    return solved


def to_vectors(layers: Sequence[Layer], leaves: Sequence[Array | None]) -> Vectors:
    """Joins leaves to one matrix for each layer with a block.

    A layer all of whose leaves are None (hidden by a mask) is left out; if only some
    are, those count as zero.
    """
    result: Vectors = {}
    for layer in layers:
        own = [leaves[i] for i in layer.leaves]
        if layer.block is None or all(x is None for x in own):
            continue
        like = next(x for x in own if x is not None)
        parts = [
            jnp.zeros(shape, like.dtype) if x is None else jnp.asarray(x)
            for x, shape in zip(own, layer.shapes, strict=True)
        ]
        result[layer.name] = layer.to_matrix(parts)
    return result


def to_leaves(
    layers: Sequence[Layer], vectors: Vectors, leaves: Sequence[Array | None]
) -> list[Array | None]:
    """Inverts `to_vectors`; leaves of layers that are not in it stay as they are."""
    result = list(leaves)
    for layer in layers:
        if layer.name not in vectors:
            continue
        parts = layer.from_matrix(vectors[layer.name])
        for i, part in zip(layer.leaves, parts, strict=True):
            old = result[i]
            if old is not None:
                result[i] = part.astype(old.dtype)
    return result
