"""Checks the returned loss against the registered one."""

import functools
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from kfac_jax._jaxpr import axis_types
from kfac_jax._jaxpr.interpreter import run
from kfac_jax._utils.dtypes import wide
from kfac_jax.distributions import Convex, RegisteredLoss
from kfac_jax.plan.programs import bare_program
from kfac_jax.plan.tracing import Traced, tracers


def check_loss(traced: Traced, params: Any, args: Any, l2: float, on_rest: str) -> None:
    """Compares the returned loss with the registered one, where arrays are concrete.

    They may differ by a constant, such as that of a normal distribution, and by a rest
    without curvature of its own (a bound's KL term, an auxiliary loss, a clipped
    objective). A difference that looks like a factor, as if a sum were used in place of
    a mean, is an error. Also warns about convex losses that are not convex at these
    arrays.

    Args:
      traced: the traced loss function.
      params: the parameters.
      args: the further arguments.
      l2: the weight of the declared penalty.
      on_rest: what to do about a rest: "warn", "error" or "ignore".

    Raises:
      ValueError: if they differ by a factor, or by a rest that is to be an error.
    """
    leaves = [*jax.tree.leaves(params), *jax.tree.leaves(args)]
    concrete = all(
        isinstance(x, Array | np.ndarray | np.generic | float | int)
        and not isinstance(x, jax.core.Tracer)
        for x in leaves
    )
    if not concrete or tracers(traced.found.graph):
        return
    program = bare_program(traced)
    known: list[bool] = []

    def compared(
        leaves: Sequence[Any], outputs: Sequence[Any], losses: Sequence[RegisteredLoss]
    ) -> tuple[Array, ...]:
        low = min((loss.z.dtype for loss in losses), key=lambda d: jnp.finfo(d).bits)
        tolerance = jnp.sqrt(jnp.asarray(float(jnp.finfo(low).eps)))
        concavity = _concavity(losses)
        # a loss without targets has no value to compare with
        known.append(on_rest != "ignore" and all(loss.data for loss in losses))
        if not known[-1]:
            return *[jnp.zeros(())] * 3, tolerance, concavity
        n = len(jax.tree.leaves(params))
        penalty = sum(jnp.vdot(x, x).astype(float) for x in leaves[:n]) * (l2 / 2)
        values = [loss.value().astype(float) for loss in losses]
        total = functools.reduce(jnp.add, values)
        return outputs[0], total, jnp.asarray(penalty), tolerance, concavity

    @jax.jit
    def values(leaves: Sequence[Any]) -> tuple[Array, ...]:
        return axis_types.auto(compared)(leaves, *run(program, leaves, None))

    # Compiled before the context, which lets values be known while a caller's jit is
    # being traced around the plan: in it JAX compiles each constant expression alone.
    compiled = values.lower(leaves).compile()
    with jax.ensure_compile_time_eval():
        numbers = map(float, compiled(leaves))
        returned, registered, penalty, tolerance, concavity = numbers
    if concavity > tolerance:
        _warn_of_concavity(concavity)
    if not known[-1] or not np.isfinite(returned):
        return

    def is_returned(value: float) -> bool:
        size = max(abs(value), abs(returned), 1e-6)
        return abs(returned - value) <= max(tolerance, 1e-6) * size

    if is_returned(registered + penalty):
        return
    with jax.ensure_compile_time_eval():
        n = len(jax.tree.leaves(params))
        elsewhere = [_moved(x) if i < n else x for i, x in enumerate(leaves)]
        there, registered_there, penalty_there, *_ = map(float, compiled(elsewhere))
    change = there - returned
    rests = returned - registered - penalty, there - registered_there - penalty_there
    large = abs(change) > 10 * max(tolerance, 1e-6) * abs(returned)
    if large and abs(rests[1] - rests[0]) <= _CONSTANT * abs(change):
        return
    if penalty > 0 and is_returned(registered):
        advice = (
            f"The loss lacks the penalty that l2={l2} declares: expected "
            f"{registered + penalty:.6g}, got {returned:.6g}, which is the registered "
            "loss alone. Add (l2 / 2)·‖params‖² to the loss, or leave l2 out."
        )
    else:
        advice = _difference(returned, registered + penalty, traced, l2)
    if on_rest == "error":
        raise ValueError(advice)
    warnings.warn(advice, stacklevel=3)


