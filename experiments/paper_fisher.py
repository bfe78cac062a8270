"""The pictures of sections 3 and 4: how good the Kronecker factors are, and why.

The paper's example is a 256-20-20-20-20-20-10 classifier of 16 x 16 digits with tanh
units, after a few iterations of K-FAC with all cases in the batch. For its middle four
layers, those of 20 units into 20:

- section 3: the exact Fisher F, `F~_ij = A_ij (x) G_ij`, their difference, and the
  bound of the difference by cumulants (section 3.1);
- section 4: the damped F~ and its inverse, and how far the inverses with the
  block-diagonal and the block-tridiagonal structure are from that.

Expectations are exact: over all cases, and over the model's own distribution of the 10
classes. A layer's parameters are the matrix M, `[in + 1, out]`, of `s = [a, 1] M`: the
transpose of the paper's W. All matrices over parameters have the layers in order and in
each the entries of M row by row; so `F~_ij` is `kron(A_ij, G_ij)`, as in the paper, and
the order is that of `jax.flatten_util.ravel_pytree`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mnist
import numpy as np
import paper_fisher_figures as figures
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from tqdm import trange

import kfac_jax

SIZES = (256, 20, 20, 20, 20, 20, 10)
PAPER_MODEL = kfac_jax.QuadraticModel(largest_momentum=None, longest=None)
SIDE = 16  # of the images
INCOMING = 4  # weights into each unit at the start; 15 would saturate such a small net
DAMPING = 1e-3  # lambda_0; with 150, seven iterations would hardly change anything
# At least, and at most:
ITERATIONS = 3, 7  # 7 in the paper, to a training error of 5%
CASES = 500, 4_500

STRUCTURES = {
    "block_diagonal": kfac_jax.BlockDiagonal(),
    "block_tridiagonal": kfac_jax.BlockTridiagonal(),
}

Params = tuple[Array, ...]  # [in + 1, out] each


def run(output: Path, budget: float, seed: int) -> dict[str, Any]:
    """Trains the network, measures it and draws the figures.

    Args:
        output: the folder of fisher.png, fisher_inverse.png and fisher_structures.png.
        budget: below 1 there are fewer cases and iterations; above, no more.
        seed: of the initial parameters.

    Returns:
        The numbers, for JSON. "damping" is gamma; sums and means are of absolute
        values, the means within blocks; "inverse_error" is each structure's `distance`
        from the inverse of the damped F~.
    """
    images, labels = digits(_scaled(budget, *CASES))
    iterations = _scaled(budget, *ITERATIONS)
    params, gamma = train(init_params(seed, SIZES), images, labels, iterations)
    loss, error = (float(x) for x in _measure(params, images, labels))
    print(f"Training loss {loss:.3f}, error {error:.1%}, gamma {gamma:.3g}.")
    pairs = all_pairs(sample(params, images))
    inverses = {
        name: structured_inverse(structure, params, images, gamma)
        for name, structure in STRUCTURES.items()
    }
    return {
        "cases": len(images),
        "iterations": iterations,
        "training_loss": loss,
        "training_error": error,
        "damping": gamma,
    } | compare(pairs, inverses, gamma, output)


def _scaled(budget: float, least: int, most: int) -> int:
    return round(min(max(most * budget, least), most))


def compare(
    pairs: Pairs, inverses: Mapping[str, np.ndarray], gamma: float, output: Path
) -> dict[str, Any]:
    """Draws the figures of the pairs' moments; returns their numbers."""
    fisher, kronecker = dense(pairs, Pair.exact), dense(pairs, Pair.kronecker)
    with_damping = damped(pairs, gamma)
    inverse = np.linalg.inv(with_damping)
    error = float(np.abs(fisher - kronecker).sum())
    bound = float(dense(pairs, Pair.bound).sum())
    print(f"Sum of |F - F~|: {error:.1f}; bound by cumulants: {bound:.1f}.")
    errors = {name: distance(found, inverse) for name, found in inverses.items()}
    for name, value in errors.items():
        print(f"Inverse of F~, {name.replace('_', '-')}: off by {value:.1%}.")
    layers = len(pairs)
    averages = {
        "fisher": block_averages(fisher, layers),
        "kronecker": block_averages(kronecker, layers),
        "kronecker_damped": block_averages(with_damping, layers),
        "inverse": block_averages(inverse, layers),
    }
    figures.plot_fisher(output / "fisher.png", fisher, kronecker, layers)
    figures.plot_inverse(
        output / "fisher_inverse.png",
        (with_damping, averages["kronecker_damped"]),
        (inverse, averages["inverse"]),
    )
    path = output / "fisher_structures.png"
    figures.plot_structures(path, inverse, inverses, layers)
    return {
        "fisher_sum": float(np.abs(fisher).sum()),
        "error_sum": error,
        "cumulant_bound": bound,
        "ratio": error / bound,
        "block_averages": {name: x.tolist() for name, x in averages.items()},
        "inverse_error": errors,
    }


