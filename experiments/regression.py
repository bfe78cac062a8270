"""Error bars of a small regression: a Laplace approximation and an ensemble.

The diabetes data of scikit-learn are as large as most of the UCI collection: 442
patients, ten measurements, and how far the illness had gone a year later. On each of
several splits, nine tenths for training, a network of ten hidden units is trained by
K-FAC, of which nothing is chosen, for several priors and variances of the noise; those
of largest evidence are taken. On the rest its predictions are compared with those of
the Laplace approximation (exact, over all parameters) and of an ensemble of five: root
mean squared error, mean negative log likelihood, and the share of targets in the
central 90 % of the prediction. One or two minutes on two CPU cores:

    python experiments/regression.py
    python experiments/regression.py --quick

`regression_results/` gets regression.json.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pandas
from jax import Array
from options import parse
from report import write_json
from sklearn.datasets import load_diabetes
from tqdm import tqdm

import kfac_jax
from kfac_jax.laplace import Laplace

Params = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Error bars of a small regression: a Laplace approximation and an ensemble."""

    splits: int = 10  # of the patients, in training and test
    hidden: int = 10  # units
    steps: int = 150  # of training, each with all cases
    variances: tuple[float, ...] = (0.4, 0.5, 0.6)  # of the noise, of which to choose
    precisions: tuple[float, ...] = (1.0, 4.0, 16.0)  # of the prior, the same
    members: int = 5  # of the ensemble
    seed: int = 0  # of everything random
    output: Path = Path("regression_results")  # folder
    quick: bool = False  # a trial that proves nothing: few of all


QUICK: dict[str, Any] = {
    "splits": 1,
    "hidden": 3,
    "steps": 5,
    "variances": (0.5,),
    "precisions": (1.0,),
    "members": 2,
}


class Normal(NamedTuple):
    """Predictions: a mixture of normal distributions for each case."""

    means: np.ndarray  # [members, cases]
    variances: np.ndarray  # [members, cases]


def network(params: Params, x: Array) -> Array:
    """One hidden layer; `[n, 1]`."""
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["o"] + params["c"]


def loss_of(variance: float) -> Any:
    """The mean negative log likelihood but for a constant, by the noise's variance."""

    def loss_fn(params: Params, x: Array, y: Array) -> Array:
        z = network(params, x)
        kfac_jax.register_normal_predictive_distribution(z, y, variance=variance)
        return 0.5 * jnp.square(z - y).sum(-1).mean() / variance

    return loss_fn


def init(inputs: int, hidden: int, key: Array) -> Params:
    """Weights of variance one over their inputs; biases zero."""
    first, second = jax.random.split(key)
    return {
        "w": jax.random.normal(first, (inputs, hidden)) / inputs**0.5,
        "b": jnp.zeros(hidden),
        "o": jax.random.normal(second, (hidden, 1)) / hidden**0.5,
        "c": jnp.zeros(1),
    }


class Model:
    """A network under one prior and one variance of the noise; compiled once."""

    def __init__(self, variance: float, precision: float, options: Options) -> None:
        """Takes the variance of the noise, and the prior's precision."""
        self.variance = variance
        self._precision = precision
        self._options = options
        self._loss_fn = loss_of(variance)
        self.train = jax.jit(self._train)
        self._curvature: kfac_jax.Curvature | None = None

    def _train(self, x: Array, y: Array, key: Array) -> Params:
        l2 = self._precision / len(x)

        def penalised(params: Params, x: Array, y: Array) -> Array:
            squares = sum(jnp.square(w).sum() for w in jax.tree.leaves(params))
            return self._loss_fn(params, x, y) + 0.5 * l2 * squares

        params = init(x.shape[1], self._options.hidden, key)
        curvature = kfac_jax.make_curvature(penalised, params, x, y, l2=l2)
        tx = kfac_jax.kfac(curvature)
        step = kfac_jax.make_step(curvature, tx)

        def one(carry: Any, key: Array) -> Any:
            return step(*carry, key, x, y)[:2], None

        keys = jax.random.split(key, self._options.steps)
        (params, _), _ = jax.lax.scan(one, (params, tx.init(params)), keys)
        return params

    def posterior(self, params: Params, x: Array, y: Array) -> tuple[Laplace, float]:
        """With the exact Gauss-Newton matrix; and the logarithm of the evidence."""
        if self._curvature is None:
            self._curvature = kfac_jax.make_curvature(
                self._loss_fn,
                params,
                x,
                y,
                estimation_mode="fisher_exact",
                blocks=kfac_jax.blocks.Full(),
            )
        laplace = Laplace(
            mean=params,
            curvature=self._curvature.at(params, x, y),
            cases=len(x),
            prior_precision=self._precision,
        )
        constant = 0.5 * np.log(2 * np.pi * self.variance)
        likelihood = -len(x) * (self._loss_fn(params, x, y) + constant)
        return laplace, float(laplace.log_evidence(likelihood))


