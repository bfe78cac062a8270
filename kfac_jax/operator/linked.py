"""The inverse of linked layers' curvature, block-tridiagonal for a chain (section 4.3).

`F̂⁻¹ = Ξᵀ Λ Ξ`. A row of Ξ takes from a layer's vector what its parent's predicts,
`U_i = V_i - Ψ_A V_p Ψ_Gᵀ`, with the regressions `Ψ_A = A_ip A_p⁻¹`, `Ψ_G = G_ip G_p⁻¹`.
Λ inverts what the parent leaves of a layer's own curvature,
`Σ = A_i ⊗ G_i - (Ψ_A A_p Ψ_Aᵀ) ⊗ (Ψ_G G_p Ψ_Gᵀ)`, all of it for the root of a tree.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import Array

from kfac_jax import linalg
from kfac_jax._utils import fresh
from kfac_jax.devices import Distribution
from kfac_jax.plan import CROSS, Layer
from kfac_jax.statistics.averages import Factors

Vectors = dict[str, Array]
"""By layer name, `[i, o]`."""

SIDES = ("input", "output")


def members(layers: Sequence[Layer]) -> list[Layer]:
    """Those that are linked, parents before their children."""
    linked = {x.name: x for x in layers if x.link is not None}

    def depth(layer: Layer) -> int:
        parent = _parent(layer)
        return 0 if parent is None else 1 + depth(linked[parent])

    return sorted(linked.values(), key=depth)


def _parent(layer: Layer) -> str | None:
    assert layer.link is not None
    return layer.link.parent


def init(layer: Layer) -> dict[str, Array]:
    """What `refresh` gives for the identity: Σ = I, no regression."""
    return {
        name: fresh.identities(shape, layer.dtype)
        if name.endswith("_basis")
        else fresh.full(shape, 0.0, layer.dtype)
        for name, shape in layer.joint_shapes.items()
    }


def refresh(
    layers: Sequence[Layer],
    factors: Factors,
    damping: Array,
    sharing: Distribution | None = None,
) -> tuple[Factors, dict[str, Array]]:
    """Computes Ψ and the inverse of Σ for linked layers.

    Only the layers' own factors are damped (factored, section 6.3).

    Args:
      layers: the plan's layers.
      factors: the moving averages, by layer name.
      damping: λ + η.
      sharing: devices that share the work.

    Returns:
      For each linked layer K, s and Ψ of both sides, with `Σ⁻¹ = (K_A ⊗ K_G)
      (I - s_A ⊗ s_G)⁻¹ (K_A ⊗ K_G)ᵀ`; and by tree (its root) whether all are finite.
    """
    linked = members(layers)
    roots = _roots(linked, factors, damping, sharing)
    pairs = [
        (layer, side, cross)
        for layer in linked
        if _parent(layer) is not None
        for side, cross in zip(SIDES, CROSS, strict=True)
    ]
    found = linalg.conditionals(
        [
            (
                roots[layer.name, side],
                factors[layer.name][cross],
                roots[str(_parent(layer)), side],
            )
            for layer, side, cross in pairs
        ],
        None if sharing is None else sharing.each,
    )
    result: Factors = {
        layer.name: {f"{side}_basis": roots[layer.name, side] for side in SIDES}
        for layer in linked
    }
    for (layer, side, cross), (basis, explained) in zip(pairs, found, strict=True):
        other = roots[str(_parent(layer)), side]
        result[layer.name] |= {
            f"{side}_basis": basis,
            f"{side}_explained": explained,
            f"{side}_regression": factors[layer.name][cross] @ other @ other.T,
        }
    finite: dict[str, Array] = {}
    for layer in linked:
        assert layer.link is not None
        root = layer.link.root
        flags = [jnp.isfinite(x).all() for x in result[layer.name].values()]
        finite[root] = jnp.stack([finite.get(root, jnp.asarray(True)), *flags]).all()
    return result, finite


def _roots(
    linked: Sequence[Layer],
    factors: Factors,
    damping: Array,
    sharing: Distribution | None,
) -> dict[tuple[str, str], Array]:
    """Roots of the inverses of the damped factors, by layer and side."""
    names: list[tuple[str, str]] = []
    shifted: list[tuple[Array, Array]] = []
    for layer in linked:
        assert layer.block is not None
        own = {side: factors[layer.name][side] for side in SIDES}
        damped = layer.block.damp(own, jnp.asarray(damping, layer.dtype))
        for side, (factor, shift) in damped.items():
            names.append((layer.name, side))
            shifted.append((factor, jnp.broadcast_to(shift, factor.shape[:-2])))
    apply = None if sharing is None else sharing.map
    return dict(zip(names, linalg.inverse_root_many(shifted, apply), strict=True))


def solve(layers: Sequence[Layer], inverses: Factors, v: Vectors) -> Vectors:
    """Applies `Ξᵀ Λ Ξ`.

    Args:
      layers: the plan's layers.
      inverses: from `refresh`.
      v: vectors of linked layers; one that is missing counts as zero.

    Returns:
      Those of the product that `v` has.
    """
    linked = [layer for layer in members(layers) if layer.name in v]
    left: Vectors = {}
    for layer in linked:
        own, parent = inverses[layer.name], _parent(layer)
        x = v[layer.name]
        if parent in v:
            x = x - own["input_regression"] @ v[parent] @ own["output_regression"].T
        x = own["input_basis"].T @ x @ own["output_basis"]
        x = own["input_basis"] @ (x / _unexplained(own)) @ own["output_basis"].T
        left[layer.name] = x
    return _transposed(linked, inverses, left)


def sample(layers: Sequence[Layer], inverses: Factors, noise: Vectors) -> Vectors:
    """Turns white noise of all linked layers to one with covariance `Ξᵀ Λ Ξ`."""
    linked = members(layers)
    left: Vectors = {}
    for layer in linked:
        own = inverses[layer.name]
        x = noise[layer.name] / jnp.sqrt(_unexplained(own))
        left[layer.name] = own["input_basis"] @ x @ own["output_basis"].T
    return _transposed(linked, inverses, left)


def _transposed(linked: Sequence[Layer], inverses: Factors, v: Vectors) -> Vectors:
    """Applies Ξᵀ."""
    result = dict(v)
    for layer in linked:
        own, parent = inverses[layer.name], _parent(layer)
        if parent in v:
            back = own["input_regression"].T @ v[layer.name] @ own["output_regression"]
            result[parent] = result[parent] - back
    return result


def _unexplained(own: Mapping[str, Array]) -> Array | float:
    """`1 - s_A s_Gᵀ`, [i, o]."""
    if "input_explained" not in own:
        return 1.0
    return 1 - own["input_explained"][:, None] * own["output_explained"][None, :]


def logdet(layers: Sequence[Layer], inverses: Factors) -> Array:
    """`log det F̂`: Ξ has unit determinant.

    Args:
      layers: the plan's layers.
      inverses: from `refresh`.

    Returns:
      A scalar.
    """
    total = jnp.zeros(())
    for layer in members(layers):
        own = inverses[layer.name]
        inputs, outputs = (jnp.linalg.slogdet(own[f"{x}_basis"])[1] for x in SIDES)
        of_bases = 2 * (layer.shape.outputs * inputs + layer.shape.inputs * outputs)
        total = total + jnp.log(_unexplained(own)).sum() - of_bases
    return total


def matvec(layers: Sequence[Layer], factors: Factors, v: Vectors) -> Vectors:
    """Multiplies by the undamped F̂ = Ξ⁻¹ Λ⁻¹ Ξ⁻ᵀ.

    Regressions take the pseudo-inverse of the parent's factors, in whose range the
    second moments with its children's rows are.

    Args:
      layers: the plan's layers.
      factors: the moving averages, by layer name.
      v: vectors of all linked layers.

    Returns:
      The product.
    """
    linked = members(layers)
    regressions = {
        layer.name: _regressions(layer, factors)
        for layer in linked
        if _parent(layer) is not None
    }
    gathered = dict(v)
    for layer in reversed(linked):  # Ξ⁻ᵀ: children first
        parent = _parent(layer)
        if parent is not None:
            a, g = regressions[layer.name]
            gathered[parent] = gathered[parent] + a.T @ gathered[layer.name] @ g
    result: Vectors = {}
    for layer in linked:  # parents first
        own, parent, x = factors[layer.name], _parent(layer), gathered[layer.name]
        moved = own["input"] @ x @ own["output"]
        if parent is not None:
            a, g = regressions[layer.name]
            explained = own[CROSS[0]] @ (a.T @ x @ g) @ own[CROSS[1]].T
            moved = moved - explained + a @ result[parent] @ g.T
        result[layer.name] = moved
    return result


def _regressions(layer: Layer, factors: Factors) -> tuple[Array, Array]:
    own, parent = factors[layer.name], factors[str(_parent(layer))]
    a, g = (
        own[cross] @ linalg.pseudo_inverse(parent[side])
        for side, cross in zip(SIDES, CROSS, strict=True)
    )
    return a, g
