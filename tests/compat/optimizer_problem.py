"""A small classifier for `Optimizer`, in the form of programs written for it."""

import jax
import jax.numpy as jnp

import kfac_jax
from tests.helpers import models

X, LABELS = models.array(0, 16, 3), jnp.arange(16) % 4
BATCH = (X, LABELS)
PARAMS = models.dense_params(1, 3, 5, 4)
KEY = jax.random.key(0)
RATES = {"learning_rate": 0.1, "momentum": 0.9, "damping": 1e-2}
ADAPTIVE = {
    "use_adaptive_learning_rate": True,
    "use_adaptive_momentum": True,
    "use_adaptive_damping": True,
    "initial_damping": 1.0,
}
EXACT = {"l2_reg": 0.0, "estimation_mode": "fisher_exact", "num_burnin_steps": 0}


def cross_entropy(z, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], 1).mean()


def loss_fn(params, batch):
    x, labels = batch
    z = models.mlp(params, x)
    kfac_jax.register_categorical_predictive_distribution(z, labels)
    return cross_entropy(z, labels)


VALUE_AND_GRAD = jax.value_and_grad(loss_fn)


def train(optimizer, params, batches, state=None, **rates):
    """Steps on batches; returns parameters, state and the stats of all steps."""
    if state is None:
        state = optimizer.init(params, KEY, batches[0])
    every = []
    for i, batch in enumerate(batches):
        key = jax.random.fold_in(KEY, i)
        params, state, stats = optimizer.step(params, state, key, batch=batch, **rates)
        every.append(stats)
    return params, state, every


def batches(count, size=16):
    return [(models.array(10 + i, size, 3), LABELS[:size]) for i in range(count)]


def spread(tree, devices):
    return jax.tree.map(lambda x: jnp.reshape(x, (devices, -1, *x.shape[1:])), tree)


def replicated(tree, devices):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (devices, *jnp.shape(x))), tree)
