"""Groups the uses that discovery found into layers, and gives each layer its block."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kfac_jax._jaxpr.parts import Part
from kfac_jax._jaxpr.sites import OtherUse, Parameter, Site, Use
from kfac_jax._jaxpr.view import Layout
from kfac_jax._utils.arguments import shown
from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.blocks import (
    TNT,
    Block,
    BlockShape,
    Diagonal,
    Identity,
    Kronecker,
    KroneckerSum,
)
from kfac_jax.plan.choosing import (
    BlocksSpec,
    as_rule,
    has_mapped_sides,
    misfit,
    with_default_block,
)
from kfac_jax.plan.layer import KINDS, Layer
from kfac_jax.plan.summing import (
    is_remote,
    sums_gradients,
    used,
)


@dataclasses.dataclass(frozen=True, eq=False)
class _Leaf:
    index: int
    path: str
    shape: tuple[int, ...]
    dtype: str
    part: Part | None = None  # of another leaf that this one stands for

    @property
    def place(self) -> tuple[int, Any]:
        """The index of the leaf that it is or is a part of, and where the part is."""
        return (self.part.leaf, self.part.box.ends) if self.part else (self.index, ())


def make_layers(
    uses: Sequence[Use],
    paths: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
    blocks: BlocksSpec,
    weight_sharing: str,
    parts: Sequence[Part] = (),
    inputs: bool = False,
) -> tuple[tuple[Layer, ...], dict[str, list[Site]]]:
    """Makes layers from uses.

    A weight is a layer if all its uses are the same linear map. A bias joins this layer
    if it is added to the weight's output in every use, and is used nowhere else.

    Args:
      uses: what discovery found.
      paths: each parameter's path.
      shapes: each parameter's shape.
      dtypes: each parameter's type.
      blocks: the user's choice of blocks.
      weight_sharing: the setting of default blocks.
      parts: the parts that some parameters are cut in; uses count them as further
        parameters.
      inputs: whether default blocks are of inputs alone.

    Returns:
      The layers in the order of their first parameters, and for each layer name the
      sites that its statistics are gathered at.

    Raises:
      TypeError: if `blocks` is of an unknown type or holds something else than blocks.
      ValueError: if a key of `blocks` fits no layer, or a block does not fit its layer.
    """
    leaves = {
        i: _Leaf(i, p, tuple(s), d)
        for i, (p, s, d) in enumerate(zip(paths, shapes, dtypes, strict=True))
    }
    for part in parts:
        path, dtype = f"{paths[part.leaf]}{part.box}", dtypes[part.leaf]
        index = len(leaves)
        leaves[index] = _Leaf(index, path, part.shape, dtype, part)
    for part in parts:
        leaves.pop(part.leaf, None)
    layers: dict[int, tuple[Layer, list[Site]]] = {}
    taken: set[int] = set()
    for leaf in leaves.values():
        made = _linear_layer(leaf, leaves, uses)
        if made is not None:
            layers[leaf.index] = made
            taken.update(made[0].leaves)
    for leaf in leaves.values():
        if leaf.index not in taken:
            made = _shift_layer(leaf, uses) or _remote_layer(leaf, uses)
            layers[leaf.index] = made or (_other_layer(leaf, uses), [])

    def place(made: tuple[Layer, list[Site]]) -> tuple[int, Any]:
        return min(leaves[i].place for i in made[0].leaves)

    ordered = [
        (with_default_block(layer, sites, weight_sharing, inputs), sites)
        for layer, sites in sorted(layers.values(), key=place)
    ]
    chosen = _choose(blocks, _distinct(ordered), leaves)
    sites = {layer.name: sites for layer, sites in chosen}
    return tuple(_of_leaves(layer, leaves) for layer, _ in chosen), sites


def _of_leaves(layer: Layer, leaves: Mapping[int, _Leaf]) -> Layer:
    """The layer with the leaves that its parameters are parts of."""
    parts = [leaves[i].part for i in layer.leaves]
    if not any(parts):
        return layer
    return dataclasses.replace(
        layer,
        leaves=tuple(leaves[i].place[0] for i in layer.leaves),
        boxes=tuple(part.box if part else None for part in parts),
    )


def _weight_uses(leaf: _Leaf, uses: Sequence[Use]) -> list[Use]:
    return [
        use
        for use in uses
        if (isinstance(use, OtherUse) and use.leaf == leaf.index)
        or (isinstance(use, Site) and use.weight and use.weight.leaf == leaf.index)
        or (isinstance(use, Site) and use.kind == "shift" and _bias(use) == leaf.index)
    ]


def _bias(site: Site) -> int | None:
    return site.bias.leaf if site.bias else None


def _linear_layer(
    leaf: _Leaf, leaves: Mapping[int, _Leaf], uses: Sequence[Use]
) -> tuple[Layer, list[Site]] | None:
    own = _weight_uses(leaf, uses)
    sites = [use for use in own if isinstance(use, Site)]
    if not sites or len(sites) != len(own) or any(site.computed for site in sites):
        return None
    oriented = _oriented(sites)
    if oriented is None:
        return None
    sites, tied = oriented
    assert sites[0].weight is not None
    params = [(leaf, sites[0].weight.layout, "weight")]
    bias = sites[0].bias
    # A bias needs a further input. A table's inputs are integers, and for a tied weight
    # one side's inputs are the other side's outputs, so neither has room for it.
    plain = sites[0].kind != "embedding" and not tied
    if plain and bias is not None and _joins(bias, sites, leaves[bias.leaf], uses):
        params.append((leaves[bias.leaf], bias.layout, "bias"))
    else:
        sites = [dataclasses.replace(site, bias=None) for site in sites]
    kind = sites[0].kind
    if kind == "scale" and len(params) == 2:
        kind = "scale_and_shift"
    if tied:
        kind = "tied"
    *lead, inputs, outputs = params[0][1].shape
    shape = (tuple(lead), inputs + len(params) - 1, outputs)
    return _layer(kind, params, sites, shape), sites


def _oriented(sites: Sequence[Site]) -> tuple[list[Site], bool] | None:
    """Marks the sites that use a weight transposed, relative to the first site.

    Args:
      sites: all uses of the weight.

    Returns:
      The sites, those that use it as the first one does in front, and whether there are
      others. (If it is a table somewhere, the first is such a use.) None if the sites
      are different linear maps.
    """
    tables = [site for site in sites if site.kind == "embedding"]
    first = (tables or sites)[0]
    result: list[Site] = []
    for site in sites:
        if first.weight is None or site.weight is None:
            return None
        if site.kind == first.kind and site.weight.layout == first.weight.layout:
            result.append(site)
        elif site.transposed == first.weight.layout:
            result.append(dataclasses.replace(site, swapped=True))
        else:
            return None
    tied = any(site.swapped for site in result)
    return sorted(result, key=lambda site: site.swapped), tied


def _joins(
    bias: Parameter, sites: Sequence[Site], leaf: _Leaf, uses: Sequence[Use]
) -> bool:
    """Whether all sites add this bias, and nothing else uses it."""
    own = _weight_uses(leaf, uses)
    shifts = [u for u in own if isinstance(u, Site) and u.kind == "shift"]
    elsewhere = [
        u
        for u in uses
        if isinstance(u, Site)
        and u.kind != "shift"
        and _bias(u) == leaf.index
        and not any(u is site for site in sites)
    ]
    # discovery records each addition of a bias as a shift, too
    return (
        all(site.bias == bias for site in sites)
        and not elsewhere
        and len(shifts) == len(own) == len(sites)
    )


def _shift_layer(leaf: _Leaf, uses: Sequence[Use]) -> tuple[Layer, list[Site]] | None:
    own = _weight_uses(leaf, uses)
    sites = [u for u in own if isinstance(u, Site) and u.kind == "shift" and u.bias]
    same = len({(site.bias, site.computed) for site in sites}) == 1
    if not same or len(sites) != len(own) or sites[0].computed:
        return None
    assert sites[0].bias is not None
    layout = sites[0].bias.layout
    *lead, outputs = layout.shape
    shape = (tuple(lead), 1, outputs)
    return _layer("shift", [(leaf, layout, "bias")], sites, shape), sites


def _remote_layer(leaf: _Leaf, uses: Sequence[Use]) -> tuple[Layer, list[Site]] | None:
    """A parameter that reaches the data by maps, or as different linear maps.

    If what is computed has the parameter's shape (`w * mask`), the layer has the
    computed weight's matrix. If not, the last two axes are that of a matrix, and those
    before are axes of independent ones.
    """
    own = _weight_uses(leaf, uses)
    sites = [use for use in own if isinstance(use, Site)]
    if not sites or len(sites) != len(own):
        return None
    layouts = {used(site).layout for site in sites}
    kinds = {site.kind for site in sites}
    (layout,) = layouts if len(layouts) == 1 else (None,)
    if layout is None or layout.source_shape != leaf.shape or len(layout.shape) < 2:
        matrix = leaf.shape if len(leaf.shape) > 1 else (1, math.prod(leaf.shape))
        layout = Layout(leaf.shape, matrix, tuple(range(len(matrix))), matrix)
    kind = kinds.pop() if len(kinds) == 1 else "mixed"
    *lead, inputs, outputs = layout.shape
    made = _layer(kind, [(leaf, layout, "weight")], sites, ((), inputs, outputs))
    shape = BlockShape((), tuple(lead), inputs, outputs)
    return dataclasses.replace(made, shape=shape), sites


def _layer(
    kind: str,
    params: Sequence[tuple[_Leaf, Layout, str]],
    sites: Sequence[Site],
    shape: tuple[tuple[int, ...], int, int],
) -> Layer:
    lead, inputs, outputs = shape
    independent = len(sites[0].reader.y_axes.independent)
    split = len(lead) - independent
    joint = {role for _, _, role in params} == {"weight", "bias"}
    one_hot, tied = sites[0].kind == "embedding", kind == "tied"
    block_shape = BlockShape(
        lead[:split], lead[split:], inputs, outputs, joint, one_hot, tied
    )
    leaves = [leaf for leaf, _, _ in params]
    return Layer(
        name=_common([leaf.path for leaf in leaves]),
        kind=kind,
        params=tuple(leaf.path for leaf in leaves),
        shapes=tuple(leaf.shape for leaf in leaves),
        dtype=_wide(leaves[0].dtype),
        factor_dtype=_wide(leaves[0].dtype),
        uses=len(sites),
        rows=sum(site.count for site in sites),
        block=None,
        shape=block_shape,
        source=sites[0].source,
        leaves=tuple(leaf.index for leaf in leaves),
        layouts=tuple(layout for _, layout, _ in params),
        roles=tuple(role for _, _, role in params),
    )


def _distinct(
    made: Sequence[tuple[Layer, list[Site]]],
) -> list[tuple[Layer, list[Site]]]:
    """Names layers by all their parameters where common paths coincide."""
    names = [layer.name for layer, _ in made]
    return [
        (
            layer
            if names.count(layer.name) == 1
            else dataclasses.replace(layer, name="+".join(layer.params)),
            sites,
        )
        for layer, sites in made
    ]


def _wide(dtype: str) -> str:
    return str(wide_dtype(dtype))


def _common(paths: Sequence[str]) -> str:
    if len(paths) == 1:
        return paths[0]
    parts = [path.split("/") for path in paths]
    common: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return "/".join(common) or "+".join(paths)


def _other_layer(leaf: _Leaf, uses: Sequence[Use]) -> Layer:
    """A parameter that is unused, tagged generic, or used in a way no layer covers."""
    own = _weight_uses(leaf, uses)
    others = [use for use in own if isinstance(use, OtherUse)]
    bad = next((use for use in others if use.kind == "unmatched"), None)
    if not own:
        return _bare_layer(leaf, "unused", 0, KINDS["unused"], "")
    if bad is not None:
        return _bare_layer(leaf, "unmatched", len(own), bad.reason, bad.source)
    return _bare_layer(leaf, "generic", len(own), "", others[0].source)


def _bare_layer(leaf: _Leaf, kind: str, uses: int, reason: str, source: str) -> Layer:
    size = math.prod(leaf.shape)
    return Layer(
        name=leaf.path,
        kind=kind,
        params=(leaf.path,),
        shapes=(leaf.shape,),
        dtype=_wide(leaf.dtype),
        factor_dtype=_wide(leaf.dtype),
        uses=uses,
        block=Identity() if kind == "unused" else Diagonal(),
        shape=BlockShape((), (), 1, size),
        reason=reason,
        source=source,
        leaves=(leaf.index,),
        layouts=(Layout(leaf.shape, (size,), (0,), (1, size)),),
        roles=("weight",),
    )


def _choose(
    blocks: BlocksSpec,
    made: Sequence[tuple[Layer, list[Site]]],
    leaves: Mapping[int, _Leaf],
) -> list[tuple[Layer, list[Site]]]:
    rule = as_rule(blocks, [layer for layer, _ in made])
    result: list[tuple[Layer, list[Site]]] = []
    for layer, sites in made:
        block = rule(layer)
        if isinstance(block, KroneckerSum) and is_remote(sites):
            block = block.alone
        mapped = has_mapped_sides(layer, sites, block)
        remote = is_remote(sites) and not mapped
        if isinstance(block, Kronecker) and remote:
            # its sides are of inputs and output gradients, these of gradients
            block = TNT(
                max_factor_dim=block.max_factor_dim,
                pi=block.pi,
                exact_scalars=block.exact_scalars,
            )
        if isinstance(block, Kronecker) and layer.shape.tied:
            block = dataclasses.replace(block, fit="independent")
        if block is not None and not isinstance(block, Block):
            raise TypeError(
                "blocks must give a Block (kfac_jax.blocks) or None for each layer; "
                f"got {shown(block)} for layer '{layer.name}'."
            )
        if not layer.tagged and not isinstance(block, Diagonal | Identity | None):
            raise ValueError(
                f"Layer '{layer.name}' ({layer.kind}) has no inputs and outputs to "
                f"build {block!r} from; use Diagonal(), Identity() or None."
            )
        reason = misfit(layer, sites, block)
        if reason:
            result.extend(
                (
                    _bare_layer(
                        leaves[i], "unmatched", layer.uses, reason, layer.source
                    ),
                    [],
                )
                for i in layer.leaves
            )
            continue
        shape = layer.shape
        if block is not None and not block.handles_one_hot:
            shape = dataclasses.replace(shape, one_hot=False)
        if sums_gradients(block, sites):
            shape = dataclasses.replace(shape, tied=False)
        if mapped and layer.kind == "embedding":
            shape = dataclasses.replace(shape, one_hot=True)
        result.append((dataclasses.replace(layer, block=block, shape=shape), sites))
    return result
