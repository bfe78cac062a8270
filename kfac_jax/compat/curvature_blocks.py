"""Classes of curvature blocks by their names in the existing JAX K-FAC library.

Each describes which native block stands for it; none is ever instantiated. Programs
that derive from them, to handle weight sharing, get the native block, which does that
by itself, and a warning that says so.
"""

import dataclasses
from typing import Any, ClassVar, Generic, TypeVar

from kfac_jax import blocks
from kfac_jax.compat import _state_classes
from kfac_jax.compat._state_classes import register_state_class
from kfac_jax.compat.layers_and_loss_tags import LayerData

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerVjpData(Generic[T]):
    """What a block's `update_curvature_matrix_estimate` gets there."""

    primals: LayerData[T]
    tangents: LayerData[T]


class CurvatureBlock:
    """The base of all: what describes the block of a layer.

    Attributes:
      native: the native block that stands for it; None where there is none.
    """

    native: ClassVar[blocks.Block | None] = None

    @register_state_class
    class State(_state_classes.State):
        """What a block keeps there."""

        cache: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Refuses to be instantiated."""
        raise TypeError(
            f"{type(self).__name__} only describes a block, and is not instantiated: "
            f"{self.native!r} is run in its place. Pass the class, or a native block "
            "(kfac_jax.blocks), in layer_tag_to_block_ctor."
        )


class ScaledIdentity(CurvatureBlock):
    """`blocks.Identity`; its scale can only be 1."""

    native = blocks.Identity()


class Diagonal(CurvatureBlock):
    """`blocks.Diagonal`."""

    native = blocks.Diagonal()

    @register_state_class
    class State(CurvatureBlock.State):
        """What a block keeps there."""

        diagonal_factors: tuple[Any, ...]


class Full(CurvatureBlock):
    """`blocks.Full`."""

    native = blocks.Full()

    @register_state_class
    class State(CurvatureBlock.State):
        """What a block keeps there."""

        matrix: Any


class KroneckerFactored(CurvatureBlock):
    """`blocks.Kronecker`."""

    native = blocks.Kronecker()

    @register_state_class
    class State(CurvatureBlock.State):
        """What a block keeps there."""

        factors: tuple[Any, ...]


class NaiveDiagonal(Diagonal):
    """For any layer: `blocks.Diagonal`.

    For a generic parameter that is `N ḡ²` of a batch's mean gradient ḡ for sampled
    targets; for other layers it is the exact diagonal.
    """


class NaiveFull(Full):
    """For any layer: `blocks.Full`."""


class NaiveTNT(KroneckerFactored):
    """For any layer: `blocks.TNT`."""

    native = blocks.TNT()


class DenseDiagonal(Diagonal):
    """For dense layers: `blocks.Diagonal`."""


class DenseFull(Full):
    """For dense layers: `blocks.Full`."""


class DenseTwoKroneckerFactored(KroneckerFactored):
    """For dense layers: `blocks.Kronecker`."""


class DenseTNT(DenseTwoKroneckerFactored):
    """For dense layers: `blocks.TNT`."""

    native = blocks.TNT()


class RepeatedDenseKroneckerFactored(DenseTwoKroneckerFactored):
    """For dense layers used at many positions: `blocks.Kronecker`, "expand"."""

    @register_state_class
    class State(KroneckerFactored.State):
        """What a block keeps there."""

        average_repeats: Any


class Conv2DDiagonal(Diagonal):
    """For convolutions: `blocks.Diagonal`."""


class Conv2DFull(Full):
    """For convolutions: `blocks.Full`."""


class Conv2DTwoKroneckerFactored(KroneckerFactored):
    """For convolutions: `blocks.Kronecker`, "expand"."""


class Conv2DTNT(Conv2DTwoKroneckerFactored):
    """For convolutions: `blocks.TNT`."""

    native = blocks.TNT()


class ScaleAndShiftDiagonal(Diagonal):
    """For elementwise layers: `blocks.Diagonal`."""


class ScaleAndShiftFull(Full):
    """For elementwise layers: `blocks.Full`."""
