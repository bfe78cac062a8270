"""The tags by the names, and with the arguments, of the existing JAX K-FAC library.

The functions are those of `kfac_jax`, where `variant` is kept with the tag and has no
effect: this library handles a weight that is used at many positions by itself.
"""

import dataclasses
import functools
from typing import Any, Generic, TypeVar

from jax import Array
from jax.typing import ArrayLike

from kfac_jax.tags import register_conv2d as register_conv2d
from kfac_jax.tags import register_dense as register_dense
from kfac_jax.tags import register_generic as register_generic
from kfac_jax.tags import register_scale_and_shift as register_scale_and_shift

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerMetaData:
    """Which operands of a layer tag are what.

    Attributes:
      variant: the kind of layer, such as "dense" or "repeated_dense".
      outputs_index: the places of its outputs among the operands.
      inputs_index: those of its inputs.
      params_index: those of its parameters.
      name: a name, or None.
      nesting: the names of what it is within.
    """

    variant: str
    outputs_index: tuple[int, ...]
    inputs_index: tuple[int, ...]
    params_index: tuple[int, ...]
    name: str | None = None
    nesting: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerData(Generic[T]):
    """What belongs to the inputs, outputs and parameters of a layer."""

    inputs: tuple[T, ...]
    outputs: tuple[T, ...]
    params: tuple[T, ...]


@dataclasses.dataclass(frozen=True)
class LayerTag:
    """Stands for the primitive that the tags of layers are made of."""

    name: str = "layer_tag"

    def bind(self, *operands: ArrayLike, meta: LayerMetaData, **metadata: Any) -> Array:
        """Tags a dense layer or a generic parameter, as `meta` says.

        Args:
          *operands: outputs, inputs and parameters.
          meta: which is which.
          **metadata: kept with the tag.

        Returns:
          The output.

        Raises:
          ValueError: if it is another kind of layer.
        """
        outputs, inputs, params = (
            [operands[i] for i in index]
            for index in (meta.outputs_index, meta.inputs_index, meta.params_index)
        )
        if (len(outputs), len(inputs), len(params)) == (1, 0, 1):
            return register_generic(outputs[0])
        dense = "dense" in meta.variant and len(outputs) == len(inputs) == 1
        if dense and len(params) in (1, 2):
            w, b = (*params, None)[:2]
            assert w is not None
            metadata |= {"variant": meta.variant}
            return register_dense(outputs[0], inputs[0], w, b, **metadata)
        raise ValueError(
            "layer_tag.bind expects a dense layer, or a parameter of variant "
            f'"generic"; got {meta}. Use kfac_jax.register_conv2d or '
            "kfac_jax.register_scale_and_shift, or leave it to discovery."
        )


layer_tag = LayerTag()


register_repeated_dense = functools.partial(register_dense, variant="repeated_dense")
