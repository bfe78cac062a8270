"""Who does what on several devices, and how they exchange it."""

import dataclasses
import functools
from typing import Any, TypeGuard, TypeVar

import jax

from kfac_jax._arguments import shown
from kfac_jax.linalg._psd import Apply
from kfac_jax.linalg._shared import shared_inverse

from ._over_axis import OverAxis as OverAxis
from ._over_mesh import OverMesh as OverMesh

T = TypeVar("T")

Distribution = OverAxis | OverMesh


def by_rows(distribution: Distribution | None) -> TypeGuard[Distribution]:
    """Whether the devices keep parts of the state."""
    return distribution is not None and distribution.by_rows


def mean(distribution: Distribution | None, tree: T) -> T:
    """The average over the devices, where each has its own."""
    return tree if distribution is None else distribution.mean(tree)


def whole(distribution: Distribution | None) -> Distribution | None:
    """The same devices, each of which has all of the state."""
    if distribution is None:
        return None
    return dataclasses.replace(distribution, state_axes=())


def kept(distribution: Distribution | None, tree: T) -> T:
    """What a device keeps of arrays that all have."""
    if not by_rows(distribution):
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, distribution.rows(leaves))


def apply(distribution: Distribution | None) -> Apply | None:
    """What `linalg.inverse_many` applies inversion by; None for one device."""
    if distribution is None:
        return None
    return functools.partial(distribution.map, shared=shared_inverse)


def check(distribution: Any, name: str = "distribution") -> None:
    """Raises TypeError unless it is a distribution or None."""
    if distribution is not None and not isinstance(distribution, Distribution):
        raise TypeError(
            f"{name} must be None, kfac_jax.OverAxis(axis name) or "
            f"kfac_jax.OverMesh(mesh); got {shown(distribution)}."
        )
