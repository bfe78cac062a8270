"""Weights that data choose from a table: experts, tasks and kinds of atoms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax._jaxpr.kinds.chosen import FEW, MOST
from kfac_jax.losses import squared_error
from tests.helpers import models

N, E, IN, OUT = 12, 3, 4, 2
X = models.array(0, N, IN)
TASK = jnp.asarray(np.random.RandomState(0).randint(0, E, N))
W = models.array(1, E, IN, OUT)


def loss_of(apply):
    def loss_fn(w, x, task):
        return squared_error(jnp.tanh(apply(w, x, task))).sum(-1).mean()

    return loss_fn


def chosen(w, x, task):
    return jnp.einsum("ni,nio->no", x, w[task])


def under_vmap(w, x, task):
    return jax.vmap(lambda x, t: x @ w[t])(x, task)


def of_each(w, x, task):
    """The same, by a product with every weight."""
    every = jnp.einsum("ni,eio->neo", x, w)
    return (every * jax.nn.one_hot(task, E, dtype=float)[..., None]).sum(1)


def factors_of(apply, w=W, x=X, task=TASK, **options):
    plan, factors = models.exact_factors(
        loss_of(apply), w, x, task, on_unmatched="error", **options
    )
    (layer,) = plan.layers
    return layer, factors[layer.name]


@pytest.mark.parametrize("apply", [chosen, under_vmap])
def test_they_are_independent_layers_of_the_rows_that_choose_them(apply):
    layer, found = factors_of(apply)
    assert (layer.kind, layer.shape.matrix) == ("dense", (E, IN, OUT))
    for e in range(E):
        own = np.flatnonzero(TASK == e)
        _, wanted = models.exact_factors(
            loss_of(lambda w, x, task: x @ w), W[e], X[own], TASK[own]
        )
        (wanted,) = wanted.values()
        # the loss is a mean over all cases, of which some are this weight's
        np.testing.assert_allclose(found["input"][e], wanted["input"])
        scale = len(own) / N
        np.testing.assert_allclose(found["output"][e], scale * wanted["output"])


@pytest.mark.parametrize("apply", [chosen, under_vmap])
def test_a_batch_of_one_has_the_same_layer(apply):
    layer, found = factors_of(apply, x=X[:1], task=TASK[:1])
    assert layer.shape.matrix == (E, IN, OUT)
    own = int(TASK[0])
    others = [e for e in range(E) if e != own]
    assert found["input"][own].any() and not found["input"][others, :, :].any()


def test_integers_out_of_bounds():
    """They choose none where JAX fills with zeros, and the nearest where it clips."""
    task = TASK.at[0].set(7)

    def filled(w, x, task):
        return jnp.einsum("ni,nio->no", x, w.at[task].get(mode="fill", fill_value=0.0))

    def clipped(w, x, task):
        return jnp.einsum("ni,nio->no", x, w.at[task].get(mode="clip"))

    _, found = factors_of(filled, task=task)
    wanted, exact = (
        kfac_jax.make_curvature(
            loss_of(apply),
            W,
            X,
            task,
            blocks=kfac_jax.blocks.Full(),
            estimation_mode="fisher_exact",
        )
        .at(W, X, task)
        .to_dense()
        for apply in (of_each, filled)
    )
    np.testing.assert_allclose(exact, wanted, atol=1e-12)
    _, clipped = factors_of(clipped, task=task)
    _, nearest = factors_of(chosen, task=TASK.at[0].set(2))
    models.assert_trees_close(clipped, nearest, rtol=1e-12)
    assert found["output"].sum() < clipped["output"].sum()


def lookups(w, x, task):
    """A row that is no weight of a product of its own."""
    return w[task].reshape(N, -1)


def test_rows_that_meet_a_weight_are_no_weights():
    """Of embeddings by heads, that another parameter is multiplied with."""

    def apply(p, x, task):
        heads = p["table"][task] @ p["w"]
        return heads.reshape(N, -1) + x[:, :1]

    params = {"table": W, "w": models.array(2, OUT, OUT)}
    plan = kfac_jax.make_curvature(
        loss_of(apply), params, X, TASK, on_unmatched="error"
    )
    kinds = {layer.name: layer.kind for layer in plan.layers}
    assert kinds == {"table": "embedding", "w": "dense"}


@pytest.mark.parametrize(
    "apply, shape, kind",
    [
        (lookups, W.shape, "embedding"),
        (chosen, (FEW, IN, OUT), "dense"),
        (chosen, (FEW + 1, IN, OUT), "embedding"),
        (chosen, (100, IN, 200), "embedding"),
        (chosen, (MOST, 200, 200), "dense"),
        (chosen, (MOST + 1, 400, 400), "embedding"),
    ],
)
def test_tables_of_many_weights_are_embeddings(apply, shape, kind):
    """Those whose rows, read for each weight, would take much memory."""
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    x = jax.ShapeDtypeStruct((N, shape[1] if apply is chosen else IN), jnp.float32)
    plan = kfac_jax.make_curvature(loss_of(apply), w, x, TASK)
    assert [layer.kind for layer in plan.layers] == [kind]
