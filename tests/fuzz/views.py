"""How weights are made of parameters; what a layer must, may and cannot be made of."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

import kfac_jax

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ViewKind:
    """One way to make a weight of a given shape.

    Attributes:
      stored: from the weight's shape to those of the parameters.
      make: from the parameters and the weight's shape to the weight.
      index: the same of their entries' numbers, for each term of a sum; None where
        entries are not moved only.
      scale: the factor between entries and the weight's.
      covered: whether a layer with the parameter's own sides has to be found.
      least_rank: of the weight.
    """

    stored: Callable[[Shape], tuple[Shape, ...]]
    make: Callable[..., Any]
    index: Callable[..., Any] | None = None
    scale: float = 1.0
    covered: bool = True
    least_rank: int = 0


def _moved(stored: Callable[[Shape], Shape], make: Callable[..., Any], **more: Any):
    return ViewKind(lambda shape: (stored(shape),), make, make, **more)


def _scaled(make: Callable[..., Any], scale: float, **more: Any) -> ViewKind:
    same = lambda w, shape: w  # noqa: E731
    return ViewKind(lambda shape: (shape,), make, same, scale, **more)


def _concatenate(*arrays: Any, axis: int) -> Any:
    library = np if isinstance(arrays[0], np.ndarray) else jnp
    return library.concatenate(arrays, axis=axis)


def _flat(shape: Shape) -> Shape:
    return (int(np.prod(shape)),)


def _halves(shape: Shape, axis: int) -> tuple[Shape, Shape]:
    first, second = list(shape), list(shape)
    first[axis] = shape[axis] // 2
    second[axis] = shape[axis] - first[axis]
    return tuple(first), tuple(second)


VIEWS: dict[str, ViewKind] = {
    "plain": _moved(lambda s: s, lambda w, s: w),
    "transposed": _moved(lambda s: s[::-1], lambda w, s: w.T, least_rank=2),
    "flat": _moved(_flat, lambda w, s: w.reshape(s), least_rank=2),
    "turned": _moved(
        lambda s: (int(np.prod(s[1:])), s[0]),
        lambda w, s: w.T.reshape(s),
        least_rank=2,
    ),
    "leading": _moved(lambda s: (1, *s), lambda w, s: w[0]),
    "reshaped": _moved(lambda s: (1, *s, 1), lambda w, s: w.reshape(s)),
    "joined out": ViewKind(
        lambda s: _halves(s, -1),
        lambda v, w, s: _concatenate(v, w, axis=-1),
        lambda v, w, s: _concatenate(v, w, axis=-1),
        least_rank=2,
    ),
    "joined in": ViewKind(
        lambda s: _halves(s, 0),
        lambda v, w, s: _concatenate(v, w, axis=0),
        lambda v, w, s: _concatenate(v, w, axis=0),
        covered=False,
        least_rank=2,
    ),
    "scaled": _scaled(lambda w, s: w * 0.5, 0.5),
    "divided": _scaled(lambda w, s: w / 2, 0.5),
    "negative": _scaled(lambda w, s: -w, -1.0),
    "named": _scaled(lambda w, s: checkpoint_name(w, "w"), 1.0),
    "cut out": _moved(
        lambda s: (*s[:-1], s[-1] + 1),
        lambda w, s: w[..., :-1],
        covered=False,
        least_rank=1,
    ),
    "cut in": _moved(
        lambda s: (s[0] + 1, *s[1:]), lambda w, s: w[1:], covered=False, least_rank=1
    ),
    "second": _moved(lambda s: (2, *s), lambda w, s: w[1], covered=False),
    "generic": _scaled(lambda w, s: kfac_jax.register_generic(w), 1.0, covered=False),
    "stopped": ViewKind(
        lambda s: (s,), lambda w, s: jax.lax.stop_gradient(w), covered=False
    ),
    "exp": ViewKind(lambda s: (s,), lambda w, s: 0.5 * jnp.exp(0.3 * w), covered=False),
    "masked": ViewKind(
        lambda s: (s,),
        lambda w, s: w * (np.arange(w.size).reshape(s) % 3 > 0).astype(w.dtype),
        covered=False,
    ),
    "normed": ViewKind(
        lambda s: (s,),
        lambda w, s: w / jnp.sqrt(jnp.square(w).sum() + 0.1),
        covered=False,
    ),
    "sum": ViewKind(
        lambda s: (s, s),
        lambda v, w, s: v + w,
        index=lambda v, w, s: (v, w),
        covered=False,
    ),
    "product": ViewKind(
        lambda s: ((s[0], 2), (2, *s[1:])),
        lambda v, w, s: jnp.tensordot(v, w, 1),
        covered=False,
        least_rank=2,
    ),
}
"""Each by its name."""
