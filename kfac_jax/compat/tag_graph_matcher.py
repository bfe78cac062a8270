"""Graph patterns, which are accepted and not needed.

The existing JAX K-FAC library finds layers by comparing programs with patterns, so that
programs with layers of their own carry patterns. This one follows each parameter to
where it meets data (see `kfac_jax.make_curvature`), and finds those layers as they are.
Patterns are checked to be patterns, and that is all that is done with them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from kfac_jax._utils.arguments import shown
from kfac_jax.compat.layers_and_loss_tags import LayerMetaData, LayerTag, layer_tag


@dataclasses.dataclass(frozen=True)
class GraphPattern:
    """Describes a layer by a function that computes it.

    Attributes:
      name: what to call it.
      tag_primitive: `layers_and_loss_tags.layer_tag`.
      compute_func: `(x, params) -> y`.
      parameters_extractor_func: from the equations of a match, last ones first, to what
        the tag keeps.
      example_args: arguments of `compute_func`.
      in_values_preprocessor: what changes the operands of a match, or None.
    """

    name: str
    tag_primitive: LayerTag
    compute_func: Callable[..., Any]
    parameters_extractor_func: Callable[..., Mapping[str, Any]]
    example_args: Sequence[Any]
    in_values_preprocessor: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        """Checks the types."""
        preprocessor = self.in_values_preprocessor
        functions = [self.compute_func, self.parameters_extractor_func]
        functions += [] if preprocessor is None else [preprocessor]
        if not isinstance(self.tag_primitive, LayerTag):
            raise TypeError(
                "GraphPattern expects kfac_jax.layers_and_loss_tags.layer_tag as its "
                f"tag_primitive; got {shown(self.tag_primitive)}."
            )
        if not all(map(callable, functions)):
            raise TypeError(
                f"GraphPattern {self.name!r} expects functions as compute_func, "
                f"parameters_extractor_func and in_values_preprocessor; got "
                f"{shown(functions)}."
            )


def check_graph_patterns(patterns: Any) -> None:
    """Checks what a program passes as `graph_patterns`, which is then not needed.

    Args:
      patterns: a sequence of patterns.

    Raises:
      TypeError: if it is anything else.
    """
    others = [patterns]
    if isinstance(patterns, Sequence):
        others = [x for x in patterns if not isinstance(x, GraphPattern)]
    if others:
        raise TypeError(
            "graph_patterns expects a sequence of tag_graph_matcher.GraphPattern; got "
            f"{shown(others[0])}. Layers are found without any, so leave them out."
        )


def _dense(
    x: Array, params: Sequence[Array], axes: int = 1, with_reshape: bool = False
) -> Array:
    """`x` contracted with a weight over its last axes, plus a bias if there is one."""
    w, *biases = params
    y = jnp.tensordot(x, w, axes)
    shape = y.shape
    for b in biases:
        if with_reshape:
            b = b.reshape(-1)
            y = y.reshape(*y.shape[: y.ndim - w.ndim + axes], -1)
        y = y + jnp.broadcast_to(b, y.shape)
    return y.reshape(shape)


def _dense_parameter_extractor(
    reversed_eqns: Sequence[Any], variant: str = "dense"
) -> Mapping[str, Any]:
    """What the tag of a dense layer keeps: its operands' places and its contraction."""
    products = [x for x in reversed_eqns if x.primitive.name == "dot_general"]
    if len(products) != 1:
        raise ValueError(
            "_dense_parameter_extractor expects the equations of one dense layer, with "
            f"one dot_general; got {[x.primitive.name for x in reversed_eqns]}."
        )
    has_bias = any(x.primitive.name == "add" for x in reversed_eqns)
    params = (2, 3) if has_bias else (2,)
    meta = LayerMetaData(
        variant=variant, outputs_index=(0,), inputs_index=(1,), params_index=params
    )
    return {"meta": meta, **products[0].params}


def _dense_pattern(repeated: int, has_bias: bool) -> GraphPattern:
    variant = "repeated_dense" if repeated else "dense"
    prefix = f"repeated[{repeated}]_" if repeated else ""
    x, w, b = np.zeros((2,) * (repeated + 2)), np.zeros((2, 2)), np.zeros(2)
    return GraphPattern(
        name=f"{prefix}dense_{'with' if has_bias else 'no'}_bias_no_reshape",
        tag_primitive=layer_tag,
        compute_func=functools.partial(_dense, axes=1, with_reshape=False),
        parameters_extractor_func=functools.partial(
            _dense_parameter_extractor, variant=variant
        ),
        example_args=[x, [w, b] if has_bias else [w]],
    )


DEFAULT_GRAPH_PATTERNS: tuple[GraphPattern, ...] = tuple(
    _dense_pattern(repeated, has_bias)
    for has_bias in (True, False)
    for repeated in (0, 1, 2)
)
"""Patterns of dense layers; a program may put its own in front."""
