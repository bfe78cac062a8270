"""The approximate curvature as a structured linear operator over the parameters."""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax import linalg
from kfac_jax._jaxpr import axis_types
from kfac_jax._utils import arguments
from kfac_jax._utils.trees import TreeSpec
from kfac_jax.blocks import Block, Damped, Spectrum
from kfac_jax.linalg._psd import Apply
from kfac_jax.operator import linked
from kfac_jax.plan import Layer
from kfac_jax.statistics.averages import Factors

Vector = Any
"""A pytree like the parameters."""


def layer_vectors(
    layers: Sequence[Layer], leaves: Sequence[Array | None]
) -> dict[str, Array]:
    """Joins leaves to one matrix for each layer with a block.

    A layer all of whose leaves are None (hidden by a mask) is left out; if only some
    are, those count as zero.
    """
    result: dict[str, Array] = {}
    for layer in layers:
        own = [leaves[i] for i in layer.leaves]
        if layer.block is None or all(x is None for x in own):
            continue
        like = next(x for x in own if x is not None)
        parts = [
            jnp.zeros(shape, like.dtype) if x is None else jnp.asarray(x)
            for x, shape in zip(own, layer.shapes, strict=True)
        ]
        result[layer.name] = layer.to_matrix(parts)
    return result


def layer_leaves(
    layers: Sequence[Layer], vectors: dict[str, Array], leaves: Sequence[Array | None]
) -> list[Array | None]:
    """Inverts `layer_vectors`; leaves of layers that are not in it stay as they are."""
    result = list(leaves)
    for layer in layers:
        if layer.name not in vectors:
            continue
        parts = layer.from_matrix(vectors[layer.name])
        for i, part in zip(layer.leaves, parts, strict=True):
            old = result[i]
            if old is not None:
                result[i] = part.astype(old.dtype)
    return result


def invert(
    blocks: dict[str, Block],
    damped: dict[str, dict[str, Damped]],
    apply: Apply | None = None,
) -> dict[str, dict[str, linalg.Inverted]]:
    """Inverts what `Block.damp` returned, all matrices of one size as a batch."""
    result: dict[str, dict[str, linalg.Inverted]] = {name: {} for name in damped}
    matrices: list[tuple[str, str]] = []
    for name, parts in damped.items():
        for part, (factor, shift) in parts.items():
            if part in blocks[name].elementwise:
                inverse = 1.0 / (factor + shift.astype(factor.dtype))
                finite = jnp.isfinite(inverse).all()
                result[name][part] = linalg.Inverted(inverse, finite)
            else:
                matrices.append((name, part))
    shifted = [
        (factor, jnp.broadcast_to(shift, factor.shape[:-2]))
        for factor, shift in (damped[name][part] for name, part in matrices)
    ]
    inverses = linalg.inverse_many(shifted, apply) if shifted else []
    for (name, part), value in zip(matrices, inverses, strict=True):
        result[name][part] = value
    return {
        name: {part: result[name][part] for part in parts}
        for name, parts in damped.items()
    }


def _check_damping(damping: Any) -> None:
    arguments.number("damping (λ)", damping, arrays=True)
    if isinstance(damping, numbers.Real) and not float(damping) >= 0:
        raise ValueError(f"damping (λ) must be at least 0; got {damping}.")


