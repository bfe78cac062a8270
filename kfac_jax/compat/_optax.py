"""The preconditioner for optax, over a plan."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax.compat import _options
from kfac_jax.compat._block_diagonal import BlockDiagonalCurvature, BlockDiagonalState
from kfac_jax.compat._devices import in_pmap
from kfac_jax.compat.utils import (
    default_batch_size_extractor,
    inner_product,
    scalar_mul,
)
from kfac_jax.plan.modes import MODES


class OptaxPreconditionState(NamedTuple):
    """The state of `OptaxPreconditioner`."""

    # the existing library's name, which hides a method of tuples
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    # [] int32, how often `increment_count` was called
    estimator_state: BlockDiagonalState


class OptaxPreconditioner:
    """A preconditioner whose state is updated apart from the optax transformation.

    The native way is `kfac_jax.scale_by_kfac`, whose state is optax's.

    Numbers are those of the existing library in exact modes. Different are:
    `damping_schedule` works; `pmap_axis_name` need not be mapped; with
    `use_exact_inverses` or `use_sqrt_inv` factors are decomposed in each `apply`.

    Args:
      value_func: registers its loss; what it returns does not matter.
      l2_reg: added to the damping.
      damping: λ; or
      damping_schedule: λ as a function of the count.
      norm_constraint: the largest `vᵀ C⁻¹ v` of an update v, or None.
      estimation_mode: as of `make_curvature`.
      curvature_ema: what the weight of earlier batches is multiplied by.
      curvature_update_period: only 1.
      inverse_update_period: how many counts inverses are kept for.
      use_exact_inverses: whether λ is added to the blocks, or to their factors with π.
      use_sqrt_inv: whether to multiply by `C^(-1/2)`.
      register_only_generic: whether all parameters get diagonal blocks.
      patterns_to_skip: accepted with a warning; there are none to skip.
      auto_register_kwargs: as of `BlockDiagonalCurvature`.
      layer_tag_to_block_ctor: as of `BlockDiagonalCurvature`.
      pmap_axis_name: the devices to average statistics over, where it is mapped.
      batch_size_extractor: accepted; it is the leading axis of the registered loss.
      distributed_inverses: accepted, without effect.
      distributed_precon_apply: accepted, without effect.
      num_samples: how many samples sampled modes average over.
      should_vmap_samples: accepted, without effect.
      norm_to_scale_identity_weight_per_block: only None.

    Raises:
      ValueError: if an option is not supported, or not one of both dampings is given.
    """

    def __init__(
        self,
        value_func: Callable[..., Any],
        l2_reg: Any = 0.0,
        damping: float | None = None,
        damping_schedule: Callable[..., Any] | None = None,
        norm_constraint: Any = None,
        estimation_mode: str | None = "fisher_gradients",
        curvature_ema: Any = 0.95,
        curvature_update_period: int = 1,
        inverse_update_period: int = 5,
        use_exact_inverses: bool = False,
        use_sqrt_inv: bool = False,
        register_only_generic: bool = False,
        patterns_to_skip: Sequence[str] = (),
        auto_register_kwargs: Mapping[str, Any] | None = None,
        layer_tag_to_block_ctor: Mapping[str, Any] | None = None,
        pmap_axis_name: str | None = "kfac_axis",
        batch_size_extractor: Callable[[Any], Any] = default_batch_size_extractor,
        distributed_inverses: bool = True,
        distributed_precon_apply: bool = True,
        num_samples: int = 1,
        should_vmap_samples: bool = False,
        norm_to_scale_identity_weight_per_block: str | None = None,
    ) -> None:
        """Keeps the options; `init` makes the plan."""
        _check_types(value_func, l2_reg, damping, damping_schedule, norm_constraint)
        if (damping is None) == (damping_schedule is None):
            raise ValueError(
                "OptaxPreconditioner expects one of damping and damping_schedule; got "
                f"{damping!r} and {damping_schedule!r}."
            )
        if estimation_mode is not None:
            arguments.choice("estimation_mode", estimation_mode, MODES)
        if norm_to_scale_identity_weight_per_block is not None:
            raise ValueError(
                "norm_to_scale_identity_weight_per_block is expected to be None; got "
                f"{arguments.shown(norm_to_scale_identity_weight_per_block)}. "
                "kfac_jax adds the same λ I to each block."
            )
        arguments.number("curvature_ema", curvature_ema, arrays=True)
        arguments.within("curvature_ema", curvature_ema, 0.0, 1.0, closed=True)
        arguments.whole("inverse_update_period", inverse_update_period, arrays=True)
        arguments.within(
            "inverse_update_period", inverse_update_period, 1, float("inf")
        )
        for name, value in (
            ("use_exact_inverses", use_exact_inverses),
            ("use_sqrt_inv", use_sqrt_inv),
            ("register_only_generic", register_only_generic),
        ):
            arguments.flag(name, value)
        arguments.number("curvature_update_period", curvature_update_period)
        if curvature_update_period != 1:
            raise ValueError(
                "curvature_update_period is expected to be 1; got "
                f"{arguments.shown(curvature_update_period)}. Use scale_by_kfac, with "
                "curvature.zero_statistics(params) in steps that are to gather none."
            )
        options = {
            "register_only_generic": register_only_generic,
            "patterns_to_skip": patterns_to_skip,
            **_options.as_mapping("auto_register_kwargs", auto_register_kwargs),
        }
        self._damping = damping if damping_schedule is None else damping_schedule
        self._l2_reg, self._decay = l2_reg, curvature_ema
        self._norm_constraint = norm_constraint
        self._period = inverse_update_period
        self._exact, self._power = use_exact_inverses, -0.5 if use_sqrt_inv else -1
        self._norm = norm_to_scale_identity_weight_per_block
        self.pmap_axis_name = pmap_axis_name
        self.estimator = BlockDiagonalCurvature(
            value_func,
            default_estimation_mode=estimation_mode,
            layer_tag_to_block_ctor=layer_tag_to_block_ctor,
            num_samples=num_samples,
            auto_register_kwargs=options,
        )

    def init(self, func_args: Sequence[Any], rng: Array) -> OptaxPreconditionState:
        """Makes the plan and an empty state.

        Args:
          func_args: arguments of `value_func`, the parameters first.
          rng: accepted, not used.

        Returns:
          The state.
        """
        state = self.estimator.init(rng, func_args, None, self._power)
        return OptaxPreconditionState(jnp.zeros((), jnp.int32), state)

    def get_identity_weight(self, state: OptaxPreconditionState) -> Any:
        """λ, with the weight of the penalty."""
        _check_state(state)
        damping = self._damping
        now = damping(state.count) if callable(damping) else damping
        return now + self._l2_reg

    def maybe_update(
        self, state: OptaxPreconditionState, func_args: Sequence[Any], rng: Array
    ) -> OptaxPreconditionState:
        """Takes in a batch, and renews the inverses if it is time.

        Args:
          state: the state.
          func_args: arguments of `value_func`.
          rng: a key, for sampled modes.

        Returns:
          The state.
        """
        updated = self._updated(state, func_args, rng, self._decay, self.pmap_axis_name)
        return self.maybe_update_inverse_cache(updated)

    def maybe_update_estimator_curvature(
        self,
        state: OptaxPreconditionState,
        func_args: Sequence[Any],
        rng: Array,
        decay_old_ema: Any = True,
        sync: Any = True,
    ) -> OptaxPreconditionState:
        """Takes in a batch, and leaves the inverses alone.

        For several batches a step: of those all but the first have
        `decay_old_ema=False`, and all but the last may have `sync=False`.

        Args:
          state: the state.
          func_args: arguments of `value_func`.
          rng: a key, for sampled modes.
          decay_old_ema: whether the weight of earlier batches decays; it may be traced.
          sync: whether to average all that was gathered over the devices, where that
            axis is mapped; it may be traced.

        Returns:
          The state.
        """
        decay = jnp.where(_condition("decay_old_ema", decay_old_ema), self._decay, 1.0)
        due = _condition("sync", sync)
        updated = self._updated(state, func_args, rng, decay, None)
        if not in_pmap(self.pmap_axis_name):
            return updated
        if isinstance(sync, Array):
            return jax.lax.cond(due, self.sync_estimator_state, lambda x: x, updated)
        return self.sync_estimator_state(updated) if sync else updated

    def maybe_update_inverse_cache(
        self, state: OptaxPreconditionState
    ) -> OptaxPreconditionState:
        """Renews the inverses if it is time."""
        weight = self.get_identity_weight(state)

        def renew(estimator_state: BlockDiagonalState) -> BlockDiagonalState:
            return self.estimator.update_cache(
                estimator_state, weight, None, self._power, False, None, self._norm
            )

        due = self.should_update_inverse_cache(state)
        renewed = jax.lax.cond(due, renew, lambda x: x, state.estimator_state)
        return state._replace(estimator_state=renewed)

    def should_update_estimator_curvature(
        self, state: OptaxPreconditionState
    ) -> bool | Array:
        """Whether statistics are gathered at this count: always."""
        _check_state(state)
        return True

    def should_update_inverse_cache(
        self, state: OptaxPreconditionState
    ) -> bool | Array:
        """Whether inverses are renewed at this count."""
        _check_state(state)
        return state.count % self._period == 0

    def should_sync_estimate_curvature(
        self, state: OptaxPreconditionState
    ) -> bool | Array:
        """Whether devices need the same curvature at this count, for its inverses."""
        return self.should_update_inverse_cache(state)

    def sync_estimator_state(
        self, state: OptaxPreconditionState
    ) -> OptaxPreconditionState:
        """Averages the curvature over devices, where that axis is mapped."""
        _check_state(state)
        synced = self.estimator.sync(state.estimator_state, self.pmap_axis_name)
        return state._replace(estimator_state=synced)

    def _updated(
        self,
        state: OptaxPreconditionState,
        func_args: Sequence[Any],
        rng: Array,
        decay: Any,
        axis: str | None,
    ) -> OptaxPreconditionState:
        _check_state(state)
        updated = self.estimator.update_curvature_matrix_estimate(
            state.estimator_state,
            decay,
            1.0,
            self.get_identity_weight(state),
            None,
            rng,
            func_args,
            pmap_axis_name=axis,
        )
        return state._replace(estimator_state=updated)

    def increment_count(self, state: OptaxPreconditionState) -> OptaxPreconditionState:
        """Counts a step."""
        _check_state(state)
        return state._replace(count=state.count + 1)

    def apply(self, updates: Any, state: OptaxPreconditionState) -> Any:
        """Multiplies by the cached inverse, and scales down to the norm constraint."""
        _check_state(state)
        moved = self.estimator.multiply_matpower(
            state.estimator_state,
            updates,
            self.get_identity_weight(state),
            self._power,
            self._exact,
            True,
        )
        if self._norm_constraint is None:
            return moved
        square = inner_product(updates, moved)
        scale = jnp.minimum(1.0, jnp.sqrt(self._norm_constraint / square))
        return scalar_mul(moved, scale)

    def multiply_curvature(self, updates: Any, state: OptaxPreconditionState) -> Any:
        """Multiplies by the damped curvature itself."""
        _check_state(state)
        weight = self.get_identity_weight(state)
        return self.estimator.multiply(
            state.estimator_state, updates, weight, self._exact, False
        )

    def as_gradient_transform(
        self, use_inverse: bool = True
    ) -> optax.GradientTransformationExtraArgs:
        """What `apply`, or `multiply_curvature`, does as an optax transformation.

        Args:
          use_inverse: whether to divide by the curvature, or multiply.

        Returns:
          A transformation; its update needs `precond_state=`, the state of this.
        """
        multiply = self.apply if use_inverse else self.multiply_curvature

        def init(params: Any) -> optax.EmptyState:
            return optax.EmptyState()

        def update(
            updates: Any,
            state: Any,
            params: Any = None,
            *,
            precond_state: OptaxPreconditionState | None = None,
            **extra_args: Any,
        ) -> tuple[Any, Any]:
            if not isinstance(precond_state, OptaxPreconditionState):
                raise ValueError(
                    "The transformation of OptaxPreconditioner expects "
                    "update(..., precond_state=state), with what maybe_update "
                    f"returned; got {arguments.shown(precond_state)}."
                )
            return multiply(updates, precond_state), state

        return optax.GradientTransformationExtraArgs(init, update)


def _condition(name: str, value: Any) -> Array:
    """A bool, or an array of one."""
    if not isinstance(value, bool):
        array = arguments.real(name, value)
        if array.shape or jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be one bool, or an array of one; got "
                f"{arguments.shown(value)}."
            )
    return jnp.asarray(value, bool)


def _check_types(
    value_func: Any,
    l2_reg: Any,
    damping: Any,
    damping_schedule: Any,
    norm_constraint: Any,
) -> None:
    arguments.function("value_func", value_func)
    arguments.callable_or_none("damping_schedule", damping_schedule)
    arguments.number("l2_reg", l2_reg, arrays=True)
    arguments.within("l2_reg", l2_reg, 0.0, float("inf"))
    for name, value in (("damping", damping), ("norm_constraint", norm_constraint)):
        if value is not None:
            arguments.number(name, value, arrays=True)
            arguments.within(name, value, 0.0, float("inf"))


def _check_state(state: Any) -> None:
    arguments.instance(
        "state",
        state,
        OptaxPreconditionState,
        "what init or maybe_update of the preconditioner returned",
    )
