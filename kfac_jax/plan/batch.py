"""The batch among the loss function's arguments: arrays with a leading batch axis."""

from collections.abc import Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp

from kfac_jax._jaxpr import axis_types
from kfac_jax._jaxpr.states import Examples
from kfac_jax._utils import arguments


def _is_key(leaf: Any) -> bool:
    """Whether it is a random key: a typed one, or a raw one of two or four uint32."""
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return True
    return dtype == jnp.uint32 and jnp.shape(leaf) in ((2,), (4,))


Argnums = tuple[int, ...] | None
"""The indices of the loss function's arguments that are the batch; None to guess."""


def check_argnums(value: Any, args: Sequence[Any]) -> Argnums:
    """Checks `batch_argnums`.

    Args:
      value: an integer, several, or None.
      args: the loss function's arguments after the parameters.

    Returns:
      The integers as a tuple, or None.

    Raises:
      TypeError: if they are no integers.
      ValueError: if there are no such arguments.
    """
    if value is None:
        return None
    several = (value,) if isinstance(value, int) else value
    arguments.sequence("batch_argnums", several, "places of arguments")
    for place in several:
        arguments.count("each of batch_argnums", place, 0)
        if place >= len(args):
            raise ValueError(
                "batch_argnums counts the loss function's arguments after the "
                f"parameters from 0: expected less than {len(args)}, got {place}."
            )
    return tuple(several)


def _is_batch(path: Any, leaf: Any, argnums: Argnums) -> bool:
    if jnp.ndim(leaf) == 0 or _is_key(leaf):
        return False
    return argnums is None or path[0].idx in argnums


def examples(
    args: tuple[Any, ...], argnums: Argnums, cases: Sequence[int]
) -> list[Examples | None]:
    """For each array of the arguments, the axis that holds the examples.

    This is the leading axis of the arrays that belong to the batch. Without `argnums`,
    if leading axes differ, an array belongs to the batch if its length fits the number
    of cases of a loss. If for some loss more than one length could fit, all arrays do.

    Args:
      args: the loss function's arguments.
      argnums: the indices of the arguments that are the batch, or None.
      cases: the number of cases of each registered loss.

    Returns:
      Axes; None for arrays that belong to no batch.
    """
    leaves = jax.tree.leaves_with_path(args)
    axes = [
        Examples(0, jnp.shape(leaf)[0]) if _is_batch(path, leaf, argnums) else None
        for path, leaf in leaves
    ]
    sizes = {axis.size for axis in axes if axis is not None}
    if len(sizes) < 2 or argnums is not None:
        return axes
    chosen = {_examples_of(count, sizes) for count in cases}
    if None in chosen or not chosen:
        return axes
    return [axis if axis is not None and axis.size in chosen else None for axis in axes]


def _examples_of(cases: int, sizes: Set[int]) -> int | None:
    """Which of some lengths is the number of a loss's examples; None if ambiguous.

    It is the number of cases or, where each example has several cases (positions of a
    sequence), the only length that divides it. That length is ambiguous if it divides
    another one: then the cases may be arrays joined along their leading axes.
    """
    if cases in sizes:
        return cases
    dividing = [n for n in sizes if n and cases % n == 0]
    if len(dividing) != 1:
        return None
    (only,) = dividing
    return None if any(n % only == 0 for n in sizes - {only}) else only


def leading_axes(args: Any, argnums: Argnums) -> list[tuple[str, int]]:
    """The name and the leading length of each array that may be of the batch."""
    return [
        (_name(path), jnp.shape(leaf)[0])
        for path, leaf in jax.tree.leaves_with_path(args)
        if _is_batch(path, leaf, argnums)
    ]


def _name(path: Any) -> str:
    index, *rest = path
    where = jax.tree_util.keystr(tuple(rest))
    return f"args[{getattr(index, 'idx', index)}]{where}"


def describe(axes: Sequence[tuple[str, int]]) -> str:
    """Formats leading axes for an error message."""
    return ", ".join(f"{name}: {size}" for name, size in axes)


def take(args: Any, fraction: float, in_batch: Sequence[bool]) -> Any:
    """Takes the first `fraction` of every array of the batch.

    Args:
      args: the loss function's arguments.
      fraction: in (0, 1].
      in_batch: for each array of them whether it belongs to the batch.

    Returns:
      The arguments with `max(1, round(fraction · n))` examples.

    Raises:
      ValueError: if the leading axes disagree, so that it is not clear what to slice.
    """
    if fraction == 1.0:
        return args
    keep = max(1, round(fraction * batch_size(args, in_batch)))

    def first(leaf: Any) -> Any:
        return axis_types.auto(lambda x: x[:keep], leaf)(leaf)

    leaves, treedef = jax.tree.flatten(args)
    pairs = zip(leaves, in_batch, strict=True)
    return jax.tree.unflatten(treedef, [first(x) if y else x for x, y in pairs])


def batch_size(args: Any, in_batch: Sequence[bool]) -> int:
    """Returns the length of the one leading axis that the arguments share.

    Args:
      args: the loss function's arguments, or their shapes.
      in_batch: for each array of them whether it belongs to the batch.

    Returns:
      The length.

    Raises:
      ValueError: if the leading axes disagree or there is none, or if there are more or
        fewer arrays.
    """
    leaves = jax.tree.leaves_with_path(args)
    if len(leaves) != len(in_batch):
        raise ValueError(
            f"The plan was made for arguments of {len(in_batch)} array(s); got "
            f"{len(leaves)}. Make a new plan with make_curvature for these arguments."
        )
    pairs = zip(leaves, in_batch, strict=True)
    axes = [(_name(path), jnp.shape(x)[0]) for (path, x), chosen in pairs if chosen]
    sizes = {size for _, size in axes}
    if len(sizes) != 1:
        raise ValueError(
            "Taking a fraction of the batch needs arguments that share one leading "
            f"axis; got {describe(axes) or 'none'}. Say by batch_argnums which "
            "arguments are the batch, or use a fraction of 1."
        )
    return sizes.pop()
