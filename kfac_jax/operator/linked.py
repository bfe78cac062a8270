"""Linked layers: cross-layer curvature, block-tridiagonal for a chain (section 4.3).

`F̂⁻¹ = Ξᵀ Λ Ξ`. A row of Ξ subtracts from a layer's vector the prediction from its
parent's, `U_i = V_i - Ψ_A V_p Ψ_Gᵀ`, with the regressions `Ψ_A = A_ip A_p⁻¹` and
`Ψ_G = G_ip G_p⁻¹`. Λ inverts the part of a layer's own curvature that the parent does
not explain, `Σ = A_i ⊗ G_i - (Ψ_A A_p Ψ_Aᵀ) ⊗ (Ψ_G G_p Ψ_Gᵀ)`. For the root of a tree
`Σ = A ⊗ G`.
"""

import dataclasses
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from chex import ArrayTree, Numeric
from jax import Array
from jaxtyping import Float

from kfac_jax._jaxpr import axis_types
from kfac_jax._jaxpr.flow import sources
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import Examples
from kfac_jax._utils import fresh
from kfac_jax.blocks import Block
from kfac_jax.devices import Devices
from kfac_jax.linalg import Inverted
from kfac_jax.linalg._coherence import pseudo_inverse
from kfac_jax.operator.inverses import compute
from kfac_jax.operator.products import by_themselves, not_one_product
from kfac_jax.operator.single import site_statistics, statistics_cost
from kfac_jax.plan.group import (
    Arrays,
    Factors,
    FactorShapes,
    Group,
    Grouped,
    Name,
    Products,
    ToInvert,
    Uses,
    Vectors,
)
from kfac_jax.plan.layer import Layer

SIDES = ("input", "output")

CROSS = ("parent_input", "parent_output")
"""The factors of a link: second moments of a layer's inputs with its parent's, and of
their output gradients, `[i, parent's i]` and `[o, parent's o]`."""

ROWS = ("input_rows", "output_rows")
"""Names of the rows, `[rows, i]` and `[rows, o]`, that taps return besides statistics.
Second moments of different layers are computed from them."""


