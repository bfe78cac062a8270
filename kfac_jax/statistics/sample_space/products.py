"""Products with U: `U v` is forward mode, and `Uᵀ w` one pull-back."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.differentiation import check_forward_mode, reverse_mode
from kfac_jax._jaxpr.interpreter import Program, run
from kfac_jax._utils.dtypes import wide
from kfac_jax.distributions import (
    Bernoulli,
    Categorical,
    Normal,
    NormalWithVariance,
    RegisteredLoss,
)
from kfac_jax.plan import batch
from kfac_jax.plan.modes import is_exact
from kfac_jax.plan.plan import Plan
from kfac_jax.plan.programs import outputs_program
from kfac_jax.statistics.averages import Statistics
from kfac_jax.statistics.sample_space.gram import NAME
from kfac_jax.statistics.sample_space.rows import centered, row_sets


class Products(NamedTuple):
    """Products with U at one point.

    Attributes:
      push: leaves to rows, `U v`.
      pull: rows to leaves, `Uᵀ w`.
      errors: e with `Uᵀ e` the gradient of the registered losses; None where that is
        not in the space of the rows (sampled ones), or without targets.
    """

    push: Callable[[Sequence[Array]], Array]
    pull: Callable[[Array], list[Array]]
    errors: Array | None


def products(plan: Plan, params: Any, args: Any, gathered: Statistics) -> Products:
    """Products with U.

    Args:
      plan: the plan.
      params: the parameters.
      args: the loss function's further arguments.
      gathered: the statistics of these, which have the cotangents of sampled rows.

    Returns:
      The products.

    Raises:
      ValueError: if the network uses a `custom_vjp` function, which has no forward
        mode.
    """
    own = list(plan.tree.leaves(params, "params"))
    args = batch.take(args, plan.statistics_fraction, plan.in_batch)
    arrays = gathered.layers[NAME]
    drawn = [arrays[name] for name in sorted(arrays.keys() - {"gram"})]
    traced = plan.derive(params, args, quiet=True).traced
    found, data = traced.found, jax.tree.leaves(args)
    program = outputs_program(traced)
    if found.constant_means:
        program = Program(found.graph, {}, {}, found.constant_means)

    def outputs(leaves: list[Array]) -> Any:
        _, losses = run(program, [*leaves, *data], None)
        return [loss.z for loss in losses], losses

    def forward(leaves: list[Array], tangents: list[Array]) -> Any:
        return jax.jvp(outputs, (leaves,), (tangents,), has_aux=True)[1]

    check_forward_mode(program.graph, forward, own, own)
    _, push, losses = jax.linearize(outputs, own, has_aux=True)
    sets = row_sets(plan, losses, found.loss_examples, drawn)
    is_centered = plan.structure.centered  # type: ignore[attr-defined]

    def rows(v: Sequence[Array]) -> Array:
        tangents = [x.astype(y.dtype) for x, y in zip(v, own, strict=True)]
        moved = push(tangents)
        found = jnp.concatenate([one.push(moved).reshape(-1) for one in sets])
        return centered(sets, found) if is_centered else found

    def columns(w: Array) -> list[Array]:
        w = centered(sets, w) if is_centered else w
        ends = [0, *itertools.accumulate(one.cases * one.columns for one in sets)]
        parts = [
            one.pull(w[a:b].reshape(one.cases, one.columns))
            for one, a, b in zip(sets, ends[:-1], ends[1:], strict=True)
        ]
        cotangents = [sum(us[1:], us[0]) for us in zip(*parts, strict=True)]
        with reverse_mode(program.graph, len(own)):
            (result,) = jax.linear_transpose(push, own)(cotangents)
        return result

    errors = _errors(losses) if is_exact(plan.estimation_mode) else None
    if errors is not None:
        errors = jnp.concatenate([one.arrange(errors).reshape(-1) for one in sets])
        errors = centered(sets, errors) if is_centered else errors
    return Products(rows, columns, errors)


def _errors(losses: Sequence[RegisteredLoss]) -> list[Array] | None:
    """`B⁻¹ c` for the losses' gradients c by their outputs, of least length.

    Args:
      losses: the registered losses.

    Returns:
      Arrays like the outputs; None without targets, or for a root that is not known.
    """
    result: list[Array] = []
    for loss in losses:
        root = _diagonal_root(loss)
        if root is None or not loss.data:
            return None
        gradient = wide(loss.target_gradient())
        result.append(gradient / jnp.where(root > 0, root, 1))
    return result


def _diagonal_root(loss: RegisteredLoss) -> Array | None:
    """B with `B (v / b) = v` for all gradients v of a case."""
    z = wide(loss.z)
    match loss.distribution:
        case Categorical():  # B = diag(√p) - p √pᵀ, and gradients have the sum zero
            return jnp.sqrt(jax.nn.softmax(z))
        case Bernoulli() | Normal() | NormalWithVariance():
            ones = jnp.ones_like(z)
            return loss.distribution.multiply_root(z, loss.data, ones)
        case _:
            return None
