"""Initializers of weights, in the manner of `jax.nn.initializers`."""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import arguments

Initializer = Callable[..., Array]
"""`(key, shape, dtype) -> array`, the dtype optional."""

Axes = int | Sequence[int]


def sparse_normal(
    incoming: int = 15,
    stddev: float = 1.0,
    *,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    dtype: Any = None,
) -> Initializer:
    """Sparse initialisation: a few normal weights into each unit, the rest zero.

    However wide the layer, a unit's total input stays as large as its few incoming
    weights make it, and units differ more from each other than with many small weights.
    Biases start at zero. The paper's autoencoders start from it.

    Axes are those of `jax.nn.initializers.variance_scaling`: a unit is an index of
    `out_axis` (and of `batch_axis`, which tells independent layers apart, such as
    experts or layers to be scanned over). All other axes, `in_axis` and the spatial
    ones of a convolution's kernel, are the places its weights come from.

    Args:
      incoming: how many weights into each unit are not zero; all, where there are
        fewer.
      stddev: their standard deviation.
      in_axis: axis or axes of the inputs.
      out_axis: axis or axes of the units.
      batch_axis: axis or axes of independent layers.
      dtype: the default type of the weights; None for JAX's.

    Returns:
      The initializer, `(key, shape, dtype) -> array`.

    Raises:
      ValueError: if a number is out of its range; by the initializer, if a shape lacks
        an axis or an axis has two meanings.
      TypeError: if `incoming` is not an integer; by the initializer, for a type that is
        not real floating point.

    References:
      Martens 2010, section 5; Sutskever et al. 2013, section 3.

    >>> import jax
    >>> weights = sparse_normal(2)(jax.random.key(0), (6, 3))
    >>> weights.shape, (weights != 0).sum(0).tolist()
    ((6, 3), [2, 2, 2])
    """
    arguments.integer_from("incoming", incoming, 1)
    arguments.number("stddev", stddev)
    if not 0.0 <= stddev < float("inf"):
        raise ValueError(f"stddev must be finite and at least 0; got {stddev}.")
    named = {"in_axis": in_axis, "out_axis": out_axis, "batch_axis": batch_axis}
    for name, axes in named.items():
        _whole_numbers(name, [axes] if isinstance(axes, int) else axes)
    _floating_type(dtype)
    default = dtype

    def init(key: Array, shape: Sequence[int], dtype: Any = default) -> Array:
        arguments.key("key", key)
        _whole_numbers("shape", shape)
        kind = _floating_type(dtype)
        unit_axes, input_axes = _split(shape, in_axis, out_axis, batch_axis)
        units = math.prod(shape[i] for i in unit_axes)
        inputs = math.prod(shape[i] for i in input_axes)
        rows = _rows(key, units, inputs, min(incoming, inputs), kind)
        weights = jnp.asarray(stddev, kind) * rows
        axes = unit_axes + input_axes
        weights = weights.reshape([shape[i] for i in axes])
        return jnp.moveaxis(weights, range(len(axes)), axes)

    return init


def _whole_numbers(name: str, values: Any) -> None:
    fits = isinstance(values, list | tuple) and all(
        isinstance(x, numbers.Integral) and not isinstance(x, bool) for x in values
    )
    if not fits:
        raise TypeError(
            f"{name} must hold integers; got {arguments.shown(values)}. Expected one, "
            "or a tuple of them."
        )


def _floating_type(dtype: Any) -> Any:
    """The type of weights; None is JAX's default."""
    kind = float if dtype is None else dtype
    return jnp.result_type(arguments.floating_type("dtype", kind))


# as one program, like the functions of jax.random: it is much less to compile
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _rows(key: Array, units: int, inputs: int, count: int, dtype: Any) -> Array:
    """`[units, inputs]` with `count` standard normal entries in each row, else 0."""
    of_places, of_values = jax.random.split(key)
    places = _subsets(of_places, units, inputs, count)
    values = jax.random.normal(of_values, (units, count), dtype)
    zeros = jnp.zeros((units, inputs), dtype)
    return zeros.at[jnp.arange(units)[:, None], places].set(values)


def _subsets(key: Array, sets: int, size: int, count: int) -> Array:
    """Draws `[sets, count]` indices below `size`, distinct and equally likely in a set.

    Floyd's algorithm: with the draws below `last` a uniform subset, one more from 0 to
    `last` is taken if it is new, else `last`. Nothing of length `size` is sorted.
    """
    last = jnp.arange(size - count, size, dtype=jnp.int32)
    draws = jax.random.randint(key, (count, sets), 0, last[:, None] + 1, jnp.int32)

    def add(i: Array, chosen: Array) -> Array:
        taken = (chosen == draws[i][:, None]).any(1)
        return chosen.at[:, i].set(jnp.where(taken, last[i], draws[i]))

    none_yet = jnp.full((sets, count), -1, jnp.int32)
    return jax.lax.fori_loop(0, count, add, none_yet)


def _split(
    shape: Sequence[int], in_axis: Axes, out_axis: Axes, batch_axis: Axes
) -> tuple[list[int], list[int]]:
    """The axes, counted from 0, that tell units apart, and all others.

    Raises:
      ValueError: if the shape lacks an axis or an axis has two meanings.
    """
    rank = len(shape)
    named: list[list[int]] = []
    for name, axes in (
        ("in_axis", in_axis),
        ("out_axis", out_axis),
        ("batch_axis", batch_axis),
    ):
        listed = [axes] if isinstance(axes, int) else list(axes)
        if not all(-rank <= axis < rank for axis in listed):
            raise ValueError(
                f"{name}={axes} is out of range for the shape {tuple(shape)}. "
                "Sparse initialisation is for weights with inputs and units, not for "
                "biases; name their axes."
            )
        named.append([axis % rank for axis in listed])
    together = sum(named, start=list[int]())
    if len(set(together)) < len(together):
        raise ValueError(
            f"in_axis={in_axis}, out_axis={out_axis} and batch_axis={batch_axis} must "
            f"be different axes of the shape {tuple(shape)}."
        )
    unit_axes = named[2] + named[1]
    return unit_axes, [axis for axis in range(rank) if axis not in unit_axes]
