"""Dense layers with one-hot inputs, which are embeddings."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from kfac_jax._jaxpr.graph import Atom, Graph, Node, is_value
from kfac_jax._jaxpr.kinds.dense import Dense
from kfac_jax._jaxpr.kinds.embedding import Table
from kfac_jax._jaxpr.sites import Site


class Indices(NamedTuple):
    """The integers that a one-hot value encodes."""

    atom: Atom  # the integers, with a length of 1 along `axis`
    axis: int  # the axis along which the value is one-hot
    size: int  # the length of that axis


def one_hot_values(graph: Graph) -> Mapping[int, Indices]:
    """Finds one-hot values: integers compared with an `iota`, then cast."""
    counting: dict[int, int] = {}  # the axis along which a value is 0, 1, 2, ...
    found: dict[int, Indices] = {}
    for node in graph.walk():
        if len(node.outputs) != 1:
            continue
        out = node.outputs[0]
        first = next((atom for atom in node.inputs[:1] if is_value(atom)), -1)
        if node.name == "iota":
            counting[out] = node.params["dimension"]
        elif node.name == "broadcast_in_dim" and first in counting:
            axis = node.params["broadcast_dimensions"][counting[first]]
            if node.out_shape()[axis] == node.shape()[counting[first]]:
                counting[out] = axis
        elif node.name == "convert_element_type" and first in found:
            found[out] = found[first]
        elif node.name == "eq":
            indices = _compared(node, counting)
            if indices is not None:
                found[out] = indices
    return found


def _compared(node: Node, counting: Mapping[int, int]) -> Indices | None:
    for counted, other in ((0, 1), (1, 0)):
        atom, compared = node.inputs[counted], node.inputs[other]
        axis = counting.get(atom) if is_value(atom) else None
        if axis is None or (is_value(compared) and compared in counting):
            continue
        shape, size = list(node.out_shape()), node.out_shape()[axis]
        shape[axis] = 1
        dtype = node.equation.invars[other].aval.dtype
        if jnp.issubdtype(dtype, jnp.integer) and list(node.shape(other)) == shape:
            return Indices(compared, axis, size)
    return None


def as_embedding(site: Site, one_hot: Mapping[int, Indices]) -> Site:
    """Turns a dense site with a one-hot input into an embedding; returns others as is.

    An embedding's input factor is diagonal, so it needs no `[vocabulary, vocabulary]`
    matrix.
    """
    reader, x = site.reader, site.x
    indices = one_hot.get(x) if isinstance(x, int) else None
    if not isinstance(reader, Dense) or indices is None or reader.x_windows:
        return site
    axes = reader.x_axes
    if axes.independent or axes.features != (indices.axis,):
        return site
    # `drops`: an integer out of bounds equals no entry of the iota, so its row is zero
    table = Table(
        axes, reader.y_axes, indices.size, drops=True, y_windows=reader.y_windows
    )
    return dataclasses.replace(site, reader=table, x=indices.atom)
