"""Updates that need not know how their arrays are sharded."""

import functools
from collections.abc import Callable
from typing import Any

import optax

from kfac_jax._jaxpr import axis_types
from kfac_jax.statistics.averages import Statistics


def on_any_mesh(update: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps an update, which then need not know its arrays' shardings (`axis_types`).

    Results get the shardings of the gradients and of the state. The loss function's
    arguments keep theirs.
    """

    @functools.wraps(update)
    def wrapped(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        statistics: Statistics | None = None,
        value: Any = None,
        **rest: Any,
    ) -> tuple[optax.Updates, Any]:
        params = axis_types.here(params)

        def inside(updates: Any, state: Any, statistics: Any, value: Any) -> Any:
            return update(
                updates, state, params, statistics=statistics, value=value, **rest
            )

        run = axis_types.auto(inside, (updates, state))
        return run(updates, state, statistics, value)

    return wrapped
