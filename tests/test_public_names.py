"""Pins the public surface: a new or lost name must be a decision."""

import ast
import functools
import inspect
import pathlib
import types

import optax
import pytest

import kfac_jax

TOP = """
Approximation AverageIteratesState BlockDiagonal BlockTridiagonal Curvature
ExponentialBatchSize Gathered GraftState Health Info KFACState Layer LevenbergMarquardt
MultiStepsState NaturalGradientState OverAxis SampleSpace Spring
OverMesh QuadraticModel Refine RefreshSchedule SeparateDamping SharingReport Statistics
Totals
average_iterates blocks cite distributions graft health influence initializers kfac
laplace linalg losses
make_curvature make_step multi_steps muon_dimension_numbers natural_gradient
register_categorical_predictive_distribution register_conv2d register_dense
register_generic register_loss register_multi_bernoulli_predictive_distribution
register_normal_predictive_distribution register_scale_and_shift
register_sigmoid_cross_entropy_loss register_softmax_cross_entropy_loss
register_squared_error_loss scale_by_inputs scale_by_kfac sharing_report spread_state
state_specs whole_state
"""
COMPAT = """
Conv2DDiagonal Conv2DFull Conv2DTNT Conv2DTwoKroneckerFactored DenseDiagonal DenseFull
DenseTNT NaiveFull NaiveTNT ScaledIdentity
BlockDiagonalCurvature CurvatureBlock DenseTwoKroneckerFactored
ImplicitExactCurvature
KroneckerFactored LayerVjpData NaiveDiagonal OptaxPreconditionState OptaxPreconditioner
Optimizer RepeatedDenseKroneckerFactored ScaleAndShiftDiagonal ScaleAndShiftFull
curvature_blocks curvature_estimator get_default_tag_to_block_ctor layers_and_loss_tags
optimizer set_default_tag_to_block_ctor tag_graph_matcher utils
"""
BLOCKS = """
Block BlockShape Damped Diagonal Eigen Full Identity InputOnly Kronecker KroneckerSum
Spectrum TNT
"""
DISTRIBUTIONS = """
Bernoulli Categorical Convex Distribution Normal NormalWithVariance RegisteredLoss
"""
LINALG = """
Conditional Inverted conditionals diagonal eigh finite_diagonals gram inverse
inverse_many inverse_root_many mean_rows pseudo_inverse symmetrize trace_pi
turned_basis
"""
LOSSES = """
convex normal_negative_log_likelihood sigmoid_binary_cross_entropy softmax_cross_entropy
softmax_cross_entropy_with_integer_labels squared_error
"""
LAPLACE = "Laplace expected_softmax probit"
INFLUENCE = "Top gradients_of queries refined scores top"
MODULES = (
    "blocks",
    "distributions",
    "influence",
    "initializers",
    "laplace",
    "linalg",
    "losses",
)
CURVATURE = """
approximation at gathered gram init_factors matvec over quadratic_form renew_factors
report update_factors
value_and_grad value_and_statistics value_grad_and_statistics zero_statistics
"""
OPERATOR = "diagonal eigenvalues logdet matvec power sample solve to_dense trace"
SIGNATURES = {  # parameters, `*` before those by keyword only
    "make_curvature": (
        "loss_fn params *args has_aux estimation_mode blocks structure weight_sharing "
        "on_unmatched on_rest num_samples statistics_fraction l2 batch_argnums "
        "independent_cases factor_dtype"
    ),
    "kfac": (
        "curvature learning_rate momentum damping * norm_constraint decay "
        "inverse_every factored_damping devices"
    ),
    "scale_by_kfac": "curvature damping decay inverse_every * devices",
    "scale_by_inputs": "curvature power damping decay inverse_every * devices",
    "muon_dimension_numbers": "curvature kinds",
    "make_step": "curvature tx * statistics_every devices",
    "health": "state",
    "average_iterates": "decay * start",
    "graft": "direction magnitude",
    "cite": "*used",
    "multi_steps": "curvature tx every",
    "natural_gradient": "curvature learning_rate damping momentum * "
    "norm_constraint devices",
    "Curvature.gram": "self params *args rng",
    "sharing_report": "curvature devices axis_sizes",
    "spread_state": "curvature state devices",
    "state_specs": "devices",
    "whole_state": "curvature state devices",
    "register_dense": "y x w b **metadata",
    "register_conv2d": "y x w b **metadata",
    "register_scale_and_shift": "y x scale shift **metadata",
    "register_generic": "w",
    "register_loss": "distribution z *data mask weight",
    "register_softmax_cross_entropy_loss": "logits targets mask weight",
    "register_categorical_predictive_distribution": "logits targets mask weight",
    "register_sigmoid_cross_entropy_loss": "logits targets mask weight",
    "register_multi_bernoulli_predictive_distribution": "logits targets mask weight",
    "register_normal_predictive_distribution": "mean targets variance weight mask",
    "register_squared_error_loss": "prediction targets weight mask",
    "OverAxis": "axis state_axes",
    "OverMesh": "mesh axes state_axes",
    "RefreshSchedule": "every * shares stale phase warm_up",
    "laplace.Laplace": "* mean curvature cases prior_precision",
    "laplace.probit": "mean covariance",
    "laplace.expected_softmax": "key mean covariance samples",
    "influence.queries": "losses params *args operator damping damping_mode",
    "influence.gradients_of": "losses params *args",
    "influence.refined": (
        "found losses params *args curvature batches operator damping steps"
    ),
    "influence.scores": "found losses params *args",
    "influence.top": "found losses params batches k",
    "losses.convex": "per_case_loss outputs *data mask weight",
    "losses.normal_negative_log_likelihood": "mean log_variance targets * mask weight",
    "Curvature.approximation": "self factors",
    "Curvature.at": "self params *args rng",
    "Curvature.over": "self params batches * rng",
    "Curvature.gathered": "self params batches * rng start",
    "Curvature.init_factors": "self params",
    "Curvature.matvec": "self params v *args matrix",
    "Curvature.quadratic_form": "self params vectors *args",
    "Curvature.renew_factors": "self factors",
    "Curvature.report": "self",
    "Curvature.update_factors": "self factors statistics step decay",
    "Curvature.value_and_grad": "self params *args",
    "Curvature.value_and_statistics": "self params *args rng factors",
    "Curvature.value_grad_and_statistics": "self params *args rng factors",
    "Curvature.zero_statistics": "self params",
    "Approximation.diagonal": "self",
    "Approximation.eigenvalues": "self",
    "Approximation.logdet": "self damping damping_mode",
    "Approximation.matvec": "self v",
    "Approximation.power": "self v exponent damping damping_mode",
    "Approximation.sample": "self key damping damping_mode",
    "Approximation.solve": "self v damping damping_mode",
    "Approximation.to_dense": "self",
    "Approximation.trace": "self",
}


