"""Which options of the published Optimizer are honoured; what to do about others."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from kfac_jax._utils import arguments
from kfac_jax.compat._native_blocks import callers_level
from kfac_jax.compat.tag_graph_matcher import check_graph_patterns
from kfac_jax.plan.modes import MODES

_SEPARATE = "Use kfac_jax.kfac(..., factored_damping=kfac_jax.SeparateDamping(...))."
_OWN_STEP = (
    "Write the step yourself with kfac_jax.kfac, whose update leaves the decision "
    "what to do with it to you."
)

REFUSED: dict[str, tuple[Any, str]] = {
    "regularized_parameters_path_exclusions": (
        "",
        "Penalise parts of the parameters in the loss function itself, with l2_reg=0.",
    ),
    "use_initial_damping_calibration": (
        False,
        "Start with a large initial_damping: the Levenberg-Marquardt rule lowers it.",
    ),
    "precon_damping_mult": (1.0, _SEPARATE),
    "precon_damping_schedule": (None, _SEPARATE),
    "use_step_rejection": (False, _OWN_STEP),
    "reject_damping_increase_factor": (1.0, _OWN_STEP),
    "custom_estimator_ctor": (
        None,
        "Choose blocks by kfac_jax.make_curvature(..., blocks=...).",
    ),
    "use_exact_inverses": (
        False,
        "Use kfac_jax.blocks.Eigen(), whose damping is exact, in "
        "kfac_jax.make_curvature(..., blocks=...).",
    ),
    "use_automatic_registration": (
        True,
        "Give layers their blocks by kfac_jax.make_curvature(..., blocks=...).",
    ),
    "precon_power": (
        -1.0,
        "Use kfac_jax.make_curvature(...).approximation(factors).power(grads, p).",
    ),
    "norm_to_scale_identity_weight_per_block": (
        None,
        "Write a block of your own, see the guide on extending.",
    ),
    "exact_quad_model_matrix_type": (
        None,
        "The Fisher is used, which the GGN equals for the losses that are registered.",
    ),
    "include_registered_loss_in_stats": (
        False,
        "kfac_jax.make_curvature compares the registered loss with the returned one.",
    ),
}
"""By option: its only value here, and what else to do."""

RATES = (
    ("learning_rate", "use_adaptive_learning_rate", "learning_rate_schedule"),
    ("momentum", "use_adaptive_momentum", "momentum_schedule"),
    ("damping", "use_adaptive_damping", "damping_schedule"),
)
"""What a step needs: its argument, the flag of its rule and its schedule."""

_COUNTS = {
    "curvature_update_period": 1,
    "inverse_update_period": 1,
    "damping_adaptation_interval": 1,
    "num_estimator_samples": 1,
    "num_burnin_steps": 0,
}
"""Options that are whole numbers, with the smallest of each."""

_NUMBERS = (
    "l2_reg",
    "min_damping",
    "max_damping",
    "damping_adaptation_decay",
    "damping_lower_threshold",
    "damping_upper_threshold",
    "curvature_ema",
    "invalid_metric_value",
    *_COUNTS,
)
_FLAGS = (
    "value_func_has_aux",
    "value_func_has_state",
    "value_func_has_rng",
    "use_adaptive_learning_rate",
    "use_adaptive_momentum",
    "use_adaptive_damping",
    "include_damping_in_quad_change",
    "always_use_exact_qmodel_for_damping_adjustment",
    "register_only_generic",
    "multi_device",
    "debug",
    "include_norms_in_stats",
    "include_per_param_norms_in_stats",
)
_FUNCTIONS = (
    "value_func_for_estimator",
    "batch_process_func",
    "batch_size_extractor",
)

_AUTO_REGISTER = frozenset(
    {
        "allow_multiple_registrations",
        "compute_only_loss_tags",
        "graph_matcher_rules",
        "graph_patterns",
        "patterns_to_skip",
        "register_only_generic",
        "register_only_until_losses",
        "register_orphans",
    }
)


def refuse(
    who: str, refused: Mapping[str, tuple[Any, str]], options: Mapping[str, Any]
) -> None:
    """Raises for what is not offered.

    Args:
      who: whose options these are.
      refused: by option its only value, and what else to do.
      options: the arguments by name.

    Raises:
      ValueError: for another value.
    """
    for name, (value, instead) in refused.items():
        given = options[name]
        plain = isinstance(given, str | int | float | list | tuple | None)
        empty = value == "" and plain and given in ((), [], None)
        if not (empty or given is value or (plain and given == value)):
            raise ValueError(
                f"kfac_jax.{who} does not offer {name}: expected "
                f"{arguments.shown(value)}, got {arguments.shown(given)}. {instead}"
            )


def check(options: Mapping[str, Any]) -> None:
    """Raises for what the Optimizer does not do.

    Args:
      options: the constructor's arguments by name.

    Raises:
      TypeError: if an option is of the wrong type.
      ValueError: for an option that cannot be honoured, is out of its range, or
        excludes another.
    """
    refuse("Optimizer", REFUSED, options)
    _check_types(options)
    for name, least in _COUNTS.items():
        if not least <= options[name] < float("inf") or options[name] % 1:
            raise ValueError(
                f"{name} is expected to be an integer ≥ {least}; got {options[name]!r}."
            )
    if not 0.0 <= options["curvature_ema"] <= 1.0:
        raise ValueError(
            "curvature_ema, what earlier batches are multiplied by, is expected in "
            f"[0, 1]; got {options['curvature_ema']!r}."
        )
    _check_rates(options)


def _check_rates(options: Mapping[str, Any]) -> None:
    """Raises unless each rate is chosen in one way at most, and ways go together."""
    for name, flag, schedule in RATES:
        if options[schedule] is not None and not callable(options[schedule]):
            raise TypeError(
                f"{schedule} must be a function of the step, or None; got "
                f"{options[schedule]!r}. For a constant write lambda step: ...."
            )
        if options[flag] and options[schedule] is not None:
            raise ValueError(
                f"Got both {flag}=True and {schedule}: expected at most one way to "
                f"choose the {name}. Leave one out."
            )
    if options["use_adaptive_momentum"] and not options["use_adaptive_learning_rate"]:
        raise ValueError(
            "kfac_jax.Optimizer does not offer use_adaptive_momentum=True with a given "
            "learning rate: the quadratic model chooses either both or the learning "
            "rate. Expected use_adaptive_learning_rate=True, too; got False."
        )
    if options["use_adaptive_damping"] and options["initial_damping"] is None:
        raise ValueError(
            "use_adaptive_damping=True needs initial_damping, the first λ; got None. "
            "Start too large rather than too small."
        )
    if options["use_adaptive_learning_rate"] and options["norm_constraint"] is not None:
        raise ValueError(
            "norm_constraint limits a given learning rate: expected None with "
            f"use_adaptive_learning_rate=True, got {options['norm_constraint']!r}."
        )


def _check_types(options: Mapping[str, Any]) -> None:
    arguments.function("value_and_grad_func", options["value_and_grad_func"])
    for name in _FUNCTIONS:
        arguments.callable_or_none(name, options[name])
    for name in _NUMBERS:
        arguments.number(name, options[name], arrays=True)
    arguments.within("l2_reg (η)", options["l2_reg"], 0.0, float("inf"))
    for name in ("initial_damping", "norm_constraint"):
        if options[name] is not None:
            arguments.number(name, options[name], arrays=True)
            arguments.within(name, options[name], 0.0, float("inf"))
    for name in _FLAGS:
        value = options[name]
        whole = isinstance(value, int | np.bool_)  # programs may have 0 and 1
        arguments.flag(name, bool(value) if whole and value in (0, 1) else value)
    if options["estimation_mode"] is not None:
        arguments.choice("estimation_mode", options["estimation_mode"], MODES)
    name = options["pmap_axis_name"]
    arguments.instance("pmap_axis_name", name, str, "the name of an axis")


def generic_only(auto_register_kwargs: Any, patterns_to_skip: Any) -> bool:
    """Reads `auto_register_kwargs`, most of which layers found by dataflow do not need.

    Args:
      auto_register_kwargs: keyword arguments of the published pattern matcher, or None.
      patterns_to_skip: names of patterns.

    Returns:
      Whether they ask for generic blocks only.

    Raises:
      TypeError: if `graph_patterns` are none.
      ValueError: for names that the published matcher does not have.
    """
    given = as_mapping("auto_register_kwargs", auto_register_kwargs)
    unknown = sorted(given.keys() - _AUTO_REGISTER)
    if unknown:
        raise ValueError(
            "auto_register_kwargs must have options of the published matcher: expected "
            f"some of {sorted(_AUTO_REGISTER)}, got {unknown}."
        )
    check_graph_patterns(given.get("graph_patterns", ()))
    skipped: list[str] = []
    for names in (patterns_to_skip, given.get("patterns_to_skip", ())):
        arguments.sequence("patterns_to_skip", names, "names")
        for name in names:
            arguments.instance("each of patterns_to_skip", name, str, "a name")
        skipped += names
    if skipped:
        warnings.warn(
            f"kfac_jax finds layers by dataflow and has no patterns to skip: {skipped} "
            "changes nothing. Give layers other blocks by layer_tag_to_block_ctor or "
            "kfac_jax.make_curvature(..., blocks=...).",
            stacklevel=callers_level() + 1,
        )
    return bool(given.get("register_only_generic", False))


def as_mapping(name: str, value: Any) -> dict[str, Any]:
    """The value as a dictionary, empty for None."""
    if value is None:
        return {}
    arguments.instance(name, value, Mapping, "a mapping by name, or None")
    return dict(value)
