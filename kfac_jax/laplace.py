"""The Laplace approximation: a normal posterior around trained parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax._utils.dtypes import wide
from kfac_jax.linalg._psd import eigh
from kfac_jax.operator.approximation import (
    Approximation,
    only_with_curvature,
    sizes_with_curvature,
)
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
    block (`blocks={...: None}`), or with `Identity`, are not random: so that one plan
    is for all layers, or for the last one. What no layer covers is random by its
    diagonal block, if the plan was not made with `on_unmatched="ignore"`. F must be
    that of the negative log likelihood itself, as that of
    `losses.softmax_cross_entropy`, or of a normal distribution with the noise's
    variance (`register_normal_predictive_distribution(..., variance=σ²)`), as a mean
    over cases. Its blocks must have eigenvectors in closed form, as those of
    `BlockDiagonal()` have but for sums of several products.

    Attributes:
      mean: θ.
      curvature: the operator F.
      cases: N.
      prior_precision: δ, a number, or by layer name one for each random layer.

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

    @property
    def sizes(self) -> dict[str, int]:
        """The layers whose parameters are random, and how many these are."""
        return sizes_with_curvature(self.curvature)

    @property
    def _prior(self) -> dict[str, Any]:
        """δ by layer; checks the attributes, which JAX may have replaced before."""
        self._check()
        given = self.prior_precision
        if isinstance(given, Mapping):
            return dict(given)
        return dict.fromkeys(self.sizes, given)

    def _check(self) -> None:
        """Raises TypeError or ValueError unless the attributes are a posterior's."""
        arguments.instance(
            "curvature", self.curvature, Approximation, "an operator, curvature.over()"
        )
        arguments.number("cases (N)", self.cases, arrays=True)
        if arguments.is_number(self.cases) and not self.cases > 0:
            raise ValueError(f"cases (N) must be positive; got {self.cases!r}.")
        given = self.prior_precision
        by_layer = isinstance(given, Mapping)
        if by_layer and {*given} != {*self.sizes}:
            raise ValueError(
                "prior_precision (δ) must be a number, or have one for each layer with "
                f"a block: expected {sorted(self.sizes)}, got {sorted(given)}."
            )
        for delta in given.values() if by_layer else [given]:
            arguments.number("prior_precision (δ)", delta, arrays=True)
            if arguments.is_number(delta) and not delta > 0:
                raise ValueError(
                    f"prior_precision (δ) must be positive; got {delta!r}. Without a "
                    "prior, directions that the data leave open have no variance."
                )
        for group in self.curvature.groups:
            if group.layers[0].block is not None and not group.has_spectrum:
                raise ValueError(
                    "The Laplace approximation needs blocks with eigenvectors in "
                    "closed form: expected a plan with structure=BlockDiagonal() and "
                    f"blocks of one product, got {type(group).__name__} for "
                    f"{', '.join(group.names)}. Use blocks.Eigen() there, say."
                )

    @property
    def _damping(self) -> dict[str, Any]:
        """δ / N for the operator, which has a λ for layers with `Identity`, too."""
        prior, layers = self._prior, layers_of(self.curvature.groups)
        names = [layer.name for layer in layers if layer.block is not None]
        return {name: prior.get(name, 1.0) / self.cases for name in names}

    # ------------------------------------------------------------------- the posterior

    def covariance(self, v: Params) -> Params:
        """`Σ v` with `Σ = (N F + δ I)⁻¹`; zero for parameters that are not random.

        Args:
          v: like the parameters.

        Returns:
          The product.

        Raises:
          TypeError: if an attribute is of the wrong type.
          ValueError: if one is out of its range, or `v` is not like the parameters.
        """
        return self._power(v, -1.0)

    def _power(self, v: Params, exponent: float) -> Params:
        """`(N F + δ I)^p v`."""
        damping = self._damping
        moved = self.curvature.power(v, exponent, damping, "exact")
        return self._scaled(exponent, moved)

    def _scaled(self, exponent: float, v: Params) -> Params:
        """`N^p v`; zero for parameters that are not random."""
        scale = jnp.asarray(self.cases, float) ** exponent
        return jax.tree.map(
            lambda x: (scale.astype(wide(x).dtype) * wide(x)).astype(x.dtype),
            only_with_curvature(self.curvature, v),
        )

    def sample(self, key: Array) -> Params:
        """Draws parameters from the posterior.

        Args:
          key: a random key; `jax.vmap` over keys draws several.

        Returns:
          Parameters.

        Raises:
          TypeError: if it is no key, or an attribute is of the wrong type.
          ValueError: if an attribute is out of its range.
        """
        damping = self._damping
        noise = self.curvature.sample(key, damping, "exact")
        return jax.tree.map(
            lambda x, n: jnp.asarray(x) + n.astype(jnp.result_type(x)),
            self.mean,
            self._scaled(-0.5, noise),
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

        Raises:
          TypeError: if an argument or attribute is of the wrong type.
          ValueError: if `predict` returns another shape, or an attribute is out of its
            range.

        References:
          Immer, Korzepa, Bauer 2021, arXiv:2008.08400.
        """
        arguments.function("predict", predict)
        arguments.count("batch_size", batch_size, 1)
        found = jax.eval_shape(predict, self.mean, *inputs)
        cases = {jnp.shape(x)[:1] for x in inputs}
        if len(getattr(found, "shape", ())) != 2 or cases != {found.shape[:1]}:
            raise ValueError(
                "predict must return outputs of each case, an array [n, o] of inputs "
                f"with n in front; got {arguments.shown(found)} of inputs of shapes "
                f"{[jnp.shape(x) for x in inputs]}."
            )
        zeros = jax.tree.map(jnp.zeros_like, self.mean)
        # linear, so that its decompositions are those of one call for all cases
        _, root = jax.linearize(lambda v: self._power(v, -0.5), zeros)

        def one(case: tuple[Array, ...]) -> tuple[Array, Array]:
            def outputs(params: Params) -> Array:
                return predict(params, *[x[None] for x in case])[0]

            rows = jax.vmap(root)(jax.jacrev(outputs)(self.mean))
            flat = [wide(x).reshape(len(x), -1) for x in jax.tree.leaves(rows)]
            products = [x.astype(float) @ x.astype(float).T for x in flat]
            return outputs(self.mean), sum(products[1:], products[0])

        return jax.lax.map(one, inputs, batch_size=batch_size)

    # --------------------------------------------------------------------- the evidence

    def log_evidence(self, log_likelihood: Any) -> Array:
        """The logarithm of the data's marginal likelihood under the prior.

        `log p(D | θ) + log N(θ | 0, I / δ) + (P / 2) log 2π - ½ log det(N F + δ I)`

        Args:
          log_likelihood: `log p(D | θ)`, the sum over all cases; -N times the loss.

        Returns:
          A scalar.

        Raises:
          TypeError: if an argument or attribute is of the wrong type.
          ValueError: if an attribute is out of its range.

        References:
          MacKay 1992; Immer et al. 2021, arXiv:2104.04975.
        """
        arguments.number("log_likelihood", log_likelihood, arrays=True)
        prior, squares = self._prior, self._squares()
        total = jnp.asarray(log_likelihood, float)
        for name, e in self._eigenvalues().items():
            delta = jnp.asarray(prior[name], float)
            of_prior = e.size * jnp.log(delta) - delta * squares[name]
            total += 0.5 * (of_prior - jnp.log(e + delta).sum())
        return total

    def tuned(self, *, by_layer: bool = False, steps: int = 100) -> "Laplace":
        """The posterior with the prior precision of largest evidence.

        By MacKay's iteration `δ = γ / ‖θ‖²`, where `γ = Σ N e / (N e + δ)` with the
        eigenvalues e is the number of parameters that the data determine. Layers keep
        their δ where the parameters, or the curvature, are zero.

        Args:
          by_layer: whether each layer has a precision of its own.
          steps: the number of iterations.

        Returns:
          The posterior.

        Raises:
          TypeError: if an argument or attribute is of the wrong type.
          ValueError: if one is out of its range.
        """
        arguments.flag("by_layer", by_layer)
        arguments.count("steps", steps, 1)
        prior, eigenvalues, squares = self._prior, self._eigenvalues(), self._squares()
        found: dict[str, Any] = {}
        for names in [[name] for name in prior] if by_layer else [[*prior]]:
            e = jnp.concatenate([eigenvalues[name].ravel() for name in names])
            square = jnp.stack([squares[name] for name in names]).sum()
            known = (square > 0) & (e.max() > 0)
            square = jnp.where(known, square, 1)

            def step(_: Any, delta: Array, e: Any = e, square: Any = square) -> Array:
                return (e / (e + delta)).sum() / square

            delta = jax.lax.fori_loop(0, steps, step, e.size / square)
            own = sum(jnp.asarray(prior[name], float) for name in names) / len(names)
            found |= dict.fromkeys(names, jnp.where(known, delta, own))
        tuned = found if by_layer else next(iter(found.values()))
        return dataclasses.replace(self, prior_precision=tuned)

    def _eigenvalues(self) -> dict[str, Array]:
        """Those of N F by layer; none below zero, where rounding may bring them."""
        found, cases = self.curvature.eigenvalues(), jnp.asarray(self.cases, float)
        return {x: cases * jnp.maximum(found[x].astype(float), 0) for x in self.sizes}

    def _squares(self) -> dict[str, Array]:
        """`‖θ‖²` by layer."""
        layers = [x for x in layers_of(self.curvature.groups) if x.name in self.sizes]
        leaves = self.curvature.tree.leaves(self.mean, "mean")
        vectors = to_vectors(layers, leaves)
        return {name: jnp.square(x.astype(float)).sum() for name, x in vectors.items()}


def probit(mean: Array, covariance: Array) -> Array:
    """Class probabilities of normal logits, without sampling.

    `softmax(μ / √(1 + π v / 8))` with the variances v: MacKay's approximation for two
    classes of which one has the logit 0; otherwise each logit is scaled as by itself.

    Args:
      mean: μ, `[..., classes]`.
      covariance: `[..., classes, classes]`.

    Returns:
      Probabilities `[..., classes]`.

    References:
      MacKay 1992, The evidence framework applied to classification networks; Lu, Ie,
      Sha 2020, arXiv:2006.07584.

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

    Raises:
      TypeError: if `key` is no random key.
      ValueError: if `samples` is no positive integer.

    >>> key, mean = jax.random.key(0), jnp.array([2.0, 0.0])
    >>> [round(p, 1) for p in expected_softmax(key, mean, 4 * jnp.eye(2)).tolist()]
    [0.8, 0.2]
    """
    arguments.key("key", key)
    arguments.count("samples", samples, 1)
    values, vectors = eigh(covariance)
    root = vectors * jnp.sqrt(values)[..., None, :]
    noise = jax.random.normal(key, (samples, *mean.shape), mean.dtype)
    logits = mean[None] + jnp.einsum("...ij,s...j->s...i", root, noise)
    return jax.nn.softmax(logits).mean(0)