def _moved(x: Any) -> Any:
    """A parameter at another point; numbers that are no arrays stay.

    Entries move by different amounts: a rest that keeps its value where all are scaled,
    as one of directions, is no constant.
    """
    if not isinstance(x, Array | np.ndarray):
        return x
    return x + (0.1 * jnp.sin(37 * jnp.real(x) + 1)).astype(x.dtype)


_CONSTANT = 1e-3
"""The largest change of a constant rest, as a part of the returned loss's."""


def _difference(returned: float, registered: float, traced: Traced, l2: float) -> str:
    """Tells both losses, their ratio, and what to do about a rest.

    Args:
      returned: the returned loss.
      registered: the registered one, with the declared penalty.
      traced: the traced loss function.
      l2: the weight of the declared penalty.

    Returns:
      The message.

    Raises:
      ValueError: if they differ by a factor.
    """
    ratio = returned / registered if registered else float("inf")
    told = (
        f"The loss function returned {returned:.6g}, but the registered loss is "
        f"{registered:.6g}: ratio returned/registered = {ratio:.6g}. Expected the mean "
        "over the leading axis of what is registered, of the sum within a case"
        + (f" plus (l2 / 2)·‖params‖² with l2={l2}" if l2 else "")
    )
    shapes = [
        node.shape() for node in traced.found.graph.walk() if node.name == "kfac_loss"
    ]
    if any(_close(ratio, 1 / math.prod(shape[1:-1])) for shape in shapes if shape[2:]):
        raise ValueError(
            f"{told}. A mean over positions, too, makes each of them a case: give them "
            "to the loss as such, as in `loss(logits.reshape(-1, logits.shape[-1]), "
            f"labels.reshape(-1)).mean()`, or pass `weight={ratio:.6g}` to the "
            "registered loss."
        )
    if _is_factor(ratio, shapes):
        raise ValueError(
            f"{told}. Average over cases (not a sum), or pass `weight={ratio:.6g}` to "
            "the registered loss."
        )
    return (
        f"{told}. If cases are masked, pass `mask=` to the registered loss; declare a "
        "penalty with `l2`, another factor with `weight`. If the loss has a term that "
        'is not registered, only its gradient counts: say so by on_rest="ignore".'
    )


def _is_factor(ratio: float, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a ratio is ½, 2, or a product of lengths of registered outputs' axes.

    These are the ratios if a mean is taken in place of a sum, or the other way round,
    along some axes.
    """
    sums = {
        math.prod(lengths)
        for shape in shapes
        for count in range(len(shape) + 1)
        for lengths in itertools.combinations(shape, count)
    }
    factors = {a * b for a in sums for b in (0.5, 1.0, 2.0)} - {0.0, 1.0}
    factors |= {1 / f for f in factors} | {-1.0}  # -1: a log-likelihood, not minus it
    return any(_close(ratio, f) for f in factors)


def _close(ratio: float, factor: float) -> bool:
    return math.isclose(ratio, factor, rel_tol=_FACTOR_TOLERANCE)


_FACTOR_TOLERANCE = 1e-3
"""The precision of float32 losses over large batches. The ratio of a rest is seldom as
close to a factor."""


def _warn_of_concavity(concavity: float) -> None:
    warnings.warn(
        "A loss given to losses.convex is not convex in the network's output: at these "
        f"arrays its Hessians have eigenvalues down to {-concavity:.2g} times their "
        "size. For K-FAC its negative curvature is taken for zero.",
        stacklevel=4,
    )


def _concavity(losses: Sequence[RegisteredLoss]) -> Array:
    """The largest concavity of all convex losses; 0 without any."""
    each = [
        loss.distribution.concavity(wide(loss.z), loss.data).astype(float)
        for loss in losses
        if isinstance(loss.distribution, Convex)
    ]
    return jnp.stack(each).max() if each else jnp.zeros(())
