"""The preconditioner for optax, over a plan."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree, Numeric, PRNGKey
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax.compat import _options
from kfac_jax.compat._block_diagonal import BlockDiagonalCurvature, BlockDiagonalState
from kfac_jax.compat.utils import (
    default_batch_size_extractor,
    inner_product,
    scalar_mul,
)
from kfac_jax.plan.modes import MODES

_REFUSED = {
    "curvature_update_period": (
        1,
        "Use scale_by_kfac, with curvature.zero_statistics(params) in steps that are "
        "to gather none.",
    ),
    "norm_to_scale_identity_weight_per_block": (
        None,
        "kfac_jax adds the same λ I to each block.",
    ),
}

_FLAGS = ("use_exact_inverses", "use_sqrt_inv", "register_only_generic")


class OptaxPreconditionState(NamedTuple):
    """The state of `OptaxPreconditioner`."""

    # the existing library's name, which hides a method of tuples
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    # [] int32, how often `increment_count` was called
    estimator_state: BlockDiagonalState


@dataclasses.dataclass(eq=False, repr=False)
class OptaxPreconditioner:
    """A preconditioner whose state is updated apart from the optax transformation.

    The native way is `kfac_jax.scale_by_kfac`, whose state is optax's.

    Numbers are those of the existing library in exact modes. Different are:
    `damping_schedule` works; `pmap_axis_name` need not be mapped; with
    `use_exact_inverses` or `use_sqrt_inv` factors are decomposed in each update.

    What is not offered raises an error that says what to do. Hints about how to compute
    the same are accepted and not needed.

    Attributes:
      value_func: registers its loss; what it returns does not matter.
      l2_reg: added to the damping.
      damping: λ; or
      damping_schedule: λ as a function of the count.
      norm_constraint: the largest `vᵀ C⁻¹ v` of an update v, or None.
      estimation_mode: as of `make_curvature`.
      curvature_ema: what the weight of earlier batches is multiplied by.
      inverse_update_period: how many counts inverses are kept for.
      use_exact_inverses: whether λ is added to the blocks, or to their factors with π.
      use_sqrt_inv: whether to multiply by `C^(-1/2)`.
      register_only_generic: whether all parameters get diagonal blocks.
      patterns_to_skip: accepted with a warning; there are none to skip.
      auto_register_kwargs: as of `BlockDiagonalCurvature`.
      layer_tag_to_block_ctor: as of `BlockDiagonalCurvature`.
      pmap_axis_name: the devices to average statistics over, where it is mapped.
      num_samples: how many samples sampled modes average over.
      estimator: the estimator, whose plan `init` makes.
    """

    value_func: Callable[..., Any]
    l2_reg: Numeric = 0.0
    damping: Numeric | None = None
    damping_schedule: Callable[..., Numeric] | None = None
    norm_constraint: Numeric | None = None
    estimation_mode: str | None = "fisher_gradients"
    curvature_ema: Numeric = 0.95
    curvature_update_period: int = 1
    inverse_update_period: int = 5
    use_exact_inverses: bool = False
    use_sqrt_inv: bool = False
    register_only_generic: bool = False
    patterns_to_skip: Sequence[str] = ()
    auto_register_kwargs: Mapping[str, Any] | None = None
    layer_tag_to_block_ctor: Mapping[str, Any] | None = None
    pmap_axis_name: str | None = "kfac_axis"
    batch_size_extractor: Callable[..., Any] = default_batch_size_extractor
    distributed_inverses: bool = True
    distributed_precon_apply: bool = True
    num_samples: int = 1
    should_vmap_samples: bool = False
    norm_to_scale_identity_weight_per_block: None = None
    estimator: BlockDiagonalCurvature = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Checks the options; `init` makes the plan."""
        arguments.function("value_func", self.value_func)
        _options.refuse("OptaxPreconditioner", _REFUSED, vars(self))
        self._check_numbers()
        for name in _FLAGS:
            arguments.flag(name, getattr(self, name))
        if self.estimation_mode is not None:
            arguments.choice("estimation_mode", self.estimation_mode, MODES)
        self._power = -0.5 if self.use_sqrt_inv else -1.0
        registering = {
            "register_only_generic": self.register_only_generic,
            "patterns_to_skip": self.patterns_to_skip,
        }
        registering |= _options.as_mapping(
            "auto_register_kwargs", self.auto_register_kwargs
        )
        self.estimator = BlockDiagonalCurvature(
            self.value_func,
            default_estimation_mode=self.estimation_mode,
            layer_tag_to_block_ctor=self.layer_tag_to_block_ctor,
            num_samples=self.num_samples,
            auto_register_kwargs=registering,
        )

    def _check_numbers(self) -> None:
        arguments.callable_or_none("damping_schedule", self.damping_schedule)
        if (self.damping is None) == (self.damping_schedule is None):
            raise ValueError(
                "OptaxPreconditioner expects one of damping and damping_schedule; got "
                f"{self.damping!r} and {self.damping_schedule!r}."
            )
        for name in ("l2_reg", "damping", "norm_constraint", "curvature_ema"):
            value = getattr(self, name)
            if value is not None or name in ("l2_reg", "curvature_ema"):
                arguments.number(name, value, arrays=True)
                arguments.within(name, value, 0.0, float("inf"))
        arguments.within("curvature_ema", self.curvature_ema, 0.0, 1.0, closed=True)
        period = self.inverse_update_period
        arguments.integer("inverse_update_period", period, arrays=True)
        arguments.within("inverse_update_period", period, 1, float("inf"))

    def init(
        self, func_args: Sequence[ArrayTree], rng: PRNGKey
    ) -> OptaxPreconditionState:
        """Makes the plan and an empty state.

        Args:
          func_args: arguments of `value_func`, the parameters first.
          rng: accepted, not used.

        Returns:
          The state.
        """
        state = self.estimator.init(rng, func_args, None, self._power)
        return OptaxPreconditionState(jnp.zeros((), jnp.int32), state)

    def maybe_update(
        self,
        state: OptaxPreconditionState,
        func_args: Sequence[ArrayTree],
        rng: PRNGKey,
    ) -> OptaxPreconditionState:
        """Takes in a batch, and renews the inverses if it is time.

        Args:
          state: the state.
          func_args: arguments of `value_func`, the parameters first.
          rng: a key, for sampled modes.

        Returns:
          The state.
        """
        weight = self.get_identity_weight(state)
        updated = self.estimator.update_curvature_matrix_estimate(
            state.estimator_state,
            self.curvature_ema,
            1.0,
            weight,
            0,
            rng,
            func_args,
            pmap_axis_name=self.pmap_axis_name,
        )

        def renewed() -> BlockDiagonalState:
            return self.estimator.update_cache(updated, weight, None, self._power)

        due = state.count % self.inverse_update_period == 0
        return state._replace(
            estimator_state=jax.lax.cond(due, renewed, lambda: updated)
        )

    def increment_count(self, state: OptaxPreconditionState) -> OptaxPreconditionState:
        """Counts a step."""
        _check(state)
        return state._replace(count=state.count + 1)

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

        def init(params: optax.Params) -> optax.EmptyState:
            return optax.EmptyState()

        def update(
            updates: Any,
            state: optax.OptState,
            params: optax.Params | None = None,
            *,
            precond_state: OptaxPreconditionState | None = None,
            **extra_args: Any,
        ) -> tuple[ArrayTree, optax.OptState]:
            if not isinstance(precond_state, OptaxPreconditionState):
                raise ValueError(
                    "The transformation of OptaxPreconditioner expects "
                    "update(..., precond_state=state), with what maybe_update "
                    f"returned; got {arguments.shown(precond_state)}."
                )
            return multiply(updates, precond_state), state

        return optax.GradientTransformationExtraArgs(init, update)

    def get_identity_weight(self, state: OptaxPreconditionState) -> Numeric:
        """λ, with the weight of the penalty."""
        _check(state)
        schedule = self.damping_schedule
        damping = self.damping if schedule is None else schedule(state.count)
        assert damping is not None
        return damping + self.l2_reg

    def apply(self, updates: ArrayTree, state: OptaxPreconditionState) -> ArrayTree:
        """Multiplies by the cached inverse, and scales down to the norm constraint."""
        weight = self.get_identity_weight(state)
        moved = self.estimator.multiply_matpower(
            state.estimator_state,
            updates,
            weight,
            self._power,
            self.use_exact_inverses,
            use_cached=True,
        )
        if self.norm_constraint is None:
            return moved
        square = inner_product(updates, moved)
        scale = jnp.minimum(1.0, jnp.sqrt(self.norm_constraint / square))
        return scalar_mul(moved, scale)

    def multiply_curvature(
        self, updates: ArrayTree, state: OptaxPreconditionState
    ) -> ArrayTree:
        """Multiplies by the damped curvature itself."""
        weight = self.get_identity_weight(state)
        return self.estimator.multiply_matpower(
            state.estimator_state,
            updates,
            weight,
            1,
            self.use_exact_inverses,
            use_cached=False,
        )

    def __getattr__(self, name: str) -> Any:
        """Says where to find what is not here."""
        raise AttributeError(
            f"OptaxPreconditioner has no {name!r} in kfac_jax; expected one of init, "
            "maybe_update, increment_count, as_gradient_transform. For several batches "
            "a step add up their Statistics, and call update of kfac_jax.scale_by_kfac "
            "once. The estimator is .estimator, and its plan .estimator.curvature."
        )


def _check(state: Any) -> None:
    arguments.instance(
        "state",
        state,
        OptaxPreconditionState,
        "what init or maybe_update of the preconditioner returned",
    )
