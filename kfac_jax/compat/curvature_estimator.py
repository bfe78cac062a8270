"""Estimators of the curvature by their names in the existing JAX K-FAC library.

Thin adapters over a plan: new programs call `kfac_jax.make_curvature`, and use what
that returns.
"""

from kfac_jax.compat._block_diagonal import (
    BlockDiagonalCurvature as BlockDiagonalCurvature,
)
from kfac_jax.compat._explicit import (
    ExplicitExactCurvature as ExplicitExactCurvature,
)
from kfac_jax.compat._implicit import ImplicitExactCurvature as ImplicitExactCurvature
from kfac_jax.compat._optax import OptaxPreconditioner as OptaxPreconditioner
from kfac_jax.compat._optax import OptaxPreconditionState as OptaxPreconditionState
from kfac_jax.compat.curvature_blocks import (
    get_default_tag_to_block_ctor as get_default_tag_to_block_ctor,
)
from kfac_jax.compat.curvature_blocks import (
    set_default_tag_to_block_ctor as set_default_tag_to_block_ctor,
)
from kfac_jax.compat.curvature_blocks import (
    set_multi_default_tag_to_block_ctor as set_multi_default_tag_to_block_ctor,
)