def digits(cases: int) -> tuple[Array, Array]:
    """Images `[cases, 256]` of 16 x 16 pixels, and their labels."""
    images, labels = mnist.load_labelled()
    side = round(mnist.PIXELS**0.5)
    squares = jnp.asarray(images[:cases], float).reshape(-1, side, side)
    small = jax.image.resize(squares, (len(squares), SIDE, SIDE), "linear")
    return small.reshape(len(small), -1), jnp.asarray(labels[:cases])


@partial(jax.jit, static_argnums=1)
def init_params(seed: int, sizes: tuple[int, ...]) -> Params:
    """Sparse normal weights, biases zero."""
    weights = kfac_jax.initializers.sparse_normal(INCOMING)
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return tuple(
        jnp.pad(weights(key, shape, float), ((0, 1), (0, 0)))
        for key, shape in zip(keys, pairwise(sizes), strict=True)
    )


def homogeneous(a: Array) -> Array:
    """`[a, 1]`."""
    return jnp.concatenate([a, jnp.ones((len(a), 1), a.dtype)], axis=1)


def logits(params: Params, images: ArrayLike) -> Array:
    """The natural parameters of the model's distribution, [cases, classes]."""
    s = homogeneous(jnp.asarray(images)) @ params[0]
    for m in params[1:]:
        s = homogeneous(jnp.tanh(s)) @ m
    return s


def loss_fn(params: Params, images: ArrayLike, labels: Array) -> Array:
    """Cross-entropy, averaged over cases."""
    z = logits(params, images)
    return kfac_jax.losses.softmax_cross_entropy_with_integer_labels(z, labels).mean()


@jax.jit
def _measure(params: Params, images: Array, labels: Array) -> tuple[Array, Array]:
    wrong = logits(params, images).argmax(1).astype(labels.dtype) != labels
    return loss_fn(params, images, labels), wrong.mean()


def train(
    params: Params, images: Array, labels: Array, iterations: int
) -> tuple[Params, float]:
    """K-FAC with all cases in the batch and exact factors, so nothing is drawn.

    Args:
        params: where to start.
        images: `[cases, pixels]`.
        labels: `[cases]`.
        iterations: how many.

    Returns:
        The parameters, and `gamma = sqrt(lambda)` with which the next inverse would be
        damped.
    """
    curvature = kfac_jax.make_curvature(
        loss_fn, params, images, labels, estimation_mode="fisher_exact"
    )
    rule = kfac_jax.LevenbergMarquardt(DAMPING)
    tx = kfac_jax.kfac(curvature, PAPER_MODEL, None, rule, inverse_every=1)

    step = jax.jit(kfac_jax.make_step(curvature, tx))
    state, key = tx.init(params), jax.random.key(0)  # nothing is drawn
    for _ in trange(iterations, desc=f"K-FAC, {len(images):,} cases"):
        params, state, _ = step(params, state, key, images, labels)
    return params, float(np.sqrt(state.damping))


class Sample(NamedTuple):
    """What is known of the middle layers for every case and class, float64."""

    activities: list[np.ndarray]  # [cases, in + 1] each, into the layer
    gradients: list[np.ndarray]  # [cases, classes, out] each, of its output s
    probabilities: np.ndarray  # [cases, classes]


