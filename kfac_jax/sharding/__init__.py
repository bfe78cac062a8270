"""Who does what on several devices, and how they exchange it."""

from typing import Any, TypeVar

from ._over_axis import OverAxis as OverAxis
from ._over_mesh import OverMesh as OverMesh

T = TypeVar("T")

Distribution = OverAxis | OverMesh


def mean(distribution: Distribution | None, tree: T) -> T:
    """The average over the devices, where each has its own."""
    return tree if distribution is None else distribution.mean(tree)


def check(distribution: Any) -> None:
    """Raises TypeError unless it is a distribution or None."""
    if distribution is not None and not isinstance(distribution, Distribution):
        raise TypeError(
            "distribution must be None, kfac_jax.OverAxis(axis name) or "
            f"kfac_jax.OverMesh(mesh); got {distribution!r}."
        )
