"""Gradients of each case by itself, of parameters that no layer covers.

The loss function is traced for a batch of one case, and mapped over the cases. That is
right if no case meets another one on its way to the registered outputs, and none is
told by its place in the batch; see `_jaxpr/separate.py`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import _compat
from kfac_jax._jaxpr.differentiation import reverse_mode
from kfac_jax._jaxpr.interpreter import run
from kfac_jax._jaxpr.loops import sum_over
from kfac_jax._utils.dtypes import wide
from kfac_jax.plan.group import Factors
from kfac_jax.plan.layer import Layer
from kfac_jax.plan.plan import Derived, Plan
from kfac_jax.plan.programs import outputs_program
from kfac_jax.plan.tracing import trace
from kfac_jax.statistics.estimation import Cases

LARGEST = 2**26
"""How many numbers the gradients of cases that are evaluated at once are, at most."""


class CaseError(ValueError):
    """A case cannot be evaluated by itself."""


Pull = Callable[[list[Array]], dict[str, Array]]
"""Maps cotangents of one case's outputs to gradients as the layers' matrices."""


class Alone(NamedTuple):
    """The cases, and a function of one.

    Attributes:
      cases: the arrays that hold the cases, `[N, ...]`.
      pull: a function of one case that evaluates it, and returns a pull-back.
      entries: how many numbers its gradients are.
    """

    cases: list[Array]
    pull: Callable[[list[Array]], Pull]
    entries: int


def prepare(
    plan: Plan,
    derived: Derived,
    layers: Sequence[Layer],
    args: Any,
    leaves: Sequence[Array],
    arranged: Sequence[Cases],
    size: int,
) -> Alone:
    """Traces the loss function for a batch of one case.

    Args:
      plan: the plan.
      derived: the program and its layers.
      layers: the layers whose gradients are wanted.
      args: the loss function's further arguments.
      leaves: the parameters' leaves.
      arranged: how cases are arranged in the registered outputs.
      size: N, the number of cases that are evaluated.

    Returns:
      What evaluates cases one by one.

    Raises:
      CaseError: if a case cannot be evaluated by itself.
    """
    if why := derived.traced.found.joins_cases:
        raise CaseError(why)
    flags, flat = derived.traced.in_batch, jax.tree.leaves(args)
    mapped = [own and len(x) == size for x, own in zip(flat, flags, strict=True)]
    # of batches of another length one case will do: these outputs do not use it
    cut = [x[:1] if own else x for x, own in zip(flat, flags, strict=True)]
    single = jax.tree.unflatten(jax.tree.structure(args), cut)
    # inside of shard_map JAX sums the cotangents of what is the same on all devices
    leaves = [_compat.vary_like(x, *flat) for x in leaves]
    params = jax.tree.unflatten(plan.tree.treedef, leaves)
    try:
        traced = trace(
            plan.loss_fn,
            plan.has_aux,
            plan.tree,
            params,
            single,
            plan.batch_argnums,
            agreements=plan.agreements,
        )
    except (TypeError, ValueError) as error:
        raise CaseError(str(error)) from error
    program = outputs_program(traced)
    full, one = (
        [node.shape() for node in found.graph.walk() if node.name == "kfac_loss"]
        for found in (derived.traced.found, traced.found)
    )
    pairs = zip(one, arranged, strict=True)
    if [math.prod(x) * cases.size for x, cases in pairs] != [*map(math.prod, full)]:
        raise CaseError(f"of one case the registered outputs have shapes {one}")
    chosen = [*dict.fromkeys(i for layer in layers for i in layer.leaves)]

    def evaluate(case: list[Array]) -> Pull:
        rest = iter(case)
        data = [
            next(rest)[None] if yes else x for x, yes in zip(cut, mapped, strict=True)
        ]

        def outputs(values: list[Array]) -> list[Array]:
            replaced = dict(zip(chosen, values, strict=True))
            inputs = [replaced.get(i, x) for i, x in enumerate(leaves)]
            return [loss.z for loss in run(program, [*inputs, *data], None)[1]]

        zs, pull = jax.vjp(outputs, [leaves[i] for i in chosen])

        def pulled(us: list[Array]) -> dict[str, Array]:
            given = [
                _compat.vary_like(u.reshape(z.shape), z)
                for u, z in zip(us, zs, strict=True)
            ]
            with reverse_mode(program.graph, len(leaves)):
                by_leaf = dict(zip(chosen, pull(given)[0], strict=True))
            return {x.name: x.to_matrix([by_leaf[i] for i in x.leaves]) for x in layers}

        return pulled

    cases = [x for x, yes in zip(flat, mapped, strict=True) if yes]
    return Alone(cases, evaluate, sum(math.prod(leaves[i].shape) for i in chosen))


def gradients(alone: Alone, cotangents: Sequence[Array]) -> dict[str, Array]:
    """The gradients of each case, `[N, K, entries]` by layer.

    Args:
      alone: what `prepare` returned.
      cotangents: K for each case, `[N, K, entries]` for each registered output.

    Returns:
      Arrays by layer.
    """

    def one(case: list[Array], us: list[Array]) -> dict[str, Array]:
        found = jax.vmap(alone.pull(case))(us)
        return {name: x.reshape(len(x), -1) for name, x in found.items()}

    return jax.vmap(one)(alone.cases, list(cotangents))


def squares(alone: Alone, cotangents: Sequence[Array]) -> Factors:
    """The sums over cases of their gradients' squares, as the layers' diagonals.

    Args:
      alone: what `prepare` returned.
      cotangents: one for each case, `[N, entries]` for each registered output.

    Returns:
      The statistics by layer.
    """

    def one(case: list[Array], us: list[Array]) -> dict[str, Array]:
        return {n: jnp.square(wide(x)) for n, x in alone.pull(case)(us).items()}

    def summed(given: tuple[list[Array], list[Array]]) -> dict[str, Array]:
        return {n: x.sum(0) for n, x in jax.vmap(one)(*given).items()}

    given = alone.cases, list(cotangents)
    size = len(cotangents[0])
    chunk = min(size, max(1, LARGEST // max(1, alone.entries)))

    def of_chunk(c: Array) -> dict[str, Array]:
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=c * chunk, slice_size=chunk
        )
        return summed(jax.tree.map(cut, given))

    total = sum_over(of_chunk, size // chunk)
    if rest := size % chunk:
        last = summed(jax.tree.map(lambda x: x[size - rest :], given))
        total = jax.tree.map(jnp.add, total, last)
    return {name: {"diagonal": x} for name, x in total.items()}
