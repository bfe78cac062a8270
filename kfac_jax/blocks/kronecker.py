"""The Kronecker-factored block of Martens & Grosse (2015)."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from kfac_jax import linalg
from kfac_jax._utils import arguments
from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.blocks._block import Block, BlockShape, Damped, Factors, Spectrum
from kfac_jax.blocks._pi import check_pi, pi
from kfac_jax.blocks._sides import DIAGONAL, Side, named, sides
from kfac_jax.blocks._tied import TRANSPOSED, join, nearest_product, split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kronecker(Block):
    """`F ≈ A ⊗ G`, with `A = E[x xᵀ]` and `G = E[dy dyᵀ]`.

    Weight and bias share the block: the bias is the weight of a homogeneous coordinate.
    As a matrix, `V ↦ A V G`.

    A layer used at several positions of an example (weight sharing) has, in the
    "expand" setting, `A` averaged over all of them and `G` summed. In the "reduce"
    setting x is averaged and dy summed over an example's positions first. Each is exact
    for deep linear nets where the loss treats positions, or their mean, as cases.

    Factored damping replaces the factors by `A + π √λ I` and `G + √λ / π I` with `π =
    √(‖A ⊗ I‖ / ‖I ⊗ G‖)`: of what their product has beyond `A ⊗ G + λ I`, that
    minimises a bound on the norm.

    A weight that is used transposed too (a table of embeddings that is also the output
    layer) has a sum of two such products, `A ⊗ G + G' ⊗ A'`, with four factors; the
    block is the product nearest to it in the Frobenius norm.

    Of a side longer than `max_factor_dim`, and of one-hot inputs (an embedding's
    vocabulary, where nothing is lost by it), only the diagonal is kept; the factor is
    then called `input_diagonal` or `output_diagonal`.

    With `gradient_products` the inverses are applied to the inputs and the output
    gradients whose product a gradient is, `A⁻¹ (Xᵀ dY) G⁻¹ = (A⁻¹ Xᵀ) (dY G⁻¹)`, in
    dense layers where that takes fewer multiply-adds: where a batch has fewer cases
    than about two thirds of the layer's width. It is not possible with an `l2` penalty.
    The report says which layers. An update whose gradients are not those that the
    statistics came with (clipped, averaged over devices or micro-batches) recognises
    that, and multiplies the gradients themselves. Statistics then hold the batch's
    inputs and output gradients, too.

    Attributes:
      max_factor_dim: the longest side with a full factor; None for no limit.
      weight_sharing: "expand" or "reduce".
      pi: the norm in π: "trace", the paper's choice; "frobenius"; "spectral", for the
        cost of an eigendecomposition in each refresh; or "one" for π = 1.
      gradient_products: whether to precondition gradients as products, see above.
      exact_scalars: whether a layer with only one input or output is damped exactly, as
        `A g + λ I`, where its factor g is a number. Otherwise as all others.

    References:
      Martens & Grosse 2015, sections 3, 4.2, 6.3 and 8. Eschenhagen et al. 2023
      (arXiv:2311.00636) for weight sharing.

    >>> Kronecker(weight_sharing="reduce")
    Kronecker(max_factor_dim=8192, weight_sharing='reduce', pi='trace',
              gradient_products=False, exact_scalars=False)
    """

    max_factor_dim: int | None = 8192
    weight_sharing: str = "expand"
    pi: str = "trace"
    gradient_products: bool = False
    exact_scalars: bool = False

    elementwise = frozenset({"input_diagonal", "output_diagonal"})
    row_statistics = frozenset(
        prefix + name
        for prefix in ("", TRANSPOSED)
        for name in ("input", "input_diagonal", "count")
    )
    handles_tied = True
    handles_one_hot = True

    def __post_init__(self) -> None:
        """Checks the range."""
        limit = self.max_factor_dim
        whole = isinstance(limit, int) and not isinstance(limit, bool)
        if limit is not None and (not whole or limit < 1):
            raise ValueError(
                f"max_factor_dim must be an integer ≥ 1 or None; got {limit!r}."
            )
        check_weight_sharing(self.weight_sharing)
        check_pi(self.pi)
        for name in ("gradient_products", "exact_scalars"):
            arguments.flag(name, getattr(self, name))

    @property
    def needs_examples(self) -> bool:
        """In the "reduce" setting."""
        return self._reduces

    @property
    def _reduces(self) -> bool:
        return self.weight_sharing == "reduce"

    def statistics_shapes(self, shape: BlockShape) -> dict[str, tuple[int, ...]]:
        """Sums for both factors, and the number of rows that count.

        With a homogeneous coordinate that is the last entry of the inputs' sum.
        """
        if shape.tied:
            return join(*map(self.statistics_shapes, shape.terms))
        count = {} if shape.homogeneous else {"count": shape.lead}
        return self.factor_shapes(shape) | count

    def factor_shapes(self, shape: BlockShape) -> dict[str, tuple[int, ...]]:
        """`input: [*e, i, i]` and `output: [*e, o, o]`, or their diagonals."""
        if shape.tied:
            return join(*map(self.factor_shapes, shape.terms))
        lengths = {"input": shape.inputs, "output": shape.outputs}
        diagonal = {name: self._is_long(d) for name, d in lengths.items()}
        diagonal["input"] |= shape.one_hot
        return {
            name + DIAGONAL if diagonal[name] else name: (
                (*shape.lead, d) if diagonal[name] else (*shape.lead, d, d)
            )
            for name, d in lengths.items()
        }

    def _is_long(self, d: int) -> bool:
        return self.max_factor_dim is not None and d > self.max_factor_dim

    def statistics(self, x: Array, dy: Array, shape: BlockShape) -> Factors:
        """The sums; rows without a gradient do not count."""
        kept = self.statistics_shapes(shape)
        active = (dy != 0).any(-1)
        outputs = self.output_rows(dy)
        result: Factors = {}
        if shape.one_hot:
            result["input_diagonal"] = self._occurrences(x, active, dy, shape.inputs)
        else:
            full = "input" in kept
            inputs = self.input_rows(x, active)
            result["input" if full else "input_diagonal"] = _moment(inputs, full)
        full = "output" in kept
        result["output" if full else "output_diagonal"] = _moment(outputs, full)
        if "count" in kept:
            counted = active.any(-1) if self._reduces else active.sum(-1)
            result["count"] = counted.sum(-1)
        return result

    def input_rows(self, x: Array, active: Array) -> Array:
        """The rows that count as cases: those given or, in "reduce", examples' means.

        Args:
          x: inputs, `[*e, b, s, i]`, zero where not active.
          active: which rows have a gradient, `[*e, b, s]`.

        Returns:
          `[*e, b, s or 1, i]`.
        """
        if not self._reduces:
            return x
        positions = _at_least_one(active)[..., None]
        x = x.sum(-2, keepdims=True, dtype=wide_dtype(x.dtype))
        return x / positions.astype(x.dtype)

    def output_rows(self, dy: Array) -> Array:
        """Those of output gradients: in "reduce" examples' sums, `[*e, b, 1, o]`."""
        if not self._reduces:
            return dy
        return dy.sum(-2, keepdims=True, dtype=wide_dtype(dy.dtype))

    def _occurrences(self, x: Array, active: Array, dy: Array, size: int) -> Array:
        reduce = self._reduces
        positions = _at_least_one(active)
        weight = 1 / positions if reduce else jnp.ones_like(positions)
        return _occurrences(x, size, weight.astype(wide_dtype(dy.dtype)), reduce)

    def counts(self, statistics: Factors, weight: Array) -> Factors:
        """The number of rows for inputs, that of batches for outputs."""
        first, second = split(statistics)
        if second:
            return join(self.counts(first, weight), self.counts(second, weight))
        inputs, outputs = sides(statistics)
        rows = jnp.expand_dims(self.rows(statistics), inputs.axes)
        return named(Side(rows, inputs.is_full), Side(weight, outputs.is_full))

    def rows(self, statistics: Factors) -> Array:
        """How many rows the inputs' sum is over, `[*e]`."""
        if "count" in statistics:
            return statistics["count"]
        return sides(statistics)[0].diagonal[..., -1]

    def damp(self, factors: Factors, damping: Array) -> dict[str, Damped]:
        """Factored Tikhonov damping (section 6.3)."""
        factors = nearest_product(factors)
        (a, a_is_full), (g, g_is_full) = both_sides = sides(factors)
        damping = jnp.asarray(damping, a.dtype)
        if self._has_scalar(both_sides):
            return dict(
                zip(sorted(factors), _damped_scalar(both_sides, damping), strict=True)
            )
        both = pi(self.pi, both_sides) * jnp.sqrt(damping)
        shifts = [
            shift if is_full else shift[..., None]
            for shift, is_full in zip(both, (a_is_full, g_is_full), strict=True)
        ]
        damped = Damped(a, shifts[0]), Damped(g, shifts[1])
        return dict(zip(sorted(factors), damped, strict=True))

    def _has_scalar(self, factors: tuple[Side, Side]) -> bool:
        return self.exact_scalars and any(x.array.shape[-1] == 1 for x in factors)

    def solve(self, inverses: Factors, v: Array) -> Array:
        """`A⁻¹ V G⁻¹`."""
        return self.matvec(inverses, v)

    def matvec(self, factors: Factors, v: Array) -> Array:
        """`A V G`."""
        (a, a_is_full), (g, g_is_full) = sides(nearest_product(factors))
        v = a @ v if a_is_full else a[..., :, None] * v
        return v @ g if g_is_full else v * g[..., None, :]

    def diagonal(self, factors: Factors, shape: BlockShape) -> Array:
        """The outer product of both diagonals."""
        a, g = (part.diagonal for part in sides(nearest_product(factors)))
        return a[..., :, None] * g[..., None, :]

    def spectrum(self, factors: Factors, shape: BlockShape) -> Spectrum:
        """The joint eigenbasis `U_A ⊗ U_G`; exact damping adds λ to the products."""
        both = sides(nearest_product(factors))
        (wa, ua), (wg, ug) = (linalg.eigh(x) if full else (x, None) for x, full in both)
        exact = self._has_scalar(both)
        shares = pi(self.pi, (Side(wa, False), Side(wg, False)))[..., None]

        def eigenvalues(damping: Array, mode: str) -> Array:
            damping = jnp.asarray(damping, wa.dtype)
            if mode == "exact" or exact:
                return wa[..., :, None] * wg[..., None, :] + damping
            gamma = jnp.sqrt(damping)
            damped_a, damped_g = wa + shares[0] * gamma, wg + shares[1] * gamma
            return damped_a[..., :, None] * damped_g[..., None, :]

        def to_basis(v: Array) -> Array:
            v = v if ua is None else jnp.swapaxes(ua, -1, -2) @ v
            return v if ug is None else v @ ug

        def from_basis(v: Array) -> Array:
            v = v if ua is None else ua @ v
            return v if ug is None else v @ jnp.swapaxes(ug, -1, -2)

        return Spectrum(eigenvalues, to_basis, from_basis)


