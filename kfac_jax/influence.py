"""Influence functions: which training cases a prediction comes from.

The score of a training case z for a query q is `⟨∇L(q), (F + λ I)⁻¹ ∇L(z)⟩`: how much
the query's loss would rise without z, times the number of training cases. Parameters of
layers without a block, or with `Identity`, count as fixed. Queries are preconditioned
once. The scores of a batch of training cases are then directional derivatives of their
losses, one forward-mode pass for each query: no gradient of a case is formed.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._utils import arguments
from kfac_jax.curvature import Curvature
from kfac_jax.operator.approximation import Approximation, only_with_curvature

Params = Any
Losses = Callable[..., Array]
"""`losses(params, *args) -> [n]`, the loss of each case; no case sees another."""


def queries(
    losses: Losses,
    params: Params,
    *args: Any,
    operator: Approximation,
    damping: Any,
    damping_mode: str = "exact",
) -> Params:
    """`(F + λ I)⁻¹ ∇L(q)` for a batch of cases q.

    Args:
      losses: the loss of each case.
      params: the trained parameters.
      *args: the loss function's further arguments, with the queries in front.
      operator: the curvature of the training set, `curvature.over(...)`.
      damping: λ > 0, a number or one for each layer.
      damping_mode: "exact" or "factored".

    Returns:
      A tree like the parameters, with the queries in front.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if `losses` does not return a loss for each case, and as
        `Approximation.solve`.

    References:
      Grosse et al. 2023, arXiv:2308.03296.

    Of linear regression, at its minimum:

    >>> import jax.numpy as jnp, kfac_jax
    >>> from kfac_jax import influence
    >>> def losses(w, x, y):
    ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1)
    >>> x, y = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[1.0], [2.0], [4.0]])
    >>> w = jnp.linalg.lstsq(x, y)[0]
    >>> loss_fn = lambda w, x, y: losses(w, x, y).mean()
    >>> curvature = kfac_jax.make_curvature(
    ...     loss_fn, w, x, y, estimation_mode="fisher_exact")
    >>> operator = curvature.over(w, [(x, y)])
    >>> query = jnp.array([[1.0]]), jnp.array([[1.5]])
    >>> found = queries(losses, w, *query, operator=operator, damping=1e-6)
    >>> top(found, losses, w, [(x, y)], k=1).cases.tolist()  # the one that is highest
    [[2]]
    """
    gradients = gradients_of(losses, params, *args)
    return jax.vmap(_solve(operator, damping, damping_mode))(gradients)


def _solve(
    operator: Approximation, damping: Any, damping_mode: str
) -> Callable[[Params], Params]:
    """`(F + λ I)⁻¹`, and zero for parameters without curvature."""
    return lambda v: only_with_curvature(
        operator, operator.solve(v, damping, damping_mode)
    )


def gradients_of(losses: Losses, params: Params, *args: Any) -> Params:
    """The gradient of each case's loss, with the cases in front.

    Args:
      losses: the loss of each case.
      params: the parameters.
      *args: the loss function's further arguments.

    Returns:
      A tree like the parameters, with the cases in front.

    Raises:
      TypeError: if `losses` is no function.
      ValueError: if it does not return a loss for each case.
    """
    _check(losses, params, args)

    def of_case(case: Any) -> Params:
        single = jax.tree.map(lambda x: x[None], case)
        return jax.grad(lambda params: losses(params, *single).sum())(params)

    return jax.vmap(of_case)(tuple(args))


def refined(
    found: Params,
    losses: Losses,
    params: Params,
    *args: Any,
    curvature: Curvature,
    batches: Iterable[Any],
    operator: Approximation,
    damping: float,
    steps: int,
) -> Params:
    """Queries closer to those of the exact curvature, by conjugate gradients.

    From the preconditioned queries on, iterations on `F + λ I` with the exact F of some
    batches, preconditioned by the operator: its error in directions that the queries
    have goes away first.

    Args:
      found: what `queries` returned.
      losses: the loss of each case.
      params: the trained parameters.
      *args: the queries, as for `queries`.
      curvature: the plan.
      batches: for each batch the arguments of the plan's loss function, a tuple. Each
        counts by its number of cases, so that the last may be smaller. All are held in
        memory.
      operator: the curvature's approximation.
      damping: λ > 0.
      steps: the number of iterations.

    Returns:
      A tree like `found`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if there is no batch, and as `queries`.

    References:
      Wang et al. 2025, arXiv:2507.14740.
    """
    arguments.count("steps", steps, 1)
    arguments.number("damping (λ)", damping, arrays=True)
    gradients = gradients_of(losses, params, *args)
    exact = _mean_product(curvature, params, batches)

    def product(v: Params) -> Params:
        both = jax.tree.map(
            lambda x, y: x + jnp.asarray(damping, y.dtype) * y, exact(v), v
        )
        return only_with_curvature(operator, both)

    def one(start: Params, gradient: Params) -> Params:
        solution, _ = jax.scipy.sparse.linalg.cg(
            product,
            only_with_curvature(operator, gradient),
            start,
            maxiter=steps,
            tol=0.0,
            M=_solve(operator, damping, "exact"),
        )
        return solution

    return jax.lax.map(lambda pair: one(*pair), (found, gradients))


def _mean_product(
    curvature: Curvature, params: Params, batches: Iterable[Any]
) -> Callable[[Params], Params]:
    """Products with the mean of the exact curvature over the cases of some batches.

    Batches of one shape are one loop, so that the program does not grow with them.

    Raises:
      TypeError: if a batch is no tuple.
      ValueError: if there is no batch.
    """
    by_shape: dict[Any, list[Any]] = {}
    for args in batches:
        arguments.sequence("each batch", args, "arguments of the loss function")
        leaves, treedef = jax.tree.flatten(tuple(args))
        shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        by_shape.setdefault((treedef, shapes), []).append(tuple(args))
    if not by_shape:
        raise ValueError(
            "refined needs at least one batch, a tuple of the loss function's "
            "arguments after the parameters; got none."
        )
    stacks = [jax.tree.map(lambda *x: jnp.stack(x), *x) for x in by_shape.values()]

    def weight(args: Any) -> Array:
        """The number of cases that a batch's loss is the mean of."""
        key = jax.random.key(0)  # of draws that are not used
        found = curvature.value_grad_and_statistics(params, *args, rng=key)
        return found[-1].weight.astype(float)

    weights = [jax.lax.map(weight, stack) for stack in stacks]
    total = sum(x.sum() for x in weights)

    def product(v: Params) -> Params:
        def add(sums: Params, batch: tuple[Array, Any]) -> tuple[Params, None]:
            share, args = batch
            own = curvature.matvec(params, v, *args)
            parts = jax.tree.map(lambda y: share.astype(y.dtype) * y, own)
            return jax.tree.map(jnp.add, sums, parts), None

        sums = jax.tree.map(jnp.zeros_like, v)
        for own, stack in zip(weights, stacks, strict=True):
            sums, _ = jax.lax.scan(add, sums, (own / total, stack))
        return sums

    return product


