"""The block that the documentation writes, on every kind of layer, against `A ⊗ I`."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks
from tests.helpers import models, oracles

TEXT = pathlib.Path(__file__).parents[2] / "docs" / "extending.md"
DAMPING = 0.3


@pytest.fixture(scope="module")
def block():
    """The page's `InputOnly()`."""
    scope = {}
    code = re.findall(r"```python\n(.*?)```", TEXT.read_text(), flags=re.DOTALL)[0]
    exec(code, scope)
    return scope["InputOnly"]()


TABLE = models.array(0, 7, 5)
IDS = models.classes(1, 7, 6, 4)  # some of the table's rows, several of them twice
KERNEL = {"w": models.array(2, 3, 3, 2, 4), "b": models.array(3, 4)}
IMAGES = models.array(4, 5, 6, 6, 2)
STACK = models.array(5, 3, 5, 5)
X = models.array(6, 6, 5)
EXPERTS = models.array(7, 2, 5, 3)


def _second_moment(rows):
    rows = np.asarray(rows).reshape(-1, np.shape(rows)[-1])
    return rows.T @ rows / len(rows)


def _conv(params, x):
    y = jax.lax.conv_general_dilated(
        x, params["w"], (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + jnp.broadcast_to(params["b"], y.shape)


def _patches():
    """Rows in the order of the kernel's first three axes, and the bias's 1."""
    x = np.asarray(IMAGES)
    rows = [
        x[:, i : i + 3, j : j + 3].reshape(len(x), -1)
        for i in range(0, 4, 2)
        for j in range(4)
    ]
    rows = np.concatenate(rows)
    return np.hstack([rows, np.ones((len(rows), 1))])


def _scanned(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def _hidden():
    h = [X]
    for w in STACK[:-1]:
        h.append(jnp.tanh(h[-1] @ w))
    return h


def _flat(params):
    return [oracles.indices(params)["w"]]


CASES = {  # the network, its parameters, its input, rows of A's, places of V's
    "embedding": (
        lambda p, ids: p["w"][ids],
        {"w": TABLE},
        IDS,
        lambda: [np.eye(7)[IDS]],
        _flat,
    ),
    "embedding of negative ids, scaled": (
        lambda p, ids: (2.0 * p["w"])[ids - 7],
        {"w": TABLE},
        IDS,
        lambda: [2 * np.eye(7)[IDS]],
        _flat,
    ),
    "one-hot product": (
        lambda p, ids: jax.nn.one_hot(ids, 7) @ p["w"],
        {"w": TABLE},
        IDS,
        lambda: [np.eye(7)[IDS]],
        _flat,
    ),
    "convolution": (
        _conv,
        KERNEL,
        IMAGES,
        lambda: [_patches()],
        lambda p: [
            np.vstack(
                [
                    oracles.indices(p)["w"].reshape(-1, 4),
                    oracles.indices(p)["b"][None],
                ]
            )
        ],
    ),
    "stacked": (
        _scanned,
        {"w": STACK},
        X,
        _hidden,
        lambda p: list(oracles.indices(p)["w"]),
    ),
    "experts": (
        lambda p, x: jnp.einsum("bi,eio->beo", x, p["w"]),
        {"w": EXPERTS},
        X,
        lambda: [X, X],
        lambda p: list(oracles.indices(p)["w"]),
    ),
}


def _problem(name, block, **options):
    apply, params, x, rows, places = CASES[name]

    def loss_fn(params, x):
        z = jnp.sin(apply(params, x))
        return kfac_jax.losses.squared_error(z.reshape(len(z), -1)).sum(-1).mean()

    plan, factors = models.exact_factors(
        loss_fn, params, x, blocks=block, on_unmatched="error", **options
    )
    return plan, factors, params, [_second_moment(r) for r in rows()], places(params)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
def test_the_block_of_the_page_is_exact(name, block):
    plan, factors, params, moments, places = _problem(name, block)
    (layer,) = plan.layers
    assert layer.block is block
    op = plan.approximation(factors)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    dense = np.zeros((size, size))
    for a, place in zip(moments, places, strict=True):
        rows = place.reshape(-1)
        dense[np.ix_(rows, rows)] = np.kron(a, np.eye(place.shape[1]))
    np.testing.assert_allclose(op.to_dense(), dense, rtol=1e-10, atol=1e-13)
    v = oracles.random_like(params, 8)
    damped, flat = dense + DAMPING * np.eye(size), oracles.vector(v)
    expected = np.linalg.solve(damped, flat)
    found = oracles.vector(op.solve(v, DAMPING))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    root = oracles.vector(op.power(v, -0.5, DAMPING))
    expected = oracles.matrix_power(damped, -0.5) @ flat
    np.testing.assert_allclose(root, expected, rtol=1e-9, atol=1e-12)
    logdet = np.linalg.slogdet(damped)[1]
    np.testing.assert_allclose(op.logdet(DAMPING), logdet, rtol=1e-10)
    np.testing.assert_allclose(op.trace(), np.trace(dense), rtol=1e-10)
    np.testing.assert_allclose(
        oracles.vector(op.diagonal()), np.diag(dense), rtol=1e-10, atol=1e-13
    )


def test_rows_of_a_table_that_are_out_of_bounds_or_masked_do_not_count(block):
    ids = jnp.array([[0, 1, 1, 9], [2, 1, 7, 0], [3, 3, 5, 6]])  # 7 and 9 give zeros
    mask = jnp.array([1.0, 1.0, 0.0])

    def loss_fn(params, ids, mask):
        h = jnp.take(params, ids, axis=0, mode="fill", fill_value=0.0).mean(1)
        z = kfac_jax.register_loss(kfac_jax.distributions.Normal(), h, mask=mask)
        return jnp.square(z).sum()

    _, factors = models.exact_factors(loss_fn, TABLE, ids, mask, blocks=block)
    rows = np.eye(7)[np.array([0, 1, 1, 2, 1, 0])]
    found = factors["params"]["input"]
    np.testing.assert_allclose(found, _second_moment(rows), rtol=1e-12, atol=1e-14)


def test_a_block_that_handles_one_hot_gets_integers(block):
    class Integers(type(block)):
        handles_one_hot = True

        def statistics(self, x, dy, shape):
            assert shape.one_hot and jnp.issubdtype(x.dtype, jnp.integer)
            x = jax.nn.one_hot(x, shape.inputs, dtype=dy.dtype)
            return super().statistics(x, dy, shape)

    _, factors, _, (moment,), _ = _problem("embedding", Integers())
    np.testing.assert_allclose(factors["w"]["input"], moment, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "block", [blocks.Kronecker(), blocks.Diagonal(), blocks.TNT(), blocks.Eigen()]
)
def test_blocks_of_the_library_never_see_one_hot_rows(block):
    assert _problem("embedding", block)[0].layers[0].shape.one_hot


@models.EIGHT_DEVICES
def test_devices_that_keep_rows_ask_the_block_to_solve(block):
    p = models.problem()
    curvature = kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, blocks=block, estimation_mode="fisher_exact"
    )

    def update(distribution):
        tx = kfac_jax.scale_by_kfac(curvature, 0.1, devices=distribution)
        _, grads, statistics = curvature.value_grad_and_statistics(p.params, *p.args)
        state = tx.init(p.params)
        return jax.jit(lambda s: tx.update(grads, s, statistics=statistics)[0])(state)

    over = kfac_jax.OverMesh(models.mesh(8, "data"), state_axes="data")
    models.assert_trees_close(update(over), update(None))
