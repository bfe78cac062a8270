"""Where the axis of examples is followed to, and what happens where it is lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax._jaxpr.graph import build
from kfac_jax._jaxpr.states import LOST, Examples
from kfac_jax._jaxpr.tracking import track
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

B, S, F = 4, 3, 6
X = models.array(0, B, S, F)


def _matrices(x):
    """Square and symmetric, one of each example."""
    return jnp.einsum("bsf,btf->bst", x, x) + jnp.eye(x.shape[1])[None]


def _windows(x, size):
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, size, (1, 1, 1), "SAME")


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
    "while": (
        lambda x: jax.lax.while_loop(
            lambda c: c[1].sum() < 10, lambda c: (c[0] + x, c[1] + x**2), (x, x**2)
        )[0],
        Examples(0, B),
    ),
    "solved": (
        lambda x: jnp.linalg.solve(_matrices(x), x),
        Examples(0, B),
    ),
    "solved, not by vmap": (
        lambda x: jnp.linalg.inv(_matrices(x)).transpose(1, 0, 2),
        Examples(1, B),
    ),
    "one window of each": (lambda x: x.at[:, 1, 1:3].set(2.0), Examples(0, B)),
    "window that moves": (
        lambda x: jax.lax.dynamic_update_slice(x, x[:, :1] ** 2, (0, 1, 0)),
        Examples(0, B),
    ),
    "transform": (lambda x: jnp.abs(jnp.fft.rfft2(x)), Examples(0, B)),
    "sums of windows": (
        lambda x: jax.lax.reduce_window(
            x, 0.0, jax.lax.add, (1, 2, 1), (1, 1, 1), "SAME"
        ),
        Examples(0, B),
    ),
    "mapped, one by one": (
        lambda x: jax.lax.map(lambda x: jnp.sort(x @ x.T, axis=0), x),
        Examples(0, B),
    ),
    "mapped, where several rows are of one": (
        lambda x: jax.lax.map(jnp.cumsum, x.reshape(B * S, F)),
        Examples(0, B, 1, S),
    ),
    "mapped, each by a loop of its own": (
        lambda x: jax.lax.map(
            lambda x: jax.lax.scan(lambda c, x: (c + x.sum(), c * x), 0.0, x)[1], x
        ),
        Examples(0, B),
    ),
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
    "sums of windows of the batch": (
        lambda x: jax.lax.reduce_window(
            x, 0.0, jax.lax.add, (2, 1, 1), (1, 1, 1), "SAME"
        ),
        LOST,
    ),
    "log-sum-exp up to each of the batch": (
        lambda x: jax.lax.cumlogsumexp(x, axis=0),
        LOST,
    ),
    "called back": (
        lambda x: jax.pure_callback(lambda x: x[::-1], jax.typeof(x), x),
        LOST,
    ),
    "solved, with a matrix of all": (
        lambda x: jax.lax.custom_linear_solve(
            lambda v: (2.0 + x.sum()) * v, jnp.ones(B), lambda _, b: b / 2.0
        ),
        LOST,
    ),
    "solved, over the batch": (
        lambda x: jax.scipy.linalg.solve_triangular(jnp.eye(B), x[:, 0]),
        LOST,
    ),
    "part of the batch": (lambda x: x[: B // 2], LOST),
    "shuffled": (lambda x: x[jnp.array([3, 1, 0, 2])], LOST),
    "transform of the batch": (lambda x: jnp.abs(jnp.fft.fft(x, axis=0)), LOST),
    "decomposed with the batch": (lambda x: jnp.linalg.qr(x[:, 0])[0], LOST),
    "written in a part of the batch": (lambda x: x.at[1].set(0.0), LOST),
    "added to others of the batch": (
        lambda x: jnp.zeros((B, S, F)).at[jnp.array([1, 0, 3, 2])].add(x),
        LOST,
    ),
    "gram matrix": (lambda x: jnp.einsum("bsf,csf->bc", x, x), LOST),
    "scan over the batch": (
        lambda x: jax.lax.scan(lambda c, x: (c + x.sum(), x), 0.0, x)[0],
        LOST,
    ),
    "sums so far": (
        lambda x: jax.lax.scan(lambda c, x: (c + x.sum(), x + c), 0.0, x)[1],
        LOST,
    ),
    "the example before": (
        lambda x: jax.lax.scan(lambda c, x: (x, c), jnp.zeros((S, F)), x)[1],
        LOST,
    ),
    "mapped beside all": (
        lambda x: jax.lax.map(lambda row: row[None] - x, x),
        LOST,
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", AT)
def test_the_axis_is_followed(name):
    f, expected = AT[name]
    assert _state(f, X) == expected


COMMON = 3.0 * jnp.eye(3) + models.array(4, 3, 3, scale=0.2)


def _square(h):
    return h[:9].reshape(3, 3) + 3.0 * jnp.eye(3)


def _positive(h):
    return _square(h) @ _square(h).T


def _own_rule(h):
    """Where a custom rule's own operations are what is differentiated."""
    return jnp.sinh(jnp.linalg.slogdet(_square(h))[1]) * h


