"""Inverses and eigendecompositions of symmetric positive matrices, batched."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular
from jaxtyping import Bool, Float

from kfac_jax._utils.ordering import known_false_after

Matrices = Float[Array, "*e d d"]
Stack = Float[Array, "k d d"]


def symmetrize(x: Matrices) -> Matrices:
    """Returns `(x + xᵀ) / 2`."""
    return (x + jnp.swapaxes(x, -1, -2)) / 2


def inverse(x: Matrices) -> Matrices:
    """Inverts positive definite matrices.

    A matrix that is not positive definite gives NaN, which the caller must handle.

    >>> import jax.numpy as jnp
    >>> inverse(4.0 * jnp.eye(2))
    Array([[0.25, 0.  ],
           [0.  , 0.25]], dtype=float32)
    """
    return inverse_many([(x, jnp.zeros(x.shape[:-2], x.dtype))])[0].inverse


class Inverted(NamedTuple):
    """Inverses, and whether all of them are finite."""

    inverse: Float[Array, "*e d d"]
    finite: Bool[Array, ""]


Apply = Callable[[Sequence[Array], Callable[[Array], Array]], list[Array]]
"""Applies a function of `[k, d, d]` to each of several arrays."""


def inverse_many(
    shifted: Sequence[tuple[Array, Array]], apply: Apply | None = None
) -> list[Inverted]:
    """Inverts `x + s I` for many x and s, matrices of similar size as one batch.

    Matrices are padded by the identity. So the size of the compiled program grows with
    the number of different padded sizes, not with the number of matrices.

    Sizes are inverted one after the other: on CPUs, batched LAPACK calls that run at
    the same time wait for each other's threads and can block for ever (jaxlib 0.10).

    Args:
      shifted: x, symmetric `[..., d, d]`, and s, `[...]`; the sum positive definite.
      apply: applies the inversion to the batches; by default one after the other.

    Returns:
      The inverses in the same order and shapes.
    """
    return _many(shifted, inverse_stack, apply)


def inverse_root_many(
    shifted: Sequence[tuple[Array, Array]], apply: Apply | None = None
) -> list[Array]:
    """Roots R of the inverses of `x + s I`: upper triangular, `R Rᵀ (x + s I) = I`.

    Args:
      shifted: x and s, as for `inverse_many`.
      apply: applies the inversion to the batches, as for `inverse_many`.

    Returns:
      The roots in the same order and shapes; NaN where not positive definite.
    """
    roots = _many(shifted, inverse_root, apply)
    return [root.inverse for root in roots]


def _in_turn(
    stacks: Sequence[Array], function: Callable[[Array], Array]
) -> list[Array]:
    """Calls a function for one stack after the other."""
    results: list[Array] = []
    previous = jnp.zeros(())
    for stack in stacks:
        # Adds a zero that XLA cannot know to be zero before the previous result is
        # there. A data dependency is the only order that XLA is sure to keep.
        results.append(
            function(stack + known_false_after(previous).astype(stack.dtype))
        )
        previous = results[-1][0, 0, 0]
    return results


def _many(
    shifted: Sequence[tuple[Array, Array]],
    function: Callable[[Array], Array],
    apply: Apply | None,
) -> list[Inverted]:
    groups: dict[tuple[int, jnp.dtype], list[int]] = {}
    for i, (x, _) in enumerate(shifted):
        groups.setdefault((padded(x.shape[-1]), x.dtype), []).append(i)
    results: dict[int, Inverted] = {}
    stacks = [
        _stack([shifted[i] for i in members], size)
        for (size, _), members in groups.items()
    ]
    found = (apply or _in_turn)(stacks, function)
    for members, inverses in zip(groups.values(), found, strict=True):
        # An inverse is positive definite, so its diagonal bounds all entries. The
        # padding is the identity's inverse, which is finite.
        finite = jnp.isfinite(diagonal(inverses)).all(-1)
        start = 0
        for i in members:
            shape = shifted[i][0].shape
            d = shape[-1]
            stop = start + math.prod(shape[:-2])
            inverse = inverses[start:stop, :d, :d].reshape(shape)
            flags = finite[start:stop]
            results[i] = Inverted(inverse, flags[0] if len(flags) == 1 else flags.all())
            start = stop
    return [results[i] for i in range(len(shifted))]


def padded(d: int) -> int:
    """The size that matrices of size d are padded to.

    Padded sizes are odd multiples of 16, and for small d a power of two plus 8. Rows at
    distances of powers of two compete for the same places in a CPU's caches, and LAPACK
    takes twice the time. Common sizes `d = 2^n` (outputs of one layer) and `d + 1`
    (inputs of the next, and its bias) get the same padded size, so that they share a
    batch.
    """
    if d <= 8:
        return 1 << (d - 1).bit_length()
    if d <= 136:
        return 8 + (1 << (d - 9).bit_length())
    return 32 * (-(-(d - 15) // 32)) + 16


def _stack(shifted: Sequence[tuple[Array, Array]], size: int) -> Array:
    """`x + s I` as one `[k, size, size]`, with ones on the new part of the diagonal."""
    matrices: list[Array] = []
    diagonals: list[Array] = []
    for x, s in shifted:
        d, k = x.shape[-1], math.prod(x.shape[:-2])
        new = size - d
        matrices.append(jnp.pad(x.reshape(k, d, d), ((0, 0), (0, new), (0, new))))
        added = jnp.broadcast_to(s.astype(x.dtype).reshape(k, 1), (k, d))
        diagonals.append(jnp.pad(added, ((0, 0), (0, new)), constant_values=1))
    diagonal = jnp.concatenate(diagonals)[:, :, None]
    identity = jnp.eye(size, dtype=diagonal.dtype)[None]
    return jnp.concatenate(matrices) + diagonal * identity


def _one_by_one(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Gives LAPACK one matrix at a time if a process has several CPU devices.

    Their batched calls share one pool of threads, wait for each other and can block for
    ever. The order of `_in_turn` does not help there: it is kept on each device only.
    """

    def wrapped(x: Array) -> Array:
        if len(x) == 1 or not several_cpu_devices():
            return function(x)
        return jax.lax.platform_dependent(x, cpu=in_turn, default=function)

    def in_turn(x: Array) -> Array:
        return jax.lax.map(function, x[:, None])[:, 0]

    return wrapped


