"""Plans of functions that have their parameters at any place."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from kfac_jax import _arguments
from kfac_jax.curvature import Curvature, make_curvature
from kfac_jax.tags import register_generic

Params = Any


def without(func_args: Sequence[Any], index: int) -> tuple[Any, list[Any]]:
    """The parameters, and the other arguments."""
    _arguments.sequence("func_args", func_args, "arguments of the function")
    if not -len(func_args) <= index < len(func_args):
        raise ValueError(
            f"func_args must have the parameters at params_index {index}; got "
            f"{len(func_args)} arguments."
        )
    _arguments.trees("func_args", tuple(func_args))
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
      func: what it returns is the loss, or a tuple that begins with it. That is not
        compared with the registered loss, which alone defines the curvature.
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

    def loss_fn(params: Params, *rest: Any) -> Any:
        if only_generic:
            params = jax.tree.map(register_generic, params)
        loss = func(*rest[:params_index], params, *rest[params_index:])
        while isinstance(loss, tuple | list):
            loss = loss[0]
        return loss

    return make_curvature(loss_fn, params, *rest, **options)
