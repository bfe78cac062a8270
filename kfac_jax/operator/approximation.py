"""The approximate curvature as a structured linear operator over the parameters."""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import axis_types
from kfac_jax._utils import arguments
from kfac_jax._utils.dtypes import wide
from kfac_jax._utils.trees import TreeSpec
from kfac_jax.blocks import Identity
from kfac_jax.operator.inverses import apply as apply_inverses
from kfac_jax.operator.inverses import compute, to_leaves, to_vectors
from kfac_jax.plan.group import Factors, Group, Vectors, layers_of

Vector = Any
"""A pytree like the parameters."""


def _check_damping(damping: Any) -> None:
    arguments.number("damping (λ)", damping, arrays=True)
    if isinstance(damping, numbers.Real) and not float(damping) >= 0:
        raise ValueError(f"damping (λ) must be at least 0; got {damping}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Approximation:
    """A structured approximation of the Fisher, with one block for each layer.

    Without links `F ≈ blkdiag(F_1, ..., F_l)`; linked layers (`BlockTridiagonal`) share
    one block, with a sparse inverse.

    Vectors are pytrees like the parameters. With damping λ the operator is `F + λ I`;
    `damping_mode="exact"` is that, `"factored"` damps each Kronecker factor (section
    6.3). Layers without a block count as the identity and take no damping.

    Laws: `solve(matvec(v)) = v` without damping; `power(v, -1) = solve(v)` and
    `to_dense() @ ravel(v) = ravel(matvec(v))`.
    """

    groups: tuple[Group, ...] = dataclasses.field(metadata={"static": True})
    tree: TreeSpec = dataclasses.field(metadata={"static": True}, repr=False)
    factors: Factors

    def _map(self, v: Vector, function: Callable[[Vectors], Vectors]) -> Vector:
        """Applies a function to the matrices of all layers with a block."""
        layers = layers_of(self.groups)
        original = self.tree.leaves(v, "the vector v")
        leaves = axis_types.unsharded(original)
        dtypes = {layer.name: layer.dtype for layer in layers}
        vectors = to_vectors(layers, leaves)
        moved = function({name: x.astype(dtypes[name]) for name, x in vectors.items()})
        return jax.tree.unflatten(
            self.tree.treedef,
            axis_types.sharded_like(to_leaves(layers, moved, leaves), original),
        )

    def _each(self, v: Vector, function: Callable[[Group, Vectors], Vectors]) -> Vector:
        """Applies a function to the matrices of each group by itself."""

        def apply(vectors: Vectors) -> Vectors:
            result: Vectors = {}
            for group in self._blocks:
                result |= function(group, vectors)
            return result

        return self._map(v, apply)

    @property
    def _blocks(self) -> list[Group]:
        """The groups whose layers have a block."""
        return [x for x in self.groups if x.layers[0].block is not None]

    def _dampings(self, damping: Any, mode: str) -> dict[str, Any]:
        """λ by the groups' names, checked."""
        arguments.choice("damping_mode", mode, ("factored", "exact"))
        if not isinstance(damping, Mapping):
            _check_damping(damping)
            found = {group.name: damping for group in self._blocks}
        else:
            for value in damping.values():
                _check_damping(value)
            names = [name for group in self._blocks for name in group.names]
            if {*damping} != {*names}:
                raise ValueError(
                    "damping (λ) must be a number, or have one for each layer with a "
                    f"block: expected {sorted(names)}, got {sorted(damping)}."
                )
            linked = [x.names for x in self._blocks if len(x.names) > 1]
            if linked:
                raise ValueError(
                    "Linked layers are damped together: expected one number as "
                    f"damping (λ), got one for each layer of {linked[0]}."
                )
            found = {group.name: damping[group.names[0]] for group in self._blocks}
        for group in self._blocks:
            group.check_mode(found[group.name], mode)
        return found

    def matvec(self, v: Vector) -> Vector:
        """Returns `F v`.

        Args:
          v: like the parameters.

        Returns:
          The product.

        Raises:
          ValueError: if `v` is not like the parameters.
        """
        return self._each(v, lambda group, x: group.matvec(self.factors, x))

    def solve(
        self, v: Vector, damping: Any = 0.0, damping_mode: str = "factored"
    ) -> Vector:
        """Returns `(F + λ I)⁻¹ v`.

        Args:
          v: like the parameters.
          damping: λ, at least 0; or one for each layer with a block, by its name.
          damping_mode: "factored" or "exact".

        Returns:
          The solution.

        Raises:
          TypeError: if an argument is of the wrong type.
          ValueError: for negative damping, an unknown mode (or "exact" for linked
            layers), or a vector of another shape.

        References:
          Martens & Grosse 2015, sections 4.2, 4.3 and 6.3.
        """
        dampings = self._dampings(damping, damping_mode)
        exact = [x for x in self._blocks if damping_mode == "exact" and x.has_spectrum]
        rest = [x for x in self._blocks if x not in exact]

        def apply(vectors: Vectors) -> Vectors:
            inverses, _ = compute(rest, self.factors, dampings)
            result = apply_inverses(rest, self.factors, inverses, vectors, {})
            for group in exact:
                own = dampings[group.name]
                result |= group.power(self.factors, vectors, -1.0, own, "exact")
            return result

        return self._map(v, apply)

    def power(
        self,
        v: Vector,
        exponent: float,
        damping: Any = 0.0,
        damping_mode: str = "factored",
    ) -> Vector:
        """Returns `(F + λ I)^p v`.

        Args:
          v: like the parameters.
          exponent: p; negative ones need a positive definite matrix.
          damping: λ, at least 0; or one for each layer with a block, by its name.
          damping_mode: "exact" or "factored".

        Returns:
          The product.

        Raises:
          TypeError: if an argument is of the wrong type.
          ValueError: for negative damping, an unknown mode, a vector of another shape,
            or linked layers, which have no eigenvectors in closed form.
        """
        arguments.number("exponent (p)", exponent, arrays=True)
        arguments.within("exponent (p)", exponent, -float("inf"), float("inf"))
        dampings = self._dampings(damping, damping_mode)

        def apply(group: Group, vectors: Vectors) -> Vectors:
            own = dampings[group.name]
            return group.power(self.factors, vectors, exponent, own, damping_mode)

        return self._each(v, apply)

    def to_dense(self) -> Array:
        """Returns F, `[P, P]`, in the order of `jax.flatten_util.ravel_pytree`."""
        shapes, dtypes = self.tree.shapes, self.tree.dtypes
        with jax.numpy_dtype_promotion("standard"):  # parameters may be of any types
            dtype = jnp.result_type(*dtypes)
        sizes = [math.prod(shape) for shape in shapes]
        ends = list(itertools.accumulate(sizes))

        def column(v: Array) -> Array:
            parts = jnp.split(v, ends[:-1])
            leaves = [
                x.reshape(s).astype(d)
                for x, s, d in zip(parts, shapes, dtypes, strict=True)
            ]
            product = self.matvec(jax.tree.unflatten(self.tree.treedef, leaves))
            flat = [x.reshape(-1).astype(dtype) for x in jax.tree.leaves(product)]
            return jnp.concatenate(flat)

        return jax.vmap(column, out_axes=1)(jnp.eye(ends[-1], dtype=dtype))

    def diagonal(self) -> Vector:
        """Returns the diagonal of F, like the parameters."""
        ones = [
            jnp.ones(s, d)
            for s, d in zip(self.tree.shapes, self.tree.dtypes, strict=True)
        ]
        tree = jax.tree.unflatten(self.tree.treedef, ones)
        return self._each(tree, lambda group, _: group.diagonal(self.factors))

    def trace(self) -> Array:
        """Returns the trace of F."""
        parts = [wide(leaf).sum() for leaf in jax.tree.leaves(self.diagonal())]
        return _total(parts)

    def logdet(self, damping: Any = 0.0, damping_mode: str = "factored") -> Array:
        """Returns `log det(F + λ I)`.

        Args:
          damping: λ, at least 0; or one for each layer with a block, by its name.
          damping_mode: "exact" or "factored".

        Returns:
          A scalar.

        Raises:
          TypeError: if an argument is of the wrong type.
          ValueError: for negative damping, or an unknown mode (or "exact" for linked
            layers).
        """
        dampings = self._dampings(damping, damping_mode)
        return _total(
            [
                x.logdet(self.factors, dampings[x.name], damping_mode)
                for x in self._blocks
            ]
        )

    def eigenvalues(self) -> dict[str, Array]:
        """The eigenvalues of each layer's block, undamped.

        Returns:
          Arrays by layer name, of any shape and in any order; none of layers without a
          block.

        Raises:
          ValueError: for blocks without a spectrum in closed form (linked layers, sums
            of products).
        """
        return {x.name: x.eigenvalues(self.factors) for x in self._blocks}

    def sample(
        self, key: Array, damping: Any = 0.0, damping_mode: str = "factored"
    ) -> Vector:
        """Draws from the normal distribution with mean 0 and covariance `(F + λ I)⁻¹`.

        This is the Laplace approximation's posterior around a minimum, for one case;
        scale it by `1 / √N` for a data set of N cases.

        Args:
          key: a random key.
          damping: λ, at least 0; or one for each layer with a block, by its name.
          damping_mode: "exact" or "factored".

        Returns:
          A vector like the parameters.

        Raises:
          TypeError: if an argument is of the wrong type.
          ValueError: for negative damping, or an unknown mode (or "exact" for linked
            layers).
        """
        arguments.key("key", key)
        dampings = self._dampings(damping, damping_mode)
        keys = jax.random.split(key, len(self.tree.paths))
        noise = [
            jax.random.normal(k, s, d)
            for k, s, d in zip(keys, self.tree.shapes, self.tree.dtypes, strict=True)
        ]
        tree = jax.tree.unflatten(self.tree.treedef, noise)

        def apply(group: Group, vectors: Vectors) -> Vectors:
            own = dampings[group.name]
            return group.sample(self.factors, vectors, own, damping_mode)

        return self._each(tree, apply)


def _total(parts: list[Array]) -> Array:
    """Adds scalars in the widest of their types."""
    if not parts:
        return jnp.zeros(())
    dtype = max((x.dtype for x in parts), key=lambda d: jnp.finfo(d).bits)
    return jnp.stack([x.astype(dtype) for x in parts]).sum()


def sizes_with_curvature(operator: Approximation) -> dict[str, int]:
    """How many parameters each layer has, of those with a block but `Identity`."""
    return {
        x.name: math.prod(x.shape.matrix)
        for x in layers_of(operator.groups)
        if x.block is not None and not isinstance(x.block, Identity)
    }


def only_with_curvature(operator: Approximation, v: Vector) -> Vector:
    """The vector with zeros for the parameters of all other layers."""
    kept = sizes_with_curvature(operator)
    leaves = [jnp.asarray(x) for x in operator.tree.leaves(v, "the vector v")]
    for layer in layers_of(operator.groups):
        if layer.name in kept:
            continue
        boxes = layer.boxes or (None,) * len(layer.leaves)
        for i, box in zip(layer.leaves, boxes, strict=True):
            at = ... if box is None else box.slices
            leaves[i] = leaves[i].at[at].set(0)
    return jax.tree.unflatten(operator.tree.treedef, leaves)