def several_cpu_devices() -> bool:
    """Whether this process has CPU devices that run at the same time."""
    try:
        return len(jax.local_devices(backend="cpu")) > 1
    except RuntimeError:  # JAX was told to leave CPUs alone
        return False


def inverse_stack(x: Stack) -> Stack:
    """Inverts symmetric matrices; NaN where x is not positive definite."""
    if x.shape[-1] == 1:
        return jnp.where(x > 0, 1.0 / x, jnp.nan)
    return _gram(inverse_root(x))


def inverse_root(x: Stack) -> Stack:
    """The upper triangular `U⁻¹` of `x = Uᵀ U`, so that `x⁻¹ = U⁻¹ U⁻ᵀ`.

    Only the factorisation is left to LAPACK (or its counterpart on other backends). Its
    triangular solve would take three times the arithmetic for `U⁻¹`, because it does
    not know that the right-hand side, the identity, is triangular too. NaN where x is
    not positive definite.
    """
    if x.shape[-1] == 1:
        return jnp.where(x > 0, 1.0 / jnp.sqrt(x), jnp.nan)
    return _triangular_inverse(_upper_factor(x))


@_one_by_one
def _upper_factor(x: Stack) -> Stack:
    """The upper triangular U of `x = Uᵀ U`.

    LAPACK stores matrices by columns, JAX by rows. So the transpositions here cancel
    with those around the call, and cost nothing.
    """
    return transpose(jnp.linalg.cholesky(transpose(x), symmetrize_input=False))


_SOLVED = 272
"""Largest triangular matrix that is inverted by a triangular solve."""

_MULTIPLIED = 528
"""Largest triangular matrix whose product ignores that half of it is zero."""


def _triangular_inverse(x: Stack) -> Stack:
    """Inverts upper triangular matrices, all halves on the diagonal as one batch.

    The inverse of `[[a, b], [0, c]]` is `[[a⁻¹, -a⁻¹ b c⁻¹], [0, c⁻¹]]`.
    """
    k, d, _ = x.shape
    if d <= _SOLVED or d % 2:
        return _solved(x)
    # Both halves have one size, so that each level of the recursion is one batch; the
    # number of operations to compile grows with log d. (Padded sizes are even.)
    a, b, _, c = quarters(x)
    halves = _triangular_inverse(jnp.concatenate([a, c]))
    first, second = halves[:k], halves[k:]
    return join_quarters(first, first @ (-b @ second), jnp.zeros_like(b), second)


