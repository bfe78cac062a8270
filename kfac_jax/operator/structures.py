"""How the curvature of different layers relates."""

import dataclasses

from kfac_jax._utils import arguments
from kfac_jax.operator.linked import BlockTridiagonal as BlockTridiagonal
from kfac_jax.operator.products import by_themselves
from kfac_jax.operator.single import Single
from kfac_jax.plan.group import Grouped, Structure, Uses


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


@dataclasses.dataclass(frozen=True)
class SampleSpace:
    """The exact curvature, by the products of all rows of cases instead of factors.

    For `natural_gradient` and `Curvature.gram`. Layers have no blocks.

    Attributes:
      centered: whether rows are taken less their mean over the cases, as for the
        energy of a wavefunction, whose logarithm has no fixed zero.

    >>> SampleSpace()
    SampleSpace(centered=False)
    """

    centered: bool = False

    def __post_init__(self) -> None:
        """Checks the option."""
        arguments.flag("centered", self.centered)

    def group(self, uses: Uses) -> Grouped:
        """Each layer is a group without a block."""
        bare = (dataclasses.replace(layer, block=None) for layer in uses.layers)
        return Grouped(tuple(map(Single, bare)), ())


def check_sample_space(what: str, structure: Structure) -> None:
    """Raises ValueError unless the structure is the sample space."""
    if not isinstance(structure, SampleSpace):
        raise ValueError(
            f"{what} is of the sample space: expected a plan of make_curvature(..., "
            f"structure=kfac_jax.SampleSpace()), got structure={structure!r}. Use kfac "
            "for that plan."
        )
