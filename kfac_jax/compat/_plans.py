"""Plans of functions that have their parameters at any place."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax.compat.curvature_blocks import callers_level
from kfac_jax.curvature import Curvature, make_curvature
from kfac_jax.tags import register_generic

Params = Any


def without(func_args: Sequence[Any], index: int) -> tuple[Any, list[Any]]:
    """The parameters, and the other arguments."""
    arguments.sequence("func_args", func_args, "arguments of the function")
    if not -len(func_args) <= index < len(func_args):
        raise ValueError(
            f"func_args must have the parameters at params_index {index}; got "
            f"{len(func_args)} arguments."
        )
    arguments.trees("func_args", tuple(func_args))
    rest = list(func_args)
    return rest.pop(index), rest


def plan(
    func: Callable[..., Any],
    params_index: int,
    func_args: Sequence[Any],
    only_generic: bool = False,
    **options: Any,
) -> Curvature:
    """Makes a plan of a function with its parameters at any place.

    Args:
      func: registers its loss, which alone defines the curvature. What it returns does
        not matter: a loss, losses of the cases, several outputs.
      params_index: the place of the parameters.
      func_args: its arguments.
      only_generic: whether to take all parameters for generic ones.
      **options: of `make_curvature`.

    Returns:
      The plan.
    """
    without(func_args, params_index)
    shapes = jax.eval_shape(lambda *args: args, *func_args)
    params, rest = without(shapes, params_index)
    function = with_params_first(func, params_index, only_generic)
    return make_curvature(function, params, *rest, **options)


def warn_of_lost_examples(curvature: Curvature) -> None:
    """Warns where an exact mode takes cases for independent that may not be."""
    if curvature.lost_examples:
        warnings.warn(
            "Which examples the registered outputs belong to could not be followed "
            f"since {curvature.lost_examples}. Each entry of their leading axis is "
            "taken for an example that no other depends on, as in the published "
            "release. Where one does, as with batch norm, the curvature is wrong; then "
            "use a sampled estimation_mode.",
            stacklevel=callers_level() + 1,
        )


def with_params_first(
    func: Callable[..., Any], params_index: int, only_generic: bool = False
) -> Callable[..., Any]:
    """The function with its parameters in front, which returns a scalar.

    Args:
      func: see `plan`.
      params_index: the place of the parameters.
      only_generic: whether to take all parameters for generic ones.

    Returns:
      The function.
    """

    def loss_fn(params: Params, *rest: Any) -> Array:
        if only_generic:
            params = jax.tree.map(register_generic, params)
        place = params_index if params_index >= 0 else len(rest) + 1 + params_index
        return _mean_of_first(func(*rest[:place], params, *rest[place:]))

    return loss_fn


def _mean_of_first(result: Any) -> Array:
    """What stands for the loss: the mean of the first output, if that is of numbers."""
    first = next(iter(jax.tree.leaves(result)), None)
    if arguments.is_array(first):
        if jnp.issubdtype(arguments.dtype_of(first), jnp.floating):
            return jnp.mean(jnp.asarray(first, float))
    return jnp.zeros((), float)
