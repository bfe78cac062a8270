"""Devices that run one program over sharded arrays, under `jit`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kfac_jax.sharding._over_axis import OverAxis

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class OverMesh:
    """The devices of a mesh share the inversions, in a step under `jit`.

    For `kfac(..., distribution=OverMesh(mesh))` in a step whose arrays are sharded over
    the mesh, which needs nothing else: the compiler averages statistics and gradients.
    Without it every device inverts every factor. Each damped factor has one device as
    its owner, by cost, the largest first; each inverts its own, and one collective
    hands out all inverses, which all devices keep. Eigendecompositions (`blocks.Eigen`)
    and the sparse inverse of `BlockTridiagonal` are computed by every device.

    Attributes:
      mesh: the devices; its axes may be of type `Auto` or `Explicit`.
      axes: the mesh axes along which devices share; along others they do the same work.
        Empty for all.

    >>> import jax
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> OverMesh(mesh).axes
    ('data',)
    """

    mesh: Mesh
    axes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks that the mesh has the axes."""
        if not isinstance(self.mesh, Mesh):
            raise TypeError(
                f"OverMesh needs a jax.sharding.Mesh; got {type(self.mesh).__name__}."
            )
        names = (self.axes,) if isinstance(self.axes, str) else tuple(self.axes)
        names = names or self.mesh.axis_names
        missing = [name for name in names if name not in self.mesh.axis_names]
        if missing:
            raise ValueError(
                f"OverMesh shares over axes of its mesh, {self.mesh.axis_names}; got "
                f"{missing}. Name axes that the mesh has."
            )
        object.__setattr__(self, "axes", names)

    def mean(self, tree: T) -> T:
        """The same: arrays under `jit` are of all devices together."""
        return tree

    def map(
        self, stacks: Sequence[Array], function: Callable[[Array], Array]
    ) -> list[Array]:
        """Applies a function of `[k, d, d]`, each device to the matrices it owns.

        Args:
          stacks: `[k, d, d]` matrices.
          function: as for `OverAxis.map`.

        Returns:
          Its results.
        """

        def local(stacks: list[Array]) -> list[Array]:
            return OverAxis(self.axes).map(stacks, function)

        here = jax.sharding.get_abstract_mesh()
        same = here == self.mesh.abstract_mesh or here.shape != self.mesh.shape
        mesh = self.mesh if same else here  # its axes with other types
        mapped = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P())
        return mapped(list(stacks))
