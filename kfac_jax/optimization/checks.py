"""Checks of the arguments of `kfac` and `scale_by_kfac`, and of their updates."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_jax._utils import schedules
from kfac_jax._utils.arguments import integer, shown
from kfac_jax._utils.trees import path_name
from kfac_jax.curvature import Curvature, Params
from kfac_jax.devices import Devices, checked
from kfac_jax.devices.rows import Shape
from kfac_jax.operator.structures import SampleSpace
from kfac_jax.optimization.state import Info, KFACState
from kfac_jax.plan.group import abstract_factors, abstract_inverses
from kfac_jax.plan.modes import of_inputs
from kfac_jax.rules import (
    LevenbergMarquardt,
    QuadraticModel,
    Refine,
    RefreshSchedule,
    SeparateDamping,
)
from kfac_jax.statistics.averages import check_statistics

_INF = float("inf")
_SHOWN = 10
"""The most differing leaves that an error lists."""


def check_plan(curvature: Any) -> None:
    """Raises TypeError unless it is a plan of `make_curvature`."""
    if not isinstance(curvature, Curvature):
        raise TypeError(
            "curvature must be a plan from make_curvature; got "
            f"{shown(curvature)}. Pass kfac_jax.make_curvature(loss_fn, params, ...)."
        )


def check_transformation(tx: Any) -> None:
    """Raises TypeError unless it has what an optax transformation has."""
    if not hasattr(tx, "init") or not callable(getattr(tx, "update", None)):
        raise TypeError(
            "tx must be an optax transformation with kfac or scale_by_kfac in it; got "
            f"{shown(tx)}. Pass kfac_jax.kfac(curvature)."
        )


def check_common(
    curvature: Any, damping: Any, decay: Any, inverse_every: Any, devices: Any
) -> None:
    """Checks the arguments that both transformations have."""
    check_plan(curvature)
    if isinstance(curvature.structure, SampleSpace):
        raise ValueError(
            "kfac needs blocks, which a plan of the sample space has not: expected "
            f"another structure, got {curvature.structure!r}. Use "
            "kfac_jax.natural_gradient for that plan."
        )
    if not isinstance(damping, LevenbergMarquardt):
        allowed = "a number, schedule or rule"
        schedules.check("damping", damping, 0.0, _INF, symbol="λ", allowed=allowed)
    schedules.check("decay", decay, 0.0, 1.0, symbol="ε")
    if not isinstance(inverse_every, RefreshSchedule):
        allowed = "a number of steps, a schedule or RefreshSchedule"
        name = "inverse_every"
        schedules.check(name, inverse_every, 1, _INF, symbol="T3", allowed=allowed)
        if not callable(inverse_every):
            integer("inverse_every (T3)", inverse_every, arrays=True)
    check_devices(curvature, devices)


def check_mode(curvature: Curvature) -> None:
    """Raises ValueError unless the plan estimates curvature."""
    if of_inputs(curvature.estimation_mode):
        raise ValueError(
            "kfac chooses its steps by the curvature of a registered loss: expected a "
            "plan of another estimation_mode, got 'inputs'. Use "
            "kfac_jax.scale_by_inputs before another optimizer for that plan, or "
            "scale_by_kfac."
        )


def check_devices(curvature: Curvature, devices: Any) -> None:
    """Checks that devices can share the work for a plan's layers."""
    refused = [n for x in curvature.groups if not x.by_entry for n in x.names]
    if checked(devices).cuts_state and refused:
        raise ValueError(
            "With state_axes devices keep rows of the factors: expected blocks whose "
            f"factors are averages by entry and carry no basis, got layers {refused}. "
            "Give them Kronecker blocks, or leave state_axes out."
        )
    products = [x.name for x in curvature.groups if x.product_rows]
    if devices is not None and products:
        raise ValueError(
            "Gradients that are averages over devices are no products of one device's "
            f"inputs: expected no layers with gradient_products, got {products}. Leave "
            "gradient_products or devices out."
        )


def check_update(
    state: Any, statistics: Any, kind: str, unknown: Sequence[str] = ()
) -> None:
    """Checks the arguments that every update gets.

    Args:
      state: the state.
      statistics: the step's statistics.
      kind: the transformation's name, for messages.
      unknown: the names of further keywords. optax passes the keywords of one member of
        a chain to all members, so they are no error by themselves.

    Raises:
      TypeError: if the state or the statistics are of the wrong type.
      ValueError: if there are no statistics.
    """
    if not isinstance(state, KFACState):
        raise TypeError(
            f"{kind} expects the state made by its init; got {shown(state)}. "
            "Call state = tx.init(params) once before the first update; a checkpoint "
            "is restored into the structure of that."
        )
    if statistics is None:
        raise ValueError(
            f"{kind} needs the step's statistics: value, grads, statistics = "
            "curvature.value_grad_and_statistics(params, ...), then tx.update(grads, "
            "state, params, statistics=statistics). For a step that gathers none "
            "pass curvature.zero_statistics(params). Expected the keyword statistics, "
            f"got {', '.join(unknown) or 'none'}."
        )
    check_statistics(statistics)