def _directional(h):
    return jax.jvp(lambda h: jnp.linalg.slogdet(_square(h))[1], (h,), (h,))[1]


def _keyed(h):
    key = jax.random.fold_in(jax.random.key(0), jnp.int32(h[0]))
    return h * jax.random.normal(key, h.shape)


OF_ONE_EXAMPLE = {
    "determinant": lambda h: jnp.linalg.det(_square(h)),
    "slogdet": lambda h: jnp.linalg.slogdet(_square(h)),
    "several": lambda h: jnp.linalg.slogdet(jnp.stack([_square(h), _positive(h)])),
    "its derivative": _directional,
    "its gradient": jax.grad(_directional),
    "custom rule": _own_rule,
    "inverse": lambda h: jnp.linalg.inv(_square(h)),
    "solve": lambda h: jnp.linalg.solve(_square(h), h[:3]),
    "cholesky": lambda h: jnp.linalg.cholesky(_positive(h)),
    "its solve": lambda h: jax.scipy.linalg.cho_solve(
        jax.scipy.linalg.cho_factor(_positive(h)), h[:3]
    ),
    "eigh": lambda h: jnp.linalg.eigh(_positive(h))[0],
    "svd": lambda h: jnp.linalg.svd(_square(h), compute_uv=False),
    "qr": lambda h: jnp.linalg.qr(_square(h)),
    "triangular": lambda h: jax.scipy.linalg.solve_triangular(
        _square(h), h[:3], trans=1
    ),
    "solve with a common matrix": lambda h: jnp.linalg.solve(COMMON, h[:3]),
    "its cholesky solve": lambda h: jax.scipy.linalg.cho_solve((COMMON, True), h[:3]),
    "triangular, common": lambda h: jax.scipy.linalg.solve_triangular(COMMON, h[:3]),
    "triangular, from the right": lambda h: jax.lax.linalg.triangular_solve(
        COMMON, h[:6].reshape(2, 3), left_side=False
    ),
    "tridiagonal": lambda h: jax.lax.linalg.tridiagonal_solve(
        h[:4], 3.0 + h[1:5], h[2:6], h[:4, None]
    ),
    "fft": lambda h: jnp.abs(jnp.fft.fft(h)),
    "convolve": lambda h: jnp.convolve(h, h),
    "set": lambda h: h.at[1].set(1.0),
    "set where it says": lambda h: h.at[jnp.argmax(h)].set(0.0),
    "min of some": lambda h: h.at[jnp.array([1, 1, 2])].min(h[3:6]),
    "add to some": lambda h: jnp.zeros(4).at[jnp.arange(9) % 4].add(h[:9]),
    "taken where it says": lambda h: h[jnp.argmax(h)],
    "in order": lambda h: jnp.take_along_axis(h, jnp.argsort(h), 0),
    "slice where it says": lambda h: jax.lax.dynamic_slice(h, (jnp.argmax(h),), (2,)),
    "write where it says": lambda h: jax.lax.dynamic_update_slice(
        h, h[:2] ** 2, (jnp.argmax(h),)
    ),
    "segments": lambda h: jax.ops.segment_sum(h[:9], jnp.arange(9) // 3, 3),
    "loop": lambda h: jax.lax.fori_loop(0, 3, lambda i, c: c.at[i].add(h[i]), h),
    "loop until": lambda h: jax.lax.while_loop(
        lambda c: jnp.abs(c).max() > 0.1, lambda c: c / 2.0, h
    ),
    "own noise": _keyed,
    "branches": lambda h: jax.lax.switch(
        jnp.int32(h[0] > 0), [jnp.sin, lambda h: h[::-1]], h
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", OF_ONE_EXAMPLE)
def test_what_vmap_maps_keeps_the_axis(name):
    """And each result depends on its own example only, as is claimed."""
    x = models.array(2, B, 10)

    def mapped(x):
        parts = jax.vmap(OF_ONE_EXAMPLE[name])(x)
        return jnp.concatenate([p.reshape(B, -1) for p in jax.tree.leaves(parts)], 1)

    assert _state(mapped, x) == Examples(0, B)
    jacobian = jax.jacfwd(mapped)(x)
    others = jnp.where(jnp.eye(B, dtype=bool)[:, None, :, None], 0.0, jacobian)
    np.testing.assert_array_equal(others, 0.0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name",
    [name for name in OF_ONE_EXAMPLE if name not in ("loop until", "own noise")],
)
def test_what_vmap_maps_mixes_no_examples_of_layers(name):
    """Each example's own, from the layer's output down to the loss."""
    x, w = models.array(2, B, 10), jnp.eye(10) + models.array(3, 10, 10, scale=0.1)

    def loss_fn(w, x):
        parts = jax.tree.leaves(jax.vmap(OF_ONE_EXAMPLE[name])(x @ w))
        parts = [p.reshape(B, -1) for p in parts if jnp.issubdtype(p.dtype, float)]
        return squared_error(jnp.concatenate(parts, 1)).sum(-1).mean()

    plan = kfac_jax.make_curvature(
        loss_fn, w, x, blocks=blocks.Diagonal(), on_unmatched="error"
    )
    assert not plan.lost_examples
    assert [layer.kind for layer in plan.layers] == ["dense"]


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


@pytest.mark.sampled(2)
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

    with pytest.warns(UserWarning, match=r"since gather at .*test_examples_axis"):
        lost = models.exact_factors(lambda p, x: loss_fn(p, x, True), params, X)
    assert "independent_cases=True" in lost[0].report()
    kept = models.exact_factors(lambda p, x: loss_fn(p, x, False), params, X)
    pair = [lost[1], kept[1]]
    for layer in ("layer0", "layer1"):
        np.testing.assert_allclose(
            pair[0][layer]["output"], pair[1][layer]["output"], rtol=1e-10
        )


def test_exact_mode_where_a_loop_takes_the_examples_one_by_one():
    """As where `vmap` does: one pull-back of all."""
    params, x = models.dense_params(0, F, 3, 2), X[:, 0]

    def loss_fn(params, x, each):
        z = models.dense(params["layer0"], x)
        z = each(lambda z: models.dense(params["layer1"], jnp.tanh(z)))(z)
        return squared_error(jnp.sin(z)).sum(-1).mean()

    def mapped(f):
        return functools.partial(jax.lax.map, f)

    pair = [
        models.exact_factors(lambda p, x, e=each: loss_fn(p, x, e), params, x)[1]
        for each in (mapped, jax.vmap)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), *pair)


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


# ------------------------------------------------------------------- what it costs


def _determinants(params, x):
    """`[n, 1]`, the logarithm of a determinant of each example's features."""

    def one(x):
        h = models.dense(params["layer0"], x.reshape(3, 2))
        return jnp.linalg.slogdet(models.dense(params["layer1"], jnp.tanh(h)))[1]

    return jax.vmap(one)(x)[:, None]


def _shuffled_twice(params, x):
    """The same, where nothing follows the examples."""
    return _determinants(params, x)[::-1][::-1]


def _registered(output, params, x):
    mean = output(params, x)
    kfac_jax.register_normal_predictive_distribution(mean)
    return mean.mean()


def _loops(output, size, independent):
    """How many loops over all examples the compiled statistics have, and operations.

    The loops beyond the gradient's own, and the operations in multiples of its.
    """
    params, x = models.dense_params(0, 2, 4, 3), models.array(1, size, 6)
    loss_fn = functools.partial(_registered, output)
    curvature = kfac_jax.make_curvature(
        loss_fn,
        params,
        x,
        estimation_mode="fisher_exact",
        independent_cases=independent,
    )
    assert bool(curvature.lost_examples) == (output is _shuffled_twice)
    both = [
        jax.jit(f).lower(params, x).compile()
        for f in (curvature.value_grad_and_statistics, jax.value_and_grad(loss_fn))
    ]
    flops = [compiled.cost_analysis()["flops"] for compiled in both]
    turns = f'"known_trip_count":{{"n":"{size}"'
    loops = [compiled.as_text().count(turns) for compiled in both]
    return loops[0] - loops[1], flops[0] / flops[1]


@pytest.mark.parametrize("output", [_determinants, _shuffled_twice])
def test_one_pull_back_for_all_examples(output):
    """Of 32 and of 256 examples."""
    for size in (32, 256):
        loops, flops = _loops(output, size, independent=True)
        assert loops <= 0
        assert flops < 8


@pytest.mark.filterwarnings("ignore:Which examples the registered")
def test_all_pulled_back_one_by_one_where_they_are_lost():
    loops, _ = _loops(_shuffled_twice, 32, independent=False)
    assert loops == 1


def test_cases_may_be_said_to_be_independent():
    """With the factors that there are where the examples can be followed."""
    params, x = models.dense_params(0, 2, 4, 3), models.array(1, 8, 6)
    pair = [
        models.exact_factors(
            functools.partial(_registered, output),
            params,
            x,
            independent_cases=True,
        )[1]
        for output in (_determinants, _shuffled_twice)
    ]
    jax.tree.map(np.testing.assert_allclose, *pair)


def test_the_optimizer_takes_cases_for_independent_and_says_so_once():
    params, x = models.dense_params(0, 2, 4, 3), models.array(1, 8, 6)
    loss_fn = functools.partial(_registered, _shuffled_twice)
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss_fn), l2_reg=0.0, estimation_mode="fisher_exact"
    )
    key = jax.random.key(0)
    with pytest.warns(UserWarning, match="since rev at .* as in the published release"):
        state = optimizer.init(params, key, x)
    # not again, where warnings are errors
    rates = {"learning_rate": 0.1, "momentum": 0.0, "damping": 1.0}
    optimizer.step(params, state, key, batch=x, **rates)
    optimizer.step(params, state, key, batch=x[:4], **rates)
    assert optimizer.curvature.independent_cases


