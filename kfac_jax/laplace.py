"""The Laplace approximation: a normal posterior around trained parameters."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax.blocks import Identity
from kfac_jax.linalg._psd import eigh
from kfac_jax.operator.approximation import Approximation
from kfac_jax.operator.inverses import to_vectors
from kfac_jax.plan.group import layers_of

Params = Any
Predict = Callable[..., Array]
"""`predict(params, *inputs) -> outputs [n, o]`, of n cases."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Laplace:
    """A normal posterior `N(θ, (N F + δ I)⁻¹)` over a network's parameters.

    θ are the trained parameters, F the curvature per case (`curvature.over` of the
    training set), N the number of cases, and `N(0, I / δ)` the prior. Layers without a
    block (`blocks={...: None}`), and those that no layer covers, are not random: so
    that one plan is for all layers, or for the last one. F must be that of the negative
    log likelihood itself, as that of `losses.softmax_cross_entropy`, or of a normal
    distribution with the noise's variance
    (`register_normal_predictive_distribution(..., variance=σ²)`), as a mean over cases.

    Attributes:
      mean: θ.
      curvature: the operator F.
      cases: N.
      prior_precision: δ, a number, or by layer name one for each layer with a block.

    References:
      MacKay 1992, A practical Bayesian framework for backpropagation networks; Ritter,
      Botev, Barber 2018; Daxberger et al. 2021, arXiv:2106.14806.

    >>> import jax, jax.numpy as jnp, kfac_jax
    >>> def loss_fn(w, x, y):
    ...     kfac_jax.register_normal_predictive_distribution(x @ w, y, variance=0.1)
    ...     return (jnp.square(x @ w - y) / 0.2).sum(-1).mean()
    >>> x, y = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[1.0], [2.1], [2.9]])
    >>> w = jnp.linalg.lstsq(x, y)[0]
    >>> curvature = kfac_jax.make_curvature(
    ...     loss_fn, w, x, y, estimation_mode="fisher_exact")
    >>> posterior = Laplace(
    ...     mean=w, curvature=curvature.over(w, [(x, y)]), cases=3, prior_precision=1.0)
    >>> mean, covariance = posterior.predict(lambda w, x: x @ w, jnp.array([[2.0]]))
    >>> round(float(covariance[0, 0, 0]), 4), round(4 / (14 / 0.1 + 1), 4)
    (0.0284, 0.0284)
    """

    mean: Params
    curvature: Approximation
    cases: Any
    prior_precision: Any = 1.0

    def __post_init__(self) -> None:
        """Checks what is known when it is made."""
        if isinstance(self.cases, int | float) and not self.cases > 0:
            raise ValueError(f"cases (N) must be positive; got {self.cases!r}.")
        for delta in jax.tree.leaves(self.prior_precision):
            if isinstance(delta, int | float) and not delta > 0:
                raise ValueError(
                    f"prior_precision (δ) must be positive; got {delta!r}. Without a "
                    "prior, directions that the data leave open have no variance."
                )
        if not isinstance(self.curvature, Approximation):
            return  # a placeholder of a JAX transformation
        if isinstance(self.prior_precision, Mapping):
            expected, got = {*self.sizes}, {*self.prior_precision}
            if expected != got:
                raise ValueError(
                    "prior_precision (δ) must be a number, or have one for each layer "
                    f"with a block: expected {sorted(expected)}, got {sorted(got)}."
                )

    @property
    def sizes(self) -> dict[str, int]:
        """The layers whose parameters are random, and how many these are."""
        return {
            x.name: math.prod(x.shape.matrix)
            for group in self.curvature.groups
            for x in group.layers
            if x.block is not None and not isinstance(x.block, Identity)
        }

    @property
    def _prior(self) -> dict[str, Any]:
        """δ by layer."""
        given = self.prior_precision
        if isinstance(given, Mapping):
            return dict(given)
        return dict.fromkeys(self.sizes, given)

    @property
    def _damping(self) -> dict[str, Any]:
        """δ / N for the operator, which has a λ for layers with `Identity`, too."""
        prior, layers = self._prior, layers_of(self.curvature.groups)
        names = [layer.name for layer in layers if layer.block is not None]
        return {name: prior.get(name, 1.0) / self.cases for name in names}

    def _only_random(self, tree: Params) -> Params:
        """The tree with zeros for parameters that are not random."""
        layers, sizes = layers_of(self.curvature.groups), self.sizes
        leaves = [jnp.asarray(x) for x in self.curvature.tree.leaves(tree, "the tree")]
        for layer in layers:
            if layer.name in sizes:
                continue
            boxes = layer.boxes or (None,) * len(layer.leaves)
            for i, box in zip(layer.leaves, boxes, strict=True):
                at = ... if box is None else box.slices
                leaves[i] = leaves[i].at[at].set(0)
        return jax.tree.unflatten(self.curvature.tree.treedef, leaves)

    # ------------------------------------------------------------------- the posterior

    def covariance(self, v: Params) -> Params:
        """`Σ v` with `Σ = (N F + δ I)⁻¹`; zero for parameters that are not random.

        Args:
          v: like the parameters.

        Returns:
          The product.
        """
        return self._power(v, -1.0)

    def _power(self, v: Params, exponent: float) -> Params:
        """`(N F + δ I)^p v`."""
        moved = self.curvature.power(v, exponent, self._damping, "exact")
        scale = self.cases**exponent
        return jax.tree.map(
            lambda x: (scale * x).astype(x.dtype), self._only_random(moved)
        )

    def sample(self, key: Array) -> Params:
        """Draws parameters from the posterior.

        Args:
          key: a random key; `jax.vmap` over keys draws several.

        Returns:
          Parameters.
        """
        noise = self.curvature.sample(key, self._damping, "exact")
        noise = self._only_random(noise)
        scale = 1 / self.cases**0.5
        return jax.tree.map(
            lambda x, n: (x + scale * n).astype(x.dtype), self.mean, noise
        )

    def predict(
        self, predict: Predict, *inputs: Array, batch_size: int = 16
    ) -> tuple[Array, Array]:
        """The distribution of outputs by linearisation: `N(f(x; θ), J Σ Jᵀ)`.

        Args:
          predict: `predict(params, *inputs)`, outputs `[n, o]` of n cases.
          *inputs: arrays with the cases in front.
          batch_size: how many cases' Jacobians are in memory at once.

        Returns:
          Means `[n, o]` and covariances `[n, o, o]`, without the noise of targets.

        References:
          Immer, Korzepa, Bauer 2021, arXiv:2008.08400.
        """
        zeros = jax.tree.map(jnp.zeros_like, self.mean)
        # linear, so that its decompositions are those of one call for all cases
        _, root = jax.linearize(lambda v: self._power(v, -0.5), zeros)

        def one(case: tuple[Array, ...]) -> tuple[Array, Array]:
            def outputs(params: Params) -> Array:
                return predict(params, *[x[None] for x in case])[0]

            rows = jax.vmap(root)(jax.jacrev(outputs)(self.mean))
            flat = [x.reshape(len(x), -1) for x in jax.tree.leaves(rows)]
            every = jnp.concatenate(flat, 1)
            return outputs(self.mean), every @ every.T

        return jax.lax.map(one, inputs, batch_size=batch_size)

    # --------------------------------------------------------------------- the evidence

    def log_evidence(self, log_likelihood: Any) -> Array:
        """The logarithm of the data's marginal likelihood under the prior.

        `log p(D | θ) + log N(θ | 0, I / δ) + (P / 2) log 2π - ½ log det(N F + δ I)`

        Args:
          log_likelihood: `log p(D | θ)`, the sum over all cases; -N times the loss.

        Returns:
          A scalar.

        References:
          MacKay 1992; Immer et al. 2021, arXiv:2104.04975.
        """
        eigenvalues, squares = self._eigenvalues(), self._squares()
        total = jnp.asarray(log_likelihood, float)
        for name, delta in self._prior.items():
            e, delta = eigenvalues[name], jnp.asarray(delta, float)
            of_prior = e.size * jnp.log(delta) - delta * squares[name]
            total += 0.5 * (of_prior - jnp.log(self.cases * e + delta).sum())
        return total

    def tuned(self, *, by_layer: bool = False, steps: int = 100) -> "Laplace":
        """The posterior with the prior precision of largest evidence.

        By MacKay's iteration `δ = γ / ‖θ‖²`, where `γ = Σ N e / (N e + δ)` with the
        eigenvalues e is the number of parameters that the data determine.

        Args:
          by_layer: whether each layer has a precision of its own.
          steps: the number of iterations.

        Returns:
          The posterior.
        """
        arguments.flag("by_layer", by_layer)
        arguments.count("steps", steps, 1)
        eigenvalues, squares = self._eigenvalues(), self._squares()
        groups = [[name] for name in squares] if by_layer else [[*squares]]
        found: dict[str, Any] = {}
        for names in groups:
            e = self.cases * jnp.concatenate([eigenvalues[n].ravel() for n in names])
            square = sum(squares[name] for name in names)

            def step(_: Any, delta: Array, e: Any = e, square: Any = square) -> Array:
                return (e / (e + delta)).sum() / square

            first = jnp.asarray(e.size / square, e.dtype)
            delta = jax.lax.fori_loop(0, steps, step, first)
            found |= dict.fromkeys(names, delta)
        prior = found if by_layer else next(iter(found.values()))
        return dataclasses.replace(self, prior_precision=prior)

    def _eigenvalues(self) -> dict[str, Array]:
        """Those of F by layer; none below zero, where rounding may bring them."""
        found = self.curvature.eigenvalues()
        return {name: jnp.maximum(found[name], 0) for name in self.sizes}

    def _squares(self) -> dict[str, Array]:
        """`‖θ‖²` by layer."""
        layers = [x for x in layers_of(self.curvature.groups) if x.name in self.sizes]
        leaves = self.curvature.tree.leaves(self.mean, "mean")
        vectors = to_vectors(layers, leaves)
        return {name: jnp.square(x).sum() for name, x in vectors.items()}


