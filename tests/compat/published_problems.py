"""Small problems for the published release of kfac-jax and for this library alike.

Both have the import name `kfac_jax` and the class `Optimizer`, so this file runs on
whichever the Python that runs it has installed:

    python tests/compat/published_problems.py tests/data/published_release.json

There it runs every case in float64 and writes what each step reported, and the versions
of kfac-jax and JAX. `test_published_release.py` compares this library with that file.

All modes are exact, so that no random draw matters. Two habits of the published release
are avoided, because this library differs on purpose: there the curvature is divided by
the batch size, here by the rows of what is registered, so each case registers one row;
there positions without any gradient count in the input factor, here they do not, so the
activation functions are smooth.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax

NUM_STEPS = 10
REPORTED = (
    "loss",
    "damping",
    "learning_rate",
    "momentum",
    "new_loss",
    "rho",
    "quad_model_change",
    "scaled_grad_norm_sq",
    "data_seen",
    "step",
    "batch_size",
)

Params = list[dict[str, Any]]
Batch = Any  # a pytree of arrays with the cases in front
# Of each reported quantity, one number per step; None where it is not computed.
Recording = dict[str, list[float | None]]


class Problem(NamedTuple):
    """A loss with its parameters before training and its mini-batches."""

    loss_fn: Callable[[Params, Batch, float], jax.Array]  # the float: weight of l2
    params: Params
    batches: Callable[[], Iterator[Batch]]


# --- models ---------------------------------------------------------------------------


def _init_params(seed: int, *sizes: int) -> Params:
    # The stream of RandomState is frozen, whatever the version of NumPy.
    rng = np.random.RandomState(seed)
    return [
        {"b": 0.1 * rng.normal(size=o), "w": rng.normal(size=(i, o)) / np.sqrt(i)}
        for i, o in itertools.pairwise(sizes)
    ]


def _dense(layer: dict[str, Any], x: jax.Array) -> jax.Array:
    bias = layer["b"].reshape((1,) * (x.ndim - 1) + (-1,))
    return x @ layer["w"] + bias


def _mlp(params: Params, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jnp.tanh(_dense(layer, x))
    return _dense(params[-1], x)


def _penalty(params: Params, l2: float) -> jax.Array:
    """What `l2_reg` announces: the value of the loss has to contain it."""
    leaves = jax.tree.leaves(params)
    return 0.5 * l2 * sum((jnp.sum(leaf**2) for leaf in leaves), jnp.zeros(()))


# --- problems -------------------------------------------------------------------------


def _classifier() -> Problem:
    """Softmax cross entropy."""

    def loss_fn(params: Params, batch: Batch, l2: float) -> jax.Array:
        inputs, labels = batch
        logits = _mlp(params, inputs)
        kfac_jax.register_softmax_cross_entropy_loss(logits, labels)
        log_probabilities = jax.nn.log_softmax(logits)
        of_labels = jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)
        return -jnp.mean(of_labels) + _penalty(params, l2)

    def batches() -> Iterator[Batch]:
        rng = np.random.RandomState(1)
        centres = 2.0 * rng.normal(size=(4, 5))
        while True:
            labels = rng.randint(4, size=16)
            yield centres[labels] + rng.normal(size=(16, 5)), labels

    return Problem(loss_fn, _init_params(2, 5, 6, 4), batches)


def _regression(widths: Sequence[int] = (6, 5)) -> Problem:
    """Squared error."""

    def loss_fn(params: Params, batch: Batch, l2: float) -> jax.Array:
        inputs, targets = batch
        outputs = _mlp(params, inputs)
        kfac_jax.register_squared_error_loss(outputs, targets)
        errors = jnp.sum((outputs - targets) ** 2, axis=1)
        return jnp.mean(errors) + _penalty(params, l2)

    def batches() -> Iterator[Batch]:
        rng = np.random.RandomState(3)
        while True:
            inputs = rng.normal(size=(12, 3))
            noise = 0.1 * rng.normal(size=(12, 2))
            yield inputs, np.sin(2.0 * inputs[:, :2]) * inputs[:, 1:] + noise

    return Problem(loss_fn, _init_params(4, 3, *widths, 2), batches)


def _one_unit() -> Problem:
    """One layer has one output, one has one input: factors of one number are special.

    There no damping is shared out between two factors.
    """
    return _regression(widths=(6, 1, 5))


def _autoencoder() -> Problem:
    """Sigmoid cross entropy."""

    def loss_fn(params: Params, batch: Batch, l2: float) -> jax.Array:
        logits = _mlp(params, batch)
        kfac_jax.register_sigmoid_cross_entropy_loss(logits, batch)
        losses = jnp.sum(jax.nn.softplus(logits) - batch * logits, axis=1)
        return jnp.mean(losses) + _penalty(params, l2)

    def batches() -> Iterator[Batch]:
        rng = np.random.RandomState(5)
        loadings = 2.0 * rng.normal(size=(2, 8))
        while True:
            latent = rng.normal(size=(16, 2))
            yield (latent @ loadings > rng.normal(size=(16, 8))).astype(np.float64)

    return Problem(loss_fn, _init_params(6, 8, 6, 2, 6, 8), batches)


def _repeated() -> Problem:
    """Dense layers used at several positions, whose outputs are averaged."""

    def loss_fn(params: Params, batch: Batch, l2: float) -> jax.Array:
        inputs, targets = batch
        hidden = jnp.tanh(_dense(params[1], jnp.tanh(_dense(params[0], inputs))))
        outputs = _dense(params[2], jnp.mean(hidden, axis=1))
        kfac_jax.register_squared_error_loss(outputs, targets)
        errors = jnp.sum((outputs - targets) ** 2, axis=1)
        return jnp.mean(errors) + _penalty(params, l2)

    def batches() -> Iterator[Batch]:
        rng = np.random.RandomState(7)
        while True:
            inputs = rng.normal(size=(12, 5, 3))
            yield inputs, np.sin(inputs).sum(axis=1)[:, :2]

    return Problem(loss_fn, _init_params(8, 3, 5, 4, 2), batches)


def _convolution() -> Problem:
    """A convolution, averaged over its positions, and a dense layer."""

    def loss_fn(params: Params, batch: Batch, l2: float) -> jax.Array:
        inputs, targets = batch
        kernel, output = params
        hidden = jax.lax.conv_general_dilated(
            inputs,
            kernel["w"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        hidden = jnp.tanh(hidden + kernel["b"].reshape(1, 1, 1, -1)).mean((1, 2))
        outputs = _dense(output, hidden)
        kfac_jax.register_squared_error_loss(outputs, targets)
        errors = jnp.sum((outputs - targets) ** 2, axis=1)
        return jnp.mean(errors) + _penalty(params, l2)

    def batches() -> Iterator[Batch]:
        rng = np.random.RandomState(11)
        while True:
            inputs = rng.normal(size=(12, 5, 5, 2))
            yield inputs, inputs[:, :3, 0].sum(axis=1)

    kernel, output = _init_params(12, 18, 4), _init_params(13, 4, 2)
    kernel[0]["w"] = kernel[0]["w"].reshape(3, 3, 2, 4)
    return Problem(loss_fn, [*kernel, *output], batches)


def _walkers() -> Problem:
    """Variational Monte Carlo: the gradient is not that of the value returned."""

    def log_psi(params: Params, walkers: jax.Array) -> jax.Array:
        return _mlp(params, walkers)[:, 0] - 0.25 * jnp.sum(walkers**2, axis=1)

    def local_energy(params: Params, walkers: jax.Array) -> jax.Array:
        def of_one(walker: jax.Array) -> jax.Array:
            def log_psi_of(w: jax.Array) -> jax.Array:
                return log_psi(params, w[None])[0]

            laplacian = jnp.trace(jax.hessian(log_psi_of)(walker))
            kinetic = laplacian + jnp.sum(jax.grad(log_psi_of)(walker) ** 2)
            return 0.5 * jnp.sum(walker**2) - 0.5 * kinetic

        return jax.vmap(of_one)(walkers)

    @jax.custom_jvp
    def energy(params: Params, walkers: jax.Array) -> jax.Array:
        return jnp.mean(local_energy(params, walkers))

    @energy.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        params, walkers = primals
        energies = local_energy(params, walkers)
        psi, psi_tangent = jax.jvp(log_psi, primals, tangents)
        kfac_jax.register_normal_predictive_distribution(psi[:, None])
        value = jnp.mean(energies)
        return value, jnp.mean((energies - value) * psi_tangent)

    def loss_fn(params: Params, batch: Batch, l2: float) -> jax.Array:
        return energy(params, batch) + _penalty(params, l2)

    def batches() -> Iterator[Batch]:
        rng = np.random.RandomState(9)
        while True:
            yield rng.normal(size=(20, 3))

    return Problem(loss_fn, _init_params(10, 3, 6, 5, 1), batches)


# --- cases ----------------------------------------------------------------------------

FIXED = {
    "learning_rate_schedule": lambda step: 0.2 / (1.0 + jnp.asarray(step, float) / 5.0),
    "momentum_schedule": lambda step: 0.8,
    "damping_schedule": lambda step: 1e-2,
}
ADAPTIVE = {
    "use_adaptive_learning_rate": True,
    "use_adaptive_momentum": True,
    "use_adaptive_damping": True,
    "initial_damping": 1.0,
}


class Case(NamedTuple):
    """A problem, the weight of l2 and the options of the optimizer."""

    problem: Callable[[], Problem]
    l2: float
    options: dict[str, Any]


CASES = {
    "classifier, fixed": Case(_classifier, 1e-4, {**FIXED, "norm_constraint": 1e-2}),
    "classifier, adaptive": Case(
        _classifier, 0.0, {**ADAPTIVE, "estimation_mode": "ggn_exact"}
    ),
    "regression, fixed": Case(_regression, 0.0, {**FIXED, "norm_constraint": 1e-3}),
    "regression, adaptive": Case(_regression, 1e-4, ADAPTIVE),
    "regression, adaptive damping": Case(
        _regression,
        1e-2,
        {
            "use_adaptive_damping": True,
            "initial_damping": 0.5,
            "damping_adaptation_interval": 3,
            "damping_adaptation_decay": 0.7,
            "min_damping": 0.1,
            "learning_rate_schedule": lambda step: 0.5,
            "momentum_schedule": lambda step: 0.5,
        },
    ),
    "regression, adaptive rate": Case(
        _regression,
        0.0,
        {
            "use_adaptive_learning_rate": True,
            "momentum_schedule": lambda step: 0.7,
            "use_adaptive_damping": True,
            "initial_damping": 0.02,
            "damping_adaptation_interval": 2,
            "damping_lower_threshold": 0.8,
            "damping_upper_threshold": 0.9,
            "max_damping": 0.03,
        },
    ),
    "regression, periods": Case(
        _regression,
        0.0,
        {
            **FIXED,
            "damping_schedule": lambda step: 0.1 / (1.0 + jnp.asarray(step, float)),
            "estimation_mode": "ggn_exact",
            "num_burnin_steps": 3,
            "curvature_ema": 0.7,
            "curvature_update_period": 2,
            "inverse_update_period": 3,
        },
    ),
    "regression through one unit, fixed": Case(_one_unit, 1e-2, FIXED),
    "regression through one unit, adaptive": Case(_one_unit, 0.0, ADAPTIVE),
    "autoencoder, fixed": Case(
        _autoencoder,
        0.0,
        {**FIXED, "estimation_mode": "ggn_exact", "norm_constraint": 1e-2},
    ),
    "autoencoder, adaptive": Case(_autoencoder, 1e-4, ADAPTIVE),
    "repeated, fixed": Case(_repeated, 1e-4, {**FIXED, "norm_constraint": 1e-2}),
    "repeated, adaptive": Case(
        _repeated, 0.0, {**ADAPTIVE, "estimation_mode": "ggn_exact"}
    ),
    "convolution, fixed": Case(_convolution, 1e-4, {**FIXED, "norm_constraint": 1e-2}),
    "convolution, adaptive": Case(
        _convolution, 0.0, {**ADAPTIVE, "estimation_mode": "ggn_exact"}
    ),
    "walkers, fixed": Case(_walkers, 0.0, {**FIXED, "norm_constraint": 1e-3}),
}


def run(case: Case) -> Recording:
    """What `case` reports over `NUM_STEPS` steps from an iterator of batches."""
    problem = case.problem()
    options = {"estimation_mode": "fisher_exact", "num_burnin_steps": 0, **case.options}
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(partial(problem.loss_fn, l2=case.l2)),
        l2_reg=case.l2,
        **options,
    )
    batches = problem.batches()
    params = jax.tree.map(jnp.asarray, problem.params)
    state = optimizer.init(params, jax.random.PRNGKey(0), next(problem.batches()))
    recording: Recording = {name: [] for name in REPORTED}
    for step in range(NUM_STEPS):
        params, state, stats = optimizer.step(
            params, state, jax.random.PRNGKey(step), data_iterator=batches
        )
        for name, numbers in recording.items():
            value = np.nan if stats[name] is None else float(stats[name])
            numbers.append(None if np.isnan(value) else value)
    return recording


def main() -> None:
    """Write the recording of every case to the file named on the command line."""
    jax.config.update("jax_enable_x64", True)
    recordings = {
        "kfac-jax": version("kfac-jax"),
        "jax": version("jax"),
        "cases": {name: run(case) for name, case in CASES.items()},
    }
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(recordings, file, indent=1, allow_nan=False)
        file.write("\n")


if __name__ == "__main__":
    main()
