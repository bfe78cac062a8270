"""Estimators of the curvature by their names in the existing JAX K-FAC library.

Thin adapters over a plan: new programs call `kfac_jax.make_curvature`, and use what
that returns.
"""

from typing import Any

from kfac_jax.compat._block_diagonal import (
    BlockDiagonalCurvature as BlockDiagonalCurvature,
)
from kfac_jax.compat._implicit import ImplicitExactCurvature as ImplicitExactCurvature
from kfac_jax.compat._native_blocks import (
    get_default_tag_to_block_ctor as get_default_tag_to_block_ctor,
)
from kfac_jax.compat._native_blocks import (
    set_default_tag_to_block_ctor as set_default_tag_to_block_ctor,
)
from kfac_jax.compat._optax import OptaxPreconditioner as OptaxPreconditioner
from kfac_jax.compat._optax import OptaxPreconditionState as OptaxPreconditionState


def __getattr__(name: str) -> Any:
    """Says what to do without an estimator that is not here."""
    raise AttributeError(
        f"kfac_jax has no {name!r} among its estimators; expected "
        "BlockDiagonalCurvature, ImplicitExactCurvature or OptaxPreconditioner. For "
        "exact products kfac_jax.make_curvature(...) has matvec and quadratic_form, "
        "which of unit vectors is the matrix itself."
    )
