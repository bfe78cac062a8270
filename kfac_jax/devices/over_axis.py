"""Devices that run one step together, each on its part of the batch."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import _compat
from kfac_jax._utils.arguments import shown
from kfac_jax._utils.ordering import known_false_after
from kfac_jax.devices.base import Task
from kfac_jax.devices.collectives import together
from kfac_jax.devices.planner import Allotment, Stack, allot, balance
from kfac_jax.devices.rows import Shape, fill, from_rows, own_shape, to_rows
from kfac_jax.devices.several import Several, Shared
from kfac_jax.linalg._shared import Columns

K = TypeVar("K")
S = TypeVar("S")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class OverAxis(Several):
    """The devices along a named axis of `pmap` or `shard_map` share the work.

    For `kfac(..., devices=OverAxis("batch"))` in a step that each device runs on
    its own part of the batch. In it, `update`

    * sums the statistics over the axis, where JAX has not done so, and averages what
      adaptive rules evaluate: the quadratic model and the loss;
    * gives every damped factor an owner, by cost, the largest first; each device
      inverts its own, all of them together what is too large for one, and one
      collective hands out all inverses.

    Gradients must be averages already, as any optimizer needs them:
    `grads = jax.lax.pmean(grads, "batch")`, or, in a `shard_map` that checks what
    varies, where JAX has summed them, divided by `jax.lax.axis_size("batch")`. Samples
    must differ: fold `jax.lax.axis_index("batch")` into the key. Eigendecompositions
    (`blocks.Eigen`) and what `BlockTridiagonal` decomposes have owners too.

    By default the state is the same on all devices, and nothing in it depends on their
    number: the least communication. With `state_axes` the devices along those axes keep
    a part each of factors, inverses and velocity, the rows of every matrix, and share
    the multiplication by the inverses, whose results they exchange in every step: the
    least memory if these are all axes, and something between with some of them. Then
    `init` is called in the mapped function too; `state_specs` and `whole_state` tell
    how the state lies.

    Attributes:
      axis: the name of the axis, or a tuple of names whose product counts.
      state_axes: along which of them the state is cut into parts; none by default.

    References:
      Pauloski et al. 2021 (arXiv:2107.01739) for the choice between communication and
      memory, there by owners of layers.

    >>> OverAxis("batch")
    OverAxis(axis='batch', state_axes=())
    """

    axis: str | tuple[str, ...]
    state_axes: str | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the types."""
        names = as_names(self.axis)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise TypeError(
                "OverAxis needs the name of an axis, or a tuple of names; got as axis "
                f"{shown(self.axis)}."
            )
        check_names("state_axes", self.state_axes)
        object.__setattr__(self, "state_axes", as_names(self.state_axes))
        missing = [name for name in self.state_axes if name not in names]
        if missing:
            raise ValueError(
                "OverAxis cuts the state along some of its own axes: expected "
                f"state_axes out of {names}, got {missing}. Add them to axis, or leave "
                "them out."
            )

    def size(self) -> int:
        """The number of devices that share the work.

        Raises:
          ValueError: if the axis does not exist where this is called.
        """
        return self._size(self.axis)

    def keepers(self) -> int:
        """The number of parts that the state is cut into."""
        return self._size(self.state_axes) if self.state_axes else 1

    def _size(self, axes: str | tuple[str, ...]) -> int:
        try:
            return int(jax.lax.axis_size(axes))
        except NameError as error:
            raise ValueError(
                f"The axis of OverAxis({self.axis!r}) does not exist here: {error}. "
                "Call update (and with state_axes init) inside of pmap(..., "
                "axis_name=...) or of a shard_map over a mesh with that axis, or leave "
                "the devices out."
            ) from None

    # ------------------------------------------------------------------ collectives

    def mean(self, tree: T) -> T:
        """Averages the arrays that differ between devices."""
        leaves, treedef = jax.tree.flatten(tree)
        places = [i for i, each in enumerate(self._differs(leaves)) if each]
        totals = self._sum([leaves[i] for i in places])
        for i, total in zip(places, totals, strict=True):
            leaves[i] = total / self.size()
        return jax.tree.unflatten(treedef, leaves)

    def sums(self, weight: Array, counts: S, sums: T) -> tuple[Array, S, T]:
        """Sums in one collective for each type; `sums` only if the weight is positive.

        The condition is the summed weight, the same on all devices: a collective that
        only some devices enter would block for ever.
        """
        small, small_tree = jax.tree.flatten((weight, counts))
        leaves, treedef = jax.tree.flatten(sums)
        if not any(self._differs([*small, *leaves])):  # JAX has summed them
            return weight, counts, jax.tree.unflatten(treedef, self.rows(leaves))
        weight, counts = jax.tree.unflatten(small_tree, self._sum(small))
        reduce = self._sum_rows if self.cuts_state else self._sum
        shapes = jax.eval_shape(reduce, leaves)
        done = jax.lax.cond(
            weight > 0, reduce, lambda _: list(map(_compat.zeros, shapes)), leaves
        )
        return weight, counts, jax.tree.unflatten(treedef, done)

    def everywhere(self, flags: Sequence[Array]) -> list[Array]:
        """Whether each flag is true on all devices that keep a part."""
        if not flags or not self.cuts_state:
            return list(flags)
        failed = (~jnp.stack(flags)).astype(jnp.int32)
        return list(jax.lax.psum(failed, self.state_axes) == 0)

    def parts(self) -> int:
        """The number of devices."""
        return self.size()

    def joined(self, part: Array, axis: int = 0) -> Array:
        """Gathers the parts."""
        moved = jnp.moveaxis(_compat.all_gather(part, self.axis), 0, axis)
        shape = (*part.shape[:axis], -1, *part.shape[axis + 1 :])
        return moved.reshape(shape)

    def own(self, whole: Array) -> Array:
        """Cuts the part of this device's number."""
        count = len(whole) // self.size()
        start = jax.lax.axis_index(self.axis) * count
        return jax.lax.dynamic_slice_in_dim(whole, start, count)

    def _differs(self, leaves: Sequence[Array]) -> list[bool]:
        """For each array whether it may differ between devices."""
        self.size()  # raises if the axis does not exist
        axes = as_names(self.axis)
        # A device's index differs between devices. If even its type does not say so,
        # types say nothing here (`pmap`, or `check_vma=False`), and any array may.
        types_tell = _compat.varies(jax.lax.axis_index(self.axis), axes)
        return [_compat.varies(x, axes) or not types_tell for x in leaves]

    def _sum(self, leaves: Sequence[Array]) -> list[Array]:
        """The sums over the devices, in one collective for each type."""
        return together(leaves, functools.partial(jax.lax.psum, axis_name=self.axis))

    def _sum_rows(self, leaves: Sequence[Array]) -> list[Array]:
        """The rows of the sums that this device keeps."""
        devices = self.keepers()
        others = tuple(x for x in as_names(self.axis) if x not in self.state_axes)
        cut = [to_rows(x, devices) for x in leaves]
        cut = [x.reshape(devices, len(x) // devices, *x.shape[1:]) for x in cut]

        def scatter(x: Array) -> Array:
            own = jax.lax.psum_scatter(x, self.state_axes)
            return jax.lax.psum(own, others) if others else own

        return together(cut, scatter, leading=1)

    # ------------------------------------------------------------------------- rows

    def row_shape(self, shape: Shape) -> Shape:
        """The shape of a device's rows."""
        return own_shape(shape, self.keepers()) if self.cuts_state else shape

    def rows(self, leaves: Sequence[Array]) -> list[Array]:
        """A device's rows of arrays that all devices have."""
        if not self.cuts_state:
            return list(leaves)
        devices = self.keepers()
        return [self.own_part(to_rows(x, devices)) for x in leaves]

    def own_part(self, x: Array) -> Array:
        """This device's part of the first axis, padded with zeros."""
        x = fill(x, self.keepers())
        count = len(x) // self.keepers()
        start = jax.lax.axis_index(self.state_axes) * count
        return jax.lax.dynamic_slice_in_dim(x, start, count)

    def full(self, rows: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        """Joins the rows of arrays, in one collective for each type."""
        if not self.cuts_state:
            return list(rows)
        pairs = zip(self.gather(rows), shapes, strict=True)
        return [from_rows(x, shape) for x, shape in pairs]

    def gather(self, parts: Sequence[Array]) -> list[Array]:
        """Concatenates the devices' parts, `[devices · rows, ...]`."""
        gather = functools.partial(_compat.all_gather, axis=self.state_axes)
        return [x.reshape(-1, *x.shape[2:]) for x in together(parts, gather)]

    def apart(
        self, function: Callable[["OverAxis", Any, Any], T], rows: Any, full: Any
    ) -> T:
        """Calls the function, as every device runs this code."""
        return function(self, rows, full)

    # --------------------------------------------------------------------- inversion

    def map(
        self,
        stacks: Sequence[Array],
        function: Callable[[Array], Array],
        shared: Shared | None = None,
    ) -> list[Array]:
        """Gives each matrix, the largest first, to the device with least to do."""
        me = jax.lax.axis_index(self.axis)
        sizes = [Stack(len(x), x.shape[-1], x.dtype) for x in stacks]
        allotment = allot(sizes, self.size(), shared is not None)
        columns = Columns(me, allotment.devices, self._join_columns)
        results: dict[int, Array] = {}
        mine: dict[int, Array] = {}
        waits: Array | None = None
        for i, division in enumerate(allotment.divisions):
            if division.shared:
                assert shared is not None
                results[i] = shared(stacks[i], columns)
                continue
            count = jnp.asarray(division.counts)[me]
            if waits is not None:  # one after the other, see linalg.inverse_many
                started = known_false_after(waits)
                count = jnp.where(started, jnp.zeros_like(count), count)
            first = jnp.asarray(division.first)[me]
            order, slots = jnp.asarray(division.order), division.slots
            mine[i] = _own_results(function, stacks[i], order, first, count, slots)
            waits = mine[i][0, 0, 0]
        results |= self._exchange(mine, allotment, me)
        return [results[i] for i in range(len(stacks))]

    def _exchange(
        self, mine: Mapping[int, Array], allotment: Allotment, me: Array
    ) -> dict[int, Array]:
        """All devices' results, `[k, d, d]`, in one collective for each type."""
        results: dict[int, Array] = {}
        for members, packing in allotment.exchanges:
            own = jnp.zeros((packing.length,), mine[members[0]].dtype)
            own = _compat.vary_like(own, me)
            for i, starts in zip(members, packing.starts, strict=True):
                start = jnp.asarray(starts)[me]
                own = jax.lax.dynamic_update_slice_in_dim(
                    own, mine[i].reshape(-1), start, 0
                )
            everyone = _compat.all_gather(own, self.axis)
            for i, starts in zip(members, packing.starts, strict=True):
                shape, division = mine[i].shape[1:], allotment.divisions[i]
                size, owners = math.prod(shape), division.owners
                at = (
                    jnp.asarray(owners),
                    jnp.asarray(starts[owners] + division.places * size),
                )
                found = jax.vmap(functools.partial(_piece, everyone, size))(*at)
                results[i] = found.reshape(-1, *shape)
        return results

    def each(self, tasks: Mapping[K, Task]) -> dict[K, list[Array]]:
        """Runs tasks, and sums results (zero but on owners): one collective a type."""
        me = jax.lax.axis_index(self.axis)
        own: list[list[Array]] = []
        owners = balance([task.cost for task in tasks.values()], self.size())
        for owner, (_, function, operand) in zip(owners, tasks.values(), strict=True):
            mine = me == owner
            if own and own[-1]:  # one after the other, see linalg.inverse_many
                mine &= ~known_false_after(jnp.ravel(own[-1][0])[0])
            shapes = jax.eval_shape(function, operand)

            compute = functools.partial(_varying_results, function, me)
            nothing = functools.partial(_varying_zeros, shapes, me)
            own.append(jax.lax.cond(mine, compute, nothing, operand))
        everyone = iter(self._sum([x for part in own for x in part]))
        return {
            name: [next(everyone) for _ in part]
            for name, part in zip(tasks, own, strict=True)
        }

    def _join_columns(self, x: Array) -> Array:
        """Joins all devices' columns `[..., c]` to `[..., devices · c]`."""
        everyone = _compat.all_gather(x, self.axis)
        return jnp.moveaxis(everyone, 0, -2).reshape(*x.shape[:-1], -1)


def as_names(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    """Names of axes as a tuple, also from a single name."""
    return tuple(axes) if isinstance(axes, tuple | list) else (axes,)


def check_names(argument: str, axes: Any) -> None:
    """Raises TypeError unless they are names of axes, or none."""
    if not all(isinstance(name, str) for name in as_names(axes)):
        raise TypeError(
            f"{argument} must be the name of an axis, or a tuple of names; got "
            f"{shown(axes)}."
        )


def _piece(everyone: Array, size: int, owner: Array, start: Array) -> Array:
    """A run of the entries of one device, from `[devices, n]`."""
    return jax.lax.dynamic_slice(everyone, (owner, start), (1, size))[0]


def _varying_results(
    function: Callable[[Any], list[Array]], me: Array, operand: Any
) -> list[Array]:
    return [_compat.vary_like(x, me) for x in function(operand)]


def _varying_zeros(
    shapes: Sequence[jax.ShapeDtypeStruct], me: Array, _: Any
) -> list[Array]:
    return [_compat.vary_like(_compat.zeros(x), me) for x in shapes]


def _own_results(
    function: Callable[[Array], Array],
    stack: Array,
    order: Array,
    first: Array,
    count: Array,
    slots: int,
) -> Array:
    """The results for matrices `order[first : first + count]`, `[slots, d, d]`.

    On CPUs they are computed one by one, see `linalg.inverse_many`; elsewhere as one
    batch, by devices that own any.
    """
    zeros = jnp.zeros((slots, *stack.shape[1:]), stack.dtype)
    zeros = _compat.vary_like(zeros, first, stack)

    def in_turn(stack: Array, first: Array, count: Array) -> Array:
        def one(i: Array, results: Array) -> Array:
            matrix = jax.lax.dynamic_slice_in_dim(stack, order[first + i], 1)
            result = function(matrix).astype(results.dtype)
            return jax.lax.dynamic_update_slice_in_dim(results, result, i, 0)

        return jax.lax.fori_loop(jnp.zeros_like(count), count, one, zeros)

    def at_once(stack: Array, first: Array, count: Array) -> Array:
        def batch(stack: Array) -> Array:
            places = jnp.minimum(first + jnp.arange(slots), len(stack) - 1)
            return function(stack[order[places]]).astype(zeros.dtype)

        return jax.lax.cond(count > 0, batch, lambda _: zeros, stack)

    return jax.lax.platform_dependent(stack, first, count, cpu=in_turn, default=at_once)