def _damped_scalar(factors: tuple[Side, Side], damping: Array) -> list[Damped]:
    """`A ⊗ g + λ I` as `(A g + λ I) ⊗ 1` where g, or A, is a number."""
    scalar = 0 if factors[0].array.shape[-1] == 1 else 1
    result: list[Damped] = []
    for i, (x, is_full) in enumerate(factors):
        if i == scalar:
            result.append(Damped(jnp.ones_like(x), jnp.zeros_like(damping)))
            continue
        number = factors[scalar].diagonal
        result.append(Damped(x * (number[..., None] if is_full else number), damping))
    return result


def _moment(x: Array, full: bool) -> Array:
    """`Σ_rows x xᵀ` over batch and positions, or its diagonal; in float32 or wider."""
    dtype = wide_dtype(x.dtype)
    rows = x.reshape(*x.shape[:-3], -1, x.shape[-1])
    if not full:
        return jnp.square(rows.astype(dtype)).sum(-2)
    return linalg.gram(rows, dtype)


def _at_least_one(active: Array) -> Array:
    """How many positions of each example count, `[*e, b, 1]`."""
    return jnp.maximum(active.sum(-1, keepdims=True), 1)


def _occurrences(x: Array, size: int, weight: Array, reduce: bool) -> Array:
    """The diagonal of `_moment` of one-hot rows, `[size]`.

    Rows are taken one by one, or averaged within each example (with their `weight`):
    `(Σ_s w [x_s = v])² = Σ_s [x_s = v] Σ_t [x_t = v] w²`. Indices out of bounds do not
    count.
    """
    parts = jnp.broadcast_to(jnp.square(weight), x.shape)
    if reduce:
        same = x[..., :, None] == x[..., None, :]
        parts = parts * same.sum(-1).astype(parts.dtype)
    zeros = jnp.zeros((size,), parts.dtype)
    return zeros.at[x.reshape(-1)].add(parts.reshape(-1), mode="drop")


def check_weight_sharing(value: str) -> None:
    """Raises ValueError unless it is one of the settings."""
    arguments.choice("weight_sharing", value, ("expand", "reduce"))
