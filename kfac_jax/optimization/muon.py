"""Which axes of parameters are inputs and outputs, for `optax.contrib.muon`."""

from typing import Any

import jax
import optax

from kfac_jax._utils import arguments
from kfac_jax.curvature import Curvature
from kfac_jax.optimization.checks import check_plan
from kfac_jax.plan.layer import KINDS, Layer


def muon_dimension_numbers(
    curvature: Curvature, kinds: tuple[str, ...] = ("dense", "conv")
) -> Any:
    """The axes of each weight that a plan found, as `optax.contrib.muon` takes them.

    Without them it takes every matrix `[rows, columns]` for a weight, embeddings and
    positions too, and no kernel of a convolution nor a projection to several heads.

    Args:
      curvature: the plan; its mode does not matter.
      kinds: the kinds of layers whose weights count.

    Returns:
      A tree like the parameters, of `optax.contrib.MuonDimensionNumbers`, with None
      for what is no such weight: Muon gives that to Adam.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if there is no such kind.

    >>> import jax, jax.numpy as jnp, optax, kfac_jax
    >>> def loss_fn(p, x):  # heads: [inputs, heads, outputs of each]
    ...     return jnp.square(jnp.einsum("ni,iho->nho", x, p["heads"]) + p["b"]).mean()
    >>> params = {"heads": jnp.ones((4, 2, 3)), "b": jnp.zeros((2, 3))}
    >>> curvature = kfac_jax.make_curvature(
    ...     loss_fn, params, jnp.ones((8, 4)), estimation_mode="inputs")
    >>> axes = muon_dimension_numbers(curvature)
    >>> axes["b"], axes["heads"]
    (None, MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2)))
    >>> tx = optax.contrib.muon(0.02, muon_weight_dimension_numbers=axes)
    """
    check_plan(curvature)
    arguments.sequence("kinds", kinds, "kinds of layers")
    for kind in kinds:
        arguments.choice("each of kinds", kind, tuple(KINDS))
    found: dict[int, list[Any]] = {}
    for layer in curvature.layers:
        for index, role, axes in _axes(layer):
            is_weight = role == "weight" and layer.kind in kinds
            found.setdefault(index, []).append(axes if is_weight else None)
    leaves = [_agreed(found.get(i, [])) for i in range(len(curvature.tree.paths))]
    return jax.tree.unflatten(curvature.tree.treedef, leaves)


def _agreed(found: list[Any]) -> Any:
    """What all layers with a part of one parameter agree on."""
    return found[0] if len({*found}) == 1 else None


def _axes(layer: Layer) -> list[tuple[int, str, Any]]:
    """For each parameter its index, role and axes; no axes if one of them is both."""
    result: list[tuple[int, str, Any]] = []
    for index, role, layout in zip(
        layer.leaves, layer.roles, layer.leaf_layouts, strict=True
    ):
        last = len(layout.shape) - 1
        inputs = [i for i, to in enumerate(layout.axes) if last - 1 in to]
        outputs = [i for i, to in enumerate(layout.axes) if last in to]
        mixed = any(len({j for j in to if j >= last - 1}) > 1 for to in layout.axes)
        usable = inputs and outputs and not mixed
        numbers = optax.contrib.MuonDimensionNumbers(tuple(inputs), tuple(outputs))
        result.append((index, role, numbers if usable else None))
    return result