# ---------------------------------------------------------------- which arrays have it


def _with_constants(params, x, table):
    """`[n, 2]` of examples, and of an array that all examples share."""
    h = models.dense(params["layer0"], x) + jnp.tanh(table).mean(0, keepdims=True)
    return models.dense(params["layer1"], jnp.tanh(h))


def _constants_loss(params, x, table):
    return squared_error(jnp.sin(_with_constants(params, x, table))).sum(-1).mean()


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 16])
def test_arrays_that_all_examples_share(rows):
    """Their leading axes fit the cases not as well as those of the batch."""
    params, x = models.dense_params(0, F, 5, 2), models.array(1, 8, F)
    table = models.array(2, rows, 5)
    if rows == len(x):  # then only the user can tell
        options = {"batch_argnums": 0}
    else:
        options = {}
    curvature, factors = models.exact_factors(
        _constants_loss, params, x, table, blocks=blocks.Full(), **options
    )
    exact = oracles.ggn(
        lambda p: jnp.sin(_with_constants(p, x, table)), lambda z: (z**2).sum(), params
    )
    found = np.asarray(curvature.approximation(factors).to_dense())
    for layer in ("layer0/w", "layer1/w"):
        pair = [oracles.block(m, params, layer) for m in (found, exact)]
        np.testing.assert_allclose(*pair, atol=1e-12)


