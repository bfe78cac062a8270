"""Factors that are kept in a narrow type, against those in the type of statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax.blocks import TNT, Diagonal, Eigen, Full, Kronecker
from tests.helpers import models, oracles

# Relative errors: entries are rounded to 2⁻⁹, and once more at every average; damping
# is far above that.
FACTORS = 2.0**-7
SOLVE = 0.015
DAMPING = 0.1

BLOCKS = {
    "Kronecker": Kronecker(),
    "Kronecker, long sides": Kronecker(max_factor_dim=4),
    "Diagonal": Diagonal(),
    "Full": Full(),
    "Eigen": Eigen(),
    "TNT": TNT(),
}


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


PARAMS = _float32(
    {
        "first": {"w": models.array(0, 6, 5), "b": models.array(1, 5)},
        "last": models.array(2, 5, 3),
    }
)
X = models.array(3, 64, 6).astype(jnp.float32)


def _loss_fn(params, x):
    h = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"][None])
    return kfac_jax.losses.squared_error(h @ params["last"]).sum(-1).mean()


def _plan(factor_dtype, **options):
    options = {"estimation_mode": "fisher_exact"} | options
    return kfac_jax.make_curvature(
        _loss_fn, PARAMS, X, factor_dtype=factor_dtype, **options
    )


def _averages(curvature, steps=5):
    factors = curvature.init_factors(PARAMS)
    for i in range(steps):
        x = X * (1 + 0.1 * i) + 0.1 * i
        basis = factors if i else None  # at first the batch's own
        statistics = curvature.value_grad_and_statistics(PARAMS, x, factors=basis)[2]
        factors = curvature.update_factors(factors, statistics, i + 1)
    return factors


def _distance(found, expected):
    found, expected = (oracles.vector(x).astype(float) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@functools.cache
def _both(kind, structure=kfac_jax.BlockDiagonal()):  # noqa: B008
    options = {"blocks": BLOCKS[kind], "structure": structure}
    plans = [_plan(dtype, **options) for dtype in (None, jnp.bfloat16)]
    return [(plan, jax.jit(functools.partial(_averages, plan))()) for plan in plans]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", BLOCKS)
def test_factors_and_solutions_are_close_to_those_of_the_wide_type(kind):
    (plan, wide), (narrow_plan, narrow) = _both(kind)
    for layer, part in narrow.items():
        for name, x in part.items():
            is_basis = name.endswith("_basis")
            assert x.dtype == (jnp.float32 if is_basis else jnp.bfloat16), name
            if not is_basis:
                assert _distance(_float32(x), wide[layer][name]) < FACTORS
    v = _float32(oracles.random_like(PARAMS, 8))
    exact, rounded = plan.approximation(wide), narrow_plan.approximation(narrow)
    assert 0 < _distance(rounded.matvec(v), exact.matvec(v)) < FACTORS
    for mode in ("factored", "exact"):
        found = rounded.solve(v, DAMPING, damping_mode=mode)
        assert found["last"].dtype == jnp.float32
        assert _distance(found, exact.solve(v, DAMPING, damping_mode=mode)) < SOLVE


def test_linked_layers():
    structure = kfac_jax.BlockTridiagonal()
    (plan, wide), (narrow_plan, narrow) = _both("Kronecker", structure)
    assert narrow["first"]["parent_input"].dtype == jnp.bfloat16
    v = _float32(oracles.random_like(PARAMS, 8))
    exact, rounded = plan.approximation(wide), narrow_plan.approximation(narrow)
    assert 0 < _distance(rounded.solve(v, DAMPING), exact.solve(v, DAMPING)) < SOLVE


@pytest.mark.slow
def test_tied_weights():
    table = models.array(0, 7, 4).astype(jnp.float32)
    ids = models.classes(1, 7, 16, 3)

    def loss_fn(table, ids):
        z = jnp.tanh(table[ids].mean(1)) @ table.T
        return kfac_jax.losses.softmax_cross_entropy_with_integer_labels(
            z, ids[:, 0]
        ).mean()

    solved = []
    for dtype in (None, jnp.bfloat16):
        plan = kfac_jax.make_curvature(
            loss_fn, table, ids, factor_dtype=dtype, estimation_mode="fisher_exact"
        )
        assert [x.kind for x in plan.layers] == ["tied"]
        _, _, statistics = plan.value_grad_and_statistics(table, ids)
        factors = plan.update_factors(plan.init_factors(table), statistics, 1)
        solved.append(plan.approximation(factors).solve(table, DAMPING))
    assert 0 < _distance(*solved[::-1]) < SOLVE


def test_averages_are_computed_in_the_wide_type():
    """Only what is kept is rounded: the weights of old and new are not."""
    plan = _plan(jnp.bfloat16)
    _, _, statistics = plan.value_grad_and_statistics(PARAMS, X)
    first = plan.update_factors(plan.init_factors(PARAMS), statistics, 1)
    doubled = jax.tree.map(lambda x: x, statistics)._replace(
        layers=jax.tree.map(lambda x: 2 * x, statistics.layers)
    )
    second = plan.update_factors(first, doubled, 10_000, 0.97)
    new = _plan(None).update_factors(plan.init_factors(PARAMS), doubled, 1)
    for layer, part in second.items():
        for name, x in part.items():
            old = _float32(first[layer][name])
            wide = 0.97 * old + 0.03 * _float32(new[layer][name])
            rounding = 2.0**-8 * np.abs(wide)
            assert (np.abs(_float32(x) - wide) <= rounding + 1e-7).all()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("block", [Kronecker(), Eigen(), Diagonal()])
def test_training(block):
    """The state is smaller, its inverses are wide, and training is what it was."""
    losses, sizes = [], []
    for dtype in (None, "bfloat16"):
        plan = _plan(dtype, blocks=block)
        tx = kfac_jax.kfac(plan)
        step = jax.jit(kfac_jax.make_step(plan, tx))
        params, state = PARAMS, tx.init(PARAMS)
        for i in range(20):
            params, state, value = step(params, state, jax.random.key(i), X)
        assert state.info.skipped_updates == 0
        inverses = jax.tree.leaves(state.inverses)
        assert {x.dtype for x in inverses} <= {jnp.dtype(jnp.float32)}
        losses.append(float(value))
        sizes.append(plan.totals.factor_bytes)
        held = sum(x.nbytes for x in jax.tree.leaves(state.factors))
        assert held == plan.totals.factor_bytes
    first = float(_loss_fn(PARAMS, X))
    assert losses[1] < 0.1 * first and losses[0] < 0.1 * first
    assert sizes[1] < sizes[0]


@models.EIGHT_DEVICES
@pytest.mark.parametrize("cut", [{}, {"state_axes": "data"}])
def test_devices_keep_the_same(cut):
    plan = _plan(jnp.bfloat16)
    over = kfac_jax.OverMesh(models.mesh(8, "data"), **cut)

    def update(devices):
        tx = kfac_jax.scale_by_kfac(plan, DAMPING, devices=devices)
        _, grads, statistics = plan.value_grad_and_statistics(PARAMS, X)
        state = tx.init(PARAMS)
        run = jax.jit(lambda s: tx.update(grads, s, statistics=statistics))
        updates, state = run(state)
        assert {x.dtype for x in jax.tree.leaves(state.factors)} == {
            jnp.dtype(jnp.bfloat16)
        }
        return updates

    assert _distance(update(over), update(None)) < 1e-5
    report = kfac_jax.sharing_report(plan, over)
    sizes = [plan.totals.factor_bytes, plan.totals.inverse_bytes]
    velocity = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
    assert report.whole_state_bytes == sum(sizes) + velocity


def test_a_state_of_another_type_is_refused():
    tx = kfac_jax.scale_by_kfac(_plan(jnp.bfloat16), DAMPING)
    _, grads, statistics = _plan(None).value_grad_and_statistics(PARAMS, X)
    other = kfac_jax.scale_by_kfac(_plan(None), DAMPING).init(PARAMS)
    with pytest.raises(
        ValueError, match=r"expected bfloat16\[7,7\], got float32\[7,7\]"
    ):
        tx.update(grads, other, statistics=statistics)


@pytest.mark.slow
def test_double_precision_may_keep_single():
    params, x = (jax.tree.map(lambda x: x.astype(float), t) for t in (PARAMS, X))
    solved = []
    for dtype in (None, jnp.float32):
        plan = kfac_jax.make_curvature(
            _loss_fn, params, x, factor_dtype=dtype, estimation_mode="fisher_exact"
        )
        _, _, statistics = plan.value_grad_and_statistics(params, x)
        assert statistics.layers["last"]["input"].dtype == jnp.float64
        factors = plan.update_factors(plan.init_factors(params), statistics, 1)
        assert factors["last"]["input"].dtype == (dtype or jnp.float64)
        solved.append(plan.approximation(factors).solve(params, DAMPING))
    assert solved[1]["last"].dtype == jnp.float64
    assert 0 < _distance(*solved[::-1]) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float64])
def test_types_that_are_not_kept(dtype):
    with pytest.raises(
        ValueError, match="factor_dtype must be bfloat16 or float32, wh"
    ):
        _plan(dtype)


@pytest.mark.parametrize("dtype", [jnp.int32, "float33", 16, X])
def test_what_is_no_type_of_floating_point(dtype):
    with pytest.raises(
        TypeError, match="factor_dtype must be real floating point; got"
    ):
        _plan(dtype)
