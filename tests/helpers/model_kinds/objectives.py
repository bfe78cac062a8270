"""A language model, a clipped objective, a contrastive one."""

import functools

import jax
import jax.numpy as jnp

import kfac_jax
from kfac_jax import losses
from tests.helpers import models
from tests.helpers.model_kinds._kind import (
    Kind,
    N,
    Term,
    classifier,
    dense,
    double,
    layer_norm,
    linear,
    log_loss,
    maker,
    norm,
)


def gpt2() -> Kind:
    """GPT-2 with one block; the table of tokens is the output layer too."""
    new, d, vocabulary, t, heads = maker(14), 4, 6, 4, 2
    params = {
        "wte": new(vocabulary, d),
        "wpe": 0.1 * new(5, d),
        "h0": {
            "ln_1": norm(d),
            "attn": {"c_attn": linear(new, d, 3 * d), "c_proj": linear(new, d, d)},
            "ln_2": norm(d),
            "mlp": {"c_fc": linear(new, d, 2 * d), "c_proj": linear(new, 2 * d, d)},
        },
        "ln_f": norm(d),
    }

    def attend(p, x):
        b, t, _ = x.shape
        q, k, v = jnp.split(dense(p["c_attn"], x), 3, axis=-1)
        split = lambda y: y.reshape(b, t, heads, -1).transpose(0, 2, 1, 3)  # noqa: E731
        q, k, v = map(split, (q, k, v))
        scores = q @ k.swapaxes(-1, -2) / jnp.sqrt(d // heads)
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e10)
        y = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(b, t, d)
        return dense(p["c_proj"], y)

    def apply(p, ids):
        x = p["wte"][ids] + p["wpe"][jnp.arange(ids.shape[1])]
        block = p["h0"]
        x = x + attend(block["attn"], layer_norm(block["ln_1"], x))
        h = jax.nn.gelu(dense(block["mlp"]["c_fc"], layer_norm(block["ln_2"], x)))
        x = x + dense(block["mlp"]["c_proj"], h)
        return layer_norm(p["ln_f"], x) @ p["wte"].T

    return classifier(apply, params, models.classes(0, vocabulary, 3, t))


def ppo() -> Kind:
    """The clipped objective, a value's error and an entropy; a policy is registered."""
    new, d, hidden, actions = maker(15), 4, 4, 3
    params = {
        "trunk": [linear(new, d, hidden), linear(new, hidden, hidden)],
        "policy": linear(new, hidden, actions),
        "value": linear(new, hidden, 1),
    }

    def features(p, x):
        for layer in p["trunk"]:
            x = jnp.tanh(dense(layer, x))
        return x

    def logits(p, x, *_):
        return dense(p["policy"], features(p, x))

    def value(p, x, *_):
        return dense(p["value"], features(p, x))

    def loss_fn(p, x, action, old_log_prob, advantage, returns):
        h = features(p, x)
        z, v = dense(p["policy"], h), dense(p["value"], h)
        kfac_jax.register_categorical_predictive_distribution(z)
        log_probs = jax.nn.log_softmax(z)
        log_prob = jnp.take_along_axis(log_probs, action[:, None], axis=-1)[:, 0]
        ratio = jnp.exp(log_prob - old_log_prob)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        clipped = jnp.clip(ratio, 0.8, 1.2)
        objective = jnp.minimum(ratio * advantage, clipped * advantage).mean()
        error = losses.squared_error(v, returns[:, None], weight=0.5)
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
        return 0.5 * error.sum(-1).mean() - objective - 0.01 * entropy

    action = models.classes(1, actions, N)
    args = (
        models.array(0, N, d),
        action,
        -jnp.ones(N),
        models.array(2, N),
        models.array(3, N),
    )
    halved = lambda z, y: jnp.square(z - y).sum() / 2  # noqa: E731
    terms = (
        Term(logits, log_loss, (action,)),
        Term(value, halved, (args[-1][:, None],)),
    )
    return Kind(loss_fn, params, args, terms)


def info_nce() -> Kind:
    """Two views, of which each must find its other among the batch's."""
    new, d, hidden = maker(16), 8, 8
    params = double(
        {
            "encoder": linear(new, d, hidden),
            "projection": linear(new, hidden, 4),
            "log_scale": 0.5,
        }
    )

    def embed(p, x):
        z = dense(p["projection"], jax.nn.relu(dense(p["encoder"], x)))
        return z / jnp.linalg.norm(z, axis=-1, keepdims=True)

    def similarities(p, left, right):
        return jnp.exp(p["log_scale"]) * embed(p, left) @ embed(p, right).T

    def outputs(p, left, right):
        return similarities(p, left, right)

    def transposed(p, left, right):
        return similarities(p, left, right).T

    def loss_fn(p, left, right):
        z, labels = similarities(p, left, right), jnp.arange(len(left))
        loss = functools.partial(
            losses.softmax_cross_entropy_with_integer_labels, weight=0.5
        )
        return 0.5 * (loss(z, labels).mean() + loss(z.T, labels).mean())

    x = models.array(0, N, d)
    half = lambda z, label: log_loss(z, label) / 2  # noqa: E731
    labels = jnp.arange(N)
    terms = (Term(outputs, half, (labels,)), Term(transposed, half, (labels,)))
    return Kind(loss_fn, params, (x, x + models.array(1, N, d, scale=0.3)), terms)
