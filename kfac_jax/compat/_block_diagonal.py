"""The block-diagonal estimator, over a plan."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from chex import ArrayTree, Numeric, PRNGKey
from jax import Array

from kfac_jax._utils import arguments, fresh
from kfac_jax._utils.trees import TreeSpec
from kfac_jax.compat import _options
from kfac_jax.compat._devices import pmean_if_pmap
from kfac_jax.compat._native_blocks import native_blocks
from kfac_jax.compat._registering import (
    as_loss,
    params_and_rest,
    warn_of_lost_examples,
)
from kfac_jax.curvature import Curvature, make_curvature
from kfac_jax.operator import inverses as inverses_lib
from kfac_jax.operator.approximation import Approximation
from kfac_jax.operator.single import Single
from kfac_jax.plan import Layer
from kfac_jax.plan.group import Factors, Group
from kfac_jax.plan.modes import MODES, is_exact
from kfac_jax.statistics import averages

_BY_PATH = "Choose blocks by path: kfac_jax.make_curvature(..., blocks={path: block})."

_REFUSED = {
    "func_and_grad": (None, "Pass it as func: what it returns does not matter."),
    "index_to_block_ctor": (None, _BY_PATH),
    "params_index": (0, "Wrap the function in one whose first argument they are."),
}

_Powers = float | Sequence[float] | None


class Cache(NamedTuple):
    """The curvature at the last `update_cache`."""

    factors: Factors  # by layer name
    inverses: Factors  # of the damped factors
    identity_weight: Array  # []


class BlockDiagonalState(NamedTuple):
    """The state of `BlockDiagonalCurvature`."""

    factors: Factors  # by layer name, weighted means of the batches' factors
    weight: Array  # [], the total weight of the batches so far
    cache: Cache | None  # None if `init` was asked for no powers


@dataclasses.dataclass(eq=False, repr=False)
class BlockDiagonalCurvature:
    """A block-diagonal approximation, updated batch by batch.

    The native way is `make_curvature`, `Curvature.update_factors` and
    `Curvature.approximation`, which `curvature` and `approximation` give access to.

    Numbers are those of the existing library in exact modes, but for these:

    * a generic parameter's diagonal is the plan's, exact or unbiased; there it is N
      times the diagonal, with N cases;
    * a cache holds inverses for power -1 without `exact_power`. For other powers it
      holds the factors only, and saves no time;
    * cached inverses have the damping of the cache; diagonal blocks have none cached.

    What is not offered raises an error that says what to do. Hints about how to compute
    the same are accepted and not needed.

    Attributes:
      func: registers its loss; what it returns does not matter.
      default_estimation_mode: as of `make_curvature`; None for "ggn_curvature_prop".
      layer_tag_to_block_ctor: blocks by tag, see `kfac_jax.curvature_blocks`.
      num_samples: how many samples sampled modes average over.
      auto_register_kwargs: `register_only_generic`; others are not needed.
    """

    State = BlockDiagonalState

    func: Callable[..., Any]
    func_and_grad: None = None
    default_estimation_mode: str | None = None
    layer_tag_to_block_ctor: Mapping[str, Any] | None = None
    index_to_block_ctor: None = None
    auto_register_tags: bool = True
    distributed_multiplies: bool = True
    distributed_cache_updates: bool = True
    num_samples: int = 1
    should_vmap_samples: bool = False
    auto_register_kwargs: Mapping[str, Any] | None = None
    _: dataclasses.KW_ONLY
    params_index: int = 0
    batch_index: int = 1

    def __post_init__(self) -> None:
        """Checks the options; `init` makes the plan."""
        arguments.function("func", self.func)
        _options.refuse("BlockDiagonalCurvature", _REFUSED, vars(self))
        arguments.integer("num_samples", self.num_samples)
        arguments.within("num_samples", self.num_samples, 1, float("inf"))
        mode = self.default_estimation_mode
        if mode is not None:
            arguments.choice("default_estimation_mode", mode, MODES)
        self._mode = mode or "ggn_curvature_prop"
        self._generic = _options.generic_only(self.auto_register_kwargs, ())
        self._blocks = native_blocks(self.layer_tag_to_block_ctor)
        self._curvature: Curvature | None = None

    @property
    def curvature(self) -> Curvature:
        """The plan.

        Raises:
          ValueError: before `init`.
        """
        if self._curvature is None:
            raise ValueError(
                "BlockDiagonalCurvature has its plan from init; call "
                "init(rng, func_args, ...) before it is used."
            )
        return self._curvature

    def approximation(self, state: BlockDiagonalState) -> Approximation:
        """The curvature so far as a linear operator."""
        _check(state)
        return self.curvature.approximation(state.factors)

    def init(
        self,
        rng: PRNGKey,
        func_args: Sequence[ArrayTree],
        exact_powers_to_cache: _Powers = None,
        approx_powers_to_cache: _Powers = None,
        cache_eigenvalues: bool = False,
    ) -> BlockDiagonalState:
        """Makes the plan and an empty state.

        Args:
          rng: accepted, not used.
          func_args: arguments of `func`, the parameters first, or their shapes.
          exact_powers_to_cache: powers to be used cached, with exact damping.
          approx_powers_to_cache: those with damping of each factor.
          cache_eigenvalues: accepted, not used.

        Returns:
          The state.
        """
        asked = _powers("exact_powers_to_cache", exact_powers_to_cache)
        asked += _powers("approx_powers_to_cache", approx_powers_to_cache)
        params_and_rest(func_args)  # which checks them
        params, *rest = jax.eval_shape(lambda *args: args, *func_args)
        curvature = make_curvature(
            as_loss(self.func, self._generic),
            params,
            *rest,
            blocks=self._blocks,
            estimation_mode=self._mode,
            num_samples=self.num_samples,
            independent_cases=is_exact(self._mode),
        )
        warn_of_lost_examples(curvature)
        self._curvature = curvature
        zeros = [fresh.full((), 0.0, jnp.result_type(float)) for _ in range(2)]
        cache: Cache | None = None
        if asked:  # with arrays of its own, as a state may be donated
            inverses = inverses_lib.initial(curvature.groups)
            cache = Cache(curvature.init_factors(params), inverses, zeros[1])
        return BlockDiagonalState(curvature.init_factors(params), zeros[0], cache)

    def update_curvature_matrix_estimate(
        self,
        state: BlockDiagonalState,
        ema_old: Numeric,
        ema_new: Numeric,
        identity_weight: Numeric,
        batch_size: Numeric,
        rng: PRNGKey,
        func_args: Sequence[ArrayTree],
        estimation_mode: str | None = None,
        pmap_axis_name: str | None = None,
    ) -> BlockDiagonalState:
        """Takes in a batch: a weighted mean, with `weight · ema_old + ema_new`.

        Args:
          state: the state.
          ema_old: what the weight so far is multiplied by.
          ema_new: the weight of this batch.
          identity_weight: accepted, not used.
          batch_size: accepted; it is the leading axis of the registered loss.
          rng: a key, for sampled modes.
          func_args: arguments of `func`, the parameters first.
          estimation_mode: as of `make_curvature`; None for the default one.
          pmap_axis_name: the devices to average over, if mapped.

        Returns:
          The state.
        """
        _check(state)
        params, rest = params_and_rest(func_args)
        for name, value in (("ema_old", ema_old), ("ema_new", ema_new)):
            arguments.number(name, value, arrays=True)
        if estimation_mode is not None:
            arguments.choice("estimation_mode", estimation_mode, MODES)
        mode = estimation_mode or self._mode
        curvature = dataclasses.replace(self.curvature, estimation_mode=mode)
        _, statistics = curvature.value_and_statistics(
            params, *rest, rng=rng, factors=state.factors
        )
        statistics = pmean_if_pmap(statistics, pmap_axis_name)
        old = state.weight * ema_old
        weight = old + ema_new
        epsilon = jnp.where(weight > 0, old / jnp.where(weight > 0, weight, 1), 1)
        averaged = averages.average(
            curvature.groups, state.factors, statistics, jnp.inf, epsilon
        )
        weight = jnp.where(averaged.informed, weight, state.weight)
        return state._replace(factors=averaged.factors, weight=weight)

    def update_cache(
        self,
        state: BlockDiagonalState,
        identity_weight: Numeric,
        exact_powers: _Powers = None,
        approx_powers: _Powers = None,
        eigenvalues: bool = False,
        pmap_axis_name: str | None = None,
    ) -> BlockDiagonalState:
        """Keeps the present curvature for `use_cached`.

        Args:
          state: the state.
          identity_weight: λ of the inverses, a number.
          exact_powers: accepted, not used: all powers can be used cached.
          approx_powers: -1 among them asks for inverses.
          eigenvalues: accepted, not used.
          pmap_axis_name: accepted, not used.

        Returns:
          The state.

        Raises:
          ValueError: if `init` was asked for no cache.
        """
        inverses, damping = _cache(state).inverses, _damping(identity_weight)
        if -1 in _powers("approx_powers", approx_powers):
            inverses, _ = inverses_lib.refresh(
                self.curvature.groups, state.factors, inverses, damping
            )
        return state._replace(cache=Cache(state.factors, inverses, damping))

    def multiply_matpower(
        self,
        state: BlockDiagonalState,
        parameter_structured_vector: ArrayTree,
        identity_weight: Numeric,
        power: float,
        exact_power: bool,
        use_cached: bool,
        pmap_axis_name: str | None = None,
    ) -> ArrayTree:
        """Returns `(F + λ I)^p v`.

        Args:
          state: the state.
          parameter_structured_vector: v, like the parameters.
          identity_weight: λ, a number.
          power: p.
          exact_power: whether λ is added to the blocks, or to their factors with π.
          use_cached: whether to use F of the last `update_cache`, and its λ too unless
            `exact_power`; products, p = 1, and diagonal blocks are not cached.
          pmap_axis_name: accepted, not used.

        Returns:
          The product.

        Raises:
          ValueError: if there is no cache to use.
        """
        _check(state)
        v, damping = parameter_structured_vector, _damping(identity_weight)
        arguments.number("power", power)
        arguments.within("power", power, -float("inf"), float("inf"))
        arguments.flag("exact_power", exact_power)
        arguments.flag("use_cached", use_cached)
        mode = "exact" if exact_power else "factored"
        factors = state.factors
        if use_cached and power != 1:
            groups, tree = self.curvature.groups, self.curvature.tree
            cache = _with_uncached(groups, _cache(state), factors, damping)
            factors = cache.factors
            damping = damping if exact_power else cache.identity_weight
            if power == -1 and not exact_power:
                solved, _ = inverses_lib.precondition(
                    groups, factors, cache.inverses, tree.leaves(v, "the vector v"), {}
                )
                return jax.tree.unflatten(tree.treedef, solved)
        operator = self.curvature.approximation(factors)
        if power == -1 and not exact_power:
            return operator.solve(v, damping, mode)
        return operator.power(v, power, damping, mode)

    def to_diagonal_block_dense_matrix(
        self, state: BlockDiagonalState
    ) -> tuple[Array, ...]:
        """The blocks of F, `[p, p]` each, in the order of their first parameters.

        Within a block parameters are in their order in the tree, so that "b" comes
        before "w".
        """
        _check(state)
        return tuple(_dense(x, state.factors) for x in self.curvature.layers)

    def __getattr__(self, name: str) -> Any:
        """Says where to find what is not here."""
        raise AttributeError(
            f"BlockDiagonalCurvature has no {name!r} in kfac_jax; expected one of "
            "init, update_curvature_matrix_estimate, update_cache, multiply_matpower, "
            "to_diagonal_block_dense_matrix. The plan is .curvature, with its layers, "
            "and .approximation(state) is the operator, with matvec, solve, power, "
            "diagonal and to_dense."
        )


def _powers(name: str, given: _Powers) -> tuple[float, ...]:
    """One power or several, as a tuple."""
    if given is None:
        return ()
    found: Any = tuple(given) if isinstance(given, list | tuple) else (given,)
    for power in found:
        arguments.number(f"each of {name}", power)
    return found


def _damping(identity_weight: Any) -> Array:
    """λ, the same for all blocks."""
    arguments.number("identity_weight", identity_weight, arrays=True)
    arguments.within("identity_weight", identity_weight, 0.0, float("inf"))
    return jnp.asarray(identity_weight, float)


def _check(state: Any) -> None:
    arguments.instance(
        "state", state, BlockDiagonalState, "what init of the estimator returned"
    )


def _cache(state: BlockDiagonalState) -> Cache:
    _check(state)
    if state.cache is None:
        raise ValueError(
            "The state has no cache; expected init(..., exact_powers_to_cache=powers) "
            "or approx_powers_to_cache, with powers that are to be used cached."
        )
    return state.cache


def _with_uncached(
    groups: Sequence[Group], cache: Cache, present: Factors, damping: Array
) -> Cache:
    """The cache, with what is never cached: diagonal blocks follow their factors."""
    following = [x for x in groups if x.in_every_step and not x.moves]
    names = [name for group in following for name in group.names]
    factors = {name: present[name] for name in names}
    old = {name: cache.inverses[name] for name in names}
    found, _ = inverses_lib.refresh(following, factors, old, damping)
    return cache._replace(
        factors=cache.factors | factors, inverses=cache.inverses | found
    )


def _dense(layer: Layer, factors: Factors) -> Array:
    """The block of a layer: the operator of its parameters only, in their order."""
    order = sorted(range(len(layer.leaves)), key=layer.leaves.__getitem__)
    alone = dataclasses.replace(
        layer, leaves=tuple(order.index(i) for i in range(len(order))), boxes=()
    )
    tree = TreeSpec(
        treedef=jax.tree.structure(order),
        paths=tuple(layer.params[i] for i in order),
        shapes=tuple(layer.shapes[i] for i in order),
        dtypes=(layer.dtype,) * len(order),
    )
    return Approximation((Single(alone),), tree, factors).to_dense()
