"""Which options of the published Optimizer are honoured; what to do about others."""

import warnings
from collections.abc import Mapping
from typing import Any

from kfac_jax.compat.tag_graph_matcher import check_graph_patterns

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


def refuse(options: Mapping[str, Any]) -> None:
    """Raises for what the Optimizer does not do.

    Args:
      options: the constructor's arguments by name.

    Raises:
      TypeError: if a schedule is not callable.
      ValueError: for an option that cannot be honoured, or options that exclude each
        other.
    """
    for name, (value, instead) in REFUSED.items():
        given = options[name]
        empty = value == "" and given in ((), [], None)
        if not (empty or given is value or given == value):
            raise ValueError(
                f"kfac_jax.Optimizer does not offer {name}: expected {value!r}, got "
                f"{given!r}. {instead}"
            )
    for name, least in _COUNTS.items():
        if not options[name] >= least or options[name] != int(options[name]):
            raise ValueError(
                f"{name} is expected to be an integer ≥ {least}; got {options[name]!r}."
            )
    if not 0.0 <= options["curvature_ema"] <= 1.0:
        raise ValueError(
            "curvature_ema, what earlier batches are multiplied by, is expected in "
            f"[0, 1]; got {options['curvature_ema']!r}."
        )
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
            "rate. Expected use_adaptive_learning_rate=True, too."
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
    given = dict(auto_register_kwargs or {})
    unknown = sorted(given.keys() - _AUTO_REGISTER)
    if unknown:
        raise ValueError(
            f"auto_register_kwargs has {unknown}, which are no options of it: expected "
            f"some of {sorted(_AUTO_REGISTER)}."
        )
    check_graph_patterns(given.get("graph_patterns", ()))
    skipped = [*patterns_to_skip, *given.get("patterns_to_skip", ())]
    if skipped:
        warnings.warn(
            f"kfac_jax finds layers by dataflow and has no patterns to skip: {skipped} "
            "changes nothing. Give layers other blocks by layer_tag_to_block_ctor or "
            "kfac_jax.make_curvature(..., blocks=...).",
            stacklevel=5,
        )
    return bool(given.get("register_only_generic", False))
