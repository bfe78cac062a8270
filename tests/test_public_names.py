"""Pins the public surface: a new or lost name must be a decision."""

import inspect
import types

import kfac_jax

TOP = """
AverageIteratesState BlockDiagonal BlockTridiagonal Curvature ExponentialBatchSize Info
KFACState Layer LevenbergMarquardt QuadraticModel SeparateDamping Statistics Totals
average_iterates blocks distributions initializers kfac losses make_curvature
register_categorical_predictive_distribution register_conv2d register_dense
register_generic register_loss register_multi_bernoulli_predictive_distribution
register_normal_predictive_distribution register_scale_and_shift
register_sigmoid_cross_entropy_loss register_softmax_cross_entropy_loss
register_squared_error_loss scale_by_kfac
"""
BLOCKS = "Block BlockShape Damped Diagonal Eigen Full Identity Kronecker Spectrum TNT"
LOSSES = """
convex normal_negative_log_likelihood sigmoid_binary_cross_entropy softmax_cross_entropy
softmax_cross_entropy_with_integer_labels squared_error
"""
CURVATURE = """
approximation init_factors matvec quadratic_form report update_factors value_and_grad
value_grad_and_statistics zero_statistics
"""
OPERATOR = "diagonal logdet matvec power sample solve to_dense trace"


def _public(module, exported_modules=()):
    """Names that are not submodules, which importing makes attributes by itself."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (not isinstance(value, types.ModuleType) or name in exported_modules)
    }


def test_top_level_names():
    modules = ("blocks", "distributions", "initializers", "losses")
    assert _public(kfac_jax, modules) == set(TOP.split())


def test_block_names():
    assert _public(kfac_jax.blocks) == set(BLOCKS.split())


def test_loss_names():
    own = {
        name
        for name, value in vars(kfac_jax.losses).items()
        if inspect.isfunction(value)
        and value.__module__ == "kfac_jax.losses"
        and not name.startswith("_")
    }
    assert own == set(LOSSES.split())


def test_initializer_names():
    own = {
        name
        for name, value in vars(kfac_jax.initializers).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert own == {"sparse_normal"}


def test_methods_of_the_contract_exist():
    for name in CURVATURE.split():
        assert callable(getattr(kfac_jax.Curvature, name)), name
    operator = inspect.signature(kfac_jax.Curvature.approximation).return_annotation
    for name in OPERATOR.split():
        assert callable(getattr(operator, name)), name


def test_every_public_name_has_a_docstring():
    for module, names in (
        (kfac_jax, TOP),
        (kfac_jax.blocks, BLOCKS),
        (kfac_jax.losses, LOSSES),
    ):
        for name in names.split():
            assert inspect.getdoc(getattr(module, name)), name


def test_make_curvature_takes_only_the_documented_options():
    signature = inspect.signature(kfac_jax.make_curvature)
    assert (
        list(signature.parameters)
        == (
            "loss_fn params args has_aux estimation_mode blocks structure "
            "weight_sharing on_unmatched num_samples statistics_fraction l2"
        ).split()
    )
