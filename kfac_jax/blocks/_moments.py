"""Second moments of inputs and output gradients, with a convention for shared weights.

A weight may be used at several positions of an example. In the "expand" setting each is
a row by itself. In "reduce" an example is one row, the mean of its inputs or the sum of
its output gradients. Rows without a gradient do not count.

References:
  Eschenhagen et al. 2023 (arXiv:2311.00636).
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kfac_jax._utils import arguments
from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.blocks._layout import Arrays, BlockShape, Outputs, Shapes
from kfac_jax.blocks._sides import DIAGONAL, Side, named, side_shapes, sides
from kfac_jax.linalg._gram import gram


def shapes(shape: BlockShape, max_factor_dim: int | None) -> Shapes:
    """Shapes of the sums for both sides, and of the number of rows that count.

    With a homogeneous coordinate that number is the last entry of the inputs' sum, and
    has no array of its own.
    """
    count = {} if shape.homogeneous else {"count": shape.lead}
    return side_shapes(shape, max_factor_dim) | count


def input_shapes(shape: BlockShape, max_factor_dim: int | None) -> Shapes:
    """Those of the inputs' sum alone, and of the number of rows that count."""
    own = shapes(shape, max_factor_dim)
    return {name: x for name, x in own.items() if not name.startswith("output")}


def moments(
    x: Float[Array, "*e b s i"] | Int[Array, "*e b s"],
    dy: Outputs,
    shape: BlockShape,
    max_factor_dim: int | None,
    weight_sharing: str,
) -> Arrays:
    """The sums over rows. Inputs `x` must be zero for rows without a gradient."""
    wanted = shapes(shape, max_factor_dim)
    outputs = _moment(output_rows(dy, weight_sharing), "output" in wanted)
    name = "output" if outputs.is_full else "output" + DIAGONAL
    inputs = input_moments(x, dy, shape, max_factor_dim, weight_sharing)
    return inputs | {name: outputs.array}


def input_moments(
    x: Float[Array, "*e b s i"] | Int[Array, "*e b s"],
    dy: Outputs,
    shape: BlockShape,
    max_factor_dim: int | None,
    weight_sharing: str,
) -> Arrays:
    """The sum over rows of inputs alone, and the number of rows that count."""
    wanted = shapes(shape, max_factor_dim)
    if shape.one_hot:
        inputs = Side(_occurrences(x, dy, shape.inputs, weight_sharing), False)
    else:
        inputs = _moment(input_rows(x, dy, weight_sharing), "input" in wanted)
    result = {"input" if inputs.is_full else "input" + DIAGONAL: inputs.array}
    if "count" in wanted:
        active = _active(dy)
        counted = active.sum(-1) if weight_sharing == "expand" else active.any(-1)
        result["count"] = counted.sum(-1)
    return result


def input_rows(
    x: Float[Array, "*e b s i"], dy: Outputs, weight_sharing: str
) -> Float[Array, "*e b r i"]:
    """The rows of inputs: as given or, in "reduce", each example's mean."""
    if weight_sharing == "expand":
        return x
    x = x.sum(-2, keepdims=True, dtype=wide_dtype(x.dtype))
    return x / _positions(dy)[..., None].astype(x.dtype)


def output_rows(dy: Outputs, weight_sharing: str) -> Float[Array, "*e b r o"]:
    """The rows of output gradients: as given or, in "reduce", each example's sum."""
    if weight_sharing == "expand":
        return dy
    return dy.sum(-2, keepdims=True, dtype=wide_dtype(dy.dtype))


def counts(sums: Arrays, weight: Float[Array, ""]) -> Arrays:
    """The divisors of the sums: the number of rows for inputs, `weight` for outputs."""
    inputs, outputs = sides(sums)
    count = sums["count"] if "count" in sums else inputs.diagonal[..., -1]
    count = jnp.expand_dims(count, inputs.axes)
    return named(Side(count, inputs.is_full), Side(weight, outputs.is_full))


def check_weight_sharing(value: object) -> None:
    """Raises ValueError unless it is one of the settings."""
    arguments.choice("weight_sharing", value, ("expand", "reduce"))


def _active(dy: Outputs) -> Bool[Array, "*e b s"]:
    return (dy != 0).any(-1)


def _positions(dy: Outputs) -> Int[Array, "*e b 1"]:
    """The number of positions of each example that count; 1 if none does."""
    return jnp.maximum(_active(dy).sum(-1, keepdims=True), 1)


def _moment(x: Float[Array, "*e b s d"], is_full: bool) -> Side:
    """`Σ_rows x xᵀ` over batch and positions, or its diagonal; in float32 or wider."""
    dtype = wide_dtype(x.dtype)
    rows = x.reshape(*x.shape[:-3], -1, x.shape[-1])
    if is_full:
        return Side(gram(rows, dtype), True)
    return Side(jnp.square(rows.astype(dtype)).sum(-2), False)


def _occurrences(
    x: Int[Array, "*e b s"],
    dy: Outputs,
    size: int,
    weight_sharing: str,
) -> Float[Array, " {size}"]:
    """The diagonal of `_moment` of one-hot rows.

    In "reduce", of means with the weight w of each example's positions, `(Σ_s w [x_s =
    v])² = Σ_s [x_s = v] Σ_t [x_t = v] w²`. Indices out of bounds do not count.
    """
    parts = jnp.ones(x.shape, wide_dtype(dy.dtype))
    if weight_sharing == "reduce":
        parts = occurrences_of(x, dy)
    zeros = jnp.zeros((size,), parts.dtype)
    return zeros.at[x.reshape(-1)].add(parts.reshape(-1), mode="drop")


def occurrences_of(x: Int[Array, "*e b s"], dy: Outputs) -> Float[Array, "*e b s"]:
    """The sum `Σ_t [x_t = x_s] w²` for each position s."""
    same = x[..., :, None] == x[..., None, :]
    weight = 1 / _positions(dy).astype(wide_dtype(dy.dtype))
    return jnp.square(weight) * same.sum(-1).astype(weight.dtype)