def sample(params: Params, images: Array) -> Sample:
    """Runs the network, and back from each class as the target.

    From `-log r(y|z)` of a softmax, `Dz = p - e_y`; down the layers,
    `Da = Ds Wᵀ` (without the bias) and `Ds = Da (1 - a²)`, the derivative of tanh.

    Args:
        params: of all layers.
        images: `[cases, pixels]`.

    Returns:
        Activities and gradients of all layers but the first and the last.
    """
    weights = [np.asarray(m, np.float64) for m in params]
    activities: list[np.ndarray] = []
    s = np.asarray(images, np.float64)
    for i, m in enumerate(weights):
        a = s if i == 0 else np.tanh(s)
        activities.append(np.pad(a, ((0, 0), (0, 1)), constant_values=1.0))
        s = activities[-1] @ m
    odds = np.exp(s - s.max(1, keepdims=True))
    p = odds / odds.sum(1, keepdims=True)
    gradients = [p[:, None, :] - np.eye(p.shape[1])[None]]
    for m, a in zip(weights[:0:-1], activities[:0:-1], strict=True):
        inner = 1 - a[:, None, :-1] ** 2
        gradients.append((gradients[-1] @ m[:-1].T) * inner)
    return Sample(activities[1:-1], gradients[-2:0:-1], p)


class Pair(NamedTuple):
    """Moments of two layers: activities a1, a2 into them, gradients g1, g2 of outputs.

    Methods return `[in1, out1, in2, out2]`: an entry of the first layer's matrix, then
    one of the second's.
    """

    means1: np.ndarray  # E[a1], [in1]
    means2: np.ndarray  # E[a2], [in2]
    activities: np.ndarray  # A = E[a1 a2], [in1, in2]
    products: np.ndarray  # E[a1 g1 a2 g2], [in1, out1, in2, out2]

    def exact(self) -> np.ndarray:
        """`F = E[a1 g1 a2 g2]`."""
        return self.products

    @property
    def gradients(self) -> np.ndarray:
        """`G = E[g1 g2]`, [out1, out2]: where both activities are the constant 1."""
        return self.products[-1, :, -1, :]

    def kronecker(self) -> np.ndarray:
        """`F~ = A (x) G`."""
        return self.activities[:, None, :, None] * self.gradients[None, :, None, :]

    def bound(self) -> np.ndarray:
        """By how much `F` and `F~` can differ (section 3.1).

        The cumulant of some variables is the sum over all partitions of them of
        `(-1)^(k-1) (k-1)!` times the product of the k parts' moments. Here y is drawn
        from the model, so `E[u g] = 0` for every u that does not depend on y (lemma 4):
        a part that holds just one of g1, g2 vanishes, and what is left has them
        together,

            k(a2,g1,g2) = E[a2 g1 g2] - E[a2] E[g1 g2]
            k(a1,a2,g1,g2) = E[a1 a2 g1 g2] - E[a1] E[a2 g1 g2] - E[a2] E[a1 g1 g2]
                - E[a1 a2] E[g1 g2] + 2 E[a1] E[a2] E[g1 g2]

        Put together, `F - F~ = E[a1 a2 g1 g2] - E[a1 a2] E[g1 g2]` is
        `k(a1,a2,g1,g2) + k(a1) k(a2,g1,g2) + k(a2) k(a1,g1,g2)`; the bound is the sum
        of the absolute values. Moments with fewer activities are among those with the
        constant 1 for an activity.
        """
        a1, a2 = self.means1[:, None, None, None], self.means2[None, None, :, None]
        aa = self.activities[:, None, :, None]
        only1, only2 = self.products[:, :, -1:, :], self.products[-1:, :, :, :]
        gg = self.gradients[None, :, None, :]
        fourth = self.products - a1 * only2 - a2 * only1 - aa * gg + 2 * a1 * a2 * gg
        thirds = np.abs(a1 * (only2 - a2 * gg)) + np.abs(a2 * (only1 - a1 * gg))
        return np.abs(fourth) + thirds


Pairs = list[list[Pair]]  # of the first layer and the second


def all_pairs(known: Sample) -> Pairs:
    """The moments of all pairs of layers."""
    layers = range(len(known.activities))
    return [[_pair(known, i, j) for j in layers] for i in layers]


