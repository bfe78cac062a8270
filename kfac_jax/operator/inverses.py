"""Inverses of the damped curvature: how they are computed, replaced and applied."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from chex import Numeric
from jax import Array

from kfac_jax._utils.ordering import known_false_after
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
    """Renews bases, and moves the factors that are expressed in them.

    Args:
      groups: the groups whose factors are to be moved.
      factors: the moving averages, by layer name.
      devices: the devices that share the work.

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
    """The names of the factors that a refresh changes; only these are exchanged."""
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
    """Inverts the damped factors, and replaces the old inverses where all is finite.

    Args:
      groups: the plan's groups. A group without `factors` keeps its old inverses, and
        so does a group with an inverse that is not finite.
      factors: the moving averages, by layer name.
      old: the inverses so far.
      damping: λ + η.
      devices: the devices that share the inversion, and may keep rows of the inverses.

    Returns:
      The inverses, and the number of layers whose inversion failed.
    """
    present = [group for group in groups if group.name in factors]
    found, finite = compute(present, factors, damping, devices)
    found = devices.tree_rows(found)
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
    damping: Numeric | Mapping[str, Numeric],
    devices: Devices = ALONE,
) -> tuple[Factors, dict[str, Array]]:
    """Inverts the damped factors of all groups, matrices of one size as one batch.

    Args:
      groups: the groups.
      factors: the moving averages, by layer name.
      damping: λ + η, of all groups or by their names.
      devices: the devices that share the inversion.

    Returns:
      The inverses by layer name, and whether they are finite by the group's name.
    """
    factors = widened(groups, factors)
    names = [group.name for group in groups]
    dampings = (
        damping if isinstance(damping, Mapping) else dict.fromkeys(names, damping)
    )
    wanted = {x.name: x.to_invert(factors, dampings[x.name]) for x in groups}
    inverted: dict[Name, Inverted] = {}
    for part in wanted.values():
        for name, (factor, shift) in part.elementwise.items():
            inverse = 1.0 / (factor + shift.astype(factor.dtype))
            inverted[name] = Inverted(inverse, jnp.isfinite(inverse).all())
    of_roots = [wanted[x.name] for x in groups if x.wants_roots]
    others = [wanted[x.name] for x in groups if not x.wants_roots]
    found = devices.inverses(_shifted(others))
    unknown = jnp.asarray(True)  # the group checks what it computes from the roots
    for name, root in devices.roots(_after(found, _shifted(of_roots))).items():
        inverted[name] = Inverted(root, unknown)
    inverted |= found
    result: Factors = {}
    finite: dict[str, Array] = {}
    for group in groups:
        part = wanted[group.name]
        own = {name: inverted[name] for name in (*part.elementwise, *part.matrices)}
        arrays, finite[group.name] = group.inverses(
            own, factors, dampings[group.name], devices
        )
        result |= arrays
    return result, finite


def _shifted(parts: Sequence[ToInvert]) -> dict[Name, tuple[Array, Array]]:
    return {
        name: (x, jnp.broadcast_to(s, x.shape[:-2]))
        for part in parts
        for name, (x, s) in part.matrices.items()
    }


def _after(
    found: Mapping[Name, Inverted], shifted: dict[Name, tuple[Array, Array]]
) -> dict[Name, tuple[Array, Array]]:
    """Matrices to factorise once those inverses are there.

    Two batched calls of LAPACK at a time can block for ever, see `linalg.inverse_many`.
    """
    entries = [
        jnp.ravel(x.inverse)[0].astype(float) for x in found.values() if x.inverse.size
    ]
    if not entries:
        return shifted
    zero = known_false_after(jnp.stack(entries).sum())
    return {name: (x, s + zero.astype(s.dtype)) for name, (x, s) in shifted.items()}


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
      factors: the moving averages; only those in `carried` are used.
      inverses: from `refresh`.
      leaves: the vector's leaves; None where hidden by a mask.
      products: X and dY, where one of the vector's matrices may be `Xᵀ dY`.
      devices: the devices, which may keep rows of the inverses.

    Returns:
      The leaves of the product, and its squared length. (If a mask hides some of a
      layer's parameters, the length counts their entries too.)
    """
    layers = layers_of(groups)
    vectors = to_vectors(layers, leaves)
    dtypes = {layer.name: layer.dtype for layer in layers}
    wide = {name: v.astype(dtypes[name]) for name, v in vectors.items()}
    solved = by_rows.solve(groups, inverses, wide, devices)
    rest = [x for x in groups if any(n in wide and n not in solved for n in x.names)]
    full = by_rows.full(
        {n: s for x in rest for n, s in x.inverse_shapes.items()}, inverses, devices
    )
    solved |= apply(rest, factors, full, wide, products)
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
    """Applies inverses to layers' matrices, all groups of one class at once.

    Args:
      groups: the groups.
      factors: the moving averages.
      inverses: the full inverses, by layer name.
      vectors: by layer name.
      products: X and dY, where a vector may be `Xᵀ dY`.

    Returns:
      The products by layer name.
    """
    usable: Factors = {}
    for group in groups:
        for name, carried in group.carried.items():
            usable[name] = {n: factors[name][n] for n in carried} | inverses[name]
    kinds: dict[type[Group], list[Group]] = {}
    for group in groups:
        kinds.setdefault(type(group), []).append(group)
    solved: Vectors = {}
    for kind, members in kinds.items():
        solved |= kind.solve_all(members, usable, vectors, products)
    return solved


def to_vectors(layers: Sequence[Layer], leaves: Sequence[Array | None]) -> Vectors:
    """Joins leaves to one matrix for each layer with a block.

    A leaf that is None (hidden by a mask) counts as zero. A layer whose leaves are all
    None is left out.
    """
    result: Vectors = {}
    for layer in layers:
        own = [leaves[i] for i in layer.leaves]
        if layer.block is None or all(x is None for x in own):
            continue
        like = next(x for x in own if x is not None)
        parts = [
            jnp.zeros(shape, like.dtype) if x is None else jnp.asarray(x)
            for x, shape in zip(own, layer.leaf_shapes, strict=True)
        ]
        result[layer.name] = layer.to_matrix(parts)
    return result


def to_leaves(
    layers: Sequence[Layer], vectors: Vectors, leaves: Sequence[Array | None]
) -> list[Array | None]:
    """Inverts `to_vectors`; leaves of layers without a vector stay as they are."""
    result = list(leaves)
    for layer in layers:
        if layer.name not in vectors:
            continue
        own = [result[i] for i in layer.leaves]
        parts = layer.from_matrix(vectors[layer.name], own)
        for i, old, part in zip(layer.leaves, own, parts, strict=True):
            if old is not None:
                result[i] = part.astype(old.dtype)
    return result
