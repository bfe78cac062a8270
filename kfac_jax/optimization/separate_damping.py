"""The choice of γ among its candidates, by the quadratic model (section 6.6)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kfac_jax._utils.vectors import plane_products
from kfac_jax.operator import inverses as inverses_lib
from kfac_jax.optimization.local_model import LocalModel
from kfac_jax.plan.group import Factors, Products
from kfac_jax.rules import QuadraticModel, SeparateDamping


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """Evaluates candidates for γ on the batch and gradient of one step.

    Attributes:
      rule: the rule that proposes the candidates.
      due: whether γ is to be chosen in this step.
      rates: chooses α (and μ) for each candidate.
      model: the batch's quadratic model.
      previous: δ0, by leaves.
      momentum: a fixed μ, or None.
      products: X and dY, where one of the matrices of -∇h may be `Xᵀ dY`.
    """

    rule: SeparateDamping
    due: Array
    rates: QuadraticModel
    model: LocalModel
    previous: list[Array]
    momentum: Array | None
    products: Products

    @jax.named_scope("kfac_separate_damping")
    def update(self, factors: Factors, gamma: Array) -> Array:
        """Every T2 steps, chooses the candidate whose step has the lowest M(δ).

        Args:
          factors: the full moving averages.
          gamma: γ.

        Returns:
          The best γ. A candidate without finite inverses or model loses.
        """
        select = functools.partial(self._select, factors)
        return jax.lax.cond(self.due, select, lambda gamma: gamma, gamma)

    def _select(self, factors: Factors, gamma: Array) -> Array:
        """The best candidate.

        Inverses and Δ are computed for one candidate after the other, so that they are
        compiled once and take the memory of one. The winner's inverses are computed
        again afterwards, which needs less memory than to store those of all candidates.
        All candidates share one forward pass, and the product with δ0.
        """
        gammas = self.rule.candidates(gamma)
        propose = functools.partial(self._propose, factors)
        directions, grams, slopes, finite = jax.lax.map(propose, gammas)
        matrices = self._fisher(directions)
        total = self.model.total_damping(matrices)
        matrices = matrices + total * grams.astype(matrices.dtype)
        solve = functools.partial(self.rates.solve, momentum=self.momentum)
        changes = jax.vmap(solve)(matrices, slopes.astype(matrices.dtype)).change
        return self.rule.select(gammas, jnp.where(finite, changes, jnp.inf))

    def _propose(
        self, factors: Factors, gamma: Array
    ) -> tuple[list[Array], Array, Array, Array]:
        """Δ, what the plane of Δ and δ0 needs of it, and if inverses are finite."""
        groups = self.model.curvature.groups
        inverses, finite = inverses_lib.compute(
            groups, factors, jnp.square(gamma), self.model.devices
        )
        down = [-x for x in self.model.gradient]
        scaled, _ = inverses_lib.precondition(
            groups, factors, inverses, down, self.products
        )
        direction = [x for x in scaled if x is not None]
        products = plane_products(self.model.gradient, direction, self.previous)
        return direction, *products, jnp.stack([*finite.values()]).all()

    def _fisher(self, directions: list[Array]) -> Array:
        """F in the plane of each Δ and δ0, `[3, 2, 2]`, of one form over all four."""
        vectors = [
            jnp.concatenate([d, d0.astype(d.dtype)[None]])
            for d, d0 in zip(directions, self.previous, strict=True)
        ]
        tree = jax.tree.unflatten(self.model.curvature.tree.treedef, vectors)
        fisher = self.model.fisher(tree, self.rates.fraction)
        count = len(fisher) - 1
        planes = np.stack([np.arange(count), np.full(count, count)], axis=1)
        return fisher[planes[:, :, None], planes[:, None, :]]
