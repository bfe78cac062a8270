"""K-FAC for JAX: curvature of neural networks as pure functional transformations."""

import importlib as _importlib
from typing import Any as _Any

from kfac_jax import blocks as blocks
from kfac_jax import distributions as distributions
from kfac_jax import influence as influence
from kfac_jax import laplace as laplace
from kfac_jax import linalg as linalg
from kfac_jax import losses as losses
from kfac_jax._utils.installed import warn_of_the_other as _warn_of_the_other
from kfac_jax.citing import cite as cite
from kfac_jax.curvature import Curvature as Curvature
from kfac_jax.curvature import make_curvature as make_curvature
from kfac_jax.devices import OverAxis as OverAxis
from kfac_jax.devices import OverMesh as OverMesh
from kfac_jax.extras import initializers as initializers
from kfac_jax.extras.averaging import AverageIteratesState as AverageIteratesState
from kfac_jax.extras.averaging import average_iterates as average_iterates
from kfac_jax.extras.grafting import GraftState as GraftState
from kfac_jax.extras.grafting import graft as graft
from kfac_jax.extras.schedules import ExponentialBatchSize as ExponentialBatchSize
from kfac_jax.operator.approximation import Approximation as Approximation
from kfac_jax.operator.structures import BlockDiagonal as BlockDiagonal
from kfac_jax.operator.structures import BlockTridiagonal as BlockTridiagonal
from kfac_jax.operator.structures import SampleSpace as SampleSpace
from kfac_jax.optimization.health import Health as Health
from kfac_jax.optimization.health import health as health
from kfac_jax.optimization.input_scaling import scale_by_inputs as scale_by_inputs
from kfac_jax.optimization.make_step import make_step as make_step
from kfac_jax.optimization.multi_steps import MultiStepsState as MultiStepsState
from kfac_jax.optimization.multi_steps import multi_steps as multi_steps
from kfac_jax.optimization.muon import muon_dimension_numbers as muon_dimension_numbers
from kfac_jax.optimization.natural_gradient import natural_gradient as natural_gradient
from kfac_jax.optimization.sample_space_method import (
    NaturalGradientState as NaturalGradientState,
)
from kfac_jax.optimization.spreading import SharingReport as SharingReport
from kfac_jax.optimization.spreading import sharing_report as sharing_report
from kfac_jax.optimization.spreading import spread_state as spread_state
from kfac_jax.optimization.spreading import state_specs as state_specs
from kfac_jax.optimization.spreading import whole_state as whole_state
from kfac_jax.optimization.state import Info as Info
from kfac_jax.optimization.state import KFACState as KFACState
from kfac_jax.optimization.transform import kfac as kfac
from kfac_jax.optimization.transform import scale_by_kfac as scale_by_kfac
from kfac_jax.plan import Layer as Layer
from kfac_jax.plan.report import Totals as Totals
from kfac_jax.rules import LevenbergMarquardt as LevenbergMarquardt
from kfac_jax.rules import QuadraticModel as QuadraticModel
from kfac_jax.rules import Refine as Refine
from kfac_jax.rules import RefreshSchedule as RefreshSchedule
from kfac_jax.rules import SeparateDamping as SeparateDamping
from kfac_jax.rules import Spring as Spring
from kfac_jax.statistics.averages import Statistics as Statistics
from kfac_jax.statistics.data_set import Gathered as Gathered
from kfac_jax.tags import register_conv2d as register_conv2d
from kfac_jax.tags import register_dense as register_dense
from kfac_jax.tags import register_generic as register_generic
from kfac_jax.tags import register_loss as register_loss
from kfac_jax.tags import (
    register_normal_predictive_distribution as register_normal_predictive_distribution,
)
from kfac_jax.tags import register_scale_and_shift as register_scale_and_shift
from kfac_jax.tags import (
    register_sigmoid_cross_entropy_loss as register_sigmoid_cross_entropy_loss,
)
from kfac_jax.tags import (
    register_softmax_cross_entropy_loss as register_softmax_cross_entropy_loss,
)
from kfac_jax.tags import register_squared_error_loss as register_squared_error_loss

register_categorical_predictive_distribution = register_softmax_cross_entropy_loss
register_multi_bernoulli_predictive_distribution = register_sigmoid_cross_entropy_loss

__version__ = "0.2.0"

_warn_of_the_other()

_FOR_EXISTING_PROGRAMS = {
    "curvature_blocks": """
        Conv2DDiagonal Conv2DFull Conv2DTNT Conv2DTwoKroneckerFactored CurvatureBlock
        DenseDiagonal DenseFull DenseTNT DenseTwoKroneckerFactored KroneckerFactored
        LayerVjpData NaiveDiagonal NaiveFull NaiveTNT RepeatedDenseKroneckerFactored
        ScaleAndShiftDiagonal ScaleAndShiftFull ScaledIdentity
    """,
    "curvature_estimator": """
        BlockDiagonalCurvature ExplicitExactCurvature ImplicitExactCurvature
        OptaxPreconditioner OptaxPreconditionState get_default_tag_to_block_ctor
        set_default_tag_to_block_ctor
    """,
    "optimizer": "Optimizer",
    "layers_and_loss_tags": "",
    "tag_graph_matcher": "",
    "utils": "",
}
"""Names that programs written for the existing JAX K-FAC library use, by modules of
`kfac_jax.compat`, which are such names themselves. They are looked up when asked for:
nobody else meets them, or waits for their import."""


def __getattr__(name: str) -> _Any:
    """Finds what only existing programs ask for."""
    for module, names in _FOR_EXISTING_PROGRAMS.items():
        if name == module or name in names.split():
            found = _importlib.import_module(f"kfac_jax.compat.{module}")
            return found if name == module else getattr(found, name)
    raise AttributeError(f"module 'kfac_jax' has no attribute {name!r}")
