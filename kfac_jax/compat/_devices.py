"""What programs that use `jax.pmap` need: copies on each device, keys, collectives."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kfac_jax._utils import arguments

DEVICES = "local_devices"


def in_pmap(axis_name: str | None) -> bool:
    """Whether the caller runs inside of `pmap` (or the like) over that axis."""
    if axis_name is None:
        return False
    arguments.instance("axis_name", axis_name, str | tuple, "an axis's name, or None")
    try:
        jax.lax.psum(1, axis_name)
    except NameError:
        return False
    return True


def wrap_if_pmap(p_func: Callable[[Any, str], Any]) -> Callable[[Any, str | None], Any]:
    """Makes a collective the identity where its axis is None or is not mapped.

    Args:
      p_func: the collective, `(obj, axis_name) -> obj`.

    Returns:
      A function of the same arguments.
    """
    arguments.function("p_func", p_func)

    @functools.wraps(p_func)
    def wrapped(obj: Any, axis_name: str | None) -> Any:
        if axis_name is None or not in_pmap(axis_name):
            return obj
        return p_func(obj, axis_name)

    return wrapped


@wrap_if_pmap
def psum_if_pmap(obj: Any, axis_name: str) -> Any:
    """The sum over devices; `obj` itself where the axis is None or is not mapped."""
    return jax.lax.psum(obj, axis_name)


@wrap_if_pmap
def pmean_if_pmap(obj: Any, axis_name: str) -> Any:
    """The mean over devices; `obj` itself where the axis is None or is not mapped."""
    return jax.lax.pmean(obj, axis_name)


def _sharding(axis_name: str | None) -> NamedSharding:
    """The leading axis over this process's devices, as `pmap` has its arguments."""
    if axis_name is not None:
        arguments.instance("axis_name", axis_name, str, "the name of an axis, or None")
    mesh = Mesh(np.array(jax.local_devices()), (axis_name or DEVICES,))
    return NamedSharding(mesh, PartitionSpec(axis_name or DEVICES))


def replicate_all_local_devices(obj: Any, axis_name: str | None = None) -> Any:
    """Puts a copy of each array on each local device.

    Args:
      obj: a tree of arrays.
      axis_name: what the sharding calls the new axis; it has no other effect.

    Returns:
      Arrays with a new leading axis, one entry for each device, which `pmap` takes
      without copying them.
    """
    arguments.trees("obj", obj)
    sharding, devices = _sharding(axis_name), jax.local_devices()

    def replicate(x: Any) -> Array:
        x = jnp.asarray(x)[None]
        copies = [jax.device_put(x, device) for device in devices]
        shape = (len(devices), *x.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, copies)

    return jax.tree.map(replicate, obj)


def broadcast_all_local_devices(obj: Any, axis_name: str | None = None) -> Any:
    """Puts each entry of the arrays' leading axis on its own local device.

    Args:
      obj: a tree of arrays, their leading axis as long as there are local devices.
      axis_name: what the sharding calls that axis; it has no other effect.

    Returns:
      The same arrays, which `pmap` takes without copying them.

    Raises:
      ValueError: if a leading axis is not as long as there are local devices.
    """
    arguments.trees("obj", obj)
    count = jax.local_device_count()
    for x in jax.tree.leaves(obj):
        if jnp.shape(x)[:1] != (count,):
            raise ValueError(
                "broadcast_all_local_devices expects obj to have a leading axis with "
                f"an entry for each of the {count} local devices; got shape "
                f"{jnp.shape(x)}. Reshape it, or use replicate_all_local_devices for a "
                "copy on each."
            )
    return jax.device_put(obj, _sharding(axis_name))


def as_mapped(obj: Any, axis_name: str) -> Any:
    """Arrays as `pmap` over that axis returns them: it compiles again for all others.

    Args:
      obj: a tree of arrays with a leading axis of devices.
      axis_name: the name of the mapped axis.

    Returns:
      The same arrays. What is on its device already is not copied.

    Raises:
      ValueError: if a leading axis is not as long as there are local devices.
    """
    sharding, count = _sharding(axis_name), jax.local_device_count()

    def placed(path: Any, x: Any) -> Any:
        if isinstance(x, Array) and not isinstance(x, jax.core.Tracer):
            if x.sharding == sharding or not x.is_fully_addressable:
                return x
        if np.shape(x)[:1] != (count,):
            raise ValueError(
                "With multi_device=True all arrays are expected with a leading axis "
                f"that has an entry for each of the {count} local devices; got shape "
                f"{np.shape(x)} at {jax.tree_util.keystr(path)} of the arguments. Use "
                "kfac_jax.utils.replicate_all_local_devices for a copy on each."
            )
        return x if isinstance(x, jax.core.Tracer) else jax.device_put(x, sharding)

    return jax.tree.map_with_path(placed, obj)


def make_different_rng_key_on_all_devices(rng: Array) -> Array:
    """Splits a key into one for each device, different between processes too.

    Args:
      rng: a key, from `jax.random.key` or `jax.random.PRNGKey`.

    Returns:
      The keys with a leading axis, each on its device.
    """
    arguments.key("rng", rng)
    rng = jax.random.fold_in(rng, jax.process_index())
    return broadcast_all_local_devices(jax.random.split(rng, jax.local_device_count()))


@functools.cache
def _split_on_devices(num: int) -> Callable[[Array], tuple[Array, ...]]:
    return jax.pmap(lambda key: tuple(jax.random.split(key, num)))


def p_split(key: Array) -> tuple[Array, ...]:
    """Splits each device's key in two, each with the leading axis of devices."""
    return p_split_num(key, 2)


def p_split_num(key: Array, num: int) -> tuple[Array, ...]:
    """Splits each device's key into `num`.

    Args:
      key: keys with a leading axis, one for each device.
      num: how many to make of each.

    Returns:
      That many arrays like `key`.

    Raises:
      ValueError: if there is not one for each device.
    """
    arguments.integer("num", num)
    arguments.within("num", num, 1, float("inf"))
    shape = jnp.shape(arguments.array("key", key))
    if shape[:1] != (jax.local_device_count(),):
        raise ValueError(
            "key must have a leading axis with an entry for each of the "
            f"{jax.local_device_count()} local devices; got shape {shape}."
        )
    return _split_on_devices(num)(key)


def get_first(obj: Any) -> Any:
    """The first device's part of arrays with a leading axis of devices.

    Args:
      obj: a tree of such arrays; Python numbers stay as they are.

    Returns:
      The tree without that axis, read without moving the other devices' parts.
    """
    return jax.tree.map(_first, obj)


def _first(x: Any) -> Any:
    if not hasattr(x, "shape") or not x.shape:
        return x
    if isinstance(x, jax.core.Tracer) or not isinstance(x, Array):
        return x[0]
    part = x.addressable_data(0)
    return part[0] if part.shape[1:] == x.shape[1:] else x[0]
