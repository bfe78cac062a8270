"""The plan: a loss function's layers and every computation that follows."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kfac_jax._jaxpr import axis_types
from kfac_jax._utils import arguments
from kfac_jax._utils.trees import rebuilt, tree_spec
from kfac_jax.blocks._moments import check_weight_sharing
from kfac_jax.operator import inverses
from kfac_jax.operator.approximation import Approximation
from kfac_jax.operator.structures import (
    BlockDiagonal,
    SampleSpace,
    check_sample_space,
)
from kfac_jax.plan import batch as batch_lib
from kfac_jax.plan import checks
from kfac_jax.plan import report as report_lib
from kfac_jax.plan.choosing import BlocksSpec
from kfac_jax.plan.group import Factors, Structure, widened
from kfac_jax.plan.loss_check import check_loss
from kfac_jax.plan.modes import needs_rng, of_inputs
from kfac_jax.plan.plan import Options, Plan
from kfac_jax.statistics import averages, sample_space
from kfac_jax.statistics.averages import Statistics
from kfac_jax.statistics.data_set import Gathered, check_start, gathered
from kfac_jax.statistics.exact_products import ExactProducts
from kfac_jax.statistics.linearization import estimated_diagonals, linearize

Params = Any

BLOCK_DIAGONAL = BlockDiagonal()


def _without_first_axis(x: Any) -> Any:
    """The first of a stack; what is no stack stays, for a check to find."""
    return x[0] if arguments.is_array(x) and jnp.ndim(x) else x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curvature(Plan):
    """A static, hashable plan: parameters → layers → blocks. Print it to see a table.

    Made by `make_curvature`. Every method is a pure function of arrays; nothing is
    jitted (but by `over`) or cached. `args` are the loss function's arguments after the
    parameters; their shapes may differ from those the plan was made with.

    Where it is not known which cases of the registered output belong to one example,
    `lost_examples` says since which equation (in exact modes), and with
    `independent_cases` each case is taken for an example.
    """

    def __str__(self) -> str:
        """The report."""
        return self.report()

    def report(self) -> str:
        """Returns a table: each layer's parameters, kind, uses, block, factors, bytes.

        Below the table, each parameter that is not covered, with the reason and the
        line of the model that uses it.
        """
        table = report_lib.table(self.layers, self.groups, self.notes, self.totals)
        if not self.lost_examples or self.independent_cases:
            return table
        return f"{table}\n{checks.cost_of_lost_examples(self.lost_examples)}"

    @property
    def totals(self) -> report_lib.Totals:
        """The report's totals as data: parameters, coverage, bytes, multiply-adds."""
        inputs = of_inputs(self.estimation_mode)
        return report_lib.totals(self.groups, self.statistics_fraction, inputs)

    def value_and_grad(self, params: Params, *args: Any) -> tuple[Any, Params]:
        """Value and gradient without statistics: `jax.value_and_grad` of the loss.

        Args:
          params: the parameters.
          *args: the loss function's further arguments.

        Returns:
          The value, `(loss, aux)` with `has_aux`, and the gradient.

        Raises:
          ValueError: if the parameters differ from the plan's.
        """
        self.tree.leaves(params, "params")

        def loss_fn(params: Params) -> Any:
            return self.loss_fn(params, *rebuilt(args))

        return jax.value_and_grad(loss_fn, has_aux=self.has_aux)(params)

    @jax.named_scope("kfac_statistics")
    def value_grad_and_statistics(
        self,
        params: Params,
        *args: Any,
        rng: Array | None = None,
        factors: Factors | None = None,
    ) -> tuple[Any, Params, Statistics]:
        """Value, gradient and curvature statistics from one forward pass.

        With `statistics_fraction` τ1 below one, the statistics come from a second pass
        over the first τ1 of the batch.

        Args:
          params: the parameters.
          *args: the loss function's further arguments.
          rng: a key for the sampled modes.
          factors: the factors so far, `state.factors`. Only `blocks.Eigen` uses them,
            for its basis, which otherwise is computed from this very batch at the cost
            of an eigendecomposition and a second pass.

        Returns:
          The value, `(loss, aux)` with `has_aux`; the gradient; the statistics.

        Raises:
          ValueError: if the parameters or factors differ from the plan's, if the
            program's layers do (its structure depends on the batch), or if a sampled
            mode gets no key.

        References:
          Martens & Grosse 2015, section 5 and, for τ1, section 8.
        """
        if isinstance(self.structure, SampleSpace):
            value, grads = self.value_and_grad(params, *args)
            return value, grads, self._sample_statistics(params, args, rng)
        leaves, part, factors = self._prepare(params, args, rng, factors)
        whole = self.statistics_fraction == 1.0
        # A second pass ends at what is registered: pulled back from there, a loss's
        # cotangent of zero would be multiplied by all that the loss is made of besides.
        value, gradient, statistics = linearize(
            self, params, part, leaves, factors, own_gradient=not whole
        )
        if not whole and any(group.product_rows for group in self.groups):
            value, gradient, _ = linearize(self, params, args, leaves, factors)
        elif not whole:
            gradient = None
        if gradient is None:  # or a custom derivative rule decides about it
            value, grads = self.value_and_grad(params, *args)
            return value, grads, statistics(rng)
        parts, products = gradient()
        grads = jax.tree.unflatten(self.tree.treedef, parts)
        return value, grads, statistics(rng)._replace(products=products)

    @jax.named_scope("kfac_statistics")
    def value_and_statistics(
        self,
        params: Params,
        *args: Any,
        rng: Array | None = None,
        factors: Factors | None = None,
    ) -> tuple[Any, Statistics]:
        """Value and curvature statistics, for a loss that has a gradient of its own.

        Such a loss function returns its gradient with `has_aux`, as the energy of a
        neural wavefunction does. It may be computed by `jax.value_and_grad` of a
        function with a `custom_jvp` in whose rule the loss is registered: the plan is
        made of what leads to what is registered, wherever that is. One forward pass
        serves the statistics and what the loss function computes besides.

        Args:
          params: the parameters.
          *args: the loss function's further arguments.
          rng: a key for the sampled modes.
          factors: the factors so far, as in `value_grad_and_statistics`.

        Returns:
          The value, `(loss, aux)` with `has_aux`; the statistics.

        Raises:
          ValueError: as `value_grad_and_statistics`, and for layers whose gradient is
            to stay a product (`gradient_products`).

        >>> import jax, jax.numpy as jnp, kfac_jax
        >>> def loss_fn(w, x, y):
        ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
        >>> def own_gradient(w, x, y):
        ...     return jax.value_and_grad(loss_fn)(w, x, y)
        >>> w, x, y = jnp.ones((3, 2)), jnp.ones((8, 3)), jnp.zeros((8, 2))
        >>> curvature = kfac_jax.make_curvature(own_gradient, w, x, y, has_aux=True)
        >>> (value, grads), statistics = curvature.value_and_statistics(
        ...     w, x, y, rng=jax.random.key(0))
        >>> grads.shape
        (3, 2)
        """
        if isinstance(self.structure, SampleSpace):
            return self.loss_fn(params, *rebuilt(args)), self._sample_statistics(
                params, args, rng
            )
        products = [group.name for group in self.groups if group.product_rows]
        if products:
            raise ValueError(
                "value_and_statistics has no gradient to keep as a product: expected "
                f"no layers with gradient_products, got {products}. Use "
                "value_grad_and_statistics, or leave gradient_products out."
            )
        leaves, part, factors = self._prepare(params, args, rng, factors)
        value, _, statistics = linearize(
            self, params, part, leaves, factors, own_gradient=True
        )
        if self.statistics_fraction < 1.0:
            value = self.loss_fn(params, *rebuilt(args))
        return value, statistics(rng)

    def zero_statistics(self, params: Params) -> Statistics:
        """Statistics that say nothing, for steps which gather none.

        `update` leaves its factors alone when it gets these.

        Args:
          params: the parameters.

        Returns:
          Zeros, with weight zero.
        """
        self._has_factors("zero_statistics")
        self.tree.leaves(params, "params")
        return averages.zero_statistics(self.groups)

    def _prepare(
        self, params: Params, args: Any, rng: Array | None, factors: Factors | None
    ) -> tuple[Sequence[Array], Any, Factors | None]:
        """The parameters' leaves, τ1 of the batch, and what blocks carry."""
        if rng is not None:
            arguments.key("rng", rng)
        elif needs_rng(self.estimation_mode):
            raise ValueError(
                f'estimation_mode="{self.estimation_mode}" samples; pass a key as '
                "value_grad_and_statistics(..., rng=key): expected rng, got None."
            )
        leaves = self.tree.leaves(params, "params")
        part = batch_lib.take(args, self.statistics_fraction, self.in_batch)
        if factors is not None:
            averages.check(self.groups, "factor_shapes", factors)
        elif any(group.moves for group in self.groups):
            start = self.init_factors(params)
            _, _, first = linearize(
                self, params, part, leaves, start, own_gradient=True
            )
            factors = axis_types.auto(self._own_basis)(first(rng))
        return leaves, part, factors

    def _own_basis(self, statistics: Statistics) -> Factors:
        """What blocks carry, from a batch's own factors."""
        return {
            layer.name: layer.block.carry(
                layer.block.factors(
                    statistics.layers[layer.name],
                    statistics.weight.astype(layer.dtype),
                )
            )
            for layer in self.layers
            if layer.block is not None and layer.carried_shapes
        }

    # ---------------------------------------------------------------- exact products

    def matvec(
        self, params: Params, v: Params, *args: Any, matrix: str = "fisher"
    ) -> Params:
        """Multiplies by an exact curvature matrix, without forming it.

        Args:
          params: the parameters.
          v: a vector like the parameters.
          *args: the loss function's further arguments.
          matrix: "fisher", "ggn" (the same: they are equal for losses in natural
            parameters, and for others the Fisher is used), or "hessian", the Hessian
            of the returned loss.

        Returns:
          The product, like the parameters. `l2` is not included, except in the Hessian
          of a loss that includes it.

        Raises:
          ValueError: for an unknown matrix, for trees that do not match, or if the
            network uses a `custom_vjp` function, which has no forward mode.
        """
        arguments.choice("matrix", matrix, ("fisher", "ggn", "hessian"))
        tangents = self.tree.leaves(v, "v")
        program = self._exact(params, args)
        if matrix == "hessian":
            return program.hessian_product(params, v)
        return jax.tree.unflatten(self.tree.treedef, program.fisher_product(tangents))

    @jax.named_scope("kfac_quadratic_form")
    def quadratic_form(self, params: Params, vectors: Any, *args: Any) -> Array:
        """The matrix `Vᵀ F V` of the exact Fisher, by forward-mode products only.

        Each vector is pushed forward once and multiplied by a root of the Fisher over
        the outputs: `uᵀ F v = E[(Bᵀ J u)ᵀ (Bᵀ J v)]`.

        Args:
          params: the parameters.
          vectors: a list or tuple of n vectors like the parameters, or one tree like
            the parameters with an additional leading axis n.
          *args: the loss function's further arguments.

        Returns:
          `[n, n]`, in float32 or wider. `l2` is not included.

        Raises:
          TypeError: if a leaf is no array of real floating point.
          ValueError: if the trees do not match, or if the network uses a `custom_vjp`
            function, which has no forward mode.

        References:
          Martens & Grosse 2015, Appendix C.
        """
        program, one_by_one = self._exact(params, args), self._vectors(vectors)
        return program.quadratic_form(one_by_one or jax.tree.leaves(vectors))

    def _vectors(self, vectors: Any) -> list[list[Array]] | None:
        """The leaves of each of several vectors; None if they come as one stacked."""
        if isinstance(vectors, list | tuple) and vectors:
            if jax.tree.structure(vectors[0]) == self.tree.treedef:
                return [
                    self.tree.leaves(v, f"vectors[{i}]") for i, v in enumerate(vectors)
                ]
        what = "vectors (one tree with a leading axis)"
        self.tree.leaves(jax.tree.map(_without_first_axis, vectors), what)
        counts = {jnp.shape(x)[0] for x in jax.tree.leaves(vectors)}
        if len(counts) > 1:
            raise ValueError(
                f"{what} must hold equally many of each leaf; got {sorted(counts)}."
            )
        return None

    def _exact(self, params: Params, args: Any) -> ExactProducts:
        leaves = self.tree.leaves(params, "params")
        return ExactProducts(
            self.loss_fn, self.has_aux, self.tree, params, tuple(leaves), args
        )

    # ------------------------------------------------------------------- sample space

    @jax.named_scope("kfac_gram")
    def gram(self, params: Params, *args: Any, rng: Array | None = None) -> Array:
        """The matrix `T = U Uᵀ` of the rows of all cases, whose Fisher is `F = Uᵀ U`.

        Args:
          params: the parameters.
          *args: the loss function's further arguments.
          rng: a key for the sampled modes.

        Returns:
          `[NR, NR]`, in float32 or wider; the rows of one case are adjacent: one for
          each of its outputs in exact modes, for each sample in sampled ones. Losses of
          different numbers of cases come one after the other.

        Raises:
          ValueError: for another structure than `SampleSpace`, or if a parameter has no
            gradient of each case.

        >>> import jax.numpy as jnp, kfac_jax
        >>> def loss_fn(w, x, y):
        ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
        >>> w, x, y = jnp.ones((3, 2)), jnp.eye(3), jnp.zeros((3, 2))
        >>> curvature = kfac_jax.make_curvature(
        ...     loss_fn, w, x, y, structure=kfac_jax.SampleSpace(),
        ...     estimation_mode="fisher_exact")
        >>> curvature.gram(w, x, y).shape
        (6, 6)
        """
        check_sample_space("gram", self.structure)
        statistics = self._sample_statistics(params, args, rng)
        part = batch_lib.take(args, self.statistics_fraction, self.in_batch)
        drawn = sample_space.sampled(statistics)

        def gram(params: Params, args: Any, drawn: list[Array]) -> Array:
            return sample_space.gram(self, params, args, drawn)

        return axis_types.auto(gram)(params, part, drawn)

    def _sample_statistics(
        self, params: Params, args: Any, rng: Array | None
    ) -> Statistics:
        if rng is not None:
            arguments.key("rng", rng)
        leaves = self.tree.leaves(params, "params")
        part = batch_lib.take(args, self.statistics_fraction, self.in_batch)
        return sample_space.statistics(self, params, part, leaves, rng)

    def _has_factors(self, name: str) -> None:
        if isinstance(self.structure, SampleSpace):
            raise ValueError(
                f"{name} is of factors, which {self.structure!r} has not: expected "
                "another structure. Use gram and natural_gradient in the sample space."
            )

    # ------------------------------------------------------------------------ factors

    def init_factors(self, params: Params) -> Factors:
        """Factors of the right shapes, by layer name: zeros, and standard bases.

        Args:
          params: the parameters.

        Returns:
          The factors.
        """
        self._has_factors("init_factors")
        self.tree.leaves(params, "params")
        return averages.init_factors(self.groups)

    def update_factors(
        self, factors: Factors, statistics: Statistics, step: Any, decay: float = 0.95
    ) -> Factors:
        """Moves the factors' averages on by one batch.

        `new = ε · old + (1 - ε) · batch` with `ε = min(1 - 1/k, decay)`. A layer whose
        statistics are not finite keeps its factors; with weight zero, or where masks
        hide all cases, all do. Every batch counts alike, while the state of `kfac`
        counts them by their cases; sums of statistics, and `over`, do so, too.

        Args:
          factors: the averages so far.
          statistics: what `value_grad_and_statistics` returned, or a sum of such.
          step: k, counted from 1.
          decay: the largest ε, in [0, 1).

        Returns:
          The new averages.

        Raises:
          TypeError: if an argument is of the wrong type.
          ValueError: if factors or statistics are of another plan, or a number is out
            of its range.

        References:
          Martens & Grosse 2015, section 5.
        """
        self._has_factors("update_factors")
        averages.check_statistics(statistics)
        arguments.integer("step (k)", step, arrays=True)
        arguments.within("step (k)", step, 1, float("inf"))
        arguments.number("decay (ε)", decay, arrays=True)
        arguments.within("decay (ε)", decay, 0.0, 1.0)
        return averages.average(self.groups, factors, statistics, step, decay).factors

    def renew_factors(self, factors: Factors) -> Factors:
        """Renews what blocks carry: the bases of `Eigen`, the weights of fits.

        An optimizer does so every T3 steps. Moments are moved to the new basis, so that
        statistics that were gathered with the old factors may not be added to these.

        Args:
          factors: from `update_factors`.

        Returns:
          The factors; those of other blocks as they are.

        Raises:
          ValueError: if the factors are of another plan.
        """
        self._has_factors("renew_factors")
        averages.check(self.groups, "factor_shapes", factors)
        moving = [group for group in self.groups if group.moves]
        own = {name: factors[name] for group in moving for name in group.names}
        return factors | inverses.move(moving, own)

    def at(self, params: Params, *args: Any, rng: Array | None = None) -> Approximation:
        """The operator of one batch, without an optimizer.

        What is done is compiled, once for each shape.

        Args:
          params: the parameters.
          *args: the loss function's further arguments.
          rng: a key for the sampled modes.

        Returns:
          The operator.

        Raises:
          ValueError: as `value_grad_and_statistics`.

        >>> import jax, jax.numpy as jnp, kfac_jax
        >>> def loss_fn(w, x, y):
        ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
        >>> w, x, y = jnp.ones((3, 2)), jnp.eye(3), jnp.zeros((3, 2))
        >>> curvature = kfac_jax.make_curvature(
        ...     loss_fn, w, x, y, estimation_mode="fisher_exact")
        >>> round(float(curvature.at(w, x, y).trace()), 3)
        4.0
        """
        self._has_factors("at")
        *_, last = self._gathered(params, [args], rng)
        return self.approximation(last.factors)

    def over(
        self, params: Params, batches: Iterable[Any], *, rng: Array | None = None
    ) -> Approximation:
        """The operator of a whole data set: the mean over all cases of its batches.

        Each batch counts by the number of cases that its loss is the mean of, so that
        the last may be smaller. What is done with a batch is compiled, once for each
        shape. With `blocks.Eigen` there are two passes, one for the
        bases and one for what lies in them.

        Args:
          params: the parameters.
          batches: for each batch the loss function's further arguments, as a tuple.
          rng: a key for the sampled modes, of which every batch gets its own.

        Returns:
          The operator.

        Raises:
          TypeError: if a batch is no tuple, or if two passes are needed and the batches
            can be had only once.
          ValueError: if there is no batch, and as `value_grad_and_statistics`.
        """
        steps = self.gathered(params, batches, rng=rng)
        last = functools.reduce(lambda _, step: step, steps)
        return self.approximation(last.factors)

    def gathered(
        self,
        params: Params,
        batches: Iterable[Any],
        *,
        rng: Array | None = None,
        start: Gathered | None = None,
    ) -> Iterator[Gathered]:
        """`over`, batch by batch: for runs that may be interrupted.

        Args:
          params: the parameters.
          batches: as for `over`, and the same ones in each run.
          rng: as for `over`.
          start: what an earlier run yielded last; its batches are passed over.

        Returns:
          An iterator, of what is gathered after each batch: a pytree of arrays and
          numbers. `approximation(gathered.factors)` of the last is what `over` returns.

        Raises:
          TypeError: if `start` is something else, and as `over`.
          ValueError: if `start` is of another plan, and as `over`.

        >>> import jax.numpy as jnp, kfac_jax
        >>> def loss_fn(w, x, y):
        ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
        >>> w, batch = jnp.ones((3, 2)), (jnp.eye(3), jnp.zeros((3, 2)))
        >>> curvature = kfac_jax.make_curvature(
        ...     loss_fn, w, *batch, estimation_mode="fisher_exact")
        >>> first = next(curvature.gathered(w, [batch, batch]))
        >>> rest = curvature.gathered(w, [batch, batch], start=first)
        >>> [(x.batches, int(x.cases)) for x in (first, *rest)]
        [(1, 3), (2, 6)]
        """
        self._has_factors("over")
        if any(group.moves for group in self.groups) and iter(batches) is batches:
            raise TypeError(
                "blocks.Eigen takes two passes over the batches: expected what can be "
                "iterated again, a list or a data loader, got an iterator. Pass "
                "list(batches)."
            )
        return self._gathered(params, batches, rng, start)

    def _gathered(
        self,
        params: Params,
        batches: Iterable[Any],
        rng: Array | None,
        start: Gathered | None = None,
    ) -> Iterator[Gathered]:
        if rng is not None:
            arguments.key("rng", rng)
        if start is not None:
            check_start(start, self.groups)
            averages.check(self.groups, "factor_shapes", start.factors)

        def add(factors: Factors, cases: Array, args: Any, key: Any) -> Any:
            return self._add(factors, cases, params, args, key)

        empty = self.init_factors(params)
        return gathered(self.groups, add, empty, batches, rng, start)

    @functools.cached_property
    def _add(self) -> Callable[..., tuple[Factors, Array]]:
        """`_with_batch`, compiled once for each shape in this plan's life."""
        return jax.jit(self._with_batch)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but what is compiled."""
        return {name: x for name, x in vars(self).items() if name != "_add"}

    def _with_batch(
        self,
        factors: Factors,
        seen: Array,
        params: Params,
        args: tuple[Any, ...],
        key: Array | None,
    ) -> tuple[Factors, Array]:
        """The means over the cases so far with those of a batch, and their number."""
        leaves, part, given = self._prepare(params, args, key, factors)
        _, _, gather = linearize(self, params, part, leaves, given, own_gradient=True)
        statistics = gather(key)
        total = seen + statistics.weight.astype(float)
        share = seen / jnp.where(total > 0, total, 1.0)
        new = averages.average(self.groups, factors, statistics, jnp.inf, share)
        return new.factors, jnp.where(new.informed, total, seen)

    def approximation(self, factors: Factors) -> Approximation:
        """The approximate curvature as a linear operator over the parameters.

        Args:
          factors: from `update_factors`.

        Returns:
          The operator: `matvec`, `solve`, `power`, `to_dense`, `diagonal`, `trace`,
          `logdet`, `sample`.

        Raises:
          ValueError: if the factors are of another plan, or if blocks have no basis yet
            (where that is known when the program is traced).
        """
        self._has_factors("approximation")
        averages.check(self.groups, "factor_shapes", factors)
        averages.check_bases(self.groups, factors)
        factors = widened(self.groups, factors)
        return Approximation(groups=self.groups, tree=self.tree, factors=factors)


def make_curvature(
    loss_fn: Callable[..., Any],
    params: Params,
    *args: Any,
    has_aux: bool = False,
    estimation_mode: str = "fisher_gradients",
    blocks: BlocksSpec = None,
    structure: Structure = BLOCK_DIAGONAL,
    weight_sharing: str = "expand",
    on_unmatched: str = "warn",
    on_rest: str = "warn",
    num_samples: int = 1,
    statistics_fraction: float = 1.0,
    l2: float = 0.0,
    batch_argnums: int | Sequence[int] | None = None,
    independent_cases: bool = False,
    factor_dtype: DTypeLike | None = None,
) -> Curvature:
    """Traces a loss function and plans its curvature approximation.

    The loss function is written in any library and is traced abstractly, so plans can
    be made from shapes and inside `jit`. It must register its loss: use a function of
    `kfac_jax.losses`, or call a `kfac_jax.register_*` function on the network's output.

    Args:
      loss_fn: `loss_fn(params, *args) -> loss`, or `(loss, aux)` with `has_aux`. The
        loss is a mean over cases plus, if `l2` is given, `(l2 / 2) · ‖params‖²`.
      params: a pytree of floating-point arrays, or of `jax.ShapeDtypeStruct`.
      *args: further arguments, arrays or `jax.ShapeDtypeStruct`; leading axes are the
        batch (see `batch_argnums`). If all are concrete, the returned loss is compared
        with the registered (see `on_rest`).
      has_aux: whether the loss function also returns auxiliary data.
      estimation_mode: "fisher_gradients" (targets sampled from the model),
        "fisher_exact", "fisher_empirical" (the data's targets),
        "fisher_curvature_prop", "ggn_exact" or "ggn_curvature_prop". "inputs" gathers
        second moments of layers' inputs in the gradient's own backward pass: no loss
        need be registered, and default blocks are `blocks.InputOnly()`, or the identity
        for other parameters than weights. (If weights are used inside of a function
        with a custom derivative rule, the gradient takes a pass of its own.)
      blocks: the approximation of each layer: one block for all; a mapping from layer
        kind or path regex to a block or None; or a function of the layer. None as a
        block leaves the gradient of that layer as it is.
      structure: how blocks relate: `BlockDiagonal()`, or `BlockTridiagonal()` with the
        curvature between neighbouring layers.
      weight_sharing: what default blocks do with the positions of one example at which
        a weight is used: "expand" takes each for a case, "reduce" averages inputs and
        adds output gradients first, which suits losses of the positions' mean. Blocks
        given in `blocks` have their own; if no layer is left that "reduce" is for, it
        is an error.
      on_unmatched: what to do about parameters no layer covers: "warn" gives them the
        diagonal `N · ḡ²` of the sampled batch gradient ḡ; in the exact modes their
        exact diagonal, by a forward pass for each entry of the smallest, up to 32, and
        by the gradient of each case for others (where cases may meet before the
        outputs `N · ḡ²` with random signs of the cases, from `rng`). "error" raises,
        "ignore" gives them the identity. `SampleSpace()` takes their gradients case by
        case, exactly, and has no use for this.
      on_rest: what to do if the returned loss has terms that are not registered, as a
        bound's KL divergence or an auxiliary loss. They have no curvature; the gradient
        is always that of the returned loss. "warn" tells the difference, "error"
        raises, "ignore" compares nothing. A factor between both, as of a sum in place
        of a mean, is an error unless ignored.
      num_samples: how many samples per batch the sampled modes average over.
      statistics_fraction: τ1, the fraction of the batch used for statistics, in (0, 1].
      l2: η, the weight of the quadratic penalty that the loss includes, at least 0.
      batch_argnums: which of `args`, counted from 0, are the batch: their arrays have
        the examples in front. None for all arrays whose leading axis fits the cases
        of the registered losses.
      independent_cases: that no case's registered output depends on another case's
        input. Exact modes pull back the cases of one example (positions of a sequence)
        one by one, and all cases where they could not follow which belong to one
        example; there, but not where they could, they then pull back all at once.
      factor_dtype: bfloat16 or float32, in which factors are kept, or None for the type
        of their statistics. These, averages, inverses and bases are computed in float32
        or wider. Of bfloat16, an average does not follow changes of less than about
        2⁻⁹ / (1 - ε) of an entry, and damped factors must be positive definite after
        entries lost all but eight bits; where they are not, inverses stay as they were.

    Returns:
      The plan.

    Raises:
      TypeError: if parameters are not real floating point, or the loss is not a scalar
        array.
      ValueError: if no loss is registered, if the registered loss differs from the
        returned one by a factor, if leading axes disagree, or if an option is out of
        its range.

    References:
      Martens & Grosse 2015, sections 3, 4, 5 and 8.

    >>> import jax.numpy as jnp, kfac_jax
    >>> def loss_fn(w, x, y):
    ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
    >>> w, x, y = jnp.ones((3, 2)), jnp.ones((8, 3)), jnp.zeros((8, 2))
    >>> [layer.kind for layer in make_curvature(loss_fn, w, x, y).layers]
    ['dense']
    """
    arguments.function("loss_fn", loss_fn)
    checks.check_options(
        has_aux,
        estimation_mode,
        on_unmatched,
        on_rest,
        num_samples,
        statistics_fraction,
        l2,
        independent_cases,
    )
    if isinstance(structure, type) or not callable(getattr(structure, "group", None)):
        raise ValueError(
            "structure must be BlockDiagonal() or BlockTridiagonal(), or have a method "
            f"group(uses) that makes groups; got {arguments.shown(structure)}."
        )
    if of_inputs(estimation_mode) and not isinstance(structure, BlockDiagonal):
        raise ValueError(
            'estimation_mode="inputs" gathers no output gradients: expected '
            f"structure=BlockDiagonal(), got {structure!r}. Use another mode for it."
        )
    check_weight_sharing(weight_sharing)
    options: dict[str, Any] = dict(
        loss_fn=loss_fn,
        has_aux=has_aux,
        estimation_mode=estimation_mode,
        num_samples=num_samples,
        statistics_fraction=statistics_fraction,
        l2=l2,
        tree=tree_spec(params),
        blocks=blocks,
        on_unmatched=on_unmatched,
        weight_sharing=weight_sharing,
        structure=structure,
        batch_argnums=batch_lib.check_argnums(batch_argnums, args),
        independent_cases=independent_cases,
        factor_dtype=checks.check_factor_dtype(factor_dtype),
    )
    # In the sample space nothing is approximated: cases are taken one by one at worst.
    exact = isinstance(structure, SampleSpace)
    derived = Options(**options).derive(params, args, quiet=exact)
    checks.check_sharing(derived.layers, blocks is not None, weight_sharing)
    if statistics_fraction < 1.0:
        batch_lib.batch_size(args, derived.traced.in_batch)
    if not of_inputs(estimation_mode):
        check_loss(derived.traced, params, args, l2, on_rest)
    means = checks.check_means(derived.traced, on_unmatched)
    plan = Curvature(
        **options,
        kept_rules=derived.kept_rules,
        agreements=derived.traced.agreements,
        layers=derived.layers,
        groups=derived.grouped.groups,
        notes=derived.grouped.notes + means,
        in_batch=derived.traced.in_batch,
        lost_examples=checks.check_cases(
            derived.traced, estimation_mode, independent_cases
        ),
    )
    if exact:
        lines = sample_space.lines(plan, params, args)
    else:
        lines = estimated_diagonals(plan, derived, params, args)
    return dataclasses.replace(plan, notes=plan.notes + lines)
