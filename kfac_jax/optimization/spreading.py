"""States whose rows are spread over devices: their shardings, and conversions."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kfac_jax._utils.arguments import shown
from kfac_jax.curvature import Curvature
from kfac_jax.devices import Devices, OverAxis, OverMesh, Sharing, checked
from kfac_jax.devices.over_axis import as_names
from kfac_jax.devices.rows import from_rows, rows_shape, to_rows
from kfac_jax.optimization.checks import check_devices, check_plan, state_arrays
from kfac_jax.optimization.sharing_report import SharingReport as SharingReport
from kfac_jax.optimization.sharing_report import report
from kfac_jax.optimization.state import KFACState

T = TypeVar("T")

_SPREAD = ("factors", "inverses", "velocity")
"""The fields of the state that devices keep rows of."""


def state_specs(devices: Sharing | None) -> KFACState:
    """How the state lies on a mesh: a prefix of it, for `in_specs` and `out_specs`.

    Args:
      devices: what the transformation was made with.

    Returns:
      A `KFACState` of partition specs: the first axis of factors, inverses and velocity
      over the `state_axes`, all else the same on all devices.

    Raises:
      TypeError: if they are none of those.

    >>> import kfac_jax
    >>> tuple(state_specs(kfac_jax.OverAxis("data", state_axes="data")).factors)
    ('data',)
    """
    checked(devices)
    axes = () if devices is None else as_names(devices.state_axes)
    rows = P(axes) if axes else P()
    specs: dict[str, Any] = {
        name: rows if name in _SPREAD else P() for name in KFACState._fields
    }
    return KFACState(**specs)


def whole_state(curvature: Curvature, state: T, devices: Sharing | None = None) -> T:
    """The state as one device would have it, from one that devices keep rows of.

    It fits `kfac` without `devices=`, `curvature.approximation(state.factors)`,
    and, by `spread_state`, any other number of devices.

    Args:
      curvature: the plan.
      state: the `KFACState`, or a tree with it, such as the state of a chain. It was
        made with `state_axes`; with devices that keep none it is whole.
      devices: `OverMesh` to exchange rows in one collective, `OverAxis` in the
        function that is mapped over its axis. None for arrays that hold the rows of
        all devices: what a `shard_map` or `jit` returned, or a checkpoint, whatever
        the number of devices was.

    Returns:
      The state.

    Raises:
      TypeError: if there is no `KFACState` in it, or no devices.
      ValueError: if it is of another plan, or has arrays that are no rows.
    """
    check_plan(curvature)
    checked(devices)
    join = functools.partial(_whole, curvature, devices=devices)
    return _mapped(join, state)


def _whole(
    curvature: Curvature, state: KFACState, devices: Sharing | None
) -> KFACState:
    is_whole = devices is not None and not devices.cuts_state
    leaves, shapes, treedef = _leaves(curvature, state, devices, is_whole)
    if is_whole:
        return state

    def join(rows: list[Array]) -> list[Array]:
        if devices is None:
            return [from_rows(x, s) for x, s in zip(rows, shapes, strict=True)]
        return devices.full(rows, shapes)

    # compiled at once: one by one, each shape would be compiled for itself
    compiled = join if isinstance(devices, OverAxis) else jax.jit(join)
    return state._replace(**jax.tree.unflatten(treedef, compiled(leaves)))


def spread_state(curvature: Curvature, state: T, devices: Sharing) -> T:
    """Inverts `whole_state`: cuts a whole state into the rows that devices keep.

    Of `OverMesh`, all that is given is also laid on the mesh, wherever it was.

    Args:
      curvature: the plan.
      state: as one device would have it: the `KFACState`, or a tree with it.
      devices: of `OverAxis`, in the mapped function.

    Returns:
      The state, for a transformation that was made with the same devices.

    Raises:
      TypeError: if there is no `KFACState` in it, or no devices.
      ValueError: if it is of another plan, or not whole.
    """
    check_plan(curvature)
    cut = functools.partial(_spread, curvature, devices=checked(devices))
    if not isinstance(devices, OverMesh):
        return _mapped(cut, state)
    everywhere = NamedSharding(devices.mesh, P())
    return _mapped(cut, state, lambda x: _laid(x, everywhere))


def _spread(curvature: Curvature, state: KFACState, devices: Devices) -> KFACState:
    leaves, _, treedef = _leaves(curvature, state, None, whole=True)
    if not isinstance(devices, OverMesh):
        found = devices.tree_rows(leaves)
        return state._replace(**jax.tree.unflatten(treedef, found))
    if devices.cuts_state:  # not by `kept`: the arrays may lie on other devices
        keepers = devices.keepers()
        cut = jax.jit(lambda leaves: [to_rows(x, keepers) for x in leaves])(leaves)
        state = state._replace(**jax.tree.unflatten(treedef, cut))
    specs = state_specs(devices)
    laid: dict[str, Any] = {}
    for name, part in state._asdict().items():
        lies = NamedSharding(devices.mesh, getattr(specs, name))
        laid[name] = jax.tree.map(functools.partial(_laid, lies=lies), part)
    return KFACState(**laid)


def _laid(x: Any, lies: NamedSharding) -> Array:
    """`device_put`, also onto devices of other processes that have the same array.

    `device_put` itself compares the processes' arrays for equality then, and fails for
    arrays with NaN, which is not equal to itself.
    """
    here = isinstance(x, np.ndarray | Array) and not isinstance(x, Tracer)
    here = here and getattr(x, "is_fully_addressable", True)
    if not here or lies.is_fully_addressable or not jnp.issubdtype(x.dtype, np.inexact):
        return jax.device_put(x, lies)
    own = np.asarray(x)
    return jax.make_array_from_callback(own.shape, lies, lambda index: own[index])


def _mapped(
    function: Callable[[KFACState], KFACState],
    tree: T,
    other: Callable[[Any], Any] = lambda x: x,
) -> T:
    """Applies a function to the K-FAC states in a tree, and another to other leaves.

    Raises:
      TypeError: if there is none.
    """
    nodes, treedef = jax.tree.flatten(tree, is_leaf=_is_state)
    if not any(map(_is_state, nodes)):
        raise TypeError(
            "state: expected the KFACState that init returned, or a tree with it; got "
            f"{shown(tree)}. Restore a checkpoint into such a tree first."
        )
    found = [function(x) if _is_state(x) else other(x) for x in nodes]
    return jax.tree.unflatten(treedef, found)


def _is_state(node: Any) -> TypeGuard[KFACState]:
    return isinstance(node, KFACState)


def _leaves(
    curvature: Curvature,
    state: KFACState,
    devices: Sharing | None,
    whole: bool = False,
) -> tuple[list[Array], list[tuple[int, ...]], Any]:
    """The arrays that can be cut, their full shapes, and their tree's structure.

    Raises:
      ValueError: if an array is not as it should be.
    """
    parts = {name: getattr(state, name) for name in _SPREAD}
    shapes: dict[str, Any] = {**state_arrays(curvature), "velocity": ()}
    if not isinstance(state.velocity, tuple) or state.velocity:
        leaves = [jax.ShapeDtypeStruct(s, float) for s in curvature.tree.shapes]
        shapes["velocity"] = curvature.tree.restore(leaves, state.velocity)
    arrays, treedef = jax.tree.flatten(parts)
    structs, expected = jax.tree.flatten(shapes)
    if treedef != expected:
        raise ValueError(
            f"The state is of another plan: expected {expected}, got {treedef}. Use "
            "the plan that its transformation was made with."
        )
    for x, struct in zip(arrays, structs, strict=True):
        fits = _fits(jnp.shape(x), struct.shape, devices, whole)
        if not fits:
            what = "whole arrays" if whole else "rows"
            raise ValueError(
                f"Expected {what} of an array of shape {struct.shape} in the state; "
                f"got {jnp.shape(x)}. whole_state takes a state that was made with "
                "state_axes, spread_state one that was not."
            )
    return arrays, [x.shape for x in structs], treedef


def _fits(
    got: tuple[int, ...],
    shape: tuple[int, ...],
    devices: Sharing | None,
    whole: bool,
) -> bool:
    if whole:
        return got == shape
    if devices is not None:
        return got == devices.row_shape(shape)
    rows, *rest = rows_shape(shape, 1)
    return len(got) > 0 and got[0] >= rows and [*got[1:]] == rest


def sharing_report(
    curvature: Curvature,
    devices: Sharing,
    axis_sizes: Mapping[str, int] | None = None,
) -> SharingReport:
    """What each device owns, keeps and receives, before anything is computed.

    Args:
      curvature: the plan.
      devices: as in `kfac`.
      axis_sizes: how many devices lie along each axis of an `OverAxis`.

    Returns:
      The report; print it.

    Raises:
      TypeError: if they are none of those.
      ValueError: if the size of an axis is not known, or if `kfac` refuses them.

    >>> import jax.numpy as jnp, kfac_jax
    >>> def loss_fn(w, x, y):
    ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
    >>> w, x, y = jnp.ones((3, 2)), jnp.ones((8, 3)), jnp.zeros((8, 2))
    >>> curvature = kfac_jax.make_curvature(loss_fn, w, x, y)
    >>> over = kfac_jax.OverAxis("data", state_axes="data")
    >>> report = sharing_report(curvature, over, {"data": 2})
    >>> report.owners, report.work
    ({'params': {'input': (0,), 'output': (1,)}}, (64.0, 8.0))
    """
    check_plan(curvature)
    check_devices(curvature, devices)
    if not isinstance(devices, OverAxis | OverMesh):
        raise TypeError(
            "devices must be an OverAxis or OverMesh, for a report of what "
            "devices share; got None."
        )
    sizes = _checked_sizes(axis_sizes)
    if isinstance(devices, OverMesh):
        return report(curvature, devices.size(), devices.keepers(), scatters=False)
    axes = as_names(devices.axis)
    missing = [axis for axis in axes if axis not in sizes]
    if missing:
        raise ValueError(
            f"Expected the sizes of the axes {axes}; got none for {missing}. Pass "
            'axis_sizes={"batch": 8}, say.'
        )
    return report(
        curvature,
        math.prod(sizes[axis] for axis in axes),
        math.prod(sizes[axis] for axis in as_names(devices.state_axes)),
        scatters=devices.cuts_state,
    )


def _checked_sizes(axis_sizes: Any) -> dict[str, int]:
    """How many devices lie along each axis.

    Raises:
      TypeError: if it is no mapping from names to whole numbers from 1.
    """
    if axis_sizes is None:
        return {}
    sizes: list[Any] = [None]
    if isinstance(axis_sizes, Mapping):
        sizes = [*axis_sizes.values()]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise TypeError(
            'axis_sizes must be numbers of devices by axis name, {"batch": 8}, say; '
            f"got {shown(axis_sizes)}."
        )
    return dict(axis_sizes)
