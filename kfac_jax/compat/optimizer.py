"""`Optimizer`: a front for programs written for the published JAX K-FAC library.

It has their constructor, `init` and `step`, over `make_curvature` and `kfac`. New
programs are better served by those two; the page on migration says by which arguments.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree, Numeric, PRNGKey
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax.compat import _options, _steps
from kfac_jax.compat._devices import as_mapped, get_first
from kfac_jax.curvature import Curvature

Params = ArrayTree
Batch = ArrayTree
FuncState = ArrayTree | None


@dataclasses.dataclass(eq=False, repr=False)
class Optimizer:
    """K-FAC with the constructor, `init` and `step` of the published JAX K-FAC library.

    Programs written for its releases 0.0.7 and 0.0.8 run unchanged. What differs:

    * Layers are found by dataflow: no patterns are needed. `print` the optimizer, once
      it is initialised, for what each parameter got.
    * `init` and `step` stage themselves (by `jit`, with `multi_device` by `pmap`),
      compile once, and donate nothing, as the caller may still hold it. They also work
      inside the caller's `jit` and `scan`.
    * `step(batch=...)` works with any `num_burnin_steps`. Burn-in takes batches of its
      own from `data_iterator`; with `batch` there is none.
    * An update that is not finite is not made, and counted in
      `state.estimator_state.info.skipped_updates`.
    * What cannot be honoured raises an error that names the option and what to do.
      Hints about how to compute the same (`distributed_inverses`,
      `distributed_precon_apply`, `should_vmap_estimator_samples`) and about setting
      attributes are accepted and not needed. Options stay as they were given.

    Attributes:
      value_and_grad_func: `f(params[, func_state][, rng], batch) -> (value, grads)`
        with value a loss, `(loss, aux)`, `(loss, state)` or `(loss, (state, aux))`. A
        loss is registered in it, at any depth. The gradient need not be that of the
        value.
      l2_reg: η of the penalty `η/2 ‖θ‖²` that the loss itself includes.
      value_func_has_aux: see `value_and_grad_func`.
      value_func_has_state: see there.
      value_func_has_rng: see there.
      value_func_for_estimator: a function with the same arguments whose registered loss
        is used instead of those in `value_and_grad_func`; what it returns is not.
      use_adaptive_learning_rate: the quadratic model chooses α, or
      learning_rate_schedule: a function of the step from 0 (and `data_seen`) does, or
        the argument of `step`. So with the next four.
      use_adaptive_momentum: the quadratic model chooses μ, too.
      momentum_schedule: μ.
      use_adaptive_damping: the Levenberg-Marquardt rule chooses λ.
      damping_schedule: λ.
      initial_damping: λ0 of the rule.
      min_damping: its smallest λ.
      max_damping: its largest.
      include_damping_in_quad_change: whether ρ's denominator includes ½ λ ‖δ‖².
      damping_adaptation_interval: T1.
      damping_adaptation_decay: `ω1 = decay ** T1`.
      damping_lower_threshold: λ rises where ρ is below.
      damping_upper_threshold: λ falls where ρ is above.
      always_use_exact_qmodel_for_damping_adjustment: predict with the exact curvature
        also where the learning rate is given; otherwise the approximation predicts.
      norm_constraint: the largest `α² Δᵀ ∇h`; only with a given learning rate.
      num_burnin_steps: how many batches of `data_iterator` the curvature sees before
        the first step.
      estimation_mode: as in `make_curvature`; None for "ggn_curvature_prop".
      curvature_ema: ε; batches count ε, ε², ... times as much as the latest.
      curvature_update_period: in steps.
      inverse_update_period: T3, in steps; the first step is one.
      batch_process_func: is applied to each batch inside the staged step.
      register_only_generic: give each parameter a diagonal block.
      layer_tag_to_block_ctor: block classes of `curvature_blocks` by layer tag.
      multi_device: each array has a leading axis of local devices.
      debug: do not stage.
      invalid_metric_value: what stands in `stats` for what was not computed; with NaN,
        the default, `jax_debug_nans` stops at each step.
      batch_size_extractor: a function of the batch (of one device); None for the first
        axis of its first array.
      pmap_axis_name: the name of the axis of devices.
      include_norms_in_stats: adds the norms of parameters, gradient, preconditioned
        gradient and update.
      include_per_param_norms_in_stats: those of each parameter.
      num_estimator_samples: how many samples sampled modes average over.

    References:
      Martens & Grosse 2015, Algorithm 2 (section 9).

    >>> import jax, jax.numpy as jnp, kfac_jax
    >>> def loss_fn(w, batch):
    ...     x, y = batch
    ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
    >>> w, batch = jnp.ones((3, 2)), (jnp.eye(3), jnp.zeros((3, 2)))
    >>> optimizer = kfac_jax.Optimizer(jax.value_and_grad(loss_fn), l2_reg=0.0)
    >>> key = jax.random.key(0)
    >>> state = optimizer.init(w, key, batch)
    >>> w, state, stats = optimizer.step(
    ...     w, state, key, batch=batch, learning_rate=0.1, momentum=0.9, damping=1e-3)
    >>> int(stats["step"])
    1
    """

    State = _steps.State

    value_and_grad_func: Callable[..., Any]
    l2_reg: float | Array = 0.0
    regularized_parameters_path_exclusions: str = ""
    value_func_has_aux: bool = False
    value_func_has_state: bool = False
    value_func_has_rng: bool = False
    value_func_for_estimator: Callable[..., Any] | None = None
    use_adaptive_learning_rate: bool = False
    learning_rate_schedule: Callable[..., Numeric] | None = None
    use_adaptive_momentum: bool = False
    momentum_schedule: Callable[..., Numeric] | None = None
    use_adaptive_damping: bool = False
    damping_schedule: Callable[..., Numeric] | None = None
    initial_damping: float | None = None
    use_initial_damping_calibration: bool = False
    min_damping: float = 1e-8
    max_damping: float = float("inf")
    include_damping_in_quad_change: bool = False
    damping_adaptation_interval: int = 5
    damping_adaptation_decay: float = 0.9
    damping_lower_threshold: float = 0.25
    damping_upper_threshold: float = 0.75
    always_use_exact_qmodel_for_damping_adjustment: bool = False
    precon_damping_mult: float = 1.0
    precon_damping_schedule: Any = None
    use_step_rejection: bool = False
    reject_damping_increase_factor: float = 1.0
    norm_constraint: float | None = None
    num_burnin_steps: int = 10
    estimation_mode: str | None = None  # ggn_curvature_prop
    custom_estimator_ctor: Any = None
    curvature_ema: float = 0.95
    curvature_update_period: int = 1
    inverse_update_period: int = 5
    use_exact_inverses: bool = False
    batch_process_func: Callable[[Batch], Batch] | None = None
    register_only_generic: bool = False
    patterns_to_skip: Sequence[str] = ()
    use_automatic_registration: bool = True
    auto_register_kwargs: Mapping[str, Any] | None = None
    layer_tag_to_block_ctor: Mapping[str, Any] | None = None
    multi_device: bool = False
    debug: bool = False
    invalid_metric_value: float = float("nan")
    batch_size_extractor: Callable[..., Numeric] | None = None
    pmap_axis_name: str = "kfac_axis"
    forbid_setting_attributes_after_finalize: bool = True
    modifiable_attribute_exceptions: Sequence[str] = ()
    include_norms_in_stats: bool = False
    include_per_param_norms_in_stats: bool = False
    include_registered_loss_in_stats: bool = False
    distributed_precon_apply: bool = True
    distributed_inverses: bool = True
    num_estimator_samples: int = 1
    should_vmap_estimator_samples: bool = False
    norm_to_scale_identity_weight_per_block: Any = None
    precon_power: float = -1.0
    exact_quad_model_matrix_type: str | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        _options.check(own)
        steps = _steps.from_options(own)
        self._steps = steps
        self._staged = [self._stage(f) for f in (steps.init, steps.step, steps.burn_in)]

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets what is no option; those have been read.

        Raises:
          AttributeError: for an option.
        """
        if name in type(self).__dataclass_fields__ and "_staged" in self.__dict__:
            raise AttributeError(
                f"{name} of an Optimizer cannot be changed once it is made: expected "
                "it as an argument of the constructor. Make another one, in which the "
                "state of this one goes on."
            )
        super().__setattr__(name, value)

    def _stage(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.debug:
            return function
        if self.multi_device:
            axis = self.pmap_axis_name
            mapped = jax.pmap(function, axis)
            return lambda *args: mapped(*as_mapped(args, axis))
        return jax.jit(function)

    def __repr__(self) -> str:
        """The plan's report, once there is a plan."""
        name = type(self).__name__
        if not self._steps.plans:
            return f"<{name}: its plan is made by the first init or step>"
        return f"<{name}>\n{self.curvature.report()}"

    @property
    def curvature(self) -> Curvature:
        """The plan that `init` or `step` made last.

        Its methods take the arguments of `value_and_grad_func`.

        Raises:
          ValueError: before the first of them.
        """
        if not self._steps.plans:
            raise ValueError(
                "The plan is made when arguments are first seen: expected a call of "
                "Optimizer.init(params, rng, batch) before this."
            )
        return next(reversed(self._steps.plans.values()))

    def init(
        self, params: Params, rng: PRNGKey, batch: Batch, func_state: FuncState = None
    ) -> State:
        """The state before the first step.

        Args:
          params: the parameters.
          rng: a key, raw or typed; with `multi_device` one for each device.
          batch: a batch, of which only shapes matter.
          func_state: the function's state, with `value_func_has_state`.

        Returns:
          The state.

        Raises:
          TypeError: if one is no tree of arrays.
        """
        self._check(params=params, rng=rng, batch=batch, func_state=func_state)
        return self._staged[0](params, rng, batch, func_state)

    def _check(self, rng: Any, **trees: Any) -> None:
        """Says which argument holds something else than arrays, before staging."""
        if self.multi_device:
            trees["rng"] = rng
        else:
            arguments.key("rng", rng)
        for name, tree in trees.items():
            arguments.trees(name, tree)

    def step(
        self,
        params: Params,
        state: State,
        rng: PRNGKey,
        data_iterator: Iterator[Batch] | None = None,
        batch: Batch | None = None,
        func_state: FuncState = None,
        learning_rate: Numeric | None = None,
        momentum: Numeric | None = None,
        damping: Numeric | None = None,
        global_step_int: int | None = None,
    ) -> tuple[Any, ...]:
        """One step.

        Args:
          params: the parameters.
          state: from `init` or the step before.
          rng: a key, raw or typed; with `multi_device` one for each device.
          data_iterator: where the batch comes from, after `num_burnin_steps` batches if
            this is the first step.
          batch: the batch itself; there is no burn-in then.
          func_state: the function's state, with `value_func_has_state`.
          learning_rate: α where it is given: a number or an array, with `multi_device`
            also one that has the axis of devices. So are the next two.
          momentum: μ.
          damping: λ.
          global_step_int: how many steps were made, for burn-in to know without waiting
            for the state.

        Returns:
          The parameters, the state, with `value_func_has_state` the function's state,
          and a dictionary that tells what happened.

        Raises:
          TypeError: if the state is none of an Optimizer.
          ValueError: unless exactly one of `data_iterator` and `batch` is given, and
            each rate in exactly one way.
        """
        if (data_iterator is None) == (batch is None):
            got = "neither" if batch is None else "both"
            raise ValueError(f"step expects one of data_iterator and batch; got {got}.")
        given = learning_rate, momentum, damping
        rates = [self._rate(*x) for x in zip(_options.RATES, given, strict=True)]
        expected = "what init, or the step before, returned, an Optimizer.State"
        arguments.instance("state", state, _steps.State, expected)
        self._check(params=params, rng=rng, batch=batch, func_state=func_state)
        if global_step_int is not None:
            arguments.integer("global_step_int", global_step_int, arrays=True)
        if data_iterator is not None:
            state, rng = self._burnt_in(
                params, state, rng, data_iterator, func_state, global_step_int
            )
            batch = next(data_iterator)
        params, state, func_state, stats = self._staged[1](
            params, state, rng, batch, func_state, rates
        )
        if self.value_func_has_state:
            return params, state, func_state, stats
        return params, state, stats

    def _burnt_in(
        self,
        params: Params,
        state: State,
        rng: PRNGKey,
        data_iterator: Iterator[Batch],
        func_state: FuncState,
        steps: int | None,
    ) -> tuple[State, PRNGKey]:
        """The state once the curvature has seen batches, and another key.

        Args:
          params: as of `step`, like the next four.
          state: see there.
          rng: see there.
          data_iterator: see there.
          func_state: see there.
          steps: how many steps were made, if it is known. After the first there is no
            burn-in.

        Returns:
          The state and the key.

        Raises:
          TypeError: if there is no iterator.
        """
        if not hasattr(data_iterator, "__next__"):
            raise TypeError(
                "data_iterator must be an iterator of batches; got "
                f"{arguments.shown(data_iterator)}. Pass iter(batches)."
            )
        if self.num_burnin_steps > 0 and steps is None:
            steps = int(get_first(state.step_counter))
        count = 0 if steps else self.num_burnin_steps
        for batch in itertools.islice(data_iterator, count):
            state, rng = self._staged[2](params, state, rng, batch, func_state)
        return state, rng

    def _rate(self, names: tuple[str, str, str], value: Numeric | None) -> Any:
        """A rate as the staged step takes it: always of one type and shape.

        Raises:
          ValueError: unless it is chosen in exactly one way, and a number.
        """
        argument, flag, schedule = names
        if not getattr(self, flag) and getattr(self, schedule) is None:
            if value is None:
                raise ValueError(
                    f"Nothing chooses the {argument}: expected step(..., {argument}=), "
                    f"or {schedule} or {flag}=True in the constructor; got none of "
                    "them."
                )
        elif value is not None:
            raise ValueError(
                f"The constructor's {schedule} or {flag} chooses the {argument}: "
                f"expected step without {argument}=, got {value!r}."
            )
        else:
            return None
        arguments.real(argument, value)
        # of the same kind each time, so that nothing is compiled anew or waited for
        on_device = isinstance(value, Array)
        number: Any = value if on_device else np.asarray(value)
        number = number.astype(jax.dtypes.canonicalize_dtype(float))
        whole = (jax.local_device_count(),) if self.multi_device else ()
        if number.shape == whole:
            return number
        if number.shape:
            raise ValueError(
                f"step expects {argument} as one number"
                f"{', or one for each device' if self.multi_device else ''}; got shape "
                f"{number.shape}."
            )
        return (jnp if on_device else np).broadcast_to(number, whole)
