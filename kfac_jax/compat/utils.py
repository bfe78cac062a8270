"""Types, arithmetic of trees, helpers for `pmap`, and inverses of small matrices.

For programs already written for the existing JAX K-FAC library; see `kfac_jax.compat`.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from chex import ArrayTree as ArrayTree
from chex import PRNGKey as PRNGKey
from jax import Array
from jax.typing import DTypeLike

from kfac_jax import linalg
from kfac_jax._utils import arguments
from kfac_jax.compat._devices import (
    broadcast_all_local_devices as broadcast_all_local_devices,
)
from kfac_jax.compat._devices import get_first as get_first
from kfac_jax.compat._devices import in_pmap as in_pmap
from kfac_jax.compat._devices import (
    make_different_rng_key_on_all_devices as make_different_rng_key_on_all_devices,
)
from kfac_jax.compat._devices import p_split as p_split
from kfac_jax.compat._devices import p_split_num as p_split_num
from kfac_jax.compat._devices import pmean_if_pmap as pmean_if_pmap
from kfac_jax.compat._devices import psum_if_pmap as psum_if_pmap
from kfac_jax.compat._devices import (
    replicate_all_local_devices as replicate_all_local_devices,
)
from kfac_jax.compat._devices import wrap_if_pmap as wrap_if_pmap
from kfac_jax.compat._state_classes import State as State
from kfac_jax.compat._state_classes import (
    WeightedMovingAverage as WeightedMovingAverage,
)
from kfac_jax.compat._state_classes import register_state_class as register_state_class

T = TypeVar("T")

# Numbers and arrays.
Numeric = Array | float | int
Scalar = float | int
Shape = tuple[int, ...]
DType = DTypeLike
# Trees; the program decides what they are.
PyTree = T | Sequence[Any] | Mapping[str, Any]
Params = Any
Batch = Any
FuncState = Any
FuncAux = dict[str, Any]
FuncArgs = Sequence[Any]
FuncOuts = Array | tuple[Array, FuncAux]
# Functions.
Func = Callable[..., FuncOuts]
ValueFunc = Callable[..., Array]
ValueAndGradFunc = Callable[..., tuple[Any, Any]]
ScheduleType = Callable[..., Numeric]


# --------------------------------------------------------------------- trees as vectors


def inner_product(obj1: ArrayTree, obj2: ArrayTree, in_float64: bool = False) -> Array:
    """The sum of products of all entries of two trees.

    Args:
      obj1: a tree of arrays.
      obj2: a tree of the same structure and shapes.
      in_float64: whether to compute in float64.

    Returns:
      A scalar.

    Raises:
      ValueError: if structure or shapes differ.
    """
    arguments.trees("obj1", obj1)
    arguments.trees("obj2", obj2)
    arguments.flag("in_float64", in_float64)
    (xs, treedef), (ys, other) = jax.tree.flatten(obj1), jax.tree.flatten(obj2)
    if treedef != other or [*map(jnp.shape, xs)] != [*map(jnp.shape, ys)]:
        raise ValueError(
            "inner_product expects obj1 and obj2 of the same structure and shapes; got "
            f"{jax.tree.map(jnp.shape, obj1)} and {jax.tree.map(jnp.shape, obj2)}."
        )
    dtype = jnp.float64 if in_float64 else None
    parts = [
        jnp.sum(jnp.asarray(x, dtype) * jnp.asarray(y, dtype), dtype=dtype)
        for x, y in zip(xs, ys, strict=True)
    ]
    return functools.reduce(operator.add, parts, jnp.zeros((), dtype))


def norm(obj: ArrayTree) -> Array:
    """The Euclidean norm of a tree.

    >>> norm({"a": jnp.full(2, 3.0), "b": jnp.asarray([[1.0, -1.0], [2.0, 1.0]])})
    Array(5., dtype=float32...)
    """
    arguments.trees("obj", obj)
    return jnp.sqrt(inner_product(obj, obj))


def scalar_mul(obj: ArrayTree, scalar: Numeric) -> Any:
    """Multiplies every entry of a tree by a number."""
    arguments.trees("obj", obj)
    arguments.array("scalar", scalar)
    return jax.tree.map(lambda x: x * scalar, obj)


def product(iterable_object: Iterable[Any]) -> Any:
    """The product of numbers, 1 for none.

    >>> product((2, 3))
    6
    """
    return functools.reduce(operator.mul, iterable_object, 1)


def first_dim_is_size(size: int, *args: Array) -> bool:
    """Whether the leading axis of every array has that length."""
    arguments.integer("size", size)
    for x in args:
        if not arguments.array("args", x).ndim:
            raise ValueError(
                f"args must be arrays with a leading axis; got {arguments.shown(x)}."
            )
    return all(x.shape[0] == size for x in args)


def default_batch_size_extractor(batch: Any) -> int:
    """The number of cases in a batch: the length of its first array's first axis.

    Args:
      batch: arrays.

    Returns:
      The length.

    Raises:
      ValueError: if there is none.
    """
    arguments.trees("batch", batch)
    shape = next((jnp.shape(x) for x in jax.tree.leaves(batch)), ())
    if not shape:
        raise ValueError(
            "Expected a batch whose first array has a leading axis of cases; got shape "
            f"{shape}. Pass batch_size_extractor=lambda batch: ... to the Optimizer."
        )
    return int(shape[0])


# ----------------------------------------------------------------- positive definite


def psd_inv(matrix: Array) -> Array:
    """Inverts positive definite matrices `[..., d, d]`; others give NaN."""
    return linalg.inverse(arguments.matrices("matrix", matrix))


def pi_adjusted_kronecker_factors(*factors: Array, damping: Any) -> tuple[Array, ...]:
    """Damped factors whose Kronecker product stands for `F_1 ⊗ ... ⊗ F_n + λ I`.

    Factors are rescaled to one mean eigenvalue c, their geometric mean, and each of the
    k that have more than one entry gets a kth root of what λ is relative to the others:
    `F_i c / c_i + (λ / c^(n - k))^(1/k) I`. For two factors that is the paper's π.

    Args:
      *factors: positive matrices `[d, d]`, or their diagonals `[d]`.
      damping: λ.

    Returns:
      As many factors.

    References:
      Martens & Grosse 2015, section 6.3.
    """
    n = len(factors)
    factors = tuple(_matrix_or_diagonal(x) for x in factors)
    arguments.number("damping (λ)", damping, arrays=True)
    arguments.within("damping (λ)", damping, 0.0, float("inf"))
    damping = jnp.asarray(damping, factors[0].dtype)
    means = [_diagonal(x).mean() for x in factors]
    common = jnp.prod(jnp.stack(means)) ** (1 / n)
    scaled = [
        x * (common / jnp.where(mean > 0, mean, 1))
        for x, mean in zip(factors, means, strict=True)
    ]
    large = [x.size > 1 for x in factors]
    k = sum(large)
    if k == 0:
        return tuple(jnp.full_like(x, (common**n + damping) ** (1 / n)) for x in scaled)
    even = damping ** (1 / n)
    zero = common == 0  # one of them, and so the product, is zero
    others = jnp.where(zero, 1, common).astype(common.dtype) ** (n - k)
    shift = jnp.where(zero, even, (damping / others) ** (1 / k))
    single = jnp.where(zero, even, 0).astype(even.dtype)
    pairs = zip(scaled, large, strict=True)
    return tuple(_shifted(x, shift if is_large else single) for x, is_large in pairs)


def pi_adjusted_kronecker_inverse(*factors: Array, damping: Any) -> tuple[Array, ...]:
    """Inverts the factors of `pi_adjusted_kronecker_factors`, one by one.

    Args:
      *factors: positive matrices `[d, d]`, or their diagonals `[d]`.
      damping: λ.

    Returns:
      As many factors, of the same shapes.
    """
    damped = pi_adjusted_kronecker_factors(*factors, damping=damping)
    return tuple(1 / x if x.ndim == 1 else psd_inv(x) for x in damped)


def _matrix_or_diagonal(x: Any) -> Array:
    x = arguments.floating("factors", x)
    return x if x.ndim == 1 else arguments.matrices("factors", x)


def _diagonal(x: Array) -> Array:
    return x if x.ndim == 1 else jnp.diagonal(x)


def _shifted(x: Array, shift: Array) -> Array:
    shift = shift.astype(x.dtype)
    return x + shift if x.ndim == 1 else x + shift * jnp.eye(len(x), dtype=x.dtype)


# ------------------------------------------------------------------------------- scopes


def auto_scope_method(method: Callable[..., T]) -> Callable[..., T]:
    """Runs a method in a `jax.named_scope` of its class and name."""
    arguments.function("method", method)

    @functools.wraps(method)
    def wrapped(instance: Any, *args: Any, **kwargs: Any) -> T:
        with jax.named_scope(f"{type(instance).__name__}_{method.__name__}"):
            return method(instance, *args, **kwargs)

    return wrapped


def __getattr__(name: str) -> Any:
    """Says what to do without a name that is not here."""
    raise AttributeError(
        f"kfac_jax.utils has no {name!r}: expected one of the names that programs were "
        "found to use. jax.tree and optax.tree compute with trees, and jax.lax has the "
        "collectives."
    )
