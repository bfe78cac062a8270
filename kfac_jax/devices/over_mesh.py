"""Devices that run one program over sharded arrays, under `jit`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kfac_jax._utils.arguments import shown
from kfac_jax.devices.base import Task
from kfac_jax.devices.over_axis import OverAxis, as_names, check_names
from kfac_jax.devices.rows import Shape, rows_shape
from kfac_jax.devices.several import Several, Shared

K = TypeVar("K")
S = TypeVar("S")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class OverMesh(Several):
    """The devices of a mesh share the work, in a step under `jit`.

    For `kfac(..., devices=OverMesh(mesh))` in a step whose arrays are sharded over
    the mesh, which needs nothing else: the compiler averages statistics and gradients.
    Without it every device inverts every factor. Each damped factor has one device as
    its owner, by cost, the largest first; each inverts its own, all of them together
    what is too large for one, and one collective hands out all inverses.
    Eigendecompositions (`blocks.Eigen`) and what `BlockTridiagonal` decomposes have
    owners too.

    With `state_axes` the state is sharded over those axes, see `OverAxis`.

    Attributes:
      mesh: the devices; its axes may be of type `Auto` or `Explicit`.
      axes: the mesh axes along which devices share; along others they do the same work.
        Empty for all.
      state_axes: along which of them the state is cut into parts; none by default.

    >>> import jax
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> OverMesh(mesh).axes
    ('data',)
    """

    mesh: Mesh
    axes: tuple[str, ...] = ()
    state_axes: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks that the mesh has the axes."""
        if not isinstance(self.mesh, Mesh):
            raise TypeError(
                f"OverMesh needs a jax.sharding.Mesh as mesh; got {shown(self.mesh)}."
            )
        check_names("axes", self.axes)
        check_names("state_axes", self.state_axes)
        names = as_names(self.axes) or self.mesh.axis_names
        missing = [name for name in names if name not in self.mesh.axis_names]
        if missing:
            raise ValueError(
                f"OverMesh shares over axes of its mesh, {self.mesh.axis_names}: "
                f"expected some of them, got {missing}. Name axes that the mesh has."
            )
        object.__setattr__(self, "axes", names)
        object.__setattr__(self, "state_axes", as_names(self.state_axes))
        missing = [name for name in self.state_axes if name not in names]
        if missing:
            raise ValueError(
                f"OverMesh cuts the state along axes that it shares over, {names}: "
                f"expected some of them, got {missing}. Add them to axes, or leave "
                "them out of state_axes."
            )

    @property
    def _inside(self) -> OverAxis:
        """The same devices, seen from inside of a `shard_map` over the mesh."""
        return OverAxis(self.axes, self.state_axes)

    def size(self) -> int:
        """The number of devices that share the work."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    def keepers(self) -> int:
        """The number of parts that the state is cut into."""
        return math.prod(self.mesh.shape[axis] for axis in as_names(self.state_axes))

    # ------------------------------------------------------------------ collectives

    def mean(self, tree: T) -> T:
        """Returns the tree: under `jit` arrays are those of all devices already."""
        return tree

    def sums(self, weight: Array, counts: S, sums: T) -> tuple[Array, S, T]:
        """Returns the arguments, which are sums already; of `sums` the rows."""
        return weight, counts, self.tree_rows(sums)

    def everywhere(self, flags: Sequence[Array]) -> list[Array]:
        """Returns the flags: under `jit` they are those of all devices already."""
        return list(flags)

    def parts(self) -> int:
        """1: under `jit` an array is that of all devices."""
        return 1

    def joined(self, part: Array, axis: int = 0) -> Array:
        """Returns the array: under `jit` it is that of all devices already."""
        return part

    def own(self, whole: Array) -> Array:
        """Returns the array: under `jit` all devices' parts are one."""
        return whole

    # ------------------------------------------------------------------------- rows

    def row_shape(self, shape: Shape) -> Shape:
        """The shape of all devices' rows."""
        if not self.cuts_state:
            return shape
        return rows_shape(shape, self.keepers())

    def rows(self, leaves: Sequence[Array]) -> list[Array]:
        """Cuts arrays into rows; each device takes its own."""
        if not self.cuts_state:
            return list(leaves)
        # In a `shard_map`, as every device has the full arrays and need only slice
        # them. A sharding constraint would leave it to the compiler, which exchanges
        # parts of arrays.
        cut = self._mapped(self._inside.rows, (P(),), P(self.state_axes))
        return jax.jit(cut)(list(leaves))

    def full(self, rows: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        """Joins the rows of arrays, in one collective for each type."""
        if not self.cuts_state:
            return list(rows)
        return self.apart(lambda over, rows, _: over.full(rows, shapes), rows, ())

    def apart(
        self, function: Callable[[OverAxis, Any, Any], T], rows: Any, full: Any
    ) -> T:
        """Calls the function in a `shard_map`, with these devices as an `OverAxis`."""
        local = functools.partial(function, self._inside)
        return self._mapped(local, (P(self.state_axes), P()), P())(rows, full)

    def _mapped(
        self, function: Callable[..., T], in_specs: tuple[P, ...], out_specs: P
    ) -> Callable[..., T]:
        """Maps a function over the mesh."""
        # In context there may be the same mesh with axes of other types (Auto, within
        # `axis_types.auto`); `shard_map` takes no other mesh than that in context.
        here = jax.sharding.get_abstract_mesh()
        same = here == self.mesh.abstract_mesh or here.shape != self.mesh.shape
        mesh = self.mesh if same else here
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs
        )

    # --------------------------------------------------------------------- inversion

    def map(
        self,
        stacks: Sequence[Array],
        function: Callable[[Array], Array],
        shared: Shared | None = None,
    ) -> list[Array]:
        """Maps like `OverAxis`, in a `shard_map`."""

        def local(stacks: list[Array]) -> list[Array]:
            return self._inside.map(stacks, function, shared)

        return self._mapped(local, (P(),), P())(list(stacks))

    def each(self, tasks: Mapping[K, Task]) -> dict[K, list[Array]]:
        """Runs tasks like `OverAxis`, in a `shard_map`."""

        def local(operands: list[Any]) -> list[list[Array]]:
            local_tasks = {
                name: task._replace(operand=operand)
                for (name, task), operand in zip(tasks.items(), operands, strict=True)
            }
            return [*self._inside.each(local_tasks).values()]

        operands = [task.operand for task in tasks.values()]
        found = self._mapped(local, (P(),), P())(operands)
        return dict(zip(tasks, found, strict=True))
