"""Calibration of a classifier of clothes: its Laplace approximation and an ensemble.

A small network is trained on images of Fashion-MNIST by K-FAC, of which nothing is
chosen, with the penalty that a prior is. Its class probabilities are compared with
those of the Laplace approximation (over all layers, with that prior and with priors of
largest evidence, and over the last layer) and of an ensemble of five: mean negative log
likelihood, expected calibration error, and how well the largest probability tells
images from the same ones turned by a right angle (the area under the curve). Three or
four minutes on two CPU cores:

    python experiments/uncertainty.py
    python experiments/uncertainty.py --quick

`uncertainty_results/` gets uncertainty.json and reliability.png.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import fashion
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas
from jax import Array
from options import parse
from report import save_figure, write_json
from tqdm import tqdm

import kfac_jax
from kfac_jax.laplace import Laplace, expected_softmax, probit

BINS = 10  # of the calibration error
Params = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Calibration of a classifier: its Laplace approximation and an ensemble."""

    train: int = 10_000  # training images
    test: int = 1_000  # test images
    width: int = 100  # of the hidden layer
    steps: int = 400  # of training, with 500 images each
    l2: float = 1e-3  # the prior's precision over the number of images
    members: int = 5  # of the ensemble
    seed: int = 0  # of everything random
    output: Path = Path("uncertainty_results")  # folder
    quick: bool = False  # a trial that proves nothing: few of all


QUICK = {"train": 500, "test": 40, "width": 8, "steps": 5, "members": 2}


def network(params: Params, x: Array) -> Array:
    """Two dense layers."""
    return jax.nn.relu(x @ params["w"] + params["b"]) @ params["o"] + params["c"]


def loss_fn(params: Params, x: Array, labels: Array) -> Array:
    """The mean cross-entropy."""
    loss = kfac_jax.losses.softmax_cross_entropy_with_integer_labels
    return loss(network(params, x), labels).mean()


def init(width: int, key: Array) -> Params:
    """Weights of variance two over their inputs; biases zero."""
    first, second = jax.random.split(key)
    return {
        "w": jax.random.normal(first, (784, width)) * (2 / 784) ** 0.5,
        "b": jnp.zeros(width),
        "o": jax.random.normal(second, (width, 10)) * (2 / width) ** 0.5,
        "c": jnp.zeros(10),
    }


def trained(x: Array, labels: Array, options: Any, key: Array) -> Params:
    """A network trained by K-FAC's defaults."""
    params = init(options.width, key)
    batch = min(500, len(x))

    def penalised(params: Params, x: Array, labels: Array) -> Array:
        squares = sum(jnp.square(w).sum() for w in jax.tree.leaves(params))
        return loss_fn(params, x, labels) + 0.5 * options.l2 * squares

    curvature = kfac_jax.make_curvature(
        penalised, params, x[:batch], labels[:batch], l2=options.l2
    )
    tx = kfac_jax.kfac(curvature)
    step = jax.jit(kfac_jax.make_step(curvature, tx))
    state = tx.init(params)
    for now in tqdm(jax.random.split(key, options.steps), desc="training"):
        rows = jax.random.choice(now, len(x), (batch,), replace=False)
        params, state, _ = step(params, state, now, x[rows], labels[rows])
    return params


def posterior(
    params: Params, x: Array, labels: Array, l2: float, *, last: bool
) -> Laplace:
    """The Laplace approximation, with the prior that the network was trained with."""

    def block(layer: kfac_jax.Layer) -> kfac_jax.blocks.Block | None:
        is_random = not last or "o" in layer.name
        return kfac_jax.blocks.Eigen() if is_random else None

    curvature = kfac_jax.make_curvature(
        loss_fn, params, x, labels, estimation_mode="fisher_exact", blocks=block
    )
    batches = [(x[i : i + 500], labels[i : i + 500]) for i in range(0, len(x), 500)]
    fisher = curvature.over(params, batches)
    return Laplace(
        mean=params, curvature=fisher, cases=len(x), prior_precision=l2 * len(x)
    )


