"""Which block each layer gets: the user's choice, or the default."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import Examples, Lost
from kfac_jax._utils.arguments import shown
from kfac_jax.blocks import TNT, Block, Diagonal, Identity, InputOnly, Kronecker
from kfac_jax.plan.layer import KINDS, Layer
from kfac_jax.plan.summing import is_mapped, is_remote, is_shared, no_sums, used

BlocksSpec = Block | Mapping[str, Block | None] | Callable[[Layer], Block | None] | None


LONGEST_SHIFT = 512
"""The longest full side of an elementwise layer with the default block."""


MOMENTS = 8
"""How many products with a weight moments of examples' gradients may cost, at most."""


def with_default_block(
    layer: Layer, sites: Sequence[Site], weight_sharing: str, inputs: bool
) -> Layer:
    """Elementwise layers get their exact diagonal where uses can be summed.

    Args:
      layer: the layer.
      sites: its uses.
      weight_sharing: the setting of the block.
      inputs: whether blocks are of inputs alone; elementwise layers have none.

    Returns:
      The layer with the block.
    """
    matrix = layer.kind in ("dense", "conv", "embedding", "tied")
    if inputs and layer.kind != "unmatched":
        own = InputOnly(weight_sharing=weight_sharing) if matrix else Identity()
        return dataclasses.replace(layer, block=own)
    if not layer.tagged:
        return layer
    summed = is_shared(sites) and no_sums(layer, sites, Diagonal())
    if is_remote(sites) and not (matrix and is_mapped(layer, sites)):
        block = TNT() if _is_cheap(layer, sites) else Diagonal()
    elif matrix:
        block = Kronecker(weight_sharing=weight_sharing)
    elif summed or _is_lost(sites):
        # a table of positions has no factor of all its entries
        longest = LONGEST_SHIFT
        block = Kronecker(weight_sharing=weight_sharing, max_factor_dim=longest)
    else:
        block = Diagonal()
    return dataclasses.replace(layer, block=block)


def _is_cheap(layer: Layer, sites: Sequence[Site]) -> bool:
    """Whether moments of examples' gradients cost little beside the gradient itself.

    Those of both sides take `i o (i + o)` multiply-adds for each example.
    """
    shape = layer.shape
    if min(shape.inputs, shape.outputs) == 1:
        return False
    uses = sum(site.count * math.prod(used(site).layout.shape) for site in sites)
    sizes = (x.examples.size for x in sites if isinstance(x.examples, Examples))
    examples = max(sizes, default=math.inf)
    moments = math.prod(shape.matrix) * (shape.inputs + shape.outputs)
    return examples * moments <= MOMENTS * uses


def _is_lost(sites: Sequence[Site]) -> bool:
    return not all(isinstance(site.examples, Examples) for site in sites)


def _since(sites: Sequence[Site]) -> str:
    """A phrase with the equation where the axis of examples was lost, if known."""
    states = [site.examples for site in sites]
    where = next((s.where for s in states if isinstance(s, Lost) and s.where), "")
    return f" since {where}" if where else ""


def misfit(layer: Layer, sites: Sequence[Site], block: Block | None) -> str:
    """Why the block cannot be this layer's; empty if it can."""
    if block is None or not layer.tagged:
        return ""
    if layer.shape.tied and not (block.handles_tied or block.takes_gradients):
        return f"{block!r} is not for a weight that is used transposed too"
    if any(site.cases for site in sites) and not block.row_statistics:
        return f"{block!r} is not for inputs that all cases share"
    remote = is_remote(sites) and not has_mapped_sides(layer, sites, block)
    if not block.needs_examples and not remote:
        return ""
    summed = is_shared(sites) or remote
    why = no_sums(layer, sites, block) if summed else ""
    if _is_lost(sites):
        why = "which rows belong to one example could not be followed" + _since(sites)
    return f"{block!r} sums within an example, and {why}" if why else ""


def has_mapped_sides(layer: Layer, sites: Sequence[Site], block: Block | None) -> bool:
    """Whether the block's sides are those of a computed weight; see `Mapped`."""
    is_plain = isinstance(block, Kronecker) and not block.is_fitted
    return is_plain and is_mapped(layer, sites)


def as_rule(
    blocks: BlocksSpec, layers: Sequence[Layer]
) -> Callable[[Layer], Block | None]:
    """The user's choice as a function of a layer.

    Args:
      blocks: the argument of `make_curvature`.
      layers: all layers, with default blocks.

    Returns:
      The function.

    Raises:
      TypeError: if `blocks` is of an unknown type.
      ValueError: if a key fits no layer.
    """
    if blocks is None:
        return lambda layer: layer.block
    if isinstance(blocks, Block):
        return lambda layer: blocks if layer.tagged else layer.block
    if isinstance(blocks, Mapping):
        for key in blocks:
            if not _is_pattern(key) or not any(_fits(key, layer) for layer in layers):
                names = ", ".join(layer.name for layer in layers)
                raise ValueError(
                    f"blocks expects layer kinds and path regexes as keys; got the key "
                    f"{shown(key)}, which is no layer kind in use and matches no "
                    f"parameter path. Layers: {names}. Kinds: "
                    f"{', '.join(sorted({layer.kind for layer in layers}))}."
                )
        return lambda layer: next(
            (block for key, block in blocks.items() if _fits(key, layer)), layer.block
        )
    if isinstance(blocks, type):
        raise TypeError(
            f"blocks must hold blocks, not classes; got the class {blocks.__name__}: "
            f"write {blocks.__name__}()."
        )
    if callable(blocks):
        return blocks
    raise TypeError(
        "blocks must be a Block, a mapping from layer kind or path regex to Block or "
        f"None, or a function of a layer; got {shown(blocks)}."
    )


def _is_pattern(key: Any) -> bool:
    try:
        re.compile(key)
    except (re.error, TypeError):  # the caller says what a key must be
        return False
    return isinstance(key, str)


def _fits(key: str, layer: Layer) -> bool:
    if key in KINDS:
        return layer.kind == key
    return any(re.search(key, path) for path in (layer.name, *layer.params))