@dataclasses.dataclass(frozen=True)
class Linked(Group):
    """A tree of layers, each but the root linked to a parent.

    Attributes:
      members: the layers, parents before their children.
      parents: the name of each member's parent; empty for the root.
    """

    members: tuple[Layer, ...]
    parents: tuple[str, ...]

    wants_roots = True

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The members."""
        return self.members

    @property
    def signature(self) -> tuple[Any, ...]:
        """The layers and their links."""
        return (*super().signature, self.parents)

    @property
    def links(self) -> Iterator[tuple[Layer, Layer]]:
        """Yields each layer with its parent."""
        known = {x.name: x for x in self.layers}
        for layer, parent in zip(self.layers, self.parents, strict=True):
            if parent:
                yield layer, known[parent]

    # ------------------------------------------------------------------ what it holds

    @property
    def cross_shapes(self) -> FactorShapes:
        """The shapes of the links' factors, by the child's name."""
        return {
            layer.name: {
                CROSS[0]: (layer.shape.inputs, parent.shape.inputs),
                CROSS[1]: (layer.shape.outputs, parent.shape.outputs),
            }
            for layer, parent in self.links
        }

    @property
    def factor_shapes(self) -> FactorShapes:
        """The shapes of the layers' own factors, and of the links'."""
        return _joined(super().factor_shapes, self.cross_shapes)

    @property
    def statistics_shapes(self) -> FactorShapes:
        """The shapes of the layers' own statistics, and of the links'."""
        return _joined(super().statistics_shapes, self.cross_shapes)

    @property
    def inverse_shapes(self) -> FactorShapes:
        """The shapes of K, s and Ψ for both sides, see `inverses`."""
        cross = self.cross_shapes
        return {
            x.name: {
                name: shape
                for side, n in zip(SIDES, _sizes(x), strict=True)
                for name, shape in _inverse_shapes(side, n, cross.get(x.name)).items()
            }
            for x in self.layers
        }

    # --------------------------------------------------------------------- statistics

    @property
    def row_statistics(self) -> dict[str, frozenset[str]]:
        """The blocks' input statistics, and second moments with the parent's inputs."""
        linked = self.cross_shapes
        return {
            x.name: _block(x).row_statistics
            | ({CROSS[0]} if x.name in linked else frozenset())
            for x in self.layers
        }

    def probes(
        self, sites: Mapping[str, Sequence[Site]], data: Sequence[ArrayTree]
    ) -> Factors:
        """Zeros like the blocks' statistics, and like rows.

        On a mesh with Explicit axes, rows are sharded like the data.
        """
        found: Factors = {}
        for x in self.layers:
            shapes = x.statistics_shapes
            own = {name: jnp.zeros(shape, x.dtype) for name, shape in shapes.items()}
            count = paired_rows(x, sites[x.name][0])
            for name, n in zip(ROWS, _sizes(x), strict=True):
                zeros = jnp.zeros((count, n), x.dtype)
                own[name] = axis_types.split_first(zeros, data)
            found[x.name] = own
        return found

    def gather(
        self, layer: Layer, site: Site, x: Array | None, dy: Array, carried: Arrays
    ) -> Arrays:
        """The block's statistics and the rows; rows that do not count are zero."""
        block = _block(layer)
        sums = site_statistics(site, block, layer.shape, x, dy, carried)
        x, dy = site.canonical(x, dy, layer.shape.homogeneous)
        return sums | dict(zip(ROWS, block.rows(x, dy), strict=True))

    def collect(self, sums: Factors, carried: Factors) -> Factors:
        """The statistics, with second moments of linked layers in place of the rows."""
        found = {
            name: {n: x for n, x in sums[name].items() if n not in ROWS}
            for name in self.names
        }
        for layer, parent in self.links:
            for name, row in zip(CROSS, ROWS, strict=True):
                own, other = sums[layer.name][row], sums[parent.name][row]
                found[layer.name][name] = own.T @ other
        return found

    # ------------------------------------------------------------------------ factors

    def counts(self, statistics: Factors, weight: Array) -> Factors:
        """The blocks' counts; a link's factors are divided by the number of cases."""
        cross, found = self.cross_shapes, Factors()
        for x in self.layers:
            shared = cross.get(x.name, {})
            own = {n: s for n, s in statistics[x.name].items() if n not in shared}
            cases = weight.astype(x.dtype)
            found[x.name] = _block(x).counts(own, cases)
            found[x.name] |= dict.fromkeys(shared, cases)
        return found

    def divisors(self, counts: Factors) -> Factors:
        """The counts; a link's input factor has the geometric mean of its layers' two.

        With `A_ij / √(n_i n_j)` the joint matrix of both layers is `D S D` of the sums
        S, with D diagonal. So it stays positive semidefinite.
        """
        found = super().divisors(counts)
        for layer, parent in self.links:
            both = counts[layer.name]["input"], counts[parent.name]["input"]
            mean = jnp.sqrt(both[0]) * jnp.sqrt(both[1])
            found[layer.name] = found[layer.name] | {CROSS[0]: mean}
        return found

    def average(self, old: Factors, new: Factors, epsilon: Array) -> Factors:
        """Averages layer by layer; a link's factors as the child's block does."""
        return {
            x.name: _block(x).average(old[x.name], new[x.name], epsilon)
            for x in self.layers
        }

    def looked_at(self, factors: Factors) -> tuple[list[Array], list[Array]]:
        """The layers' own factors; those of links are made of the same rows."""
        own = [factors[name][side] for name in self.names for side in SIDES]
        return own, []

    # ----------------------------------------------------------------------- inverses

    def init_inverses(self) -> Factors:
        """The inverses of the identity: Σ = I, Ψ = 0."""
        shapes = self.inverse_shapes
        return {
            x.name: {
                name: fresh.identities(shape, x.dtype)
                if name.endswith("_basis")
                else fresh.full(shape, 0.0, x.dtype)
                for name, shape in shapes[x.name].items()
            }
            for x in self.layers
        }

    def to_invert(self, factors: Factors, damping: Numeric) -> ToInvert:
        """The layers' own factors with factored damping (section 6.3)."""
        found = ToInvert({}, {})
        for x in self.layers:
            own = {side: factors[x.name][side] for side in SIDES}
            damped = _block(x).damp(own, jnp.asarray(damping, x.dtype))
            for side, part in damped.items():
                found.matrices[x.name, side] = part
        return found

    def inverses(
        self,
        found: Mapping[Name, Inverted],
        factors: Factors,
        damping: Numeric,
        devices: Devices,
    ) -> tuple[Factors, Array]:
        """K, s and Ψ of both sides, with Ψ the regression on the parent.

        `Σ⁻¹ = (K_A ⊗ K_G) (I - s_A ⊗ s_G)⁻¹ (K_A ⊗ K_G)ᵀ`. There is one flag for the
        group: a layer's inverses are only valid with those of its parent from the same
        factors.
        """
        roots = {name: part.inverse for name, part in found.items()}
        pairs = [
            (layer.name, parent.name, side, cross)
            for layer, parent in self.links
            for side, cross in zip(SIDES, CROSS, strict=True)
        ]
        conditionals = devices.conditionals(
            {
                (name, cross): (
                    roots[name, side],
                    factors[name][cross],
                    roots[parent, side],
                )
                for name, parent, side, cross in pairs
            }
        )
        result: Factors = {
            name: {f"{side}_basis": roots[name, side] for side in SIDES}
            for name in self.names
        }
        for name, parent, side, cross in pairs:
            basis, explained = conditionals[name, cross]
            other = roots[parent, side]
            result[name] |= {
                f"{side}_basis": basis,
                f"{side}_explained": explained,
                f"{side}_regression": factors[name][cross] @ other @ other.T,
            }
        arrays = [x for part in result.values() for x in part.values()]
        return result, jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()

    @classmethod
    def solve_all(
        cls,
        groups: Sequence["Linked"],
        inverses: Factors,
        vectors: Vectors,
        products: Products,
    ) -> Vectors:
        """Applies `Ξᵀ Λ Ξ`; a missing vector (hidden by a mask) counts as zero."""
        found: Vectors = {}
        for group in groups:
            left: Vectors = {}
            for name, parent in zip(group.names, group.parents, strict=True):
                if name not in vectors:
                    continue
                own, x = inverses[name], vectors[name]
                if parent in vectors:
                    explained = own["input_regression"] @ vectors[parent]
                    x = x - explained @ own["output_regression"].T
                x = own["input_basis"].T @ x @ own["output_basis"]
                x = own["input_basis"] @ (x / _unexplained(own)) @ own["output_basis"].T
                left[name] = x
            found |= group._transposed(inverses, left)
        return found

    def _transposed(self, inverses: Factors, v: Vectors) -> Vectors:
        """Applies Ξᵀ."""
        result = dict(v)
        for name, parent in zip(self.names, self.parents, strict=True):
            if name in v and parent in v:
                own = inverses[name]
                back = own["input_regression"].T @ v[name] @ own["output_regression"]
                result[parent] = result[parent] - back
        return result

    # ----------------------------------------------------------------------- operator

    def matvec(self, factors: Factors, vectors: Vectors) -> Vectors:
        """Multiplies by the undamped `F̂ = Ξ⁻¹ Λ⁻¹ Ξ⁻ᵀ`.

        The parent's factors may be singular without damping. Their pseudo-inverse is
        enough: `A_ip = E[a_i a_pᵀ]` has its rows in the range of `A_p`.
        """
        regressions = {
            layer.name: [
                factors[layer.name][cross] @ pseudo_inverse(factors[parent.name][side])
                for side, cross in zip(SIDES, CROSS, strict=True)
            ]
            for layer, parent in self.links
        }
        gathered = {name: vectors[name] for name in self.names}
        pairs = list(zip(self.names, self.parents, strict=True))
        for name, parent in reversed(pairs):  # Ξ⁻ᵀ: children first
            if parent:
                a, g = regressions[name]
                gathered[parent] = gathered[parent] + a.T @ gathered[name] @ g
        result: Vectors = {}
        for name, parent in pairs:  # parents first
            own, x = factors[name], gathered[name]
            moved = own["input"] @ x @ own["output"]
            if parent:
                a, g = regressions[name]
                explained = own[CROSS[0]] @ (a.T @ x @ g) @ own[CROSS[1]].T
                moved = moved - explained + a @ result[parent] @ g.T
            result[name] = moved
        return result

    def diagonal(self, factors: Factors) -> Vectors:
        """The diagonal of the layers' own curvature, which links do not change."""
        return {
            x.name: _block(x).diagonal(factors[x.name], x.shape) for x in self.layers
        }

    def check_mode(self, damping: Numeric, mode: str) -> None:
        """Refuses exact damping."""
        undamped = isinstance(damping, numbers.Real) and damping == 0
        if mode == "exact" and not undamped:
            raise ValueError(
                "With BlockTridiagonal only factored damping is possible; got "
                'damping_mode="exact". Pass damping_mode="factored", or make the plan '
                "with structure=BlockDiagonal()."
            )

    @property
    def has_spectrum(self) -> bool:
        """False: the eigenvectors have no closed form."""
        return False

    def power(
        self,
        factors: Factors,
        vectors: Vectors,
        exponent: Numeric,
        damping: Numeric,
        mode: str,
    ) -> Vectors:
        """Refuses."""
        raise ValueError(
            "power needs a plan with structure=BlockDiagonal(); got "
            "BlockTridiagonal(). For the inverse use solve, for draws with "
            "covariance (F + λ I)⁻¹ use sample."
        )

    def logdet(self, factors: Factors, damping: Numeric, mode: str) -> Array:
        """`log det F̂ = -log det Λ`, as Ξ has unit determinant."""
        inverses, total = compute([self], factors, damping)[0], jnp.zeros(())
        for x in self.layers:
            own = inverses[x.name]
            a, g = (jnp.linalg.slogdet(own[f"{side}_basis"])[1] for side in SIDES)
            of_bases = 2 * (x.shape.outputs * a + x.shape.inputs * g)
            total = total + jnp.log(_unexplained(own)).sum() - of_bases
        return total

    def sample(
        self, factors: Factors, noise: Vectors, damping: Numeric, mode: str
    ) -> Vectors:
        """Applies a root of Λ, then `Ξᵀ`."""
        inverses, left = compute([self], factors, damping)[0], Vectors()
        for name in self.names:
            own = inverses[name]
            x = noise[name] / jnp.sqrt(_unexplained(own))
            left[name] = own["input_basis"] @ x @ own["output_basis"].T
        return self._transposed(inverses, left)

    # ------------------------------------------------------------------ costs, report

    @property
    def inversion_cost(self) -> int:
        """Multiply-adds for the roots, and for the links.

        For each side of a link, with m ≥ n the lengths of its factor, these are the
        products for coherence and regression, and `2 m² n + 4 m n² + 4.5 n³` for
        singular vectors.
        """
        cost = 0.0
        for x in self.layers:
            cost += x.shape.inputs**3 + x.shape.outputs**3
        for shapes in self.cross_shapes.values():
            for shape in shapes.values():
                m, n = max(shape), min(shape)
                cost += 2 * m * n * (m + n) + 2 * m**2 * n + 4 * m * n**2 + 4.5 * n**3
        return int(cost)

    @property
    def statistics_cost(self) -> float:
        """Multiply-adds of all factors' products, and of the outputs' gradients."""
        shapes = self.factor_shapes
        return sum(statistics_cost(x, shapes[x.name]) for x in self.layers)


