"""What the checks of arguments have in common.

An error names the argument, what is expected and what came. Only types and shapes of
traced values are known, so only those are checked.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_COMPLEX: Any = jnp.complexfloating
_LONGEST = 80


def shown(value: Any) -> str:
    """A value in a message: arrays by type and shape, all else as written if short."""
    if _has_shape(value) and not isinstance(value, np.generic):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    kind = f"a {type(value).__name__}"
    if any(map(_has_shape, jax.tree.leaves(value))):
        return kind
    text = repr(value)
    return text if len(text) <= _LONGEST and "\n" not in text else kind


def _has_shape(value: Any) -> bool:
    has = hasattr(value, "shape") and hasattr(value, "dtype")
    return has and not isinstance(value, type)


def is_array(value: Any) -> bool:
    """Whether JAX takes it for an array of numbers or keys, or it has the shape of one.

    Lists are none, as in JAX.
    """
    if isinstance(value, bool | int | float | complex) or hasattr(
        value, "__jax_array__"
    ):
        return True
    if not _has_shape(value):
        return False
    dtype: Any = value.dtype
    if not isinstance(dtype, np.dtype):
        return isinstance(value, Array | jax.ShapeDtypeStruct)  # keys
    return any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_))


def dtype_of(value: Any) -> Any:
    """The type of what `is_array`."""
    return value.dtype if hasattr(value, "dtype") else jnp.result_type(value)


def is_number(value: Any, *, arrays: bool = False) -> bool:
    """Whether it is a real number and no bool; with `arrays` also a scalar array."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_):
        return True
    if not arrays or not _has_shape(value) or not is_array(value):
        return False
    kinds = (jnp.floating, jnp.integer)
    return not value.shape and any(jnp.issubdtype(value.dtype, x) for x in kinds)


def number(name: str, value: Any, *, arrays: bool = False) -> None:
    """Raises TypeError unless it is a real number, or with `arrays` a scalar array."""
    if not is_number(value, arrays=arrays):
        expected = "a number or a scalar array" if arrays else "a number"
        raise TypeError(f"{name} must be {expected}; got {shown(value)}.")


def within(
    name: str, value: Any, low: float, high: float, *, closed: bool = False
) -> None:
    """Raises ValueError if it is a number outside of `[low, high)`; not of arrays."""
    if not is_number(value):
        return  # a schedule, a rule or an array
    value = float(value)
    if not (low <= value < high or (closed and value == high)):
        bracket = "]" if closed else ")"
        raise ValueError(f"{name} must be in [{low}, {high}{bracket}; got {value}.")


def integer(name: str, value: Any, *, arrays: bool = False) -> None:
    """Raises TypeError unless it is an integer, or with `arrays` a scalar array.

    An array may be of any real type: `optax.inject_hyperparams` has floats of all.

    Args:
      name: of the argument.
      value: what came.
      arrays: whether an array will do.

    Raises:
      TypeError: if it is no integer.
    """
    number(name, value, arrays=arrays)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; got {shown(value)}.")


def count(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless it is an integer of Python's, and large enough."""
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or value < least:
        raise ValueError(f"{name} must be an integer ≥ {least}; got {shown(value)}.")


def integer_from(name: str, value: Any, least: int) -> None:
    """Like `count`, with TypeError for what is no integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}.")


def flag(name: str, value: Any) -> None:
    """Raises TypeError unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool; got {shown(value)}.")


def function(name: str, value: Any) -> None:
    """Raises TypeError unless it can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function; got {shown(value)}.")


def callable_or_none(name: str, value: Any) -> None:
    """Raises TypeError unless it is None or can be called."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None; got {shown(value)}.")


def choice(name: str, value: Any, options: Sequence[str]) -> None:
    """Raises ValueError unless it is one of some texts."""
    if not isinstance(value, str) or value not in options:
        *most, last = [f'"{option}"' for option in options]
        one_of = "one of " if len(options) > 3 else ""
        raise ValueError(
            f"{name} must be {one_of}{', '.join(most)} or {last}; got {shown(value)}."
        )


