"""Experts, and messages on graphs."""

import jax
import jax.numpy as jnp

from tests.helpers import models
from tests.helpers.model_kinds._kind import (
    Kind,
    N,
    classifier,
    dense,
    linear,
    maker,
)


def experts(k: int) -> Kind:
    """Tokens go to the k experts with the largest gates; Switch has k = 1."""
    new, d, hidden, e = maker(6), 3, 4, 3
    params = {
        "inputs": linear(new, 2, d),
        "router": new(d, e),
        "w1": new(e, d, hidden),
        "b1": 0.1 * new(e, hidden),
        "w2": new(e, hidden, d),
        "b2": 0.1 * new(e, d),
        "head": linear(new, d, 2),
    }

    def apply(p, x):
        x = dense(p["inputs"], x)  # [b, t, d]
        probabilities = jax.nn.softmax(x @ p["router"])
        gates, chosen = jax.lax.top_k(probabilities, k)
        if k > 1:
            gates = gates / gates.sum(-1, keepdims=True)
        dispatch = jax.nn.one_hot(chosen, e)  # [b, t, k, e]
        combine = jnp.einsum("btk,btke->bte", gates, dispatch)
        sent = jnp.einsum("btke,btd->ebtd", dispatch, x)
        h = jnp.einsum("ebtd,edh->ebth", sent, p["w1"]) + p["b1"][:, None, None]
        h = jnp.einsum("ebth,ehd->ebtd", jax.nn.relu(h), p["w2"])
        y = jnp.einsum("ebtd,bte->btd", h + p["b2"][:, None, None], combine)
        return dense(p["head"], x + y)

    return classifier(apply, params, models.array(0, N, 3, 2))


def balanced_experts() -> Kind:
    """With the loss that keeps the experts' loads alike, which is a rest."""
    kind = experts(1)

    def loss_fn(p, x):
        probabilities = jax.nn.softmax(dense(p["inputs"], x) @ p["router"])
        chosen = jax.nn.one_hot(probabilities.argmax(-1), 3)
        load = (chosen.mean((0, 1)) * probabilities.mean((0, 1))).sum()
        return kind.loss_fn(p, x) + 0.01 * 3 * load

    return kind._replace(loss_fn=loss_fn)


NODES, EDGES = 6, 9
SENDERS = jnp.asarray([0, 1, 2, 3, 4, 5, 0, 2, 4])
RECEIVERS = jnp.asarray([1, 2, 3, 4, 5, 0, 3, 5, 1])


def gnn() -> Kind:
    """Messages of edges, summed at nodes; one graph."""
    new, d = maker(7), 3
    params = {
        "embed": linear(new, 2, d),
        "layers": [
            {"message": linear(new, 2 * d, d), "update": linear(new, 2 * d, d)}
            for _ in range(2)
        ],
        "head": linear(new, d, 2),
    }

    def apply(p, x, senders, receivers):
        h = dense(p["embed"], x)
        for layer in p["layers"]:
            pairs = jnp.concatenate([h[senders], h[receivers]], -1)
            messages = jax.nn.relu(dense(layer["message"], pairs))
            total = jax.ops.segment_sum(messages, receivers, len(x))
            both = jnp.concatenate([h, total], -1)
            h = h + jax.nn.relu(dense(layer["update"], both))
        return dense(p["head"], h)

    return classifier(apply, params, models.array(0, NODES, 2), SENDERS, RECEIVERS)


def gat() -> Kind:
    """Attention over the edges that arrive at a node, two heads."""
    new, d, heads = maker(8), 3, 2
    params = {
        "layers": [
            {
                "w": new(inputs, heads, d),
                "sender": new(heads, d),
                "receiver": new(heads, d),
                "bias": 0.1 * new(heads * d),
            }
            for inputs in (2, heads * d)
        ],
        "head": linear(new, heads * d, 2),
    }

    def apply(p, x, senders, receivers):
        for layer in p["layers"]:
            h = jnp.einsum("ni,ihd->nhd", x, layer["w"])
            scores = jax.nn.leaky_relu(
                (h * layer["sender"]).sum(-1)[senders]
                + (h * layer["receiver"]).sum(-1)[receivers],
                0.2,
            )
            largest = jax.ops.segment_max(scores, receivers, len(x))
            weights = jnp.exp(scores - largest[receivers])
            sums = jax.ops.segment_sum(weights, receivers, len(x))
            weights = weights / sums[receivers]
            sent = weights[..., None] * h[senders]
            total = jax.ops.segment_sum(sent, receivers, len(x))
            x = jax.nn.elu(total.reshape(len(x), -1) + layer["bias"])
        return dense(p["head"], x)

    return classifier(apply, params, models.array(0, NODES, 2), SENDERS, RECEIVERS)