def _two_losses(params, x, wall):
    inner, outer = (_shared_net(params, points) for points in (x, wall))
    return squared_error(inner).sum(-1).mean() + squared_error(outer).sum(-1).mean()


def _joined_batches(params, x, wall):
    points = jnp.concatenate([_shared_net(params, x), _shared_net(params, wall)])
    return squared_error(points).sum(-1).mean()


def _shared_net(params, x):
    return models.dense(params["layer1"], jnp.tanh(models.dense(params["layer0"], x)))


@pytest.mark.parametrize("rows", [3, 4, 6, 16])
@pytest.mark.parametrize("loss_fn", [_two_losses, _joined_batches])
def test_batches_of_two_lengths(loss_fn, rows):
    """As of a differential equation, within a region and on its edge."""
    params, x = models.dense_params(0, F, 5, 2), models.array(1, 8, F)
    wall = models.array(2, rows, F)
    curvature = kfac_jax.make_curvature(loss_fn, params, x, wall, on_unmatched="error")
    assert [(x.kind, x.uses) for x in curvature.layers] == [("dense", 2)] * 2


def test_a_fraction_of_the_batch_leaves_other_arrays_whole():
    params, x = models.dense_params(0, F, 5, 2), models.array(1, 8, F)
    table = models.array(2, 3, 5)
    make = functools.partial(
        kfac_jax.make_curvature, _constants_loss, params, estimation_mode="fisher_exact"
    )
    whole = make(x[:4], table)
    expected = whole.value_grad_and_statistics(params, x[:4], table)[2].layers
    for options in ({}, {"batch_argnums": (0,)}):
        part = make(x, table, statistics_fraction=0.5, **options)
        found = part.value_grad_and_statistics(params, x, table)[2].layers
        models.assert_trees_close(found, expected)
    with pytest.raises(ValueError, match="plan was made for arguments of 2 array"):
        part.value_grad_and_statistics(params, x)


