"""Devices that run one step together, each on its part of the batch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kfac_jax._jaxpr import _compat
from kfac_jax._ordering import known_false_after
from kfac_jax.sharding._planner import assign

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class OverAxis:
    """The devices along a named axis of `pmap` or `shard_map` share the inversions.

    For `kfac(..., distribution=OverAxis("batch"))` in a step that each device runs on
    its own part of the batch. In it, `update`

    * averages the statistics over the axis (they may be averages already), and what
      adaptive rules evaluate: the quadratic model and the loss;
    * gives every damped factor an owner, by cost, the largest first; each device
      inverts its own, and one collective hands out all inverses.

    Gradients must be averages already, as any optimizer needs them:
    `grads = jax.lax.pmean(grads, "batch")`, or, in a `shard_map` that checks what
    varies, where JAX has summed them, divided by `jax.lax.axis_size("batch")`. Samples
    must differ: fold `jax.lax.axis_index("batch")` into the key. The state is the same
    on all devices, and nothing in it depends on their number. Eigendecompositions
    (`blocks.Eigen`) and the sparse inverse of `BlockTridiagonal` are computed by every
    device.

    Attributes:
      axis: the name of the axis, or a tuple of names whose product counts.

    >>> OverAxis("batch")
    OverAxis(axis='batch')
    """

    axis: str | tuple[str, ...]

    def __post_init__(self) -> None:
        """Checks the type."""
        names = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise TypeError(
                "OverAxis needs the name of an axis, or a tuple of names; got "
                f"{self.axis!r}."
            )

    def size(self) -> int:
        """How many devices share the work.

        Raises:
          ValueError: if the axis does not exist where this is called.
        """
        try:
            return int(jax.lax.axis_size(self.axis))
        except NameError as error:
            raise ValueError(
                f"The axis of OverAxis({self.axis!r}) does not exist here: {error}. "
                "Call update inside of pmap(..., axis_name=...) or of a shard_map over "
                "a mesh with that axis, or leave the distribution out."
            ) from None

    def mean(self, tree: T) -> T:
        """The average over the axis."""
        self.size()
        return jax.lax.pmean(tree, self.axis)

    def map(
        self, stacks: Sequence[Array], function: Callable[[Array], Array]
    ) -> list[Array]:
        """Applies a function of `[k, d, d]`, each device to the matrices it owns.

        Args:
          stacks: `[k, d, d]` matrices, the same on all devices.
          function: of matrices that come as `[k, d, d]`; it treats them one by one, and
            its cost grows as `k d³`.

        Returns:
          Its results, the same on all devices.
        """
        devices = self.size()
        shapes = [x.shape for x in stacks]
        sizes = [shape[-1] for shape in shapes for _ in range(shape[0])]
        owners = np.asarray(assign(sizes, devices), int)
        me = jax.lax.axis_index(self.axis)
        mine: list[Array] = []
        places: list[tuple[np.ndarray, np.ndarray]] = []
        for stack in stacks:
            own, owners = np.split(owners, [len(stack)])
            counts = np.bincount(own, minlength=devices)
            count = jnp.asarray(counts)[me]
            if mine:  # one after the other, see linalg.inverse_many
                started = known_false_after(mine[-1][0, 0, 0])
                count = jnp.where(started, jnp.zeros_like(count), count)
            order = np.argsort(own, kind="stable")
            first = np.cumsum(counts) - counts
            slots = np.empty_like(order)
            slots[order] = np.arange(len(order)) - first[own[order]]
            places.append((own, slots))
            mine.append(
                _one_by_one(
                    function,
                    stack,
                    jnp.asarray(order),
                    jnp.asarray(first)[me],
                    count,
                    int(counts.max()),
                )
            )
        everyone = self._gather(mine)
        return [x[place] for x, place in zip(everyone, places, strict=True)]

    def _gather(self, local: Sequence[Array]) -> list[Array]:
        """Stacks what the devices have, `[devices, ...]`: one collective for a type."""
        results: dict[int, Array] = {}
        for dtype in dict.fromkeys(x.dtype for x in local):
            members = [i for i, x in enumerate(local) if x.dtype == dtype]
            flat = jnp.concatenate([local[i].reshape(-1) for i in members])
            gathered = _compat.all_gather(flat, self.axis)
            start = 0
            for i in members:
                part = gathered[:, start : start + local[i].size]
                results[i] = part.reshape(-1, *local[i].shape)
                start += local[i].size
        return [results[i] for i in range(len(local))]


def _one_by_one(
    function: Callable[[Array], Array],
    stack: Array,
    order: Array,
    first: Array,
    count: Array,
    slots: int,
) -> Array:
    """The results for matrices `order[first : first + count]`, `[slots, d, d]`."""

    def one(i: Array, results: Array) -> Array:
        matrix = jax.lax.dynamic_slice_in_dim(stack, order[first + i], 1)
        result = function(matrix).astype(results.dtype)
        return jax.lax.dynamic_update_slice_in_dim(results, result, i, 0)

    start = jnp.zeros((slots, *stack.shape[1:]), stack.dtype)
    start = _compat.vary_like(start, first, stack)
    return jax.lax.fori_loop(jnp.zeros_like(count), count, one, start)
