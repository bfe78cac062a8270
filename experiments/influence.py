"""Which training digits does a prediction come from? Scores against training again.

A small network is trained by K-FAC on 1,000 digits with a penalty, and again on many
random halves of them. Scores are right if their sums over a half tell what the loss of
a query is after training on it: the linear datamodeling score (Park et al. 2023,
arXiv:2303.14186) is the rank correlation of both over the halves, averaged over
queries. Compared are products of gradients, and influence functions with the curvature
of K-FAC, of EKFAC, of EKFAC refined by some conjugate gradients, and the exact
Gauss-Newton matrix. About a minute on two CPU cores:

    python experiments/influence.py
    python experiments/influence.py --quick

`influence_results/` gets influence.json, and digits.png: some queries beside the
training digits of largest score.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import mnist
import numpy as np
import pandas
from jax import Array
from jax.flatten_util import ravel_pytree
from options import parse
from report import save_figure, write_json

import kfac_jax
from kfac_jax import influence

Params = dict[str, Array]
SIDE = 14  # pixels, means of four


@dataclass(frozen=True, kw_only=True)
class Options:
    """Influence of training digits, against training without them."""

    train: int = 1_000  # training digits
    queries: int = 100  # digits whose loss is to be told
    halves: int = 60  # random halves of the training digits
    width: int = 32  # of the hidden layer
    steps: int = 100  # of each training
    l2: float = 1e-2  # the penalty, and the damping of the scores
    refine: int = 8  # iterations on the exact curvature
    seed: int = 0  # of everything random
    output: Path = Path("influence_results")  # folder
    quick: bool = False  # a trial that proves nothing: few of all


QUICK = {"train": 60, "queries": 5, "halves": 4, "width": 3, "steps": 5, "refine": 2}


def losses(params: Params, x: Array, labels: Array) -> Array:
    """The cross-entropy of each digit."""
    z = jnp.tanh(x @ params["w"] + params["b"]) @ params["o"] + params["c"]
    return kfac_jax.losses.softmax_cross_entropy_with_integer_labels(z, labels)


def loss_fn(params: Params, x: Array, labels: Array) -> Array:
    """Their mean."""
    return losses(params, x, labels).mean()


def init(options: Options) -> Params:
    """The start of every training."""
    first, second = jax.random.split(jax.random.key(options.seed))
    return {
        "w": jax.random.normal(first, (SIDE**2, options.width)) / SIDE,
        "b": jnp.zeros(options.width),
        "o": jax.random.normal(second, (options.width, 10)) / options.width**0.5,
        "c": jnp.zeros(10),
    }


def trained(x: Array, labels: Array, keep: Array, options: Options) -> Params:
    """Networks trained on some of the digits, by K-FAC with nothing chosen.

    Args:
      x: the digits, `[n, pixels]`.
      labels: what they are.
      keep: for each network, which digits it sees, `[networks, n]`.
      options: the program's.

    Returns:
      Parameters, with the networks in front.
    """

    def penalised(params: Params, x: Array, labels: Array, keep: Array) -> Array:
        z = jnp.tanh(x @ params["w"] + params["b"]) @ params["o"] + params["c"]
        loss = kfac_jax.losses.softmax_cross_entropy_with_integer_labels
        mean = loss(z, labels, mask=keep).sum() / keep.sum()
        squares = sum(jnp.square(w).sum() for w in jax.tree.leaves(params))
        return mean + 0.5 * options.l2 * squares

    params = init(options)
    curvature = kfac_jax.make_curvature(
        penalised, params, x, labels, keep[0], l2=options.l2
    )
    tx = kfac_jax.kfac(curvature)
    step = kfac_jax.make_step(curvature, tx)

    def run(keep: Array) -> Params:
        def one(carry: Any, key: Array) -> Any:
            params, state, _ = step(*carry, key, x, labels, keep)
            return (params, state), None

        keys = jax.random.split(jax.random.key(options.seed), options.steps)
        (found, _), _ = jax.lax.scan(one, (params, tx.init(params)), keys)
        return found

    return jax.jit(lambda keep: jax.lax.map(run, keep))(keep)


def scores(
    params: Params,
    x: Array,
    labels: Array,
    query: tuple[Array, Array],
    options: Options,
) -> tuple[dict[str, Array], dict[str, float]]:
    """By each method `[queries, n]`, and the seconds that it took."""
    batches = [(x[i : i + 250], labels[i : i + 250]) for i in range(0, len(x), 250)]
    found: dict[str, Array] = {}
    seconds: dict[str, float] = {}

    def add(name: str, preconditioned: Params, start: float) -> None:
        of = jax.jit(lambda v: influence.scores(v, losses, params, x, labels))
        found[name] = jax.block_until_ready(of(preconditioned))
        seconds[name] = time.perf_counter() - start

    start = time.perf_counter()
    gradients = influence.gradients_of(losses, params, *query)
    add("products of gradients", gradients, start)
    for name, block in (
        ("K-FAC", kfac_jax.blocks.Kronecker()),
        ("EKFAC", kfac_jax.blocks.Eigen()),
    ):
        start = time.perf_counter()
        curvature = kfac_jax.make_curvature(
            loss_fn, params, x, labels, estimation_mode="fisher_exact", blocks=block
        )
        operator = curvature.over(params, batches)
        queries = influence.queries(
            losses, params, *query, operator=operator, damping=options.l2
        )
        add(name, queries, start)
    refined = influence.refined(
        queries,
        losses,
        params,
        *query,
        curvature=curvature,
        batches=batches,
        operator=operator,
        damping=options.l2,
        steps=options.refine,
    )
    add("EKFAC, refined", refined, start)
    start = time.perf_counter()
    exact = dense(curvature, params, x, labels) + options.l2 * np.eye(
        sum(x.size for x in jax.tree.leaves(params))
    )
    flat = jax.vmap(lambda g: ravel_pytree(g)[0])(gradients)
    solved = jnp.asarray(np.linalg.solve(exact, np.asarray(flat).T).T, jnp.float32)
    add("exact", jax.vmap(ravel_pytree(params)[1])(solved), start)
    return found, seconds


def dense(
    curvature: kfac_jax.Curvature, params: Params, x: Array, labels: Array
) -> np.ndarray:
    """The exact Gauss-Newton matrix, column by column."""
    flat, restore = ravel_pytree(params)

    def column(i: Array) -> Array:
        v = restore(jnp.zeros_like(flat).at[i].set(1.0))
        return ravel_pytree(curvature.matvec(params, v, x, labels))[0]

    columns = jax.jit(lambda: jax.lax.map(column, jnp.arange(flat.size), batch_size=16))
    return np.asarray(columns(), np.float64)


def agreement(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """The rank correlation over halves, of each query; both `[halves, queries]`."""
    a, b = (pandas.DataFrame(x).rank().to_numpy() for x in (predicted, actual))
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))


def pooled(images: np.ndarray) -> Array:
    """Digits `[n, 784]` as means of four pixels."""
    cells = images.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4))
    return jnp.asarray(cells.reshape(-1, SIDE**2))


def draw(path: Path, x: np.ndarray, query: np.ndarray, found: Array) -> None:
    """Some queries, each beside the training digits of largest score."""
    rows, columns = min(5, len(query)), 7
    figure, axes = plt.subplots(rows, columns, figsize=(columns, rows + 0.4))
    best = np.argsort(-np.asarray(found), axis=1)[:, : columns - 1]
    for own, image, cases in zip(axes, query, best, strict=False):
        for axis, shown in zip(own, [image, *x[cases]], strict=True):
            axis.imshow(shown.reshape(SIDE, SIDE), cmap="gray_r")
            axis.set(xticks=[], yticks=[])
        for spine in own[0].spines.values():
            spine.set(color="C3", linewidth=3)
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> int:
    """Trains, compares, prints the table; returns the exit status."""
    options = parse(Options, arguments)
    if options.quick:
        options = Options(seed=options.seed, output=options.output, **QUICK)
    images, answers = mnist.load_labelled()
    order = np.random.default_rng(options.seed).permutation(len(images))
    rows, others = np.split(order[: options.train + options.queries], [options.train])
    x, labels = pooled(images[rows]), jnp.asarray(answers[rows])
    query = pooled(images[others]), jnp.asarray(answers[others])

    rng = np.random.default_rng(options.seed)
    halves = np.argsort(rng.random((options.halves, options.train)), axis=1)
    halves = (halves < options.train // 2).astype(np.float32)
    every = np.concatenate([np.ones_like(halves[:1]), halves])
    start = time.perf_counter()
    networks = trained(x, labels, jnp.asarray(every), options)
    params, others = (
        jax.tree.map(lambda p, i=i: p[i], networks) for i in (0, slice(1, None))
    )
    actual = np.asarray(jax.vmap(lambda p: losses(p, *query))(others))
    print(f"{len(every)} trainings: {time.perf_counter() - start:.0f} s")

    found, seconds = scores(params, x, labels, query, options)
    rows = {}
    for name, own in found.items():
        agreed = agreement(-halves @ np.asarray(own).T, actual)
        rows[name] = {
            "score": float(agreed.mean()),
            "error": float(agreed.std() / len(agreed) ** 0.5),
            "seconds": seconds[name],
        }
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "influence.json", rows)
    shown = found["EKFAC, refined"]
    draw(options.output / "digits.png", np.asarray(x), np.asarray(query[0]), shown)
    print(pandas.DataFrame(rows).T.to_string(float_format=lambda x: f"{x:.3f}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