@_one_by_one
def _solved(x: Stack) -> Stack:
    identity = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)
    return transpose(solve_triangular(transpose(x), identity, lower=True))


def _gram(x: Stack) -> Stack:
    """`x xᵀ` for upper triangular matrices, without most products with zero.

    With `x = [[a, b], [0, c]]` it is `[[a aᵀ + b bᵀ, b cᵀ], [c bᵀ, c cᵀ]]`.
    """
    if x.shape[-1] <= _MULTIPLIED or x.shape[-1] % 2:
        return x @ transpose(x)
    a, b, _, c = quarters(x)
    right = b @ transpose(c)
    top = _gram(a) + b @ transpose(b)
    return join_quarters(top, right, transpose(right), _gram(c))


def transpose(x: Float[Array, "*e r c"]) -> Float[Array, "*e c r"]:
    return jnp.swapaxes(x, -1, -2)


def quarters(x: Array) -> tuple[Array, Array, Array, Array]:
    half = x.shape[-1] // 2
    top, bottom = x[:, :half], x[:, half:]
    return top[..., :half], top[..., half:], bottom[..., :half], bottom[..., half:]


def join_quarters(a: Array, b: Array, c: Array, d: Array) -> Array:
    """`[[a, b], [c, d]]`."""
    rows = [jnp.concatenate([a, b], axis=2), jnp.concatenate([c, d], axis=2)]
    return jnp.concatenate(rows, axis=1)


def diagonal(x: Matrices) -> Float[Array, "*e d"]:
    """The diagonals of matrices, as one strided slice."""
    d = x.shape[-1]
    return x.reshape(*x.shape[:-2], d * d)[..., :: d + 1]


def finite_diagonals(groups: Sequence[Sequence[Array]]) -> Bool[Array, " n"]:
    """Whether positive semidefinite matrices are finite.

    Only diagonals are read: they bound every entry, as `|x_ij| ≤ √(x_ii x_jj)`. All
    diagonals are put into one array, as a reduction for each takes long to compile.

    Args:
      groups: n groups of matrices `[*e, d, d]`, of any sizes.

    Returns:
      Whether all matrices of a group are finite, for each.

    >>> import jax.numpy as jnp
    >>> finite_diagonals([[jnp.eye(2), jnp.eye(3)], [jnp.nan * jnp.eye(3)]])
    Array([ True, False], dtype=bool)
    """
    if not groups:
        return jnp.zeros((0,), bool)
    rows = [[jnp.isfinite(diagonal(x)).reshape(-1) for x in xs] for xs in groups]
    longest = max(sum(x.size for x in row) for row in rows)
    for row in rows:
        row.append(jnp.ones((longest - sum(x.size for x in row),), bool))
    return jnp.stack([jnp.concatenate(row) for row in rows]).all(axis=1)


def eigh(x: Matrices) -> tuple[Float[Array, "*e d"], Matrices]:
    """Eigenvalues (clipped at zero) and eigenvectors of semidefinite matrices."""
    w, u = symmetric_eigh(x)
    return jnp.maximum(w, 0.0), u


def symmetric_eigh(x: Matrices) -> tuple[Float[Array, "*e d"], Matrices]:
    """Eigenvalues and eigenvectors of symmetric matrices.

    On CPUs matrices are decomposed one after the other, also under vmap: batched LAPACK
    calls that run at the same time wait for each other's threads and can block for ever
    (jaxlib 0.10).
    """
    x = symmetrize(x)
    w, u = _eigh(x.reshape(-1, *x.shape[-2:]))
    return w.reshape(x.shape[:-1]), u.reshape(x.shape)


@jax.custom_jvp
def _eigh(x: Stack) -> tuple[Float[Array, "k d"], Stack]:
    return jax.lax.platform_dependent(x, cpu=_eigh_in_turn, default=_eigh_at_once)


def _eigh_at_once(x: Array) -> tuple[Array, Array]:
    w, u = jnp.linalg.eigh(x)
    return w, u


def _eigh_in_turn(x: Array) -> tuple[Array, Array]:
    return jax.lax.map(jax.custom_batching.sequential_vmap(_eigh_at_once), x)


