"""The estimation modes: which output gradients the curvature is estimated from."""

MODES = (
    "fisher_gradients",
    "fisher_exact",
    "fisher_empirical",
    "fisher_curvature_prop",
    "ggn_exact",
    "ggn_curvature_prop",
    "inputs",
)
"""Gradients at sampled targets; a sum over all outputs (exact); gradients at the data's
targets (empirical); random combinations of the Fisher's root (curvature propagation).
In the mode "inputs" no curvature is estimated but second moments of layers' inputs.

The `ggn_*` modes compute the same as their `fisher_*` siblings. For losses in natural
parameters the generalised Gauss-Newton matrix equals the Fisher; for others (a
predicted variance, a user's own distribution) the Fisher is used in both."""


def is_exact(mode: str) -> bool:
    """Whether the mode sums over all outputs."""
    return mode in ("fisher_exact", "ggn_exact")


def needs_rng(mode: str) -> bool:
    """Whether the mode draws random numbers."""
    return not is_exact(mode) and mode not in ("fisher_empirical", "inputs")


def of_inputs(mode: str) -> bool:
    """Whether statistics are of inputs alone, for which no loss must be registered."""
    return mode == "inputs"
