"""Estimators of the curvature by their names in the existing JAX K-FAC library.

Thin adapters over a plan: new programs call `kfac_jax.make_curvature`, and use what
that returns.
"""

from collections.abc import Callable, Sequence
from typing import Any

from kfac_jax._arguments import function, whole
from kfac_jax.compat._block_diagonal import (
    BlockDiagonalCurvature as BlockDiagonalCurvature,
)
from kfac_jax.compat._optax import OptaxPreconditioner as OptaxPreconditioner
from kfac_jax.compat._optax import OptaxPreconditionState as OptaxPreconditionState
from kfac_jax.compat._plans import plan, without
from kfac_jax.compat.curvature_blocks import (
    get_default_tag_to_block_ctor as get_default_tag_to_block_ctor,
)
from kfac_jax.compat.curvature_blocks import (
    set_default_tag_to_block_ctor as set_default_tag_to_block_ctor,
)
from kfac_jax.compat.curvature_blocks import (
    set_multi_default_tag_to_block_ctor as set_multi_default_tag_to_block_ctor,
)
from kfac_jax.compat.utils import default_batch_size_extractor

Params = Any


class ImplicitExactCurvature:
    """Products with exact curvature matrices of the registered loss.

    The native way is `make_curvature(...).matvec`, and `quadratic_form`.

    Args:
      func: `func(*func_args) -> loss` or `(loss, aux)`, which registers its loss.
      params_index: the place of the parameters among the arguments.
      batch_size_extractor: accepted; it is the leading axis of the registered loss.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        params_index: int = 0,
        batch_size_extractor: Callable[[Any], int] = default_batch_size_extractor,
    ) -> None:
        """Keeps the options."""
        function("func", func)
        whole("params_index", params_index)
        self._func = func
        self._params_index = params_index

    def _multiply(self, func_args: Sequence[Any], v: Params, matrix: str) -> Params:
        curvature = plan(
            self._func, self._params_index, func_args, on_unmatched="ignore"
        )
        params, rest = without(func_args, self._params_index)
        return curvature.matvec(params, v, *rest, matrix=matrix)

    def multiply_fisher(
        self, func_args: Sequence[Any], parameter_structured_vector: Params
    ) -> Params:
        """Multiplies by the Fisher.

        Args:
          func_args: arguments of the function.
          parameter_structured_vector: like the parameters.

        Returns:
          The product.
        """
        return self._multiply(func_args, parameter_structured_vector, "fisher")

    def multiply_ggn(
        self, func_args: Sequence[Any], parameter_structured_vector: Params
    ) -> Params:
        """Multiplies by the generalised Gauss-Newton matrix, which is the Fisher."""
        return self._multiply(func_args, parameter_structured_vector, "ggn")

    def multiply_hessian(
        self, func_args: Sequence[Any], parameter_structured_vector: Params
    ) -> Params:
        """Multiplies by the Hessian of the returned loss."""
        return self._multiply(func_args, parameter_structured_vector, "hessian")

    def __getattr__(self, name: str) -> Any:
        """Says where to find what is not here."""
        raise AttributeError(
            f"ImplicitExactCurvature has no {name!r} in kfac_jax; expected "
            "multiply_fisher, multiply_ggn or multiply_hessian. For inner products "
            "with the Fisher use make_curvature(...).quadratic_form."
        )