def scores(found: Normal, y: np.ndarray) -> dict[str, float]:
    """Root mean squared error, negative log likelihood, and what 90 % hold."""
    deviation = np.sqrt(found.variances)
    away = (y - found.means) / deviation
    log_density = -0.5 * away**2 - np.log(deviation) - 0.5 * np.log(2 * np.pi)
    below = np.asarray(jax.scipy.stats.norm.cdf(away)).mean(0)
    return {
        "RMSE": float(np.sqrt(np.square(y - found.means.mean(0)).mean())),
        "NLL": float(-np.log(np.exp(log_density).mean(0)).mean()),
        "in 90 %": float((np.abs(below - 0.5) <= 0.45).mean()),
    }


def one_split(
    x: np.ndarray, y: np.ndarray, models: list[Model], members: int, key: Array
) -> dict[str, dict[str, float]]:
    """The scores of each method on one split."""
    count = len(x) - len(x) // 10
    order = np.asarray(jax.random.permutation(key, len(x)))
    mine, theirs = order[:count], order[count:]
    inputs = (x - x[mine].mean(0)) / x[mine].std(0)
    targets = (y - y[mine].mean()) / y[mine].std()
    own = jnp.float32(inputs[mine]), jnp.float32(targets[mine][:, None])
    keys = jax.random.split(key, members)
    found = []
    for model in models:
        laplace, evidence = model.posterior(model.train(*own, keys[0]), *own)
        found.append((evidence, model, laplace))
    _, model, laplace = max(found, key=lambda x: x[0])
    networks = [laplace.mean, *(model.train(*own, k) for k in keys[1:])]
    held_out = jnp.float32(inputs[theirs])
    means = np.stack([np.asarray(network(p, held_out))[:, 0] for p in networks])
    noise = np.full_like(means, model.variance)
    _, covariance = laplace.predict(network, held_out)
    methods = {
        "trained network": Normal(means[:1], noise[:1]),
        f"ensemble of {members}": Normal(means, noise),
        "Laplace": Normal(means[:1], noise[:1] + np.asarray(covariance)[:, 0, 0]),
    }
    return {name: scores(one, targets[theirs]) for name, one in methods.items()}


def main(arguments: list[str] | None = None) -> int:
    """Trains, compares, prints the table; returns the exit status."""
    options = parse(Options, arguments)
    if options.quick:
        options = Options(seed=options.seed, output=options.output, **QUICK)
    x, y = load_diabetes(return_X_y=True, scaled=False)
    models = [
        Model(variance, precision, options)
        for variance in options.variances
        for precision in options.precisions
    ]
    keys = jax.random.split(jax.random.key(options.seed), options.splits)
    members = options.members
    found = [one_split(x, y, models, members, k) for k in tqdm(keys, desc="splits")]
    rows = {
        name: {
            score: float(np.mean([split[name][score] for split in found]))
            for score in found[0][name]
        }
        for name in found[0]
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "regression.json", rows)
    print(pandas.DataFrame(rows).T.to_string(float_format=lambda x: f"{x:.4f}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