def instance(name: str, value: Any, kinds: Any, expected: str) -> None:
    """Raises TypeError unless it is an instance of some classes."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {expected}; got {shown(value)}.")


def key(name: str, value: Any) -> None:
    """Raises TypeError unless it is one random key, typed or raw."""
    fits = _has_shape(value) and (
        (value.dtype == jnp.uint32 and len(value.shape) == 1)
        or (jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and not value.shape)
    )
    if not fits:
        raise TypeError(
            f"{name} must be a random key, such as jax.random.key(0); got "
            f"{shown(value)}."
        )


def array(name: str, value: Any) -> Array:
    """The value as an array; TypeError if it is none."""
    if not is_array(value) or isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(f"{name} must be an array; got {shown(value)}.")
    return jnp.asarray(value)


def real(name: str, value: Any) -> Array:
    """The value as an array of real numbers; TypeError if it is none."""
    if not _is_real(value):
        raise TypeError(f"{name} must be an array of real numbers; got {shown(value)}.")
    return jnp.asarray(value)


def _is_real(value: Any) -> bool:
    if not is_array(value) or isinstance(value, jax.ShapeDtypeStruct):
        return False
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return any(jnp.issubdtype(dtype_of(value), kind) for kind in kinds)


def floating(name: str, value: Any) -> Array:
    """The value as an array of real floating point; TypeError if it is none."""
    if not _is_real(value) or not jnp.issubdtype(dtype_of(value), jnp.floating):
        complex_one = is_array(value) and jnp.issubdtype(dtype_of(value), _COMPLEX)
        advice = (
            " Take real and imaginary part of a complex one, "
            "jnp.stack([z.real, z.imag], -1)."
        )
        raise TypeError(
            f"{name} must be real floating point; got {shown(value)}."
            f"{advice if complex_one else ''}"
        )
    return jnp.asarray(value)


def floating_type(name: str, value: Any) -> Any:
    """The value as a type of arrays; TypeError unless it is real floating point."""
    try:
        known = value is not None and not _has_shape(value)
        # float is what JAX makes of it, float32 by default
        kind = jax.dtypes.canonicalize_dtype(value) if known else None
    except (TypeError, ValueError):  # numpy's, which do not say of what
        kind = None
    if kind is None or not jnp.issubdtype(kind, jnp.floating):
        raise TypeError(
            f"{name} must be real floating point; got {shown(value)}. Pass "
            "jnp.float32, say."
        )
    return kind


def matrices(name: str, value: Any) -> Array:
    """The value as floating-point matrices `[..., d, d]`.

    Raises:
      TypeError: if it is no array of real floating point.
      ValueError: if its last two axes differ.
    """
    x = floating(name, value)
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(
            f"{name} must be square matrices, an array [..., d, d]; got {shown(x)}."
        )
    return x


def sequence(name: str, value: Any, of: str, length: int | None = None) -> None:
    """Raises TypeError unless it is a list or tuple, of that length if there is one."""
    fits = isinstance(value, list | tuple)
    if not fits or (length is not None and len(value) != length):
        raise TypeError(f"{name} must be a list or tuple of {of}; got {shown(value)}.")


def trees(name: str, tree: Any) -> None:
    """Raises TypeError unless all leaves are arrays, or shapes of arrays."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not is_array(leaf):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} must be an array; got "
                f"{shown(leaf)}. Pass what is no array through a closure, or "
                "functools.partial."
            )


def real_trees(name: str, tree: Any) -> None:
    """Raises TypeError unless all leaves are arrays of real numbers."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        real(name + jax.tree_util.keystr(path), leaf)


def floating_trees(name: str, tree: Any) -> None:
    """Raises TypeError unless all leaves are arrays of real floating point."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        floating(name + jax.tree_util.keystr(path), leaf)