def _check_mode(mode: str) -> None:
    arguments.choice("damping_mode", mode, ("factored", "exact"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Approximation:
    """A structured approximation of the Fisher, with one block for each layer.

    Without links `F ≈ blkdiag(F_1, ..., F_l)`; linked layers (`BlockTridiagonal`) have
    a block together, with a sparse inverse.

    Vectors are pytrees like the parameters. With damping λ the operator is `F + λ I`;
    `damping_mode="exact"` is that, `"factored"` damps each Kronecker factor (section
    6.3). Layers without a block count as the identity and take no damping.

    Laws: `solve(matvec(v)) = v` without damping; `power(v, -1) = solve(v)` and
    `to_dense() @ ravel(v) = ravel(matvec(v))`.
    """

    layers: tuple[Layer, ...] = dataclasses.field(metadata={"static": True})
    tree: TreeSpec = dataclasses.field(metadata={"static": True}, repr=False)
    factors: dict[str, dict[str, Array]]

    def _map(
        self,
        v: Vector,
        function: Callable[[Layer, Array], Array],
        joint: Callable[[dict[str, Array]], dict[str, Array]] | None = None,
    ) -> Vector:
        """Applies a function to each layer's matrix, or to all linked ones jointly."""
        given = self.tree.leaves(v, "the vector v")
        leaves = axis_types.whole(given)
        vectors = layer_vectors(self.layers, leaves)
        dtypes = {layer.name: layer.dtype for layer in self.layers}
        vectors = {name: x.astype(dtypes[name]) for name, x in vectors.items()}
        together = self._linked if joint is not None else []
        mapped = {
            layer.name: function(layer, vectors[layer.name])
            for layer in self.layers
            if layer.block is not None and layer not in together
        }
        if joint is not None and together:
            mapped |= joint({layer.name: vectors[layer.name] for layer in together})
        moved = layer_leaves(self.layers, mapped, leaves)
        return jax.tree.unflatten(
            self.tree.treedef, axis_types.sharded_like(moved, given)
        )

    @property
    def _linked(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.link is not None]

    def _joint_inverses(self, damping: Any) -> Factors:
        return linked.refresh(self.layers, self.factors, damping)[0]

    def _check_joint(self, damping: Any, mode: str) -> None:
        undamped = isinstance(damping, numbers.Real) and damping == 0
        if self._linked and mode == "exact" and not undamped:
            raise ValueError(
                "With BlockTridiagonal only factored damping is possible; got "
                'damping_mode="exact". Pass damping_mode="factored", or make the plan '
                "with structure=BlockDiagonal()."
            )

    def matvec(self, v: Vector) -> Vector:
        """Returns `F v`.

        Args:
          v: like the parameters.

        Returns:
          The product.

        Raises:
          ValueError: if `v` is not like the parameters.
        """
        return self._map(
            v,
            lambda layer, x: _block(layer).matvec(self.factors[layer.name], x),
            lambda vectors: linked.matvec(self.layers, self.factors, vectors),
        )

    def solve(
        self, v: Vector, damping: Any = 0.0, damping_mode: str = "factored"
    ) -> Vector:
        """Returns `(F + λ I)⁻¹ v`.

        Args:
          v: like the parameters.
          damping: λ, at least 0.
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
        _check_damping(damping)
        _check_mode(damping_mode)
        self._check_joint(damping, damping_mode)
        if damping_mode == "exact" and not self._linked:
            return self.power(v, -1.0, damping, damping_mode)
        blocks = {
            x.name: _block(x)
            for x in self.layers
            if x.block is not None and x.link is None
        }
        damped = {
            name: block.damp(self.factors[name], damping)
            for name, block in blocks.items()
        }
        inverses = invert(blocks, damped)

        def apply(layer: Layer, x: Array) -> Array:
            parts = inverses[layer.name]
            carried = {n: self.factors[layer.name][n] for n in layer.carried_shapes}
            solved = {name: part.inverse for name, part in parts.items()}
            return _block(layer).solve(carried | solved, x)

        def joint(vectors: dict[str, Array]) -> dict[str, Array]:
            inverses = self._joint_inverses(damping)
            return linked.solve(self.layers, inverses, vectors)

        return self._map(v, apply, joint)

    def power(
        self,
        v: Vector,
        exponent: float,
        damping: Any = 0.0,
        damping_mode: str = "exact",
    ) -> Vector:
        """Returns `(F + λ I)^p v`.

        Args:
          v: like the parameters.
          exponent: p; negative ones need a positive definite matrix.
          damping: λ, at least 0.
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
        _check_damping(damping)
        _check_mode(damping_mode)
        if self._linked:
            raise ValueError(
                "power needs a plan with structure=BlockDiagonal(); got "
                "BlockTridiagonal(). For the inverse use solve, for draws with "
                "covariance (F + λ I)⁻¹ use sample."
            )
        return self._map(v, self._powers(exponent, damping, damping_mode))

    def _powers(
        self, exponent: float, damping: Any, damping_mode: str
    ) -> Callable[[Layer, Array], Array]:
        def apply(layer: Layer, x: Array) -> Array:
            spectrum = self._spectrum(layer)
            values = spectrum.eigenvalues(damping, damping_mode) ** exponent
            values = values.astype(x.dtype)
            return spectrum.from_basis(values * spectrum.to_basis(x))

        return apply

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
        return self._map(
            tree,
            lambda layer, _: _block(layer).diagonal(
                self.factors[layer.name], layer.shape
            ),
        )

    def trace(self) -> Array:
        """Returns the trace of F."""
        parts = [leaf.sum() for leaf in jax.tree.leaves(self.diagonal())]
        return _total(parts)

    def logdet(self, damping: Any = 0.0, damping_mode: str = "exact") -> Array:
        """Returns `log det(F + λ I)`.

        Args:
          damping: λ, at least 0.
          damping_mode: "exact" or "factored".

        Returns:
          A scalar.

        Raises:
          TypeError: if an argument is of the wrong type.
          ValueError: for negative damping, or an unknown mode (or "exact" for linked
            layers).
        """
        _check_damping(damping)
        _check_mode(damping_mode)
        self._check_joint(damping, damping_mode)
        parts = [
            jnp.log(self._spectrum(layer).eigenvalues(damping, damping_mode)).sum()
            for layer in self.layers
            if layer.block is not None and layer.link is None
        ]
        if self._linked:
            inverses = self._joint_inverses(damping)
            parts.append(linked.logdet(self.layers, inverses))
        return _total(parts)

    def sample(
        self, key: Array, damping: Any = 0.0, damping_mode: str = "exact"
    ) -> Vector:
        """Draws from the normal distribution with mean 0 and covariance `(F + λ I)⁻¹`.

        This is the Laplace approximation's posterior around a minimum, for one case;
        scale it by `1 / √N` for a data set of N cases.

        Args:
          key: a random key.
          damping: λ, at least 0.
          damping_mode: "exact" or "factored".

        Returns:
          A vector like the parameters.

        Raises:
          TypeError: if an argument is of the wrong type.
          ValueError: for negative damping, or an unknown mode (or "exact" for linked
            layers).
        """
        arguments.key("key", key)
        _check_damping(damping)
        _check_mode(damping_mode)
        self._check_joint(damping, damping_mode)
        keys = jax.random.split(key, len(self.tree.paths))
        noise = [
            jax.random.normal(k, s, d)
            for k, s, d in zip(keys, self.tree.shapes, self.tree.dtypes, strict=True)
        ]
        tree = jax.tree.unflatten(self.tree.treedef, noise)

        def joint(vectors: dict[str, Array]) -> dict[str, Array]:
            inverses = self._joint_inverses(damping)
            return linked.sample(self.layers, inverses, vectors)

        return self._map(tree, self._powers(-0.5, damping, damping_mode), joint)

    def _spectrum(self, layer: Layer) -> Spectrum:
        return _block(layer).spectrum(self.factors[layer.name], layer.shape)


def _total(parts: list[Array]) -> Array:
    """Adds scalars in the widest of their types."""
    if not parts:
        return jnp.zeros(())
    dtype = max((x.dtype for x in parts), key=lambda d: jnp.finfo(d).bits)
    return jnp.stack([x.astype(dtype) for x in parts]).sum()


def _block(layer: Layer) -> Block:
    assert layer.block is not None
    return layer.block
