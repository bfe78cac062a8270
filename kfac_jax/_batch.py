"""The arguments of the loss function as a batch: which of them have a leading axis."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_jax._jaxpr import axis_types
from kfac_jax._jaxpr.states import Examples


def _is_key(leaf: Any) -> bool:
    """Typed keys, and the raw ones: two or four uint32."""
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return True
    return dtype == jnp.uint32 and jnp.shape(leaf) in ((2,), (4,))


def examples(args: Any) -> list[Examples | None]:
    """For each array of the arguments, its leading axis as the axis of examples."""
    return [
        None
        if jnp.ndim(leaf) == 0 or _is_key(leaf)
        else Examples(0, jnp.shape(leaf)[0])
        for leaf in jax.tree.leaves(args)
    ]


def leading_axes(args: Any) -> list[tuple[str, int]]:
    """Names each array with a leading axis, and that axis's length."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(args):
        if jnp.ndim(leaf) and not _is_key(leaf):
            index, *rest = path
            name = f"args[{getattr(index, 'idx', index)}]" + jax.tree_util.keystr(
                tuple(rest)
            )
            found.append((name, jnp.shape(leaf)[0]))
    return found


def describe(axes: Sequence[tuple[str, int]]) -> str:
    """Writes leading axes for an error message."""
    return ", ".join(f"{name}: {size}" for name, size in axes)


def take(args: Any, fraction: float) -> Any:
    """Slices the first `fraction` of the batch off every array that has it.

    Args:
      args: the loss function's arguments.
      fraction: in (0, 1].

    Returns:
      The arguments with `max(1, round(fraction · n))` examples.

    Raises:
      ValueError: if the leading axes disagree, so that it is not clear what to slice.
    """
    if fraction == 1.0:
        return args
    keep = max(1, round(fraction * batch_size(args)))

    def first(leaf: Any) -> Any:
        return axis_types.auto(lambda x: x[:keep], leaf)(leaf)

    return jax.tree.map(
        lambda leaf: leaf if jnp.ndim(leaf) == 0 or _is_key(leaf) else first(leaf), args
    )


def batch_size(args: Any) -> int:
    """Returns the length of the one leading axis that the arguments share.

    Args:
      args: the loss function's arguments, or their shapes.

    Returns:
      The length.

    Raises:
      ValueError: if the leading axes disagree or there is none.
    """
    axes = leading_axes(args)
    sizes = {size for _, size in axes}
    if len(sizes) != 1:
        raise ValueError(
            "Taking a fraction of the batch needs arguments that share one leading "
            f"axis; got {describe(axes) or 'none'}. Pass other arrays through a "
            "closure, or use a fraction of 1."
        )
    return sizes.pop()
