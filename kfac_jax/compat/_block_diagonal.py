"""The block-diagonal estimator, over a plan."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax.compat import _options
from kfac_jax.compat._block_views import dense_blocks, with_uncached
from kfac_jax.compat._devices import in_pmap, pmean_if_pmap
from kfac_jax.compat._estimator_arguments import Powers, powers
from kfac_jax.compat._estimator_arguments import weight as one_weight
from kfac_jax.compat._plans import plan, warn_of_lost_examples, without
from kfac_jax.compat.curvature_blocks import native_blocks
from kfac_jax.curvature import Curvature
from kfac_jax.linalg._psd import symmetric_eigh
from kfac_jax.operator import inverses as inverses_lib
from kfac_jax.operator.approximation import Approximation
from kfac_jax.plan import Layer
from kfac_jax.plan.group import Factors
from kfac_jax.plan.modes import MODES, is_exact
from kfac_jax.statistics import averages

Params = Any


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

    Args:
      func: registers its loss; what it returns does not matter.
      func_and_grad: the same with its gradient, `(loss, gradient)`; what is registered
        anywhere inside counts.
      default_estimation_mode: as of `make_curvature`; None for "ggn_curvature_prop".
      layer_tag_to_block_ctor: blocks by tag, see `kfac_jax.curvature_blocks`.
      index_to_block_ctor: blocks by the indices of a block's parameters in the tree,
        which `indices_to_block_map` tells.
      auto_register_tags: accepted; layers are found whether or not they are tagged.
      distributed_multiplies: accepted, without effect.
      distributed_cache_updates: accepted, without effect.
      num_samples: how many samples sampled modes average over.
      should_vmap_samples: accepted, without effect.
      auto_register_kwargs: `register_only_generic`; others are not needed.
      params_index: the place of the parameters among the arguments.
      batch_index: accepted; every argument's leading axis may be that of examples.

    Raises:
      ValueError: unless one of both functions is given, or if an option is not
        supported.
    """

    State = BlockDiagonalState

    def __init__(
        self,
        func: Callable[..., Any] | None = None,
        func_and_grad: Callable[..., Any] | None = None,
        default_estimation_mode: str | None = None,
        layer_tag_to_block_ctor: Mapping[str, Any] | None = None,
        index_to_block_ctor: Mapping[Any, Any] | None = None,
        auto_register_tags: bool = True,
        distributed_multiplies: bool = True,
        distributed_cache_updates: bool = True,
        num_samples: int = 1,
        should_vmap_samples: bool = False,
        auto_register_kwargs: Mapping[str, Any] | None = None,
        *,
        params_index: int = 0,
        batch_index: int = 1,
    ) -> None:
        """Keeps the options; `init` makes the plan."""
        arguments.callable_or_none("func", func)
        arguments.callable_or_none("func_and_grad", func_and_grad)
        given = [f for f in (func, func_and_grad) if f is not None]
        if len(given) != 1:
            raise ValueError(
                "BlockDiagonalCurvature expects one of func, a loss function that "
                f"registers its loss, and func_and_grad; got {given}."
            )
        arguments.whole("params_index", params_index)
        arguments.whole("num_samples", num_samples)
        arguments.within("num_samples", num_samples, 1, float("inf"))
        if default_estimation_mode is not None:
            name = "default_estimation_mode"
            arguments.choice(name, default_estimation_mode, MODES)
        self._generic = _options.generic_only(auto_register_kwargs, ())
        self._func = given[0]
        self._params_index = params_index
        self._mode = default_estimation_mode or "ggn_curvature_prop"
        self._blocks = native_blocks(layer_tag_to_block_ctor, index_to_block_ctor)
        self._num_samples = num_samples
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
        _check_state(state)
        return self.curvature.approximation(state.factors)

    def init(
        self,
        rng: Array,
        func_args: Sequence[Any],
        exact_powers_to_cache: Powers = None,
        approx_powers_to_cache: Powers = None,
        cache_eigenvalues: bool = False,
    ) -> BlockDiagonalState:
        """Makes the plan and an empty state.

        Args:
          rng: accepted, not used.
          func_args: arguments of `func`, or their shapes.
          exact_powers_to_cache: powers to be used cached, with exact damping.
          approx_powers_to_cache: those with damping of each factor.
          cache_eigenvalues: whether eigenvalues are.

        Returns:
          The state.

        Raises:
          ValueError: if `index_to_block_ctor` has indices of no block.
        """
        self._curvature = plan(
            self._func,
            self._params_index,
            func_args,
            self._generic,
            blocks=self._blocks,
            estimation_mode=self._mode,
            num_samples=self._num_samples,
            independent_cases=is_exact(self._mode),
        )
        warn_of_lost_examples(self._curvature)
        self._check_indices()
        params, _ = without(func_args, self._params_index)
        factors = self.curvature.init_factors(params)
        asked = powers("exact_powers_to_cache", exact_powers_to_cache)
        asked += powers("approx_powers_to_cache", approx_powers_to_cache)
        cache, zero = None, jnp.zeros((), float)
        if asked or cache_eigenvalues:
            cache = Cache(factors, inverses_lib.initial(self.curvature.groups), zero)
        return BlockDiagonalState(factors, zero, cache)

    def _check_indices(self) -> None:
        blocks = [*self.indices_to_block_map]
        known = {frozenset(indices) for indices in blocks}
        unknown = [sorted(x) for x, _ in self._blocks.of_leaves if x not in known]
        if unknown:
            raise ValueError(
                "index_to_block_ctor must have the indices of all parameters of a "
                f"block: expected some of {blocks}, got {unknown}. Print the plan, "
                "estimator.curvature, or choose blocks by path: make_curvature(..., "
                "blocks={path: block})."
            )

    def update_curvature_matrix_estimate(
        self,
        state: BlockDiagonalState,
        ema_old: Any,
        ema_new: Any,
        identity_weight: Any,
        batch_size: Any,
        rng: Array,
        func_args: Sequence[Any],
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
          func_args: arguments of `func`.
          estimation_mode: as of `make_curvature`; None for the default one.
          pmap_axis_name: the devices to average over, if mapped; None leaves it to
            `sync`.

        Returns:
          The state.
        """
        _check_state(state)
        params, rest = without(func_args, self._params_index)
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

    def sync(
        self, state: BlockDiagonalState, pmap_axis_name: str | None
    ) -> BlockDiagonalState:
        """Averages the factors over devices, where that axis is mapped.

        Args:
          state: the state.
          pmap_axis_name: the axis, or None.

        Returns:
          The state.

        Raises:
          ValueError: if a block's factors are in a basis of each device's own.
        """
        _check_state(state)
        carried = [x.name for x in self.curvature.layers if x.carried_shapes]
        if carried and in_pmap(pmap_axis_name):
            raise ValueError(
                f"sync expects factors that can be averaged, which those of {carried} "
                "are not: each is in a basis of its own. Pass pmap_axis_name to "
                "update_curvature_matrix_estimate instead."
            )
        return state._replace(factors=pmean_if_pmap(state.factors, pmap_axis_name))

    def update_cache(
        self,
        state: BlockDiagonalState,
        identity_weight: Any,
        exact_powers: Powers,
        approx_powers: Powers,
        eigenvalues: bool,
        pmap_axis_name: str | None = None,
        norm_to_scale_identity_weight_per_block: str | None = None,
    ) -> BlockDiagonalState:
        """Keeps the present curvature for `use_cached`.

        Args:
          state: the state.
          identity_weight: λ of the inverses, a number.
          exact_powers: accepted, not used: all powers can be used cached.
          approx_powers: -1 among them asks for inverses.
          eigenvalues: accepted, not used.
          pmap_axis_name: accepted, not used.
          norm_to_scale_identity_weight_per_block: only None.

        Returns:
          The state.

        Raises:
          ValueError: if `init` was asked for no cache, or λ is not one number.
        """
        cache = _cache(state)
        weight = one_weight(identity_weight, norm_to_scale_identity_weight_per_block)
        inverses = cache.inverses
        if -1 in powers("approx_powers", approx_powers):
            inverses, _ = inverses_lib.refresh(
                self.curvature.groups, state.factors, inverses, weight
            )
        return state._replace(cache=Cache(state.factors, inverses, weight))

    def multiply_matpower(
        self,
        state: BlockDiagonalState,
        parameter_structured_vector: Params,
        identity_weight: Any,
        power: float,
        exact_power: bool,
        use_cached: bool,
        pmap_axis_name: str | None = None,
        norm_to_scale_identity_weight_per_block: str | None = None,
    ) -> Params:
        """Returns `(F + λ I)^p v`.

        Args:
          state: the state.
          parameter_structured_vector: v, like the parameters.
          identity_weight: λ, a number.
          power: p.
          exact_power: whether λ is added to the blocks, or to their factors with π.
          use_cached: whether to use F of the last `update_cache`, and its λ too unless
            `exact_power`; but for diagonal blocks, which are not cached.
          pmap_axis_name: accepted, not used.
          norm_to_scale_identity_weight_per_block: only None.

        Returns:
          The product.

        Raises:
          ValueError: if there is no cache to use, or λ is not one number.
        """
        v, groups = parameter_structured_vector, self.curvature.groups
        weight = one_weight(identity_weight, norm_to_scale_identity_weight_per_block)
        _check_state(state)
        arguments.number("power", power, arrays=True)
        arguments.within("power", power, -float("inf"), float("inf"))
        arguments.flag("exact_power", exact_power)
        arguments.flag("use_cached", use_cached)
        factors = state.factors
        if use_cached:
            cache = _cache(state)
            kept = cache.factors, cache.inverses
            factors, inverses = with_uncached(groups, *kept, factors, weight)
            weight = weight if exact_power else cache.identity_weight
            if power == -1 and not exact_power:
                leaves = self.curvature.tree.leaves(v, "the vector v")
                solved, _ = inverses_lib.precondition(
                    groups, factors, inverses, leaves, {}
                )
                return jax.tree.unflatten(self.curvature.tree.treedef, solved)
        operator = self.curvature.approximation(factors)
        if power == -1 and not exact_power:
            return operator.solve(v, weight, "factored")
        return operator.power(v, power, weight, "exact" if exact_power else "factored")

    def multiply_inverse(
        self,
        state: BlockDiagonalState,
        parameter_structured_vector: Params,
        identity_weight: Any,
        exact_power: bool,
        use_cached: bool,
        pmap_axis_name: str | None = None,
        norm_to_scale_identity_weight_per_block: str | None = None,
    ) -> Params:
        """Returns `(F + λ I)⁻¹ v`, see `multiply_matpower`."""
        return self.multiply_matpower(
            state,
            parameter_structured_vector,
            identity_weight,
            -1,
            exact_power,
            use_cached,
            pmap_axis_name,
            norm_to_scale_identity_weight_per_block,
        )

    def multiply(
        self,
        state: BlockDiagonalState,
        parameter_structured_vector: Params,
        identity_weight: Any,
        exact_power: bool,
        use_cached: bool,
        pmap_axis_name: str | None = None,
        norm_to_scale_identity_weight_per_block: str | None = None,
    ) -> Params:
        """Returns `(F + λ I) v`, see `multiply_matpower`."""
        return self.multiply_matpower(
            state,
            parameter_structured_vector,
            identity_weight,
            1,
            exact_power,
            use_cached,
            pmap_axis_name,
            norm_to_scale_identity_weight_per_block,
        )

    def to_dense_matrix(self, state: BlockDiagonalState) -> Array:
        """F as `[P, P]`, in the order of `jax.flatten_util.ravel_pytree`."""
        return self.approximation(state).to_dense()

    def to_diagonal_block_dense_matrix(
        self, state: BlockDiagonalState
    ) -> tuple[Array, ...]:
        """The blocks of F, `[p, p]` each, in the order of their first parameters.

        Within a block parameters are in their order in the tree, so that "b" comes
        before "w".
        """
        _check_state(state)
        return dense_blocks(self.curvature.layers, state.factors)

    def block_eigenvalues(
        self, state: BlockDiagonalState, use_cached: bool
    ) -> tuple[Array, ...]:
        """The eigenvalues of each block, `[p]`, in ascending order.

        Args:
          state: the state.
          use_cached: whether to use F of the last `update_cache`.

        Returns:
          Those of each block.
        """
        arguments.flag("use_cached", use_cached)
        _check_state(state)
        factors = _cache(state).factors if use_cached else state.factors
        matrices = dense_blocks(self.curvature.layers, factors)
        return tuple(symmetric_eigh(matrix)[0] for matrix in matrices)

    def eigenvalues(self, state: BlockDiagonalState, use_cached: bool) -> Array:
        """Those of all blocks, one block after another; see `block_eigenvalues`."""
        return jnp.concatenate(self.block_eigenvalues(state, use_cached))

    def undamped_diagonal(self, state: BlockDiagonalState) -> Params:
        """The diagonal of F, like the parameters."""
        return self.approximation(state).diagonal()

    @property
    def indices_to_block_map(self) -> dict[tuple[int, ...], Layer]:
        """The plan's layers by the indices of their parameters, weights first."""
        return {layer.leaves: layer for layer in self.curvature.layers}

    @property
    def params_block_index(self) -> Params:
        """For each parameter, the index of its block."""
        layers = enumerate(self.curvature.layers)
        places = {leaf: index for index, layer in layers for leaf in layer.leaves}
        in_order = [places[leaf] for leaf in sorted(places)]
        return jax.tree.unflatten(self.curvature.tree.treedef, in_order)

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.curvature.layers)

    @property
    def block_dims(self) -> tuple[int, ...]:
        """How many parameters each block has."""
        return tuple(sum(map(math.prod, x.shapes)) for x in self.curvature.layers)

    @property
    def dim(self) -> int:
        """How many parameters there are."""
        return sum(self.block_dims)

    def __getattr__(self, name: str) -> Any:
        """Says where to find what is not here."""
        raise AttributeError(
            f"BlockDiagonalCurvature has no {name!r} in kfac_jax; expected one of "
            "init, update_curvature_matrix_estimate, sync, update_cache, multiply, "
            "multiply_inverse, multiply_matpower, to_dense_matrix, "
            "to_diagonal_block_dense_matrix, block_eigenvalues, undamped_diagonal. The "
            "plan is .curvature and the operator .approximation(state)."
        )


def _check_state(state: Any) -> None:
    arguments.instance(
        "state", state, BlockDiagonalState, "what init of the estimator returned"
    )


def _cache(state: BlockDiagonalState) -> Cache:
    _check_state(state)
    if state.cache is None:
        raise ValueError(
            "The state has no cache; expected init(..., exact_powers_to_cache=powers) "
            "or approx_powers_to_cache, with powers that are to be used cached."
        )
    return state.cache