def probabilities(
    methods: dict[str, Any], members: list[Params], x: Array, key: Array
) -> dict[str, np.ndarray]:
    """Of every method, `[n, 10]`."""
    found = {
        "trained network": jax.nn.softmax(network(members[0], x)),
        f"ensemble of {len(members)}": jnp.stack(
            [jax.nn.softmax(network(params, x)) for params in members]
        ).mean(0),
    }
    for name, own in methods.items():
        mean, covariance = jax.jit(lambda own, x: own.predict(network, x))(own, x)
        found[f"{name}, probit"] = probit(mean, covariance)
        found[f"{name}, samples"] = expected_softmax(key, mean, covariance)
    return {name: np.asarray(p, np.float64) for name, p in found.items()}


def calibration(p: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The confidence and the share of right answers in each bin; NaN if empty."""
    confident, right = p.max(1), p.argmax(1) == labels
    bins = np.minimum((confident * BINS).astype(int), BINS - 1)
    means = [
        (confident[bins == i].mean(), right[bins == i].mean())
        if (bins == i).any()
        else (np.nan, np.nan)
        for i in range(BINS)
    ]
    mine, theirs = np.array(means).T
    return mine, theirs


def scores(p: np.ndarray, turned: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Error, negative log likelihood, calibration error, area under the curve."""
    confident = np.minimum((p.max(1) * BINS).astype(int), BINS - 1)
    weights = np.bincount(confident, minlength=BINS) / len(p)
    mine, theirs = calibration(p, labels)
    away = np.nan_to_num(np.abs(mine - theirs))
    pairs = p.max(1)[:, None] - turned.max(1)[None]
    return {
        "error": float((p.argmax(1) != labels).mean()),
        "NLL": float(-np.log(p[np.arange(len(p)), labels] + 1e-12).mean()),
        "ECE": float((weights * away).sum()),
        "AUROC": float((pairs > 0).mean() + 0.5 * (pairs == 0).mean()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Trains, compares, prints the table; returns the exit status."""
    options = parse(Options, arguments)
    if options.quick:
        options = Options(seed=options.seed, output=options.output, **QUICK)
    train, test = fashion.load()
    x = jnp.asarray(train.images[: options.train].reshape(-1, 784))
    labels = jnp.asarray(train.labels[: options.train])
    images, answers = test.images[: options.test], test.labels[: options.test]
    keys = jax.random.split(jax.random.key(options.seed), options.members)
    members = [trained(x, labels, options, key) for key in keys]
    methods = {
        name: posterior(members[0], x, labels, options.l2, last=last)
        for name, last in (("Laplace", False), ("last layer", True))
    }
    methods["Laplace, tuned"] = methods["Laplace"].tuned(by_layer=True)
    for name, own in methods.items():
        log_likelihood = -len(x) * loss_fn(members[0], x, labels)
        prior = jax.tree.map(float, own.prior_precision)
        print(f"{name}: evidence {own.log_evidence(log_likelihood):.0f}, δ {prior}")
    upright, turned = (
        probabilities(methods, members, jnp.asarray(x.reshape(-1, 784)), keys[0])
        for x in (images, np.rot90(images, axes=(1, 2)))
    )
    rows = {
        name: scores(p, turned[name], np.asarray(answers))
        for name, p in upright.items()
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "uncertainty.json", rows)
    figure, axis = plt.subplots(figsize=(5, 5))
    for name, p in upright.items():
        axis.plot(*calibration(p, np.asarray(answers)), ".-", label=name)
    axis.plot([0, 1], [0, 1], "k--", lw=1)
    axis.set(xlabel="confidence", ylabel="share of right answers")
    axis.legend()
    save_figure(figure, options.output / "reliability.png")
    print(pandas.DataFrame(rows).T.to_string(float_format=lambda x: f"{x:.4f}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