def check_state(curvature: Curvature, state: KFACState, devices: Devices) -> None:
    """Compares a state with what `init` makes for this plan, without the velocity.

    Raises:
      ValueError: if leaves are missing, unexpected, or of another shape or type.
    """
    arrays = state_arrays(curvature, devices.row_shape)
    expected = _described(arrays) | dict.fromkeys(_SCALARS, "a scalar")
    found = _described(state._replace(velocity=())._asdict())
    differing = [
        f"  {name}: expected {expected.get(name, 'nothing')}, "
        f"got {found.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if differing:
        more = len(differing) - _SHOWN
        rest = [f"  and {more} more"] if more > 0 else []
        listed = "\n".join(differing[:_SHOWN] + rest)
        raise ValueError(
            f"The state is not one that init makes for this plan:\n{listed}\n"
            "Use the state, the plan and the options that belong together, or call "
            "tx.init(params) for a new state. One that was made for another number of "
            "devices goes through whole_state and spread_state first."
        )


def state_arrays(
    curvature: Curvature, row_shape: Callable[[Shape], Shape] = lambda shape: shape
) -> dict[str, dict[str, dict[str, jax.ShapeDtypeStruct]]]:
    """The factors and inverses of a state, without values.

    Args:
      curvature: the plan.
      row_shape: the shape of the rows of an array that a device keeps.

    Returns:
      Arrays by field, layer and name.
    """
    return jax.tree.map(
        lambda x: x.update(shape=row_shape(x.shape)),
        {
            "factors": abstract_factors(curvature.groups),
            "inverses": abstract_inverses(curvature.groups),
        },
    )


_SCALARS = (
    "step",
    "batches",
    "cases",
    "damping",
    "length",
    "curvature",
    "factored_damping",
    *(f"info/{name}" for name in Info._fields),
)


def _described(tree: Any) -> dict[str, str]:
    """Types and shapes by path, such as float32[3,3]; a number's type may be any."""
    return {
        path_name(path): f"{jnp.result_type(x)}[{','.join(map(str, jnp.shape(x)))}]"
        if jnp.ndim(x)
        else "a scalar"
        for path, x in jax.tree.leaves_with_path(tree)
    }


def check_rates(learning_rate: Any, momentum: Any, norm_constraint: Any) -> None:
    """Checks the arguments that decide the length of a step."""
    modelled = isinstance(learning_rate, QuadraticModel | Refine)
    if not modelled:
        allowed = "a number, schedule or rule"
        name = "learning_rate"
        schedules.check(name, learning_rate, 0.0, _INF, symbol="α", allowed=allowed)
    automatic = isinstance(norm_constraint, str) and norm_constraint == "auto"
    if norm_constraint is not None and not automatic:
        allowed = 'a number, a schedule, "auto" or None'
        schedules.check("norm_constraint", norm_constraint, 0.0, _INF, allowed=allowed)
        if modelled:
            raise ValueError(
                "norm_constraint limits steps of a given learning rate: expected None "
                f"with {type(learning_rate).__name__}, got {shown(norm_constraint)}."
            )
    if momentum is not None and isinstance(learning_rate, Refine):
        raise ValueError(
            "Refine has no momentum, as its iterations are conjugate already: expected "
            f"momentum=None, got {shown(momentum)}."
        )
    if momentum is not None:
        allowed = "a number, a schedule or None"
        schedules.check(
            "momentum", momentum, 0.0, 1.0, symbol="μ", closed=True, allowed=allowed
        )


def check_separate(
    rule: Any, learning_rate: Any, damping: Any, schedule: RefreshSchedule, l2: float
) -> None:
    """Checks a rule for γ, and that the other rules go with it."""
    if not isinstance(rule, SeparateDamping):
        raise TypeError(
            "factored_damping must be None, for γ = √(λ+η), or a SeparateDamping rule; "
            f"got {shown(rule)}. For a γ that never changes give the rule "
            "minimum and maximum equal to its initial value."
        )
    if not isinstance(learning_rate, QuadraticModel):
        raise ValueError(
            "SeparateDamping compares its candidates by the quadratic model: expected "
            "learning_rate=QuadraticModel(); got "
            f"{type(learning_rate).__name__}. Pass that, or leave factored_damping out."
        )
    if schedule.shares > 1:
        raise ValueError(
            "SeparateDamping chooses γ by the inverses of all layers: expected a "
            f"RefreshSchedule with one share, got {schedule.shares}. Leave shares, or "
            "factored_damping, out."
        )
    inverse_every = schedule.every
    if isinstance(inverse_every, int) and rule.every % inverse_every:
        raise ValueError(
            "γ changes when inverses are refreshed: SeparateDamping's every (T2) must "
            f"be a multiple of inverse_every (T3); got {rule.every} and "
            f"{inverse_every}. Change one of them."
        )
    number = isinstance(damping, float | int)
    if rule.initial is None and number and damping + l2 == 0:
        raise ValueError(
            "SeparateDamping multiplies γ, which never leaves γ0 = √(λ0 + η) = 0; "
            "expected a positive damping or l2, got 0 for both. Give SeparateDamping "
            "an initial γ0."
        )


def check_evaluation(
    curvature: Curvature, params: Params | None, value: Any, args: Any
) -> None:
    """Raises ValueError unless the loss function can be evaluated."""
    if params is None or value is None or not isinstance(args, tuple | list):
        given = "no params" if params is None else "params"
        raise ValueError(
            "QuadraticModel, Refine and LevenbergMarquardt evaluate the loss function, "
            "and need what it takes: pass params, value= and args= (a tuple of the "
            "loss function's arguments after the parameters) to update; got "
            f"{given}, value={shown(value)}, "
            f"args={shown(args)}."
        )
    curvature.tree.leaves(params, "params")
