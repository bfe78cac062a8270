"""Predictive distributions: what a registered loss says about the model's output.

A distribution names `log r(y | z)` for the natural parameters `z` that the network puts
out. Arrays are `z: [n, ..., d]`; the leading axis holds the N cases. Every method works
on all cases at once and computes in float32 or wider. With `F_R` the Fisher of one case
over `z` and `F_R = B Bᵀ`, the methods give samples with covariance `F_R` and products
with `B`, `Bᵀ` (Martens & Grosse 2015, Appendix C).
"""

import abc
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._utils.arguments import function, number
from kfac_jax._utils.dtypes import wide
from kfac_jax.linalg._psd import symmetric_eigh

Data = tuple[Array, ...]


class Distribution(abc.ABC):
    """A predictive distribution `r(y | z)`; a small static (hashable) object.

    `data` below is what was registered with the output: `(targets,)`, or `()` where the
    loss was registered without targets.
    """

    event_rank: int = 0
    """How many trailing axes of `z` make one event.

    1 for categorical, 0 if elementwise.
    """

    @abc.abstractmethod
    def negative_log_likelihood(self, z: Array, data: Data) -> Array:
        """Returns `-log r(y | z)` without constants, `z.shape` less the event."""

    @abc.abstractmethod
    def sample_gradient(self, z: Array, data: Data, key: Array) -> Array:
        """Returns `∇_z -log r(y | z)` for y drawn from the model, shaped like `z`."""

    @abc.abstractmethod
    def multiply_root(self, z: Array, data: Data, r: Array) -> Array:
        """Returns `B r` for each case, shaped like `z`."""

    @abc.abstractmethod
    def multiply_root_transpose(self, z: Array, data: Data, v: Array) -> Array:
        """Returns `Bᵀ v` for each case, shaped like `z`."""

    def target_gradient(self, z: Array, data: Data) -> Array:
        """Returns `∇_z -log r(y | z)` at the registered targets (empirical Fisher)."""
        return jax.grad(lambda u: self.negative_log_likelihood(u, data).sum())(z)


