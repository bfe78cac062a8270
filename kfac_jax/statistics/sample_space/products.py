"""Products with U: `U v` is forward mode, and `Uᵀ w` one pull-back."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr.differentiation import check_forward_mode, reverse_mode
from kfac_jax._jaxpr.graph import epsilon
from kfac_jax._jaxpr.interpreter import Program, run
from kfac_jax._utils.dtypes import wide
from kfac_jax.devices import ALONE, Devices
from kfac_jax.distributions import (
    Bernoulli,
    Categorical,
    Normal,
    NormalWithVariance,
    RegisteredLoss,
)
from kfac_jax.plan.modes import is_exact
from kfac_jax.plan.plan import Plan
from kfac_jax.plan.programs import outputs_program
from kfac_jax.statistics.sample_space.rows import (
    centered,
    joined,
    own,
    row_sets,
    varying,
)


class Products(NamedTuple):
    """Products with U at one point.

    Attributes:
      push: leaves to rows, `U v`.
      pull: rows to leaves, `Uᵀ w`.
      errors: e with `Uᵀ e` the gradient of the registered losses; None where that is
        not in the space of the rows (sampled ones), or without targets.
      epsilon: the precision of the least precise type that the program computes in.
    """

    push: Callable[[Sequence[Array]], Array]
    pull: Callable[[Array], list[Array]]
    errors: Array | None
    epsilon: float


def products(
    plan: Plan,
    params: Any,
    args: Any,
    drawn: Sequence[Array],
    devices: Devices = ALONE,
) -> Products:
    """Products with U.

    The mean of D devices' own Fisher matrices `U_dᵀ U_d` has the rows `U_d / √D`.

    Args:
      plan: the plan.
      params: the parameters.
      args: the loss function's further arguments.
      drawn: the cotangents of sampled rows, see `gram`.
      devices: devices that have a part each of the batch.

    Returns:
      The products.

    Raises:
      ValueError: if the network uses a `custom_vjp` function, which has no forward
        mode.
    """
    leaves = varying(plan, params, args)
    params = jax.tree.unflatten(plan.tree.treedef, leaves)
    traced = plan.derive(params, args, quiet=True).traced
    found, data = traced.found, jax.tree.leaves(args)
    root = float(devices.parts()) ** 0.5
    program = outputs_program(traced)
    if found.constant_means:
        program = Program(found.graph, {}, {}, found.constant_means)

    def outputs(leaves: list[Array]) -> Any:
        _, losses = run(program, [*leaves, *data], None)
        return [loss.z for loss in losses], losses

    def forward(leaves: list[Array], tangents: list[Array]) -> Any:
        return jax.jvp(outputs, (leaves,), (tangents,), has_aux=True)[1]

    check_forward_mode(program.graph, forward, leaves, leaves)
    zs, push, losses = jax.linearize(outputs, leaves, has_aux=True)
    sets = row_sets(plan, losses, found.loss_examples, drawn)

    def all_rows(parts: Sequence[Array]) -> Array:
        rows = joined(parts, devices) / root
        is_centered = plan.structure.centered  # type: ignore[attr-defined]
        return centered(sets, rows, devices) if is_centered else rows

    def rows(v: Sequence[Array]) -> Array:
        tangents = [
            _compat.vary_like(x.astype(y.dtype), y)
            for x, y in zip(v, leaves, strict=True)
        ]
        moved = push(tangents)
        return all_rows([one.push(moved) for one in sets])

    def columns(w: Array) -> list[Array]:
        if plan.structure.centered:  # type: ignore[attr-defined]
            w = centered(sets, w, devices)
        parts = [
            one.pull(x) for one, x in zip(sets, own(sets, w, devices), strict=True)
        ]
        by_loss = zip(*parts, zs, strict=True)  # of each set, and the output
        cotangents = [
            _compat.vary_like(functools.reduce(jnp.add, us), z) for *us, z in by_loss
        ]
        with reverse_mode(program.graph, len(leaves)):
            (result,) = jax.linear_transpose(push, leaves)(cotangents)
        return [x * jnp.asarray(root, x.dtype) for x in devices.mean(result)]

    errors = _errors(losses) if is_exact(plan.estimation_mode) else None
    if errors is not None:
        errors = all_rows([one.arrange(errors) for one in sets])
    precision = epsilon(program.graph, (x.dtype for x in leaves))
    return Products(rows, columns, errors, precision)


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
