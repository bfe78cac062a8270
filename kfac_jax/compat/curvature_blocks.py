"""Block classes of the published library."""

from typing import Any

from kfac_jax.layers import BlocksSpec


def native_blocks(layer_tag_to_block_ctor: Any) -> BlocksSpec:
    """The blocks of this library that stand for published ones.

    Args:
      layer_tag_to_block_ctor: block classes by layer tag, or None.

    Returns:
      What `make_curvature` takes as `blocks`.

    Raises:
      ValueError: for anything but None.
    """
    if layer_tag_to_block_ctor:
        raise ValueError(
            "layer_tag_to_block_ctor is not offered yet: expected None. Use "
            "kfac_jax.make_curvature(..., blocks=...)."
        )
    return None