def test_a_fraction_of_two_batches_needs_to_be_told_which():
    params, x = models.dense_params(0, F, 5, 2), models.array(1, 8, F)
    wall = models.array(2, 3, F)
    with pytest.raises(ValueError, match="Say by batch_argnums"):
        kfac_jax.make_curvature(_two_losses, params, x, wall, statistics_fraction=0.5)


def test_a_batch_without_cases_is_refused():
    params, x = models.dense_params(0, F, 5, 2), models.array(1, 8, F)
    plan = kfac_jax.make_curvature(_constants_loss, params, x, models.array(2, 3, 5))
    with pytest.raises(ValueError, match="needs at least one case; got shape"):
        plan.value_grad_and_statistics(
            params, x[:0], models.array(2, 3, 5), rng=jax.random.key(0)
        )


@pytest.mark.parametrize(
    "value, error, message",
    [
        (2, ValueError, "expected less than 2, got 2"),
        ((0, -1), ValueError, "each of batch_argnums"),
        ("x", TypeError, "batch_argnums"),
        ([0.5], ValueError, "each of batch_argnums"),
    ],
)
def test_places_of_the_batch_that_do_not_exist(value, error, message):
    params, x = models.dense_params(0, F, 5, 2), models.array(1, 8, F)
    with pytest.raises(error, match=message):
        kfac_jax.make_curvature(
            _constants_loss, params, x, models.array(2, 3, 5), batch_argnums=value
        )


@pytest.mark.parametrize("data", [False, True])
def test_rows_taken_one_by_one_under_vmap_are_those_of_a_table(data):
    """Slices of length one, whose gather keeps the axis that they are picked along."""
    params = {"t": models.array(0, 4, 3), "w": models.array(1, 3, 2)}
    x, ids = models.array(2, 5, 4, 3), jnp.asarray([[0, 1, 3, 1]] * 4 + [[2, 2, 0, 3]])

    def row(table, i):
        return jax.lax.dynamic_slice(table, (i, 0), (1, 3))

    def outputs(p, x, ids):
        take = jax.vmap(row, (None, 0))
        if data:
            rows = jax.vmap(take, (None, 0))(p["t"], ids)
        else:
            rows = take(p["t"], jnp.arange(4))[None]
        return jnp.tanh(x + rows.squeeze(-2)) @ p["w"]

    def loss_fn(p, x, ids):
        return squared_error(outputs(p, x, ids)).sum((-1, -2)).mean()

    plan = kfac_jax.make_curvature(
        loss_fn,
        params,
        x,
        ids,
        estimation_mode="fisher_exact",
        blocks=kfac_jax.blocks.Full(),
        on_unmatched="error",
    )
    kinds = {layer.name: layer.kind for layer in plan.layers}
    assert kinds == {"t": "embedding" if data else "shift", "w": "dense"}
    exact = oracles.ggn(
        lambda p: outputs(p, x, ids).reshape(5, -1), lambda z: (z**2).sum(), params
    )
    for name in params:
        np.testing.assert_allclose(
            oracles.block(np.asarray(plan.at(params, x, ids).to_dense()), params, name),
            oracles.block(exact, params, name),
            rtol=1e-9,
            atol=1e-12,
        )
