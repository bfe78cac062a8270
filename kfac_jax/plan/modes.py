"""The estimation modes: what output gradients stand for the curvature."""

MODES = (
    "fisher_gradients",
    "fisher_exact",
    "fisher_empirical",
    "fisher_curvature_prop",
    "ggn_exact",
    "ggn_curvature_prop",
)
"""Sampled gradients; exact; at the targets; random roots. For losses in natural
parameters the generalised Gauss-Newton matrix and the Fisher are equal, and so are
their modes; for others (a predicted variance, distributions of the user's own) the
Fisher is used in both."""


def is_exact(mode: str) -> bool:
    """Whether the mode sums over all outputs."""
    return mode in ("fisher_exact", "ggn_exact")


def needs_rng(mode: str) -> bool:
    """Whether the mode draws random numbers."""
    return not is_exact(mode) and mode != "fisher_empirical"
