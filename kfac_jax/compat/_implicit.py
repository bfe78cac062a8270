"""Products with the exact Fisher of what a function registers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from chex import ArrayTree

from kfac_jax._utils import arguments
from kfac_jax._utils.trees import tree_spec
from kfac_jax.compat import _options
from kfac_jax.compat._registering import as_loss, params_and_rest
from kfac_jax.statistics.exact_products import ExactProducts

_REFUSED = {
    "params_index": (0, "Wrap the function in one whose first argument they are."),
    "batch_size_extractor": (
        None,
        "The leading axis of what is registered divides; multiply for another one.",
    ),
}


class ImplicitExactCurvature:
    """Products with the exact Fisher of the registered losses, which is not formed.

    The native way is `make_curvature(...).matvec`. The generalised Gauss-Newton matrix
    is the Fisher. Both are divided by the leading axis of what is registered.

    Args:
      func: registers its loss; what it returns does not matter.
      params_index: only 0: the parameters come first.
      batch_size_extractor: only None.

    Raises:
      TypeError: if `func` is no function.
      ValueError: for another value of the rest.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        params_index: int = 0,
        batch_size_extractor: None = None,
    ) -> None:
        """Keeps the function."""
        arguments.function("func", func)
        given = {
            "params_index": params_index,
            "batch_size_extractor": batch_size_extractor,
        }
        _options.refuse("ImplicitExactCurvature", _REFUSED, given)
        self._loss_fn = as_loss(func)

    def multiply_fisher(
        self, func_args: Sequence[ArrayTree], parameter_structured_vector: ArrayTree
    ) -> ArrayTree:
        """Multiplies by the Fisher.

        Args:
          func_args: arguments of the function, the parameters first.
          parameter_structured_vector: v, like the parameters.

        Returns:
          The product `F v`.
        """
        params, rest = params_and_rest(func_args)
        tree = tree_spec(params)
        leaves = tuple(tree.leaves(params, "params"))
        products = ExactProducts(self._loss_fn, False, tree, params, leaves, rest)
        v = tree.leaves(parameter_structured_vector, "the vector v")
        return jax.tree.unflatten(tree.treedef, products.fisher_product(v))

    multiply_ggn = multiply_fisher

    def __getattr__(self, name: str) -> Any:
        """Says where to find what is not here."""
        raise AttributeError(
            f"ImplicitExactCurvature has no {name!r} in kfac_jax; expected "
            "multiply_fisher or multiply_ggn. kfac_jax.make_curvature(...) has "
            "matvec(..., matrix='hessian') for the Hessian of the returned loss, and "
            "quadratic_form for inner products with the Fisher."
        )