def _pair(known: Sample, i: int, j: int) -> Pair:
    """One matrix product: activities do not depend on the class.

    `E[a1 g1 a2 g2]` is the mean over cases of `a1 a2 E_y[g1 g2]`.
    """
    a1, a2 = known.activities[i], known.activities[j]
    weighted = known.probabilities[:, :, None] * known.gradients[j]
    gg = known.gradients[i].transpose(0, 2, 1) @ weighted  # [cases, out1, out2]
    aa = a1[:, :, None] * a2[:, None, :]
    cases, *inputs, outputs = len(aa), *aa.shape[1:], gg.shape[1:]
    products = aa.reshape(cases, -1).T @ gg.reshape(cases, -1) / cases
    products = products.reshape(*inputs, *outputs).transpose(0, 2, 1, 3)
    return Pair(a1.mean(0), a2.mean(0), aa.mean(0), products)


def dense(pairs: Pairs, function: Callable[[Pair], np.ndarray]) -> np.ndarray:
    """`[P, P]`, with a function of each pair as its block."""
    found = [[function(pair) for pair in row] for row in pairs]
    return np.block(
        [[x.reshape(x.shape[0] * x.shape[1], -1) for x in row] for row in found]
    )


def damped(pairs: Pairs, gamma: float) -> np.ndarray:
    """F~ with factored damping of its diagonal blocks (section 6.3).

    These become `(A + pi gamma I) (x) (G + gamma / pi I)`, with
    `pi² = (tr A / dim A) / (tr G / dim G)`; other blocks stay as they are. With
    `gamma > 0` it is positive definite: undamped, it is a principal submatrix of the
    Kronecker product of all layers' A and G.
    """
    result, start = dense(pairs, Pair.kronecker), 0
    for i, row in enumerate(pairs):
        a, g = row[i].activities, row[i].gradients
        pi = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
        block = np.kron(
            a + pi * gamma * np.eye(len(a)), g + gamma / pi * np.eye(len(g))
        )
        end = start + len(block)
        result[start:end, start:end] = block
        start = end
    return result


def structured_inverse(
    structure: kfac_jax.BlockDiagonal | kfac_jax.BlockTridiagonal,
    params: Params,
    images: Array,
    gamma: float,
) -> np.ndarray:
    """The library's inverse for the middle layers, with factored damping.

    The plan is that of a function of the middle layers alone, in which the first and
    the last are constants: its approximation is of the same part of the Fisher as the
    F~ that it is compared with.

    Args:
        structure: how layers relate.
        params: of all layers.
        images: `[cases, pixels]`.
        gamma: as in `damped`.

    Returns:
        The dense inverse, `[P, P]`.
    """
    first, *middle, last = params
    labels = jnp.zeros(len(images), jnp.int32)  # exact expectations do not need them

    def middle_loss(middle: list[Array], images: Array) -> Array:
        return loss_fn((first, *middle, last), images, labels)

    curvature = kfac_jax.make_curvature(
        middle_loss,
        middle,
        images,
        estimation_mode="fisher_exact",
        structure=structure,
    )
    flat, unravel = ravel_pytree(middle)

    @jax.jit
    def invert() -> Array:
        _, _, statistics = curvature.value_grad_and_statistics(middle, images)
        factors = curvature.init_factors(middle)
        factors = curvature.update_factors(factors, statistics, 1)
        approximation = curvature.approximation(factors)

        def column(v: Array) -> Array:
            return ravel_pytree(approximation.solve(unravel(v), gamma**2))[0]

        return jax.vmap(column, out_axes=1)(jnp.eye(len(flat), dtype=flat.dtype))

    return np.asarray(invert(), np.float64)


def block_averages(matrix: np.ndarray, layers: int) -> np.ndarray:
    """The mean absolute value in each block of layers of one size."""
    size = len(matrix) // layers
    return np.abs(matrix).reshape(layers, size, layers, size).mean((1, 3))


def distance(matrix: np.ndarray, other: np.ndarray) -> float:
    """The sum of absolute differences, relative to that of the second's entries."""
    return float(np.abs(matrix - other).sum() / np.abs(other).sum())
