"""What rules that adapt a damping have in common."""

from typing import Any

from kfac_jax._utils import arguments


def check_adaptation(rule: Any, interval: str, omega: str) -> None:
    """Checks how often and by what factor a rule adapts, and its limits.

    Args:
      rule: it has `every`, `factor`, `minimum` and `maximum`.
      interval: the paper's symbol for `every`.
      omega: the paper's symbol for `factor`.

    Raises:
      TypeError: if one is no number.
      ValueError: if one is out of its range.
    """
    arguments.count(f"every ({interval})", rule.every, 1)
    factor = rule.factor
    if factor is not None:
        arguments.number(f"factor ({omega})", factor)
        if not 0.0 < factor < 1.0:
            raise ValueError(f"factor ({omega}) must be in (0, 1); got {factor}.")
    for name in ("minimum", "maximum"):
        arguments.number(name, getattr(rule, name))
    if not 0.0 <= rule.minimum <= rule.maximum:
        raise ValueError(
            "minimum and maximum must be numbers with 0 ≤ minimum ≤ maximum; got "
            f"{rule.minimum} and {rule.maximum}."
        )
