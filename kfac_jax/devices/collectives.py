"""Collectives on many arrays at once."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import _compat


def together(
    leaves: Sequence[Array], collective: Callable[[Array], Array], leading: int = 0
) -> list[Array]:
    """Applies a collective to all arrays of one type at once, as one flat array.

    So the number of collectives does not grow with the number of layers.

    Args:
      leaves: the arrays.
      collective: a function from `[*leading, n]` to `[*new, n]`.
      leading: the number of leading axes, equal for all arrays, that are not flattened.

    Returns:
      For each array its part of the result, `[*new, *rest]`.
    """
    results: dict[int, Array] = {}
    for dtype in dict.fromkeys(x.dtype for x in leaves):
        members = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        parts = [leaves[i] for i in members]
        flat = [x.reshape(*x.shape[:leading], -1) for x in parts]
        done = collective(jnp.concatenate(flat, axis=-1))
        start = 0
        for i, x, part in zip(members, parts, flat, strict=True):
            piece = done[..., start : start + part.shape[-1]]
            results[i] = piece.reshape(*done.shape[:-1], *x.shape[leading:])
            start += part.shape[-1]
    return [results[i] for i in range(len(leaves))]


def summed(leaves: Sequence[Array], like: Sequence[Array | None]) -> list[Array]:
    """Sums arrays over the mesh axes that they vary over but their counterparts do not.

    Inside of `shard_map`; one collective for all arrays of one type and the same axes.

    Args:
      leaves: the arrays.
      like: for each array its counterpart; None stands for one that does not vary.

    Returns:
      The sums.
    """
    result = list(leaves)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, (x, other) in enumerate(zip(leaves, like, strict=True)):
        axes = _compat.varying(x)
        axes -= frozenset() if other is None else _compat.varying(other)
        if axes:
            groups.setdefault(tuple(sorted(axes)), []).append(i)
    for axes, places in groups.items():
        psum = functools.partial(jax.lax.psum, axis_name=axes)
        sums = together([leaves[i] for i in places], psum)
        for i, x in zip(places, sums, strict=True):
            result[i] = x
    return result
