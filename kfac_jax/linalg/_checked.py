"""The public functions: their arguments are checked, and made arrays, first.

The library itself calls the functions behind them.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from jax import Array

from kfac_jax._utils.arguments import (
    callable_or_none,
    floating,
    floating_type,
    matrices,
    real,
    sequence,
)
from kfac_jax.linalg import _coherence, _gram, _psd

P = ParamSpec("P")
T = TypeVar("T")


Check = Callable[[str, Any], Any]
"""Takes an argument's name and value, and returns what the function gets."""


def _checked(function: Callable[P, T], **checks: Check) -> Callable[P, T]:
    """The function, with checks for some of its arguments."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in checks:
                bound.arguments[name] = checks[name](name, value)
        return function(*bound.args, **bound.kwargs)

    return wrapped


def _alike(function: Callable[[Array, Array], T]) -> Callable[[Array, Array], T]:
    """The function, whose two arguments must have one shape."""
    first, second = inspect.signature(function).parameters

    @functools.wraps(function)
    def wrapped(x: Array, y: Array) -> T:
        if x.shape != y.shape:
            raise ValueError(
                f"{first} and {second} must have one shape; got {x.shape} and "
                f"{y.shape}."
            )
        return function(x, y)

    return wrapped


def _optional_function(name: str, value: Any) -> Any:
    callable_or_none(name, value)
    return value


def _rows(name: str, value: Any) -> Array:
    x = real(name, value)
    if x.ndim < 2:
        raise ValueError(f"{name} must be an array [..., r, d]; got shape {x.shape}.")
    return x


def _pairs(name: str, value: Any) -> list[tuple[Array, Array]]:
    sequence(name, value, "pairs (x, s)")
    pairs: list[tuple[Array, Array]] = []
    for i, pair in enumerate(value):
        sequence(f"{name}[{i}]", pair, "a matrix and its shift", 2)
        x = matrices(f"{name}[{i}][0]", pair[0])
        s = floating(f"{name}[{i}][1]", pair[1])
        if s.shape != x.shape[:-2]:
            raise ValueError(
                f"{name}[{i}] must have a shift of shape {x.shape[:-2]} for matrices "
                f"{x.shape}; got {s.shape}."
            )
        pairs.append((x, s))
    return pairs


def _triples(name: str, value: Any) -> list[_coherence.Triple]:
    sequence(name, value, "triples (R_A, X, R_Z)")
    triples: list[_coherence.Triple] = []
    for i, part in enumerate(value):
        sequence(f"{name}[{i}]", part, "R_A, X and R_Z", 3)
        first, last = (matrices(f"{name}[{i}][{j}]", part[j]) for j in (0, 2))
        across = floating(f"{name}[{i}][1]", part[1])
        fits = first.ndim == last.ndim == 2
        if not fits or across.shape != (len(first), len(last)):
            raise ValueError(
                f"{name}[{i}] must have X of shape "
                f"{(first.shape[-1], last.shape[-1])} between matrices R_A and R_Z; "
                f"got {first.shape}, {across.shape} and {last.shape}."
            )
        triples.append((first, across, last))
    return triples


def _groups(name: str, value: Any) -> list[list[Array]]:
    sequence(name, value, "lists of matrices")
    for group in value:
        sequence(f"each of {name}", group, "matrices")
    return [[matrices(f"a matrix of {name}", x) for x in group] for group in value]


def _same_but_last(name: str, value: Any) -> list[Array]:
    sequence(name, value, "arrays")
    rows = [floating(f"{name}[{i}]", x) for i, x in enumerate(value)]
    if not rows or not all(x.ndim and x.shape[:-1] == rows[0].shape[:-1] for x in rows):
        raise ValueError(
            f"{name} must be arrays that differ in their last axis only, at least one; "
            f"got shapes {[x.shape for x in rows]}."
        )
    return rows


conditionals = _checked(
    _coherence.conditionals, parts=_triples, each=_optional_function
)
pseudo_inverse = _checked(_coherence.pseudo_inverse, x=matrices)
gram = _checked(_gram.gram, rows=_rows, dtype=floating_type)
diagonal = _checked(_psd.diagonal, x=matrices)
eigh = _checked(_psd.eigh, x=matrices)
finite_diagonals = _checked(_psd.finite_diagonals, groups=_groups)
inverse = _checked(_psd.inverse, x=matrices)
inverse_many = _checked(_psd.inverse_many, shifted=_pairs, apply=_optional_function)
inverse_root_many = _checked(
    _psd.inverse_root_many, shifted=_pairs, apply=_optional_function
)
mean_rows = _checked(_psd.mean_rows, rows=_same_but_last)
symmetrize = _checked(_psd.symmetrize, x=matrices)
trace_pi = _checked(_alike(_psd.trace_pi), mean_a=floating, mean_g=floating)
turned_basis = _checked(_alike(_psd.turned_basis), x=matrices, basis=matrices)