@dataclasses.dataclass(frozen=True)
class Categorical(Distribution):
    """Softmax over the last axis; targets are class indices or probabilities."""

    event_rank = 1

    def negative_log_likelihood(self, z: Array, data: Data) -> Array:
        """Returns the softmax cross entropy, `[n, ...]`."""
        (targets,) = data
        if targets.ndim == z.ndim - 1:
            targets = jax.nn.one_hot(targets, z.shape[-1], dtype=z.dtype)
        return -(targets.astype(z.dtype) * jax.nn.log_softmax(z)).sum(-1)

    def sample_gradient(self, z: Array, data: Data, key: Array) -> Array:
        """Returns `p - onehot(y)`."""
        y = jax.random.categorical(key, z)
        return jax.nn.softmax(z) - jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)

    def multiply_root(self, z: Array, data: Data, r: Array) -> Array:
        """`B = diag(√p) - p √pᵀ`, for which `B Bᵀ = diag(p) - p pᵀ`."""
        p = jax.nn.softmax(z)
        root = jnp.sqrt(p)
        return root * r - p * (root * r).sum(-1, keepdims=True)

    def multiply_root_transpose(self, z: Array, data: Data, v: Array) -> Array:
        """`Bᵀ v = √p (v - pᵀ v)`."""
        p = jax.nn.softmax(z)
        return jnp.sqrt(p) * (v - (p * v).sum(-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Bernoulli(Distribution):
    """Independent Bernoulli variables with logits `z`."""

    def negative_log_likelihood(self, z: Array, data: Data) -> Array:
        """Returns the sigmoid cross entropy, elementwise."""
        (targets,) = data
        return jax.nn.softplus(z) - targets.astype(z.dtype) * z

    def sample_gradient(self, z: Array, data: Data, key: Array) -> Array:
        """Returns `p - y`."""
        p = jax.nn.sigmoid(z)
        return p - jax.random.bernoulli(key, p).astype(z.dtype)

    def multiply_root(self, z: Array, data: Data, r: Array) -> Array:
        """`B = √(p (1 - p))`."""
        return jnp.sqrt(jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)) * r

    def multiply_root_transpose(self, z: Array, data: Data, v: Array) -> Array:
        """The root is diagonal, so this is `multiply_root`."""
        return self.multiply_root(z, data, v)


@dataclasses.dataclass(frozen=True)
class Normal(Distribution):
    """Independent normal variables with mean `z` and a fixed variance σ²."""

    variance: float = 0.5

    def __post_init__(self) -> None:
        """Checks the range."""
        number("variance (σ²)", self.variance)
        if not 0.0 < self.variance < float("inf"):
            raise ValueError(
                "A normal distribution needs a finite positive variance; got "
                f"{self.variance}."
            )

    def negative_log_likelihood(self, z: Array, data: Data) -> Array:
        """Returns `(z - y)² / (2 σ²)`, elementwise."""
        (targets,) = data
        return jnp.square(z - targets.astype(z.dtype)) / (2.0 * self.variance)

    def sample_gradient(self, z: Array, data: Data, key: Array) -> Array:
        """Returns `(z - y) / σ²`, which is normal with variance `1 / σ²`."""
        return self.multiply_root(z, data, jax.random.normal(key, z.shape, z.dtype))

    def multiply_root(self, z: Array, data: Data, r: Array) -> Array:
        """`B = 1 / σ`."""
        return r / self.variance**0.5

    def multiply_root_transpose(self, z: Array, data: Data, v: Array) -> Array:
        """The root is diagonal, so this is `multiply_root`."""
        return self.multiply_root(z, data, v)


@dataclasses.dataclass(frozen=True)
class NormalWithVariance(Distribution):
    """Independent normal variables; `z` is mean μ and log variance s on the last axis.

    The Fisher over (μ, s) is `diag(e⁻ˢ, ½)`. The Hessian may be indefinite, as (μ, s)
    are no natural parameters; the Fisher stands for it in the ggn modes, too.
    """

    event_rank = 1

    def negative_log_likelihood(self, z: Array, data: Data) -> Array:
        """Returns `s / 2 + (μ - y)² / (2 eˢ)`, `z.shape[:-1]`."""
        (targets,) = data
        mean, log_variance = z[..., 0], z[..., 1]
        error = jnp.square(mean - targets.astype(z.dtype))
        return 0.5 * (log_variance + error * jnp.exp(-log_variance))

    def sample_gradient(self, z: Array, data: Data, key: Array) -> Array:
        """Returns `(-ε e^{-s/2}, (1 - ε²) / 2)` for standard normal ε."""
        noise = jax.random.normal(key, z.shape[:-1], z.dtype)
        mean = -noise * jnp.exp(-0.5 * z[..., 1])
        return jnp.stack([mean, 0.5 * (1.0 - jnp.square(noise))], -1)

    def multiply_root(self, z: Array, data: Data, r: Array) -> Array:
        """`B = diag(e^{-s/2}, √½)`."""
        mean = r[..., 0] * jnp.exp(-0.5 * z[..., 1])
        return jnp.stack([mean, r[..., 1] * 0.5**0.5], -1)

    def multiply_root_transpose(self, z: Array, data: Data, v: Array) -> Array:
        """The root is diagonal, so this is `multiply_root`."""
        return self.multiply_root(z, data, v)


@dataclasses.dataclass(frozen=True)
class Convex(Distribution):
    """Any loss that is convex in the output; its factor comes from autodiff.

    There is no predictive distribution to draw from, so the sampled gradients are
    normal with covariance `H`, the Hessian of one case's loss over the flattened
    output. Where the loss is not convex after all, negative eigenvalues of H are taken
    for zero.
    """

    per_case_loss: Callable[..., Array]

    def __post_init__(self) -> None:
        """Checks the type."""
        function("per_case_loss", self.per_case_loss)

    def _eigh(self, z: Array, data: Data) -> tuple[Array, Array]:
        """Eigenvalues `[n, d]` and eigenvectors of each case's Hessian."""

        def hessian(z: Array, *data: Array) -> Array:
            shape = z.shape
            flat = lambda u: self.per_case_loss(u.reshape(shape), *data)  # noqa: E731
            return jax.hessian(flat)(z.reshape(-1))

        hessians = jax.vmap(hessian)(z, *data)
        if hessians.shape[-1] == 1:
            return hessians[..., 0], jnp.ones_like(hessians)
        return symmetric_eigh(hessians)

    def _root(self, z: Array, data: Data) -> Array:
        w, u = self._eigh(z, data)
        return u * jnp.sqrt(jnp.maximum(w, 0.0))[:, None, :]

    def concavity(self, z: Array, data: Data) -> Array:
        """How negative the cases' Hessians get, relative to their size: 0 if convex.

        Where they vanish, what is left of them is rounding, so that they count as no
        smaller than `‖∇‖ / (1 + ‖z‖)`, with which the gradient would change by itself
        over a distance like z.
        """
        w, _ = self._eigh(z, data)
        slope = jnp.abs(self.target_gradient(z, data)).max() / (1 + jnp.abs(z).max())
        size = jnp.maximum(jnp.abs(w).max(), slope)
        return jnp.maximum(-w.min(), 0.0) / jnp.where(size > 0, size, 1.0)

    def negative_log_likelihood(self, z: Array, data: Data) -> Array:
        """Returns the loss of each case, `[n]`."""
        return jax.vmap(self.per_case_loss)(z, *data)

    def sample_gradient(self, z: Array, data: Data, key: Array) -> Array:
        """Returns a normal vector with covariance `H`."""
        return self.multiply_root(z, data, jax.random.normal(key, z.shape, z.dtype))

    def multiply_root(self, z: Array, data: Data, r: Array) -> Array:
        """`B = U √w` from the eigendecomposition `H = U diag(w) Uᵀ`."""
        flat = r.reshape(len(z), -1)
        return jnp.einsum("nde,ne->nd", self._root(z, data), flat).reshape(z.shape)

    def multiply_root_transpose(self, z: Array, data: Data, v: Array) -> Array:
        """Returns `√w Uᵀ v`."""
        flat = v.reshape(len(z), -1)
        return jnp.einsum("nde,nd->ne", self._root(z, data), flat).reshape(z.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RegisteredLoss:
    """One registered loss with the arrays that reached its tag.

    The loss is `weight · (1/N) Σ mask · -log r(y | z)`, N the leading axis of `z`; its
    Fisher over `z` is block diagonal over the cases.
    """

    distribution: Distribution = dataclasses.field(metadata={"static": True})
    z: Array  # [n, ..., d]
    data: Data  # the targets, each [n, ...]; or ()
    mask: Array | None  # [n, ...], leading axes of z
    weight: Array  # []

    def _spread(self, x: Array, rank: int) -> Array:
        return jnp.expand_dims(x, tuple(range(x.ndim, rank)))

    def _scaled(self, u: Array) -> Array:
        """Multiplies by `√(weight · mask / N)`, so that sums over cases are means."""
        scale = jnp.sqrt(self.weight.astype(u.dtype) / len(self.z))
        u = u * self._spread(scale, u.ndim)
        if self.mask is not None:
            u = u * self._spread(jnp.sqrt(self.mask.astype(u.dtype)), u.ndim)
        return u

    def value(self) -> Array:
        """Returns the loss as documented: a mean over cases, a sum within a case."""
        z = wide(self.z)
        values = self.distribution.negative_log_likelihood(z, self.data)
        if self.mask is not None:
            values = values * self._spread(self.mask.astype(z.dtype), values.ndim)
        weight = self._spread(self.weight.astype(z.dtype), values.ndim)
        return (weight * values).sum() / len(z)

    def sample_gradient(self, key: Array) -> Array:
        """Returns a draw with covariance `F_R`, the Fisher of the whole loss over z."""
        z = wide(self.z)
        u = self.distribution.sample_gradient(z, self.data, key)
        return self._scaled(u).astype(self.z.dtype)

    def target_gradient(self) -> Array:
        """Returns each case's gradient at its registered target, scaled as a sample."""
        u = self.distribution.target_gradient(wide(self.z), self.data)
        return self._scaled(u).astype(self.z.dtype)

    def multiply_root(self, r: Array) -> Array:
        """Returns `B r` with `B Bᵀ = F_R`."""
        u = self.distribution.multiply_root(wide(self.z), self.data, wide(r))
        return self._scaled(u).astype(self.z.dtype)

    def multiply_root_transpose(self, v: Array) -> Array:
        """Returns `Bᵀ v`, in float32 or wider."""
        scaled = self._scaled(wide(v))
        return self.distribution.multiply_root_transpose(
            wide(self.z), self.data, scaled
        )
