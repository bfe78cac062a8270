"""How the curvature of different layers relates."""

import dataclasses

from kfac_jax.operator.linked import BlockTridiagonal as BlockTridiagonal
from kfac_jax.operator.products import by_themselves
from kfac_jax.plan.group import Grouped, Uses


@dataclasses.dataclass(frozen=True)
class BlockDiagonal:
    """Every layer has a block of its own.

    Cross-layer curvature is dropped (section 4.2).

    >>> BlockDiagonal()
    BlockDiagonal()
    """

    def group(self, uses: Uses) -> Grouped:
        """Each layer is a group."""
        groups, notes = by_themselves(uses.layers, uses)
        return Grouped(tuple(groups), tuple(notes))
