"""Where the axis of examples is followed to, and what happens where it is lost."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import oracles
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax._jaxpr.examples import LOST, Examples
from kfac_jax._jaxpr.graph import build
from kfac_jax._jaxpr.tracking import track
from kfac_jax.losses import squared_error

B, S, F = 4, 3, 6
X = models.array(0, B, S, F)


def _state(f, *args, axes=None):
    """Follows the leading axis of the arguments to the result."""
    graph = build(jax.make_jaxpr(f)(*args))
    inputs = [
        None if axis is None else Examples(axis, x.shape[axis])
        for x, axis in zip(args, axes or [0] * len(args), strict=True)
    ]
    (out,) = graph.outputs
    return track(graph, inputs).get(out)


AT = {
    "identity": (lambda x: x * 2.0, Examples(0, B)),
    "transpose": (lambda x: x.transpose(1, 2, 0), Examples(2, B)),
    "einsum": (lambda x: jnp.einsum("bsf,sg->gb", x, jnp.ones((S, 2))), Examples(1, B)),
    "rows": (lambda x: x.reshape(B * S, F), Examples(0, B, 1, S)),
    "rows, positions first": (
        lambda x: x.transpose(1, 0, 2).reshape(B * S, F),
        Examples(0, B, S, 1),
    ),
    "middle": (lambda x: x.transpose(1, 0, 2).reshape(-1), Examples(0, B, S, F)),
    "rows and back": (lambda x: x.reshape(B * S, F).reshape(B, S, F), Examples(0, B)),
    "heads": (
        lambda x: x.reshape(B, S, 2, 3).swapaxes(1, 2).reshape(B * 2, S, 3),
        Examples(0, B, 1, 2),
    ),
    "cut in the middle of an example": (
        lambda x: x.reshape(B * 2, -1),
        Examples(0, B, 1, 2),
    ),
    "squeeze": (lambda x: x[:, None][:, 0], Examples(0, B)),
    "reduction": (lambda x: x.sum((1, 2)), Examples(0, B)),
    "softmax": (lambda x: jax.nn.softmax(x, axis=1), Examples(0, B)),
    "layer norm": (
        lambda x: x - jnp.broadcast_to(x.mean(-1, keepdims=True), x.shape),
        Examples(0, B),
    ),
    "last position": (lambda x: x[:, -1], Examples(0, B)),
    "slice of positions": (lambda x: x[:, 1:], Examples(0, B)),
    "pad positions": (lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0))), Examples(0, B)),
    "concatenation": (lambda x: jnp.concatenate([x, x], 1), Examples(0, B)),
    "unpacked": (lambda x: next(iter(x.swapaxes(0, 1))), Examples(0, B)),
    "unpacked in the middle": (lambda x: jnp.unstack(x, axis=1)[2], Examples(0, B)),
    "stacked in front": (lambda x: jnp.stack([x, x]), Examples(1, B)),
    "stacked behind": (lambda x: jnp.stack([x, x], axis=1), Examples(0, B)),
    "split": (lambda x: jnp.split(x, [1], axis=2)[1], Examples(0, B)),
    "tiled": (lambda x: jnp.tile(x, (1, 2, 1)), Examples(0, B)),
    "largest": (lambda x: jax.lax.top_k(x, 2)[0], Examples(0, B)),
    "cumulative sum": (lambda x: jnp.cumsum(x, 1), Examples(0, B)),
    "attention": (
        lambda x: jnp.einsum(
            "bst,btf->sbf", jax.nn.softmax(jnp.einsum("bsf,btf->bst", x, x)), x
        ),
        Examples(1, B),
    ),
    "vmap": (lambda x: jax.vmap(lambda x: jnp.sin(x).T)(x), Examples(0, B)),
    "scan over positions": (
        lambda x: jax.lax.scan(
            lambda h, x: (jnp.tanh(h + x), h), jnp.zeros((B, F)), x.swapaxes(0, 1)
        )[1],
        Examples(1, B),
    ),
    "carry of a scan": (
        lambda x: jax.lax.scan(
            lambda h, x: (jnp.tanh(h + x), None), jnp.zeros((B, F)), x.swapaxes(0, 1)
        )[0],
        Examples(0, B),
    ),
    "cond": (
        lambda x: jax.lax.cond(x.sum() > 0, lambda: x + 1.0, lambda: x),
        Examples(0, B),
    ),
    "remat and jit": (jax.jit(jax.checkpoint(lambda x: jnp.sin(x))), Examples(0, B)),
    "does not depend on it": (lambda x: jnp.ones(3) + 1.0, None),
    # ------------------------------------------------------------------------- lost
    "sum over the batch": (lambda x: x.sum(0), LOST),
    "batch norm": (lambda x: x - jnp.broadcast_to(x.mean(0), x.shape), LOST),
    "flipped": (lambda x: x + x[::-1], LOST),
    "rolled": (lambda x: x + jnp.roll(x, 1, 0), LOST),
    "sorted over the batch": (lambda x: jnp.sort(x, 0), LOST),
    "largest of the batch": (lambda x: jax.lax.top_k(x.T, B)[0], LOST),
    "unpacked over the batch": (lambda x: next(iter(x)), LOST),
    "split over the batch": (lambda x: jnp.split(x, 2)[0], LOST),
    "eigenvalues of all": (lambda x: jnp.linalg.eigh(x[:, 0, :B])[0], LOST),
    "cumulative over the batch": (lambda x: jnp.cumsum(x, 0), LOST),
    "part of the batch": (lambda x: x[: B // 2], LOST),
    "shuffled": (lambda x: x[jnp.array([3, 1, 0, 2])], LOST),
    "gram matrix": (lambda x: jnp.einsum("bsf,csf->bc", x, x), LOST),
    "scan over the batch": (
        lambda x: jax.lax.scan(lambda c, x: (c + x.sum(), x), 0.0, x)[0],
        LOST,
    ),
}


@pytest.mark.parametrize("name", AT)
def test_the_axis_is_followed(name):
    f, expected = AT[name]
    assert _state(f, X) == expected


def test_arguments_that_do_not_hold_examples_do_not_matter():
    table = jnp.ones((S, F))
    f = lambda x, t: x + jnp.broadcast_to(t, x.shape)  # noqa: E731
    assert _state(f, X, table, axes=[0, None]) == Examples(0, B)


def test_arguments_whose_examples_disagree_lose_the_axis():
    square = models.array(1, B, B)
    f = lambda x, y: x + y  # noqa: E731
    assert _state(f, square, square, axes=[0, 1]) == LOST


# ------------------------------------------------------------- what is made of the axis

LAYOUTS = {
    "as it is": lambda x: (x, lambda y: y),
    "rows": lambda x: (x.reshape(B * S, F), lambda y: y.reshape(B, S, -1)),
    "positions first": lambda x: (x.swapaxes(0, 1), lambda y: y.swapaxes(0, 1)),
    "rows, positions first": lambda x: (
        x.swapaxes(0, 1).reshape(S * B, F),
        lambda y: y.reshape(S, B, -1).swapaxes(0, 1),
    ),
    "features first": lambda x: (x.transpose(2, 0, 1), None),
}


def _pooled(params, x, layout):
    """Positions share the weights of layer 0, then their mean goes on."""
    moved, back = LAYOUTS[layout](x)
    if back is None:
        h = jnp.einsum("fbs,fh->bsh", moved, params["layer0"]["w"])
        h = h + jnp.broadcast_to(params["layer0"]["b"], h.shape)
    else:
        h = back(models.dense(params["layer0"], moved))
    return models.dense(params["layer1"], jnp.tanh(h).mean(1))


@pytest.mark.parametrize("block", [blocks.Full(), blocks.Diagonal()])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_within_an_example_are_exact(layout, block):
    params = models.dense_params(0, F, 2, 2)

    def loss_fn(params, x):
        return squared_error(jnp.sin(_pooled(params, x, layout))).sum(-1).mean()

    curvature, factors = models.exact_factors(
        loss_fn, params, X, blocks=block, on_unmatched="error"
    )
    exact = oracles.ggn(
        lambda p: jnp.sin(_pooled(p, X, layout)), lambda z: (z**2).sum(), params
    )
    found = np.asarray(curvature.approximation(factors).to_dense())
    if isinstance(block, blocks.Diagonal):
        np.testing.assert_allclose(np.diag(found), np.diag(exact), atol=1e-12)
        return
    for name in ("layer0", "layer1"):
        pair = [
            oracles.block(m, params, f"{name}/b", f"{name}/w") for m in (found, exact)
        ]
        np.testing.assert_allclose(*pair, atol=1e-12)


def _shuffled(w, x):
    order = jnp.array([3, 1, 0, 2])
    return squared_error(jnp.sin(x[order] @ w)).sum(-1).mean()


@pytest.mark.parametrize("block", [blocks.Full(), blocks.Diagonal()])
def test_blocks_that_need_the_axis_are_refused_where_it_is_lost(block):
    w, x = models.array(0, F, 2), X[:, 0]
    with pytest.warns(UserWarning, match="which rows .*belong to one example"):
        plan = kfac_jax.make_curvature(_shuffled, w, x, blocks=block)
    (layer,) = plan.layers
    assert layer.kind == "unmatched" and "test_examples_axis.py" in layer.source
    with pytest.raises(ValueError, match="could not be followed"):
        kfac_jax.make_curvature(_shuffled, w, x, blocks=block, on_unmatched="error")


def test_kronecker_does_not_need_the_axis():
    plan = kfac_jax.make_curvature(_shuffled, models.array(0, F, 2), X[:, 0])
    assert isinstance(plan.layers[0].block, blocks.Kronecker)


def test_exact_mode_where_the_axis_is_lost():
    """Cases of one example share values, so they may not be pulled back together."""
    params = models.dense_params(0, F, 2, 2)
    order = jnp.asarray(np.random.default_rng(0).permutation(B * S))

    def loss_fn(params, x, shuffle):
        z = models.mixing(params, x).reshape(B * S, 2)
        z = z[order] if shuffle else z
        return squared_error(jnp.sin(z)).sum(-1).mean()

    pair = [
        models.exact_factors(lambda p, x, s=s: loss_fn(p, x, s), params, X)[1]
        for s in (True, False)
    ]
    for layer in ("layer0", "layer1"):
        np.testing.assert_allclose(
            pair[0][layer]["output"], pair[1][layer]["output"], rtol=1e-10
        )


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_plan_fits_other_batch_sizes(size):
    """Also a batch of one, whose axis looks like one of length one."""
    params = models.dense_params(0, F, 2, 2)

    def loss_fn(params, x):
        z = models.mixing(params, x).reshape(-1, 2)
        return squared_error(jnp.sin(z)).sum(-1).mean()

    options = dict(blocks=blocks.Full(), estimation_mode="fisher_exact")
    x = models.array(1, size, S, F)
    plan = kfac_jax.make_curvature(loss_fn, params, X, **options)
    own = kfac_jax.make_curvature(loss_fn, params, x, **options)
    found, expected = (
        jax.jit(lambda x, p=p: models.statistics_to_factors(p, params, x))(x)
        for p in (plan, own)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    exact = oracles.ggn(
        lambda p: jnp.sin(models.mixing(p, x).reshape(-1, 2)),
        lambda z: (z**2).sum(),
        params,
    )
    np.testing.assert_allclose(
        oracles.block(
            np.asarray(plan.approximation(found).to_dense()), params, "layer0/w"
        ),
        oracles.block(exact, params, "layer0/w"),
        atol=1e-12,
    )