@_eigh.defjvp
def _eigh_jvp(
    primals: tuple[Stack], tangents: tuple[Stack]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """`ẇ = diag(M)` and `u̇ = u (M ∘ F)`, `M = uᵀ ẋ u`, `F_ij = 1 / (w_j - w_i)`.

    The rule is needed because `sequential_vmap` has no reverse mode.
    """
    w, u = _eigh(*primals)
    moved = transpose(u) @ tangents[0] @ u
    # the identity keeps the diagonal of gaps from being zero: 1 / (0 + 1) - 1 = 0
    identity = jnp.eye(w.shape[-1], dtype=w.dtype)[None]
    inverse_gaps = 1 / (w[:, None, :] - w[:, :, None] + identity) - identity
    return (w, u), (diagonal(moved), u @ (moved * inverse_gaps))


def turned_basis(x: Matrices, basis: Matrices) -> Matrices:
    """One step of orthogonal iteration from a basis towards the eigenvectors.

    `Q L = X U` with L lower triangular and a positive diagonal. If U has the
    eigenvectors in the order of `eigh`, then Q = U; any other basis moves towards them.
    A step takes a fraction of an eigendecomposition's time.

    On CPUs matrices are treated one after the other, as in `eigh`.

    Args:
      x: symmetric, semidefinite.
      basis: U, orthogonal.

    Returns:
      Q.
    """
    # Orthogonal iteration sorts the columns by falling eigenvalues, `eigh` by rising
    # ones. So the columns are reversed before and after.
    moved = (symmetrize(x) @ basis[..., ::-1]).reshape(-1, *x.shape[-2:])
    q = jax.lax.platform_dependent(moved, cpu=_qr_in_turn, default=_qr_at_once)
    return q.reshape(x.shape)[..., ::-1]


def _qr_at_once(x: Array) -> Array:
    q, r = jnp.linalg.qr(x)
    # QR leaves the signs of columns open; a positive diagonal of R makes them unique
    return q * jnp.where(diagonal(r) < 0, -1, 1).astype(q.dtype)[..., None, :]


def _qr_in_turn(x: Array) -> Array:
    return jax.lax.map(jax.custom_batching.sequential_vmap(_qr_at_once), x)


def mean_rows(rows: Sequence[Array]) -> Float[Array, " n *e"]:
    """The means over the last axis of arrays `[*e, d]` that differ only in its length.

    They are computed as one product, because XLA compiles four kernels for each sum.

    Args:
      rows: n arrays, at least one.

    Returns:
      The means of each.

    >>> import jax.numpy as jnp
    >>> mean_rows([jnp.arange(3.0), 4 * jnp.ones(2)])
    Array([1., 4.], dtype=float32...)
    """
    sizes = [x.shape[-1] for x in rows]
    longest = max(sizes)
    padded = [
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, longest - x.shape[-1])]) for x in rows
    ]
    stacked = jnp.stack(padded)
    ones = jnp.ones((longest,), stacked.dtype)
    sums = jnp.matmul(stacked, ones, precision="highest")
    over = jnp.asarray(sizes, sums.dtype).reshape(-1, *[1] * (sums.ndim - 1))
    return sums / over


def trace_pi(
    mean_a: Float[Array, "*e"], mean_g: Float[Array, "*e"]
) -> Float[Array, "*e"]:
    """`π = √((tr A / dim A) / (tr G / dim G))`, 1 where one of them is 0 or not finite.

    Args:
      mean_a: `tr A / dim A`, the mean eigenvalue of A, or another norm of `A ⊗ I`.
      mean_g: `tr G / dim G`, or the same norm of `I ⊗ G`.

    Returns:
      π.

    References:
      Martens & Grosse 2015, section 6.3 (trace norm).

    >>> import jax.numpy as jnp
    >>> trace_pi(jnp.asarray(4.0), jnp.asarray(1.0))
    Array(2., dtype=float32...)
    """
    # `where` before the division, so that no branch makes NaN under jax_debug_nans
    good = (mean_a > 0) & (mean_g > 0) & jnp.isfinite(mean_a) & jnp.isfinite(mean_g)
    ratio = jnp.where(good, mean_a, 1.0) / jnp.where(good, mean_g, 1.0)
    info = jnp.finfo(ratio.dtype)
    return jnp.sqrt(jnp.clip(ratio, info.tiny, info.max))
