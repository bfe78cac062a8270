"""What taps bring out of each layer, and gradients of cases where there are none."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr.graph import Graph, is_value
from kfac_jax._jaxpr.interpreter import JOINING
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import Examples
from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.blocks import Full
from kfac_jax.blocks._layout import Arrays
from kfac_jax.operator.remote import Remote
from kfac_jax.operator.summed import Summed
from kfac_jax.plan.layer import Layer
from kfac_jax.plan.plan import Derived, Plan
from kfac_jax.plan.summing import cases, is_remote, no_sums
from kfac_jax.statistics import alone
from kfac_jax.statistics.estimation import Cases
from kfac_jax.statistics.sample_space.rows import RowsError


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A layer's rows at each of its uses: inputs, and output gradients."""

    layer: Layer
    sites: Sequence[Site]
    graph: Graph

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The single layer."""
        return (self.layer,)

    def tap(self, layer: Layer, site: Site) -> tuple[str, tuple[str, ...]]:
        """The layer's name, and no entries with values."""
        return layer.name, ()

    def rows(self, site: Site, x: Any, dy: Array) -> tuple[Array, Array]:
        """The rows of one use, by case."""
        one_hot = self.layer.shape.one_hot
        return site.canonical(x, dy, self.layer.shape.homogeneous, one_hot=one_hot)

    def gather(
        self, layer: Layer, site: Site, x: Any, dy: Array, carried: Arrays
    ) -> Arrays:
        """What the tap at one use returns."""
        k = next(k for k, one in enumerate(self.sites) if one is site)
        inputs, outputs = self.rows(site, x, dy)
        return {f"x{k}": inputs, f"dy{k}": outputs}

    def probes(self) -> Arrays:
        """Zeros like what the taps return."""
        shapes = _shapes(self.graph)
        stacked = self.layer.shape.stacked
        result: Arrays = {}
        for k, site in enumerate(self.sites):
            x = jax.tree.map(shapes.__getitem__, site.x)
            dy = shapes[site.output]
            rows = jax.eval_shape(functools.partial(self.rows, site), x, dy)
            for name, row in zip((f"x{k}", f"dy{k}"), rows, strict=True):
                both = wide_dtype(row.dtype), jnp.dtype(self.layer.dtype)
                dtype = max(both, key=lambda x: jnp.finfo(x).bits)
                result[name] = jnp.zeros((*stacked, *row.shape), dtype)
        return result


def _shapes(graph: Graph) -> dict[Any, jax.ShapeDtypeStruct]:
    """The types of all values, and of operands that taps may be at."""
    result: dict[Any, jax.ShapeDtypeStruct] = {}

    def like(variable: Any, shape: Sequence[int] | None = None) -> Any:
        aval = variable.aval
        own = aval.shape if shape is None else shape
        return jax.ShapeDtypeStruct(tuple(own), aval.dtype)

    for node in graph.walk():
        for i, (atom, variable) in enumerate(
            zip(node.inputs, node.equation.invars, strict=True)
        ):
            if is_value(atom):
                result.setdefault(atom, like(variable))
            if node.outputs:
                own = node.name in JOINING
                shape = None if own else node.out_shape()
                result[node.outputs[0], i] = like(variable, shape)
        for out, variable in zip(node.outputs, node.equation.outvars, strict=True):
            result[out] = like(variable)
    return result


def tapped(derived: Derived) -> tuple[list[Any], dict[str, str]]:
    """What gathers each layer's rows, or its gradients of cases.

    Args:
      derived: the program and its layers.

    Returns:
      Groups, and the reasons by layer why others have none.
    """
    result: list[Any] = []
    others: dict[str, str] = {}
    for layer in derived.layers:
        sites = derived.sites.get(layer.name, [])
        if layer.kind == "unused":
            continue
        summed = is_remote(sites) or any(x.repeated or x.swapped for x in sites)
        if reason := _no_rows(layer, sites, summed):
            others[layer.name] = reason
        elif summed:
            shape = dataclasses.replace(layer.shape, one_hot=False, tied=False)
            plain = dataclasses.replace(layer, block=Full(), shape=shape)
            held = Remote if is_remote(sites) else Summed
            result.append(held(plain, cases(sites)))
        else:
            result.append(Rows(layer, sites, derived.traced.found.graph))
    return result, others


def _no_rows(layer: Layer, sites: Sequence[Site], summed: bool) -> str:
    if layer.reason or not layer.tagged:
        return layer.reason or f"it is {layer.kind}"
    if not all(isinstance(x.examples, Examples) for x in sites):
        return "which rows belong to one example could not be followed"
    if any(site.cases for site in sites):
        return "some of its inputs are shared by all cases"
    return no_sums(layer, sites, Full()) if summed else ""


def one_by_one(
    plan: Plan,
    derived: Derived,
    others: Mapping[str, str],
    args: Any,
    leaves: Sequence[Array],
    cotangents: Sequence[Array],
    arranged: Sequence[Cases],
    size: int,
) -> dict[str, Array]:
    """The gradients of rows by layers without taps, each case for itself.

    Args:
      plan: the plan.
      derived: the program and its layers.
      others: the layers, with the reasons why there are no taps.
      args: the loss function's further arguments.
      leaves: the parameters' leaves.
      cotangents: of all rows, `[K, ...]` for each registered output.
      arranged: how cases are arranged in these outputs.
      size: N, the number of cases that the rows are of.

    Returns:
      By layer `[N, K, entries]`.

    Raises:
      RowsError: if a case cannot be evaluated for itself.
    """
    by_case = [
        jnp.moveaxis(jax.vmap(at.split)(u), 1, 0)
        if at.size == size
        else jnp.zeros((size, len(u), u[0].size // at.size), u.dtype)
        for u, at in zip(cotangents, arranged, strict=True)
    ]
    layers = [layer for layer in derived.layers if layer.name in others]
    try:
        prepared = alone.prepare(plan, derived, layers, args, leaves, arranged, size)
    except alone.CaseError as error:
        name, reason = next(iter(others.items()))
        raise RowsError(
            f"The sample space needs the gradient of each case by '{name}', but "
            f"{reason}, and cases cannot be evaluated one by one: {error}. Rewrite "
            "that use, pass what belongs to the batch as arguments, or use "
            "structure=BlockDiagonal()."
        ) from error
    return alone.gradients(prepared, by_case)
