"""Schedules of what is no hyperparameter of the optimizer: the size of the batch."""

import dataclasses
import operator
from typing import Any

from kfac_jax._utils import arguments


@dataclasses.dataclass(frozen=True)
class ExponentialBatchSize:
    """A batch size that grows by a constant factor per step, as a function of the step.

    K-FAC's progress per step grows with the batch, more so near the end, where the
    gradient's noise is what is left. The paper's `m_k = min(m_1 exp((k-1)/b), |S|)`
    counts k from 1; steps here are counted from 0, as optax does: `step = k - 1`. Its b
    is `(steps - 1) / log(final / initial)`, so that `m_steps = final`.

    Each new size compiles the training step anew, and the paper's own schedule brings
    one at almost every step. `distinct` keeps to so many sizes, in equal ratios, each
    for an equal number of steps: step by step the largest of them that is not above
    m_k. `sizes` lists them.

    Attributes:
      initial: m_1, cases in the batch at step 0.
      final: `|S|`, cases in the batch from step `steps - 1` on: those of the data set.
      steps: how many steps the growth takes, at least 2.
      distinct: how many sizes there are at most, from 2 to `steps`; None for the
        paper's schedule, one for each step.
      multiple_of: sizes are rounded down to a multiple of it, e.g. the number of
        devices.

    References:
      Martens & Grosse 2015, section 13, where `m_1 = 1000` and `m_500 = |S|`.

    >>> batch_size = ExponentialBatchSize(1000, 60_000, distinct=5)
    >>> [batch_size(step) for step in (0, 124, 125, 498, 499, 10_000)]
    [1000, 1000, 2783, 21558, 60000, 60000]
    >>> batch_size.sizes
    (1000, 2783, 7745, 21558, 60000)
    """

    initial: int
    final: int
    _: dataclasses.KW_ONLY
    steps: int = 500
    distinct: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges."""
        arguments.integer_from("multiple_of", self.multiple_of, 1)
        arguments.integer_from("initial (m_1)", self.initial, self.multiple_of)
        arguments.integer_from("final (|S|)", self.final, self.initial)
        arguments.integer_from("steps", self.steps, 2)
        if self.distinct is not None:
            arguments.integer_from("distinct", self.distinct, 2)
            if self.distinct > self.steps:
                raise ValueError(
                    f"distinct must be at most steps ({self.steps}); got "
                    f"{self.distinct}."
                )

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes in the order they come, each once: so many programs compile."""
        return tuple(dict.fromkeys(map(self._size, range(self._levels))))

    def __call__(self, step: Any) -> int:
        """Returns the number of cases in the batch of a step.

        Args:
          step: counted from 0, an integer.

        Returns:
          A Python integer, as shapes need it.

        Raises:
          TypeError: if the step is no integer, or is traced.
          ValueError: if it is negative.
        """
        try:
            step = operator.index(step)
        except TypeError as error:
            raise TypeError(
                "A batch size is a shape, so step must be a concrete integer, outside "
                f"of jit; got {step!r}."
            ) from error
        if step < 0:
            raise ValueError(f"step is counted from 0; got {step}.")
        passed = min(step, self.steps - 1)
        return self._size(passed * (self._levels - 1) // (self.steps - 1))

    @property
    def _levels(self) -> int:
        return self.steps if self.distinct is None else self.distinct

    def _size(self, level: int) -> int:
        ratio = self.final / self.initial
        size = self.initial * ratio ** (level / (self._levels - 1))
        # whole numbers are met up to rounding only: 125 ** (1 / 3) is 4.999...
        whole = min(int(size * (1 + 1e-12)), self.final)
        return whole // self.multiple_of * self.multiple_of
