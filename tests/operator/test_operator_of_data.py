"""The operator of a batch and of a data set, against exact matrices."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

SIZES = (4, 3, 2)
X = models.array(1, 9, SIZES[0])
PARAMS = models.dense_params(0, *SIZES)
PARTS = (X[:4], X[4:8], X[8:])


def outputs(params, x):
    return models.dense(params["layer1"], jnp.tanh(models.dense(params["layer0"], x)))


def loss_fn(params, x):
    return squared_error(outputs(params, x)).sum(-1).mean()


def plan(block=None, **options):
    options = {"estimation_mode": "fisher_exact"} | options
    return kfac_jax.make_curvature(loss_fn, PARAMS, X, blocks=block, **options)


def test_of_one_batch_with_full_blocks_it_is_the_exact_fisher():
    exact = oracles.ggn(lambda p: outputs(p, X), lambda z: (z**2).sum(), PARAMS)
    dense = np.asarray(plan(blocks.Full()).at(PARAMS, X).to_dense())
    for layer in ("layer0/w", "layer1/w"):
        found, expected = (oracles.block(m, PARAMS, layer) for m in (dense, exact))
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "block", [None, blocks.Full(), blocks.Diagonal(), blocks.TNT(), blocks.Eigen()]
)
def test_batches_of_any_sizes_are_one_data_set(block):
    """By cases, not by batches: the last has one case."""
    curvature = plan(block)
    whole = curvature.at(PARAMS, X)
    parts = curvature.over(PARAMS, [(x,) for x in PARTS])
    np.testing.assert_allclose(parts.to_dense(), whole.to_dense(), atol=1e-12)


def test_batches_by_means_would_be_something_else():
    """Else the test above could not fail."""
    curvature = plan()
    each = [curvature.at(PARAMS, x).to_dense() for x in PARTS]
    whole = curvature.at(PARAMS, X).to_dense()
    assert np.abs(sum(each) / 3 - whole).max() > 1e-3


def test_bases_are_those_of_all_data():
    factors = plan(blocks.Eigen()).over(PARAMS, [(x,) for x in PARTS]).factors
    exact = plan().at(PARAMS, X).factors
    for name, part in factors.items():
        for side in ("input", "output"):
            u = part[f"{side}_basis"]
            turned = u.T @ exact[name][side] @ u
            np.testing.assert_allclose(turned, jnp.diag(jnp.diag(turned)), atol=1e-10)


BATCHES = [(x,) for x in PARTS]


@pytest.mark.parametrize("block", [None, blocks.Eigen()])
@pytest.mark.parametrize("after", [1, 3, 4, 6])
def test_a_run_that_ends_goes_on_bit_by_bit(block, after):
    """At the end of a pass, too: with bases there are two."""
    curvature = plan(block, estimation_mode="fisher_gradients")
    key = jax.random.key(0)
    whole = list(curvature.gathered(PARAMS, BATCHES, rng=key))
    assert len(whole) == (6 if block else 3)
    if after > len(whole):
        pytest.skip("it has ended")
    saved = pickle.loads(pickle.dumps(whole[after - 1]))
    rest = list(curvature.gathered(PARAMS, BATCHES, rng=key, start=saved))
    assert len(rest) == len(whole) - after
    models.assert_trees_equal([*whole[:after], *rest][-1], whole[-1])
    op = curvature.over(PARAMS, BATCHES, rng=key)
    models.assert_trees_equal(whole[-1].factors, op.factors)
    assert int(whole[-1].cases) == len(X)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x: tuple(x), TypeError, "start must be what Curvature.gathered yield"),
        (lambda x: x._replace(passes=1), ValueError, "less than 1 complete passes"),
        (lambda x: x._replace(batches=0.5), TypeError, "start.batches must be an int"),
        (lambda x: x._replace(factors={}), ValueError, "factors"),
    ],
)
def test_what_a_run_cannot_go_on_from_is_refused(change, error, match):
    curvature = plan()
    last = next(curvature.gathered(PARAMS, BATCHES))
    with pytest.raises(error, match=match):
        curvature.gathered(PARAMS, BATCHES, start=change(last))


def test_sampled_modes_draw_anew_for_each_batch():
    curvature = plan(estimation_mode="fisher_gradients")
    key = jax.random.key(0)
    one = curvature.over(PARAMS, [(X,)], rng=key).trace()
    two = curvature.over(PARAMS, [(X,), (X,)], rng=key).trace()
    assert abs(one - two) > 1e-6
    np.testing.assert_allclose(
        one, curvature.at(PARAMS, X, rng=key).trace(), rtol=1e-12
    )


def test_it_may_be_staged():
    curvature = plan()
    solve = jax.jit(lambda p, x: curvature.at(p, x).solve(p, damping=0.1))
    expected = curvature.at(PARAMS, X).solve(PARAMS, damping=0.1)
    jax.tree.map(np.testing.assert_allclose, solve(PARAMS, X), expected)


def test_any_iterable_will_do_where_there_is_one_pass():
    curvature = plan()
    found = curvature.over(PARAMS, ((x,) for x in PARTS)).trace()
    np.testing.assert_allclose(found, curvature.at(PARAMS, X).trace())


def test_what_is_refused():
    with pytest.raises(ValueError, match="over needs at least one batch"):
        plan().over(PARAMS, [])
    with pytest.raises(TypeError, match="each batch must be a list or tuple"):
        plan().over(PARAMS, [X])
    with pytest.raises(TypeError, match=r"takes two passes .* got an iterator"):
        plan(blocks.Eigen()).over(PARAMS, iter([(X,)]))
    with pytest.raises(ValueError, match="samples; pass a key"):
        plan(estimation_mode="fisher_gradients").over(PARAMS, [(X,)])


def test_powers_logarithms_and_samples_are_of_one_matrix():
    """One default of `damping_mode` for all of them: the factored one."""
    operator, v = plan().at(PARAMS, X), models.dense_params(3, *SIZES)
    twice = operator.power(operator.power(v, -0.5, 0.1), -0.5, 0.1)
    solved = operator.solve(v, 0.1)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), twice, solved
    )
    basis = jnp.eye(sum(x.size for x in jax.tree.leaves(PARAMS)))
    flat, back = jax.flatten_util.ravel_pytree(PARAMS)
    inverse = jax.vmap(
        lambda e: jax.flatten_util.ravel_pytree(operator.solve(back(e), 0.1))[0]
    )(basis.astype(flat.dtype))
    np.testing.assert_allclose(
        operator.logdet(0.1), -np.linalg.slogdet(inverse)[1], rtol=1e-9
    )


def counted_loss(params, x):
    counted_loss.times += 1
    return loss_fn(params, x)


def test_batches_of_one_shape_share_a_program():
    """Also in a later call; and a plan that has one can be pickled."""
    counted_loss.times = 0
    curvature = kfac_jax.make_curvature(
        counted_loss, PARAMS, X, estimation_mode="fisher_exact"
    )
    first = curvature.at(PARAMS, X)
    before = counted_loss.times
    again = curvature.over(PARAMS, [(X,), (X,)])
    assert counted_loss.times == before
    np.testing.assert_allclose(again.to_dense(), first.to_dense(), rtol=1e-12)
    loaded = pickle.loads(pickle.dumps(curvature))
    assert loaded == curvature
    np.testing.assert_array_equal(loaded.at(PARAMS, X).trace(), first.trace())