def _public(module, exported_modules=()):
    """Names that are not submodules, which importing makes attributes by itself."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (not isinstance(value, types.ModuleType) or name in exported_modules)
    }


def test_top_level_names():
    assert _public(kfac_jax, MODULES) == {*TOP.split()}


def test_names_for_existing_programs():
    """Found when asked for, and not shown."""
    for name in COMPAT.split():
        assert getattr(kfac_jax, name).__name__.rpartition(".")[2] == name
        assert name not in dir(kfac_jax)
    with pytest.raises(AttributeError, match="no attribute 'Optimiser'"):
        kfac_jax.Optimiser  # noqa: B018


FLOORS = (  # each imports from those after it only, see CONTRIBUTING
    "__init__",
    "compat",
    "citing",
    "influence laplace",
    "optimization",
    "curvature",
    "statistics",
    "operator",
    "plan",
    "blocks",
    "devices",
    "rules",
    "losses tags",
    "_jaxpr",
    "distributions",
    "linalg",
    "extras",
    "_utils",
)


def _floor(module):
    name = module.removeprefix("kfac_jax").removeprefix(".").partition(".")[0]
    return next(i for i, x in enumerate(FLOORS) if (name or "__init__") in x.split())


def test_imports_point_down():
    folder = pathlib.Path(kfac_jax.__file__).parent
    wrong = []
    for file in folder.rglob("*.py"):
        own = ".".join(("kfac_jax", *file.relative_to(folder).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "kfac_jax":
                names = [f"kfac_jax.{x.name}" for x in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            wrong += [
                f"{own} imports {name}"
                for name in names
                if name.startswith("kfac_jax") and _floor(name) < _floor(own)
            ]
    assert not wrong, "\n".join(sorted(wrong))


def test_nothing_depends_on_what_is_for_existing_programs():
    """But the package itself."""
    folder = pathlib.Path(kfac_jax.__file__).parent
    files = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*.py")
        if "compat" not in file.relative_to(folder).parts
        and "kfac_jax.compat" in file.read_text()
    }
    assert files == {"__init__.py"}


def test_block_names():
    assert _public(kfac_jax.blocks) == set(BLOCKS.split())


def test_names_for_blocks_of_ones_own():
    assert _public(kfac_jax.linalg) == set(LINALG.split())


def test_loss_names():
    own = {
        name
        for name, value in vars(kfac_jax.losses).items()
        if inspect.isfunction(value)
        and value.__module__ == "kfac_jax.losses"
        and not name.startswith("_")
    }
    assert own == set(LOSSES.split())


def test_distribution_names():
    own = {
        name
        for name, value in vars(kfac_jax.distributions).items()
        if inspect.isclass(value)
        and value.__module__ == "kfac_jax.distributions"
        and not name.startswith("_")
    }
    assert own == set(DISTRIBUTIONS.split())


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
        (kfac_jax, TOP + COMPAT),
        (kfac_jax.blocks, BLOCKS),
        (kfac_jax.linalg, LINALG),
        (kfac_jax.losses, LOSSES),
    ):
        for name in names.split():
            assert inspect.getdoc(getattr(module, name)), name


def _written(function):
    """The parameters of a function as `SIGNATURES` has them."""
    parameters = inspect.signature(function).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    names = [stars.get(p.kind, "") + p.name for p in parameters]
    by_keyword = [p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters]
    if any(by_keyword) and not any(name.startswith("*") for name in names):
        names.insert(by_keyword.index(True), "*")
    return " ".join(names)


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_have_their_names(name):
    function = functools.reduce(getattr, name.split("."), kfac_jax)
    assert _written(function) == SIGNATURES[name]


def test_no_public_function_is_left_out():
    functions = {name for name in TOP.split() if name.islower()} - {*MODULES}
    functions |= {"OverAxis", "OverMesh", "RefreshSchedule"}
    methods = {f"Curvature.{name}" for name in CURVATURE.split()}
    methods |= {f"Approximation.{name}" for name in OPERATOR.split()}
    losses = {f"losses.{n}" for n in LOSSES.split() if not hasattr(optax.losses, n)}
    more = {f"laplace.{name}" for name in LAPLACE.split()}
    more |= {f"influence.{name}" for name in INFLUENCE.split() if name != "Top"}
    assert {*SIGNATURES} == functions | methods | losses | more


@pytest.mark.parametrize(
    "name", [name for name in LOSSES.split() if hasattr(optax.losses, name)]
)
def test_losses_are_called_as_those_of_optax(name):
    """As there, in the same order, with the same defaults; then `mask`, `weight`."""
    ours, theirs = (
        inspect.signature(getattr(module, name)).parameters
        for module in (kfac_jax.losses, optax.losses)
    )
    *common, mask, weight = ours.values()
    assert (mask.name, mask.kind) == ("mask", inspect.Parameter.KEYWORD_ONLY)
    assert (weight.name, weight.kind) == ("weight", inspect.Parameter.KEYWORD_ONLY)
    for mine, other in zip(common, theirs.values(), strict=False):
        assert (mine.name, mine.kind) == (other.name, other.kind)
        assert mine.default == other.default
    assert len(common) <= len(theirs)