def _joined(first: FactorShapes, second: FactorShapes) -> FactorShapes:
    return {name: part | second.get(name, {}) for name, part in first.items()}


def _inverse_shapes(side: str, n: int, cross: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of K, s and Ψ of one side; of K alone without a parent."""
    shapes: dict[str, tuple[int, ...]] = {f"{side}_basis": (n, n)}
    if cross is not None:
        shapes[f"{side}_explained"] = (n,)
        shapes[f"{side}_regression"] = cross[f"parent_{side}"]
    return shapes


def _unexplained(own: Arrays) -> Float[Array, "i o"] | float:
    """The diagonal of `I - s_A ⊗ s_G` as a matrix, `1 - s_A s_Gᵀ`."""
    if "input_explained" not in own:
        return 1.0
    return 1 - own["input_explained"][:, None] * own["output_explained"][None, :]


def _sizes(layer: Layer) -> tuple[int, int]:
    return layer.shape.inputs, layer.shape.outputs


def _block(layer: Layer) -> Block:
    assert layer.block is not None and layer.block.handles_links
    return layer.block


# ------------------------------------------------------------------- which layers


@dataclasses.dataclass(frozen=True)
class BlockTridiagonal:
    """Neighbouring layers have cross-layer curvature, and the inverse is sparse.

    The approximation agrees with the Kronecker-factored Fisher on the blocks of each
    layer and of each two linked layers, `F_ij ≈ A_ij ⊗ G_ij`, and its inverse is zero
    in the blocks of all other pairs: that of a chain of layers is block-tridiagonal.

    A layer is linked to the layer that uses its output next: the first one in the order
    of the program whose input depends on it with no other such layer between. In a
    network that is not a chain (residual connections, branches) the links form a
    forest. A layer can be linked if its kind is "dense" or "conv", its block is a
    `Kronecker` with two full factors, and it is used once, outside of scans and
    conditionals. Two linked layers must have the same number of positions in each
    example. The report says which layers are not linked, and why; each of these has a
    block of its own.

    Damping is factored (on the layers' own factors), so `damping_mode="exact"` is
    refused. A refresh takes two singular value decompositions for each link, which cost
    about ten times what Cholesky factorisations cost; statistics keep each linked
    layer's inputs and output gradients (patches, of convolutions) until the end of the
    backward pass.

    References:
      Martens & Grosse 2015, section 4.3 and appendix B.

    >>> BlockTridiagonal()
    BlockTridiagonal()
    """

    def group(self, uses: Uses) -> Grouped:
        """Links layers to those that use their outputs; others are by themselves."""
        parents, refusals = _links(uses)
        trees = _trees(uses.layers, parents)
        linked = frozenset(name for tree in trees for name in tree.names)
        alone, notes = by_themselves(uses.layers, uses, linked)
        order = {layer.name: i for i, layer in enumerate(uses.layers)}
        groups = sorted([*trees, *alone], key=lambda g: min(order[n] for n in g.names))
        pairs = [f"  {n} → {parents[n]}" for n in order if n in parents]
        others = [f"  {n}: {refusals[n]}" for n in order if n in refusals]
        lines = ["Linked to the layer that uses its output:", *pairs] if pairs else []
        lines += ["Without such a link:", *others] if others else []
        return Grouped(tuple(groups), (*lines, *notes))


def _trees(layers: Sequence[Layer], parents: Mapping[str, str]) -> list[Linked]:
    """Groups layers that links connect, with parents before their children."""

    def path(name: str) -> list[str]:
        return [name, *(path(parents[name]) if name in parents else [])]

    known = {x.name: x for x in layers}
    trees: dict[str, list[str]] = {}
    for name in known:
        if name in parents or name in parents.values():
            trees.setdefault(path(name)[-1], []).append(name)
    groups: list[Linked] = []
    for names in trees.values():
        ordered = sorted(names, key=lambda name: len(path(name)))
        members = tuple(known[name] for name in ordered)
        groups.append(Linked(members, tuple(parents.get(n, "") for n in ordered)))
    return groups


def _links(uses: Uses) -> tuple[dict[str, str], dict[str, str]]:
    """Each layer's parent, or why it has none.

    A layer's parent is the first layer in the order of the program whose input depends
    on its output, with no other layer that can be linked between.
    """
    layers = {x.name: x for x in uses.layers}
    refusals = {n: _refusal(x, uses.sites[n]) for n, x in layers.items()}
    able = {n: uses.sites[n][0] for n, reason in refusals.items() if not reason}
    found = sources(uses.graph, able)
    parents: dict[str, str] = {}
    for name in able:
        if name not in found:
            refusals[name] = "it is inside a loop or conditional"
            continue
        users = [other for other, before in found.items() if name in before]
        if not users:
            refusals[name] = "no such layer uses its output"
        elif reason := _mismatch(layers, able, name, users[0]):
            refusals[name] = reason
        else:
            parents[name] = users[0]
    return parents, {n: reason for n, reason in refusals.items() if reason}


def _refusal(layer: Layer, sites: Sequence[Site]) -> str:
    """Why a layer can be neither child nor parent; empty if it can."""
    if layer.kind not in ("dense", "conv"):
        return f'its kind is "{layer.kind}"'
    if layer.block is None or not layer.block.handles_links:
        return f"its block is {layer.block!r}"
    return not_one_product(layer, sites)


def _mismatch(
    layers: Mapping[str, Layer], sites: Mapping[str, Site], name: str, parent: str
) -> str:
    """Why two layers that can be linked cannot be linked to each other."""
    first, second = _block(layers[name]), _block(layers[parent])
    if first.needs_examples != second.needs_examples:
        return f"{parent}, which uses its output, has another weight_sharing"
    examples = [sites[n].examples for n in (name, parent)]
    known = [x for x in examples if isinstance(x, Examples)]
    if len(known) < 2 or known[0].size != known[1].size:
        return f"its examples are not known to be those of {parent}"
    rows = [paired_rows(layers[n], sites[n]) for n in (name, parent)]
    if rows[0] != rows[1]:
        return f"{parent}, which uses its output, has other positions in each example"
    return ""


def paired_rows(layer: Layer, site: Site) -> int:
    """The number of a layer's rows that are paired with rows of its parent."""
    assert isinstance(site.examples, Examples)
    return site.examples.size if _block(layer).needs_examples else site.count
