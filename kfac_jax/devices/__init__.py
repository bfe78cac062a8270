"""Who does what on several devices, and how they exchange it."""

import dataclasses
import functools
from typing import Any, TypeGuard, TypeVar

import jax

from kfac_jax._utils.arguments import shown
from kfac_jax.linalg._psd import Apply
from kfac_jax.linalg._shared import shared_inverse

from .over_axis import OverAxis as OverAxis
from .over_mesh import OverMesh as OverMesh

T = TypeVar("T")

Distribution = OverAxis | OverMesh


def by_rows(devices: Distribution | None) -> TypeGuard[Distribution]:
    """Whether the devices keep parts of the state."""
    return devices is not None and devices.by_rows


def mean(devices: Distribution | None, tree: T) -> T:
    """The average over the devices, where each has its own."""
    return tree if devices is None else devices.mean(tree)


def whole(devices: Distribution | None) -> Distribution | None:
    """The same devices, each of which has all of the state."""
    if devices is None:
        return None
    return dataclasses.replace(devices, state_axes=())


def kept(devices: Distribution | None, tree: T) -> T:
    """What a device keeps of arrays that all have."""
    if not by_rows(devices):
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, devices.rows(leaves))


def apply(devices: Distribution | None) -> Apply | None:
    """What `linalg.inverse_many` applies inversion by; None for one device."""
    if devices is None:
        return None
    return functools.partial(devices.map, shared=shared_inverse)


def check(devices: Any, name: str = "devices") -> None:
    """Raises TypeError unless they are an `OverAxis`, an `OverMesh` or None."""
    if devices is not None and not isinstance(devices, Distribution):
        raise TypeError(
            f"{name} must be None, kfac_jax.OverAxis(axis name) or "
            f"kfac_jax.OverMesh(mesh); got {shown(devices)}."
        )
