"""Gathers statistics by pulling cotangents back from the registered outputs."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax._jaxpr import axis_types
from kfac_jax._jaxpr.sites import Site
from kfac_jax._jaxpr.states import LOST, Examples, State
from kfac_jax._utils.dtypes import wide
from kfac_jax.blocks import Block, BlockShape, Kronecker
from kfac_jax.blocks._tied import join
from kfac_jax.distributions import RegisteredLoss
from kfac_jax.operator.products import Products
from kfac_jax.plan import CROSS, Layer, paired_rows
from kfac_jax.statistics import estimation

Sums = dict[int, dict[str, Array]]
"""Statistics by the layer's place in the plan."""

Pull = Callable[[list[Array]], tuple[list[Array], Sums]]
"""From cotangents of the outputs to those of the parameters, and layers' statistics."""


def is_tapped(layer: Layer) -> bool:
    """Whether statistics come from the layer's inputs and output gradients."""
    return layer.block is not None and layer.tagged and bool(layer.factor_shapes)


def is_squared(layer: Layer) -> bool:
    """Whether statistics are squares of the parameter's own gradient."""
    return layer.block is not None and not layer.tagged and bool(layer.factor_shapes)


def gather(
    layers: Sequence[Layer],
    mode: str,
    num_samples: int,
    losses: Sequence[RegisteredLoss],
    states: Sequence[State],
    pull: Pull,
    rng: Array | None,
    independent_cases: bool = False,
    diagonals: Sums | None = None,
) -> tuple[Sums, int]:
    """Gathers the statistics of one batch.

    A parameter without a layer has only its batch gradient `Σ_n g_n / √N`, whose square
    is the diagonal's unbiased estimate `N · ḡ²` if the cases' gradients have mean zero
    and are independent. Sampled ones are; others get a random sign for each case.

    Args:
      layers: the plan's layers.
      mode: the estimation mode.
      num_samples: how many samples the sampled modes draw.
      losses: the registered losses.
      states: for each loss, where the examples are in its output.
      pull: pulls cotangents back.
      rng: a key; without one the random numbers are always the same.
      independent_cases: whether exact modes take cases for examples where it is not
        known which are.
      diagonals: those of parameters without a layer that exact modes know.

    Returns:
      The sums, and how many batches they count for.
    """
    key = jax.random.key(0) if rng is None else rng
    if estimation.is_exact(mode):
        return (
            _exact(
                layers,
                mode,
                losses,
                states,
                pull,
                key,
                independent_cases,
                diagonals or {},
            ),
            1,
        )
    if mode == "fisher_empirical":
        targets = estimation.target_cotangents(losses)
        sums = pull(targets)[1]
        if any(map(is_squared, layers)):
            signed = estimation.random_signs(targets, key)
            sums = {**sums, **_squares(layers, pull(signed)[0])}
        return sums, 1

    def sample(index: Array) -> Sums:
        one = key if num_samples == 1 else jax.random.fold_in(key, index)
        return _both(layers, pull, estimation.random_cotangents(losses, mode, one))

    return estimation.sum_over(sample, num_samples), num_samples


def _exact(
    layers: Sequence[Layer],
    mode: str,
    losses: Sequence[RegisteredLoss],
    states: Sequence[State],
    pull: Pull,
    key: Array,
    independent_cases: bool,
    diagonals: Sums,
) -> Sums:
    """Sums over all outputs; what depends on inputs only is gathered once."""
    drawn = [i for i, x in enumerate(layers) if is_squared(x) and i not in diagonals]
    only = estimation.only_column(losses, states, independent_cases)
    if only is not None and not drawn:
        return {**pull(only)[1], **diagonals}

    def column(cotangents: list[Array]) -> Sums:
        return {
            index: {
                name: value
                for name, value in part.items()
                if name not in layers[index].row_statistics
            }
            for index, part in pull(cotangents)[1].items()
        }

    once = _both(layers, pull, estimation.random_cotangents(losses, mode, key))
    columns = estimation.sum_over_outputs(losses, states, column, independent_cases)
    sums = {index: part | columns.get(index, {}) for index, part in once.items()}
    return {**sums, **diagonals}


def _both(layers: Sequence[Layer], pull: Pull, cotangents: list[Array]) -> Sums:
    gradients, sums = pull(cotangents)
    return {**sums, **_squares(layers, gradients)}


def _squares(layers: Sequence[Layer], gradients: Sequence[Array]) -> Sums:
    return {
        index: {
            "diagonal": jnp.square(
                wide(layer.to_matrix([gradients[i] for i in layer.leaves]))
            )
        }
        for index, layer in enumerate(layers)
        if is_squared(layer)
    }


def _repeated(
    sums: dict[str, Array], row_statistics: frozenset[str], cases: int
) -> dict[str, Array]:
    """The statistics of a constant that stands for as many rows as there are cases.

    The output's gradient is the sum over cases. Its square has the expectation of the
    sum of squares, as the sampled gradients of cases are independent with mean zero.
    """
    return {
        name: value * cases if name in row_statistics else value
        for name, value in sums.items()
    }


ROWS = ("input_rows", "output_rows")
"""What the taps of linked layers bring out besides statistics, `[rows, i]` and
`[rows, o]`: what second moments with other layers' rows are made of."""