def scores(found: Params, losses: Losses, params: Params, *args: Any) -> Array:
    """The scores of a batch of training cases for all queries.

    Args:
      found: what `queries` returned.
      losses: the loss of each case.
      params: the trained parameters.
      *args: the training cases.

    Returns:
      `[queries, cases]`; positive where the case lowers the query's loss.

    Raises:
      TypeError: if `losses` is no function.
      ValueError: if it does not return a loss for each case.
    """
    _check(losses, params, args)

    def of_query(query: Params) -> Array:
        return jax.jvp(lambda p: losses(p, *args), (params,), (query,))[1]

    return jax.lax.map(of_query, found)


def _check(losses: Losses, params: Params, args: Any) -> None:
    """Raises ValueError unless there is a loss for each case."""
    arguments.function("losses", losses)
    found = jax.eval_shape(losses, params, *args)
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(args)}
    shape = getattr(found, "shape", None)
    if len(lengths) != 1 or shape not in lengths:
        given = [jnp.shape(x) for x in jax.tree.leaves(args)]
        raise ValueError(
            "losses must return the loss of each case: expected one axis, the leading "
            f"one of all further arguments, got shape {shape} for arguments of shapes "
            f"{given}. Leave the mean out, and pass what belongs to no case by a "
            "closure."
        )


class Top(NamedTuple):
    """The training cases of largest score for each query."""

    scores: Array  # [queries, k], largest first
    cases: Array  # [queries, k] int32, their numbers in the order of the batches


def top(
    found: Params,
    losses: Losses,
    params: Params,
    batches: Iterable[Any],
    k: int = 10,
) -> Top:
    """The k training cases of largest score for each query, one batch at a time.

    What is done with a batch is compiled, once for each shape.

    Args:
      found: what `queries` returned.
      losses: the loss of each case.
      params: the trained parameters.
      batches: for each batch of training cases the arguments of `losses`, a tuple.
      k: how many; all of them if there are fewer.

    Returns:
      Scores and numbers of cases.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if there is no batch, or `losses` does not return a loss for each
        case.
    """
    arguments.count("k", k, 1)
    compute = jax.jit(lambda found, params, args: scores(found, losses, params, *args))
    best: Top | None = None
    start = 0
    for args in batches:
        arguments.sequence("each batch", args, "arguments of losses")
        new = compute(found, params, tuple(args))
        count = new.shape[1]
        numbers = jnp.broadcast_to(
            jnp.arange(start, start + count, dtype=jnp.int32)[None], new.shape
        )
        start += count
        if best is not None:
            new = jnp.concatenate([best.scores, new], 1)
            numbers = jnp.concatenate([best.cases, numbers], 1)
        values, places = jax.lax.top_k(new, min(k, new.shape[1]))
        best = Top(values, jnp.take_along_axis(numbers, places, 1))
    if best is None:
        raise ValueError(
            "top needs at least one batch of training cases, a tuple of the arguments "
            "of losses after the parameters; got none."
        )
    return best
