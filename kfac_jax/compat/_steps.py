"""What the published Optimizer stages: one step, as a pure function of arrays."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from chex import ArrayTree, Numeric, PRNGKey
from jax import Array

from kfac_jax.compat import _norms, _options
from kfac_jax.compat._adaptation import Adaptation, Made
from kfac_jax.compat._function import Function
from kfac_jax.compat._native_blocks import native_blocks
from kfac_jax.compat._registering import warn_of_lost_examples
from kfac_jax.compat.utils import default_batch_size_extractor
from kfac_jax.curvature import Curvature, make_curvature
from kfac_jax.devices import ALONE, Devices, OverAxis
from kfac_jax.optimization.state import Info, KFACState
from kfac_jax.optimization.transform import kfac
from kfac_jax.plan.group import Factors
from kfac_jax.rules import LevenbergMarquardt, QuadraticModel, RefreshSchedule
from kfac_jax.statistics import averages

Params = optax.Params
Batch = ArrayTree
FuncState = ArrayTree | None
Rates = Sequence[Array | None]
"""Learning rate, momentum and damping, None where a rule chooses."""


class EstimatorState(NamedTuple):
    """What is known about the curvature."""

    weight: Array  # [], the sum of the weights in the factors' averages
    batches: Array  # [] int32, how many batches are in them
    factors: Factors  # by layer name, moving averages
    inverses: Factors  # by layer name, of the damped factors
    info: Info  # of the last step


class State(NamedTuple):
    """The Optimizer's state: a plain tree of arrays.

    With `multi_device` each has a leading axis of devices.
    """

    velocities: Params  # like the parameters, the last update
    estimator_state: EstimatorState
    damping: Array  # [], λ: of the next step if it is adapted, else of the last
    data_seen: Array  # [] int, cases so far
    step_counter: Array  # [] int32, steps so far


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """The functions to stage.

    Attributes:
      function: the user's function.
      process: what is done to each batch.
      size: the number of cases in a batch.
      schedules: functions of the step for learning rate, momentum and damping, or None.
      modelled: whether the quadratic model chooses the learning rate.
      adaptation: how λ is adapted.
      ema: ε.
      every: in how many steps statistics are gathered.
      inverse_every: T3.
      plan_options: for `make_curvature`.
      axis: the name of the axis of devices, or None.
      norms: what to tell about the step's vectors.
      plans: those made so far, by the shapes of the arguments.
    """

    function: Function
    process: Callable[[Batch], Batch]
    size: Callable[[Batch], Numeric]
    schedules: Sequence[Callable[..., Numeric] | None]
    modelled: bool
    adaptation: Adaptation
    ema: float
    every: int
    inverse_every: int
    plan_options: Mapping[str, Any]
    axis: str | None
    norms: _norms.Norms
    plans: dict[Any, Curvature] = dataclasses.field(default_factory=dict)

    # ---------------------------------------------------------------- what is staged

    def init(
        self, params: Params, rng: PRNGKey, batch: Batch, func_state: FuncState
    ) -> State:
        """The state before the first step."""
        curvature = self._plan(params, rng, self.process(batch), func_state)
        rule = self.adaptation.rule
        damping = jnp.asarray(0.0 if rule is None else rule.initial, float)
        weight = jnp.zeros((), float)
        rates = [jnp.zeros(()), jnp.zeros(()), damping]
        start: Any = self._transform(curvature, rates, weight).init(params)
        return _divided(start, weight, damping, jnp.zeros((), int))

    def step(
        self,
        params: Params,
        state: State,
        rng: PRNGKey,
        batch: Batch,
        func_state: FuncState,
        rates: Rates,
    ) -> tuple[Params, State, FuncState, dict[str, Any]]:
        """One step; returns what it changes, and what it did."""
        size = self.size(batch) * (jax.lax.axis_size(self.axis) if self.axis else 1)
        batch = self.process(batch)
        rng, key = self._keys(rng)
        curvature = self._plan(params, rng, batch, func_state)
        value, statistics = self._value_and_statistics(
            curvature, params, state, batch, key
        )
        loss, (func_state, aux, grads) = value
        loss, aux, grads = self._averaged((loss, aux, grads))
        rates = self._scheduled(rates, state)
        weight = state.estimator_state.weight
        updates: Any
        after: Any
        updates, after = self._transform(curvature, rates, weight).update(
            grads,
            _joined(state),
            params,
            statistics=statistics,
            value=loss,
            args=(batch,),
        )
        made = Made(params, batch, loss, grads, updates)
        measured = self.adaptation(curvature, made, after, self._devices)
        new: Any = optax.apply_updates(params, updates)
        weight = _weight(state.estimator_state, after.batches, self.ema)
        seen = state.data_seen + size
        stats = {
            "loss": loss,
            "batch_size": jnp.asarray(size, jnp.int32),
            "data_seen": seen,
            "step": after.step,
            "learning_rate": after.info.learning_rate if self.modelled else rates[0],
            "momentum": after.info.momentum,
            "damping": after.info.damping,
            "precon_damping": after.info.damping,
            "new_loss": measured.new_loss,
            "quad_model_change": measured.change,
            "rho": measured.rho,
        }
        stats |= self.norms(curvature, after, rates[0], new, grads, updates)
        if self.function.has_aux:
            stats["aux"] = aux
        return new, _divided(after, weight, measured.damping, seen), func_state, stats

    def burn_in(
        self,
        params: Params,
        state: State,
        rng: PRNGKey,
        batch: Batch,
        func_state: FuncState,
    ) -> tuple[State, Array]:
        """Lets the factors' averages see a batch, for as much as any other before."""
        next_key, rng = jax.random.split(rng)
        rng, key = self._keys(rng)
        batch = self.process(batch)
        curvature = self._plan(params, rng, batch, func_state)
        old = state.estimator_state
        _, statistics = curvature.value_and_statistics(
            params, batch, rng=key, factors=old.factors
        )
        averaged = averages.average(
            curvature.groups,
            old.factors,
            statistics,
            old.batches + 1,
            1.0,
            self._devices,
        )
        batches = old.batches + averaged.informed.astype(old.batches.dtype)
        new = old._replace(
            weight=_weight(old, batches, 1.0),
            batches=batches,
            factors=averaged.factors,
        )
        return state._replace(estimator_state=new), next_key

    # ------------------------------------------------------------------------ pieces

    @property
    def _devices(self) -> Devices:
        return ALONE if self.axis is None else OverAxis(self.axis)

    def _plan(
        self, params: Params, rng: PRNGKey, batch: Batch, func_state: FuncState
    ) -> Curvature:
        """The plan for such arguments, with all but the batch bound to its loss."""
        arguments = self.function.arguments(rng, batch, func_state)
        leaves, treedef = jax.tree.flatten((params, arguments))
        key = treedef, *((jnp.shape(x), str(jnp.result_type(x))) for x in leaves)
        if key not in self.plans:
            # of shapes: whether or not it is staged, losses are not compared
            shapes = jax.eval_shape(lambda *args: args, params, *arguments)
            plan = make_curvature(
                self.function, *shapes, has_aux=True, **self.plan_options
            )
            if not self.plans:
                warn_of_lost_examples(plan)
            self.plans[key] = plan

        def bound(params: Params, batch: Batch) -> Any:
            own = self.function.arguments(rng, batch, func_state)
            return self.function(params, *own)

        return dataclasses.replace(self.plans[key], loss_fn=bound)

    def _value_and_statistics(
        self,
        curvature: Curvature,
        params: Params,
        state: State,
        batch: Batch,
        key: PRNGKey,
    ) -> Any:
        """The loss function's value and, if it is time, statistics."""

        def gathered() -> Any:
            factors = state.estimator_state.factors
            return curvature.value_and_statistics(
                params, batch, rng=key, factors=factors
            )

        def plain() -> Any:
            value = curvature.loss_fn(params, batch)
            return value, curvature.zero_statistics(params)

        if self.every == 1:
            return gathered()
        return jax.lax.cond(state.step_counter % self.every == 0, gathered, plain)

    def _keys(self, rng: PRNGKey) -> tuple[PRNGKey, PRNGKey]:
        """For the function, and for samples, which differ between devices."""
        own, key = jax.random.split(rng)
        if self.axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(self.axis))
        return own, key

    def _averaged(self, tree: Any) -> Any:
        """Means over devices; keys stay each device's own."""
        axis = self.axis
        if axis is None:
            return tree

        def mean(x: Any) -> Any:
            is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended)
            return x if is_key else jax.lax.pmean(x, axis)

        return jax.tree.map(mean, tree)

    def _scheduled(self, rates: Rates, state: State) -> Rates:
        """The rates that were given, or that schedules or the rule for λ choose."""
        chosen: list[Any] = list(rates)
        for i, schedule in enumerate(self.schedules):
            if schedule is not None:
                seen = {"data_seen": state.data_seen}
                wanted = "data_seen" in inspect.signature(schedule).parameters
                step = jnp.asarray(state.step_counter, int)
                chosen[i] = schedule(step, **(seen if wanted else {}))
        if self.adaptation.rule is not None:
            chosen[2] = state.damping
        return [None if x is None else jnp.asarray(x, float) for x in chosen]

    def _transform(
        self, curvature: Curvature, rates: Rates, weight: Array
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation of one step."""
        learning_rate, momentum, damping = rates
        rule = learning_rate
        if self.modelled:
            rule = QuadraticModel(largest_momentum=None, longest=None)
        assert rule is not None
        assert damping is not None
        return kfac(
            curvature,
            rule,
            momentum,
            damping,
            norm_constraint=self.norms.constraint,
            decay=self.ema * weight / (self.ema * weight + 1.0),
            inverse_every=RefreshSchedule(self.inverse_every, phase=1, warm_up=0),
            devices=None if self.axis is None else OverAxis(self.axis),
        )


def _weight(old: EstimatorState, batches: Array, ema: float) -> Array:
    """The sum of weights, once there are as many batches."""
    return jnp.where(batches > old.batches, ema * old.weight + 1.0, old.weight)


def _divided(state: KFACState, weight: Array, damping: Array, seen: Array) -> State:
    """The Optimizer's state from the transformation's."""
    estimator = EstimatorState(
        weight, state.batches, state.factors, state.inverses, state.info
    )
    return State(state.velocity, estimator, damping, seen, state.step)


def _joined(state: State) -> KFACState:
    """The transformation's state from the Optimizer's."""
    known = state.estimator_state
    return KFACState(
        step=state.step_counter,
        batches=known.batches,
        cases=jnp.zeros((), float),  # all batches count alike
        factors=known.factors,
        inverses=known.inverses,
        damping=state.damping,
        length=jnp.zeros((), float),
        curvature=jnp.zeros((), float),
        factored_damping=known.info.factored_damping,
        velocity=state.velocities,
        info=known.info,
    )


def from_options(options: Mapping[str, Any]) -> Steps:
    """What to stage for the options of `Optimizer`.

    Args:
      options: the constructor's arguments by name.

    Returns:
      The functions.
    """
    rule = None
    interval = options["damping_adaptation_interval"]
    if options["use_adaptive_damping"]:
        rule = LevenbergMarquardt(
            float(options["initial_damping"]),
            every=interval,
            factor=options["damping_adaptation_decay"] ** interval,
            minimum=options["min_damping"],
            maximum=options["max_damping"],
            lower=options["damping_lower_threshold"],
            upper=options["damping_upper_threshold"],
        )
    return Steps(
        function=_function(options),
        process=options["batch_process_func"] or (lambda batch: batch),
        size=options["batch_size_extractor"] or default_batch_size_extractor,
        schedules=[options[schedule] for _, _, schedule in _options.RATES],
        modelled=options["use_adaptive_learning_rate"],
        adaptation=Adaptation(
            rule=rule,
            modelled=options["use_adaptive_learning_rate"],
            exact=options["always_use_exact_qmodel_for_damping_adjustment"],
            damped=options["include_damping_in_quad_change"],
            unknown=options["invalid_metric_value"],
        ),
        ema=options["curvature_ema"],
        every=options["curvature_update_period"],
        inverse_every=options["inverse_update_period"],
        plan_options={
            "estimation_mode": options["estimation_mode"] or "ggn_curvature_prop",
            "blocks": native_blocks(options["layer_tag_to_block_ctor"]),
            "num_samples": options["num_estimator_samples"],
            "l2": float(options["l2_reg"]),
            "independent_cases": True,
        },
        axis=options["pmap_axis_name"] if options["multi_device"] else None,
        norms=_norms.Norms(
            constraint=options["norm_constraint"],
            total=options["include_norms_in_stats"],
            each=options["include_per_param_norms_in_stats"],
        ),
    )


def _function(options: Mapping[str, Any]) -> Function:
    """The user's function for the options of `Optimizer`."""
    generic = _options.generic_only(
        options["auto_register_kwargs"], options["patterns_to_skip"]
    )
    return Function(
        value_and_grad=options["value_and_grad_func"],
        has_aux=options["value_func_has_aux"],
        has_state=options["value_func_has_state"],
        has_rng=options["value_func_has_rng"],
        for_estimator=options["value_func_for_estimator"],
        generic_only=options["register_only_generic"] or generic,
    )