PRODUCT = ("product_inputs", "product_outputs")
"""What the taps of layers bring out whose gradient stays a product, `[rows, i]` and
`[rows, o]`: with the loss's cotangents, `∇W = Xᵀ dY`."""


def probe(
    layer: Layer, sites: Sequence[Site], data: Sequence[Array]
) -> dict[str, Array]:
    """Zeros like what the taps of a layer bring out.

    On a mesh with Explicit axes, linked layers' rows are sharded as the data are.
    """
    assert layer.block is not None
    shapes = layer.block.statistics_shapes(layer.shape)
    sizes = layer.shape.inputs, layer.shape.outputs
    if layer.link is not None:
        count = paired_rows(layer, sites[0])
        shapes |= {name: (count, n) for name, n in zip(ROWS, sizes, strict=True)}
    if layer.product_rows:
        count = sites[0].rows
        shapes |= {name: (count, n) for name, n in zip(PRODUCT, sizes, strict=True)}
    zeros = {name: jnp.zeros(shape, layer.dtype) for name, shape in shapes.items()}
    local = {
        name: axis_types.split_first(zeros[name], data)
        for name in ROWS
        if name in zeros
    }
    return zeros | local


def product_rows(
    site: Site, shape: BlockShape, x: Array | None, dy: Array
) -> dict[str, Array]:
    """The two sides of a gradient from a layer's only use, by their names."""
    sides = site.canonical(x, dy, shape.homogeneous)
    rows = [side.reshape(-1, side.shape[-1]) for side in sides]
    return dict(zip(PRODUCT, rows, strict=True))


def split_products(layers: Sequence[Layer], sums: Sums) -> tuple[Sums, Products]:
    """Takes the sides of gradients out of what the taps brought."""
    rest = {
        i: {name: x for name, x in part.items() if name not in PRODUCT}
        for i, part in sums.items()
    }
    products = {
        layers[i].name: (part[PRODUCT[0]], part[PRODUCT[1]])
        for i, part in sums.items()
        if layers[i].product_rows
    }
    return rest, products


def link_rows(
    site: Site, block: Block, shape: BlockShape, x: Array | None, dy: Array
) -> dict[str, Array]:
    """A linked layer's rows, from input and output cotangent as the program has them.

    Args:
      site: the layer's only use.
      block: its block.
      shape: its shape.
      x: the input.
      dy: the cotangent of the output.

    Returns:
      The rows by name, zero where they do not count.
    """
    assert isinstance(block, Kronecker)
    x, dy = site.canonical(x, dy, shape.homogeneous)
    active = (dy != 0).any(-1)
    rows = block.input_rows(x, active), block.output_rows(dy)
    return dict(zip(ROWS, rows, strict=True))


def with_cross(layers: Sequence[Layer], sums: Sums) -> Sums:
    """Puts second moments of linked layers' rows in place of the rows."""
    places = {layer.name: i for i, layer in enumerate(layers)}
    result: Sums = {}
    for i, part in sums.items():
        layer, found = layers[i], dict(part)
        rows = [found.pop(name) for name in ROWS if name in found]
        if layer.link is not None and layer.link.parent is not None:
            parent = sums[places[layer.link.parent]]
            for name, own, row in zip(CROSS, rows, ROWS, strict=True):
                found[name] = own.T @ parent[row]
        result[i] = found
    return result


def site_statistics(
    site: Site,
    block: Block,
    shape: BlockShape,
    x: Array | None,
    dy: Array,
    carried: dict[str, Array],
) -> dict[str, Array]:
    """One use's statistics, from input and output cotangent as the program has them.

    Patches of a convolution take the kernel's size times the memory of its input; they
    are made of a part of the batch at a time, so that they never take more than that.

    Args:
      site: the use.
      block: the layer's block.
      shape: the layer's shape.
      x: the input; None for a shift.
      dy: the cotangent of the output.
      carried: the factors that the block's statistics need.

    Returns:
      The block's sums.
    """

    def gathered(site: Site, x: Array | None, dy: Array) -> dict[str, Array]:
        term = shape.terms[site.swapped]
        rows = site.canonical(x, dy, term.homogeneous, one_hot=term.one_hot)
        sums = block.statistics(*rows, term, **carried)
        if site.cases:
            sums = _repeated(sums, block.row_statistics, site.cases)
        return join({}, sums) if site.swapped else sums

    conv = site.convolution
    if conv is None or x is None:
        return gathered(site, x, dy)
    x_axis, y_axis = conv.batch_axes
    batch = x.shape[x_axis]
    parts, size = conv.chunks(batch)
    whole = Examples(0, batch)
    if parts <= 1 or (block.needs_examples and site.examples != whole):
        return gathered(site, x, dy)

    def piece(start: Array | int, size: int) -> dict[str, Array]:
        return gathered(
            dataclasses.replace(
                site, examples=Examples(0, size) if site.examples == whole else LOST
            ),
            jax.lax.dynamic_slice_in_dim(x, start, size, x_axis),
            jax.lax.dynamic_slice_in_dim(dy, start, size, y_axis),
        )

    total = estimation.sum_over(lambda index: piece(index * size, size), parts)
    done = parts * size
    if done == batch:
        return total
    return jax.tree.map(jnp.add, total, piece(done, batch - done))
