"""What tests compare with: dense matrices from whole Jacobians, and naive formulas.

Nothing here uses the library. Matrices over the parameters are `[P, P]` in the order of
`jax.flatten_util.ravel_pytree`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

OutputsFn = Callable[[Any], jax.Array]
"""From the parameters to the registered output `[n, ...]`."""
PerCase = Callable[..., jax.Array]
"""From one case's output (and data) to its scalar negative log-likelihood."""


def jacobian(outputs: OutputsFn, params: Any) -> np.ndarray:
    """Returns `[n, d, P]`, each case's Jacobian of its flattened output."""
    theta, unravel = ravel_pytree(params)

    def flat(theta):
        z = outputs(unravel(theta))
        return z.reshape(len(z), -1)

    return np.asarray(jax.jit(jax.jacobian(flat))(theta))


def output_hessians(nll: PerCase, z: jax.Array, *data: jax.Array) -> np.ndarray:
    """Returns `[n, d, d]`, each case's Hessian over its flattened output."""

    def one(z, *data):
        flat = lambda u: nll(u.reshape(z.shape), *data)  # noqa: E731
        return jax.hessian(flat)(z.reshape(-1))

    return np.asarray(jax.jit(jax.vmap(one))(z, *data))


def ggn(outputs: OutputsFn, nll: PerCase, params: Any, *data: Any) -> np.ndarray:
    """`(1/N) Σ_n J_nᵀ H_n J_n`; the exact Fisher for natural parameters."""
    j = jacobian(outputs, params)
    h = output_hessians(nll, jax.jit(outputs)(params), *data)
    return np.einsum("nap,nab,nbq->pq", j, h, j) / len(j)


def empirical_fisher(
    outputs: OutputsFn, nll: PerCase, params: Any, *data: Any
) -> np.ndarray:
    """`(1/N) Σ_n g_n g_nᵀ` of the cases' gradients at their targets."""
    theta, unravel = ravel_pytree(params)

    def each(theta):
        return jax.vmap(nll)(outputs(unravel(theta)), *data)

    g = np.asarray(jax.jit(jax.jacobian(each))(theta))
    return g.T @ g / len(g)


def hessian(loss: Callable[[Any], jax.Array], params: Any) -> np.ndarray:
    """The Hessian of a scalar function of the parameters."""
    theta, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda t: loss(unravel(t))))(theta))


def indices(params: Any) -> dict[str, np.ndarray]:
    """For each leaf by path, where its entries are in the raveled vector."""
    result, start = {}, 0
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        result[name] = np.arange(start, start + leaf.size).reshape(leaf.shape)
        start += leaf.size
    return result


def block(matrix: np.ndarray, params: Any, *names: str) -> np.ndarray:
    """The diagonal block of some leaves, in the order given."""
    at = indices(params)
    rows = np.concatenate([at[name].reshape(-1) for name in names])
    return matrix[np.ix_(rows, rows)]


def vector(tree: Any) -> np.ndarray:
    """The raveled tree."""
    return np.asarray(ravel_pytree(tree)[0])


def random_like(tree: Any, seed: int) -> Any:
    """A random vector like a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree
    )


NORMS: dict[str, Callable[[np.ndarray], float]] = {
    "trace": lambda m: np.abs(np.linalg.eigvalsh(m)).sum(),
    "frobenius": lambda m: np.sqrt((m**2).sum()),
    "spectral": lambda m: np.linalg.norm(m, 2),
    "one": lambda m: 1.0,
}
"""Matrix norms, of symmetric matrices."""


def pi(a: np.ndarray, g: np.ndarray, norm: str = "trace") -> float:
    """`π = √(‖A ⊗ I‖ / ‖I ⊗ G‖)` (section 6.3)."""
    left, right = np.kron(a, np.eye(len(g))), np.kron(np.eye(len(a)), g)
    return float(np.sqrt(NORMS[norm](left) / NORMS[norm](right)))


def factored_damping(
    a: np.ndarray, g: np.ndarray, damping: float, norm: str = "trace"
) -> np.ndarray:
    """`(A + π√λ I) ⊗ (G + √λ/π I)` over row-major `[i, o]` matrices (section 6.3)."""
    p, root = pi(a, g, norm), np.sqrt(damping)
    return np.kron(a + p * root * np.eye(len(a)), g + root / p * np.eye(len(g)))


def matrix_power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """A power of a symmetric positive definite matrix."""
    w, u = np.linalg.eigh(matrix)
    return (u * w**exponent) @ u.T


def random_psd(rng: np.random.Generator, size: int, rank: int | None = None):
    """A random positive semidefinite matrix of a given rank."""
    root = rng.standard_normal((size, size if rank is None else rank))
    return root @ root.T / size
