"""Block classes of the published library."""

from collections.abc import Mapping
from typing import Any

from kfac_jax.blocks import Block


def native_blocks(layer_tag_to_block_ctor: Any) -> Mapping[str, Block | None]:
    """The blocks of this library that stand for published ones.

    Args:
      layer_tag_to_block_ctor: block classes by layer tag, or None.

    Returns:
      Blocks by layer kind.

    Raises:
      ValueError: for anything but None.
    """
    if layer_tag_to_block_ctor:
        raise ValueError(
            "layer_tag_to_block_ctor is not offered yet: expected None. Use "
            "kfac_jax.make_curvature(..., blocks=...)."
        )
    return {}
