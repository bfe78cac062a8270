"""Functions that register a loss, as the estimators and the optimizer take them."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax.compat._native_blocks import callers_level
from kfac_jax.curvature import Curvature
from kfac_jax.tags import register_generic


def params_and_rest(func_args: Sequence[ArrayTree]) -> tuple[ArrayTree, list[Any]]:
    """The parameters, which come first, and the other arguments."""
    arguments.sequence("func_args", func_args, "arguments, the parameters first")
    if not func_args:
        raise ValueError(
            "func_args must have the parameters first, and then the function's other "
            "arguments; got none."
        )
    arguments.trees("func_args", tuple(func_args))
    params, *rest = func_args
    return params, rest


def as_loss(
    func: Callable[..., Any], only_generic: bool = False
) -> Callable[..., Array]:
    """A loss function that registers what `func` does.

    What is registered alone defines the curvature. What `func` returns does not matter:
    a loss, losses of the cases, several outputs.

    Args:
      func: the function, of the parameters first.
      only_generic: whether to take all parameters for generic ones.

    Returns:
      A function of the same arguments, whose value is zero.
    """

    def loss_fn(params: optax.Params, *rest: Any) -> Array:
        func(all_generic(params) if only_generic else params, *rest)
        return jnp.zeros((), float)

    return loss_fn


def all_generic(params: optax.Params) -> Any:
    """The parameters, each registered as a generic one."""
    return jax.tree.map(register_generic, params)


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
