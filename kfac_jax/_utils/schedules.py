"""Hyperparameters: numbers, or schedules of the step, as optax has them."""

from typing import Any

import optax
from chex import Numeric
from jax.typing import ArrayLike

from kfac_jax._utils.arguments import is_number, shown, within


def at(value: optax.ScalarOrSchedule, step: Numeric) -> ArrayLike:
    """The number, or the schedule's value at a step, counted from 0.

    >>> at(0.5, 3), at(lambda step: 0.5**step, 3)
    (0.5, 0.125)
    """
    return value(step) if callable(value) else value


def check(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    symbol: str = "",
    closed: bool = False,
    allowed: str = "a number or a schedule",
) -> None:
    """Checks a hyperparameter; of a schedule and of arrays only that they are some.

    Args:
      name: of the argument.
      value: what came.
      low: the least number.
      high: the limit of numbers.
      symbol: the paper's.
      closed: whether the limit may be reached.
      allowed: what the argument may be.

    Raises:
      TypeError: if it is neither number, scalar array nor schedule.
      ValueError: if it is a number out of its range.
    """
    schedule = callable(value) and not isinstance(value, type)
    if not (schedule or is_number(value, arrays=True)):
        raise TypeError(f"{name} must be {allowed}; got {shown(value)}.")
    label = f"{name} ({symbol})" if symbol else name
    within(label, value, low, high, closed=closed)
