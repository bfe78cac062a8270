"""The estimator that holds the exact curvature as one dense matrix."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kfac_jax import linalg
from kfac_jax._utils import arguments
from kfac_jax.compat._devices import pmean_if_pmap
from kfac_jax.compat._estimator_arguments import Powers, powers
from kfac_jax.compat._estimator_arguments import weight as one_weight
from kfac_jax.compat._plans import plan, without
from kfac_jax.curvature import Curvature
from kfac_jax.plan.modes import is_exact

Params = Any

_UNUSED = frozenset(
    {
        "auto_register_kwargs",
        "batch_index",
        "distributed_cache_updates",
        "distributed_multiplies",
        "num_samples",
        "should_vmap_samples",
    }
)


class Spectrum(NamedTuple):
    """The matrix at the last `update_cache`: `U diag(w) Uᵀ`."""

    w: Array  # [p], at least 0
    u: Array  # [p, p]
    identity_weight: Array  # []


class ExplicitExactState(NamedTuple):
    """The state of `ExplicitExactCurvature`."""

    matrix: Array  # [p, p], a weighted mean of the batches' matrices
    weight: Array  # [], the total weight of the batches so far
    cache: Spectrum | None  # None if `init` was asked for no powers


class ExplicitExactCurvature:
    """The exact curvature of all parameters as one dense matrix, batch by batch.

    For few parameters, and to compare approximations with. The native way is
    `Curvature.matvec` and `quadratic_form`, which form no matrix; here that of unit
    vectors is taken.

    Numbers are those of the existing library in exact modes. There is no sampled mode;
    the default is "ggn_exact", which is what that of the existing library estimates. A
    cache holds an eigendecomposition, which serves any power, and λ.

    Args:
      func: registers its loss; what it returns does not matter.
      func_and_grad: the same with its gradient.
      default_estimation_mode: "fisher_exact" or "ggn_exact", which are equal; or None.
      layer_tag_to_block_ctor: only None: there are no blocks to choose.
      auto_register_tags: accepted; no layer is looked for.
      param_order: accepted; rows of the matrix are in the order of the tree, as they
        are there for any.
      params_index: the place of the parameters among the arguments.
      **kwargs: other options of `BlockDiagonalCurvature`: accepted, without effect.

    Raises:
      TypeError: for an option that is not known.
      ValueError: unless one of both functions is given, or if an option is not
        supported.
    """

    State = ExplicitExactState

    def __init__(
        self,
        func: Callable[..., Any] | None = None,
        func_and_grad: Callable[..., Any] | None = None,
        default_estimation_mode: str | None = None,
        layer_tag_to_block_ctor: Mapping[str, Any] | None = None,
        auto_register_tags: bool = False,
        param_order: Sequence[int] | None = None,
        *,
        params_index: int = 0,
        **kwargs: Any,
    ) -> None:
        """Keeps the options; `init` makes the plan."""
        arguments.callable_or_none("func", func)
        arguments.callable_or_none("func_and_grad", func_and_grad)
        given = [f for f in (func, func_and_grad) if f is not None]
        if len(given) != 1:
            raise ValueError(
                "ExplicitExactCurvature expects one of func, a function that registers "
                f"its loss, and func_and_grad; got {given}."
            )
        unknown = sorted(kwargs.keys() - _UNUSED)
        if unknown:
            raise TypeError(
                "ExplicitExactCurvature expects of the options of "
                f"BlockDiagonalCurvature only {sorted(_UNUSED)}; got {unknown}."
            )
        if layer_tag_to_block_ctor is not None:
            raise ValueError(
                "layer_tag_to_block_ctor is expected to be None, since the matrix is "
                f"held whole; got {arguments.shown(layer_tag_to_block_ctor)}. Use "
                "BlockDiagonalCurvature for blocks."
            )
        arguments.whole("params_index", params_index)
        _check_mode("default_estimation_mode", default_estimation_mode)
        self._func = given[0]
        self._params_index = params_index
        self._curvature: Curvature | None = None

    @property
    def curvature(self) -> Curvature:
        """The plan.

        Raises:
          ValueError: before `init`.
        """
        if self._curvature is None:
            raise ValueError(
                "ExplicitExactCurvature has its plan from init; call "
                "init(rng, func_args, ...) before it is used."
            )
        return self._curvature

    def init(
        self,
        rng: Array,
        func_args: Sequence[Any],
        exact_powers_to_cache: Powers = None,
        approx_powers_to_cache: Powers = None,
        cache_eigenvalues: bool = False,
    ) -> ExplicitExactState:
        """Makes the plan and an empty state.

        Args:
          rng: accepted, not used.
          func_args: arguments of `func`, or their shapes.
          exact_powers_to_cache: powers to be used cached.
          approx_powers_to_cache: the same.
          cache_eigenvalues: whether eigenvalues are.

        Returns:
          The state.
        """
        self._curvature = plan(
            self._func,
            self._params_index,
            func_args,
            on_unmatched="ignore",
            estimation_mode="ggn_exact",
            independent_cases=True,  # which nothing here depends on
        )
        dtype = jnp.result_type(float, *self._curvature.tree.dtypes)
        zeros = jnp.zeros((self.dim, self.dim), dtype)
        asked = powers("exact_powers_to_cache", exact_powers_to_cache)
        asked += powers("approx_powers_to_cache", approx_powers_to_cache)
        cache = None
        if asked or cache_eigenvalues:
            cache = Spectrum(zeros[0], zeros, jnp.zeros((), float))
        return ExplicitExactState(zeros, jnp.zeros((), float), cache)

    def update_curvature_matrix_estimate(
        self,
        state: ExplicitExactState,
        ema_old: Any,
        ema_new: Any,
        identity_weight: Any,
        batch_size: Any,
        rng: Array,
        func_args: Sequence[Any],
        estimation_mode: str | None = None,
        pmap_axis_name: str | None = None,
    ) -> ExplicitExactState:
        """Takes in a batch: a weighted mean, with `weight · ema_old + ema_new`.

        Args:
          state: the state.
          ema_old: what the weight so far is multiplied by.
          ema_new: the weight of this batch.
          identity_weight: accepted, not used.
          batch_size: accepted; it is the leading axis of the registered loss.
          rng: accepted, not used.
          func_args: arguments of `func`.
          estimation_mode: "fisher_exact" or "ggn_exact", which are equal; or None.
          pmap_axis_name: the devices to average over, if mapped; None leaves it to
            `sync`.

        Returns:
          The state.
        """
        _check_state(state)
        _check_mode("estimation_mode", estimation_mode)
        for name, value in (("ema_old", ema_old), ("ema_new", ema_new)):
            arguments.number(name, value, arrays=True)
        params, rest = without(func_args, self._params_index)
        units = self._by_parameter(jnp.eye(self.dim))
        matrix = self.curvature.quadratic_form(params, units, *rest)
        matrix = pmean_if_pmap(matrix, pmap_axis_name).astype(state.matrix.dtype)
        old = state.weight * ema_old
        weight = old + ema_new
        share = jnp.where(weight > 0, ema_new / jnp.where(weight > 0, weight, 1), 0)
        share = share.astype(matrix.dtype)
        mean = (1 - share) * state.matrix + share * matrix
        finite = jnp.isfinite(matrix).all()
        return state._replace(
            matrix=jnp.where(finite, mean, state.matrix),
            weight=jnp.where(finite, weight, state.weight),
        )

    def sync(
        self, state: ExplicitExactState, pmap_axis_name: str | None
    ) -> ExplicitExactState:
        """Averages the matrix over devices, where that axis is mapped."""
        _check_state(state)
        return state._replace(matrix=pmean_if_pmap(state.matrix, pmap_axis_name))

    def update_cache(
        self,
        state: ExplicitExactState,
        identity_weight: Any,
        exact_powers: Powers = None,
        approx_powers: Powers = None,
        eigenvalues: bool = False,
        pmap_axis_name: str | None = None,
        norm_to_scale_identity_weight_per_block: str | None = None,
    ) -> ExplicitExactState:
        """Keeps the present curvature for `use_cached`.

        Args:
          state: the state.
          identity_weight: λ, a number.
          exact_powers: accepted, not used: any power can be used cached.
          approx_powers: the same.
          eigenvalues: accepted, not used.
          pmap_axis_name: accepted, not used.
          norm_to_scale_identity_weight_per_block: only None.

        Returns:
          The state.
        """
        _cached(state)
        weight = one_weight(identity_weight, norm_to_scale_identity_weight_per_block)
        return state._replace(cache=Spectrum(*linalg.eigh(state.matrix), weight))

    def multiply_matpower(
        self,
        state: ExplicitExactState,
        parameter_structured_vector: Params,
        identity_weight: Any,
        power: float,
        exact_power: bool = True,
        use_cached: bool = False,
        pmap_axis_name: str | None = None,
        norm_to_scale_identity_weight_per_block: str | None = None,
    ) -> Params:
        """Returns `(F + λ I)^p v`.

        Args:
          state: the state.
          parameter_structured_vector: v, like the parameters.
          identity_weight: λ, a number.
          power: p.
          exact_power: accepted: every power is exact.
          use_cached: whether to use F and λ of the last `update_cache`; the product
            itself, p = 1, is never cached, as there.
          pmap_axis_name: accepted, not used.
          norm_to_scale_identity_weight_per_block: only None.

        Returns:
          The product.
        """
        _check_state(state)
        arguments.number("power", power)
        arguments.within("power", power, -float("inf"), float("inf"))
        arguments.flag("use_cached", use_cached)
        weight = one_weight(identity_weight, norm_to_scale_identity_weight_per_block)
        if use_cached and power != 1:
            w, u, weight = _cached(state)
        else:
            w, u = linalg.eigh(state.matrix)
        leaves = self.curvature.tree.leaves(parameter_structured_vector, "the vector v")
        flat = [jnp.ravel(x).astype(u.dtype) for x in leaves]
        scale = (w + weight.astype(w.dtype)) ** power
        moved = u @ (scale * (u.T @ jnp.concatenate(flat)))
        return jax.tree.map(lambda x: x[0], self._by_parameter(moved[None]))

    def multiply_inverse(
        self,
        state: ExplicitExactState,
        parameter_structured_vector: Params,
        identity_weight: Any,
        *rest: Any,
        **options: Any,
    ) -> Params:
        """Returns `(F + λ I)⁻¹ v`, see `multiply_matpower`."""
        v = parameter_structured_vector
        return self.multiply_matpower(state, v, identity_weight, -1, *rest, **options)

    def multiply(
        self,
        state: ExplicitExactState,
        parameter_structured_vector: Params,
        identity_weight: Any,
        *rest: Any,
        **options: Any,
    ) -> Params:
        """Returns `(F + λ I) v`, see `multiply_matpower`."""
        v = parameter_structured_vector
        return self.multiply_matpower(state, v, identity_weight, 1, *rest, **options)

    def to_dense_matrix(self, state: ExplicitExactState) -> Array:
        """F as `[P, P]`, in the order of `jax.flatten_util.ravel_pytree`."""
        _check_state(state)
        return state.matrix

    def to_diagonal_block_dense_matrix(
        self, state: ExplicitExactState
    ) -> tuple[Array, ...]:
        """F as the only block."""
        return (self.to_dense_matrix(state),)

    def eigenvalues(self, state: ExplicitExactState, use_cached: bool) -> Array:
        """The eigenvalues of F, of the last `update_cache` if cached, `[P]`."""
        _check_state(state)
        arguments.flag("use_cached", use_cached)
        return _cached(state).w if use_cached else linalg.eigh(state.matrix)[0]

    def block_eigenvalues(
        self, state: ExplicitExactState, use_cached: bool
    ) -> tuple[Array, ...]:
        """The eigenvalues of F as those of the only block."""
        return (self.eigenvalues(state, use_cached),)

    @property
    def num_blocks(self) -> int:
        """One."""
        return 1

    @property
    def block_dims(self) -> tuple[int, ...]:
        """How many parameters the only block has."""
        return (self.dim,)

    @property
    def dim(self) -> int:
        """How many parameters there are."""
        return sum(math.prod(shape) for shape in self.curvature.tree.shapes)

    def _by_parameter(self, rows: Array) -> Params:
        """Rows `[n, P]` as a tree like the parameters, with a leading axis n."""
        tree = self.curvature.tree
        ends = np.cumsum([math.prod(shape) for shape in tree.shapes])
        parts = jnp.split(rows, ends[:-1].tolist(), axis=1)
        leaves = [
            part.reshape(-1, *shape).astype(dtype)
            for part, shape, dtype in zip(parts, tree.shapes, tree.dtypes, strict=True)
        ]
        return jax.tree.unflatten(tree.treedef, leaves)

    def __getattr__(self, name: str) -> Any:
        """Says where to find what is not here."""
        raise AttributeError(
            f"ExplicitExactCurvature has no {name!r} in kfac_jax; expected one of "
            "init, update_curvature_matrix_estimate, sync, update_cache, multiply, "
            "multiply_inverse, multiply_matpower, to_dense_matrix, eigenvalues. The "
            "plan is .curvature, whose matvec needs no matrix."
        )


def _check_mode(name: str, mode: str | None) -> None:
    if mode is not None and not (isinstance(mode, str) and is_exact(mode)):
        raise ValueError(
            f'{name} is expected to be one of the exact modes, "fisher_exact" or '
            f'"ggn_exact", for the exact matrix; got {arguments.shown(mode)}. For '
            "others use BlockDiagonalCurvature, or make_curvature(..., "
            "blocks=kfac_jax.blocks.Full())."
        )


def _check_state(state: Any) -> None:
    arguments.instance(
        "state", state, ExplicitExactState, "what init of the estimator returned"
    )


def _cached(state: ExplicitExactState) -> Spectrum:
    _check_state(state)
    if state.cache is None:
        raise ValueError(
            "The state has no cache; expected init(..., exact_powers_to_cache=powers), "
            "with powers that are to be used cached, got none."
        )
    return state.cache