def probit(mean: Array, covariance: Array) -> Array:
    """Class probabilities of normal logits, in MacKay's approximation.

    `softmax(μ / √(1 + π v / 8))` with the variances v.

    Args:
      mean: μ, `[..., classes]`.
      covariance: `[..., classes, classes]`.

    Returns:
      Probabilities `[..., classes]`.

    References:
      MacKay 1992, The evidence framework applied to classification networks.

    >>> [round(p, 2) for p in probit(jnp.array([2.0, 0.0]), jnp.eye(2)).tolist()]
    [0.84, 0.16]
    """
    variances = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    return jax.nn.softmax(mean / jnp.sqrt(1 + jnp.pi / 8 * variances))


def expected_softmax(
    key: Array, mean: Array, covariance: Array, samples: int = 100
) -> Array:
    """Class probabilities of normal logits, as the mean over samples of these.

    Args:
      key: a random key.
      mean: `[..., classes]`.
      covariance: `[..., classes, classes]`.
      samples: how many.

    Returns:
      Probabilities `[..., classes]`.
    """
    arguments.count("samples", samples, 1)
    values, vectors = eigh(covariance)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]
    noise = jax.random.normal(key, (samples, *mean.shape), mean.dtype)
    logits = mean[None] + jnp.einsum("...ij,s...j->s...i", root, noise)
    return jax.nn.softmax(logits).mean(0)
