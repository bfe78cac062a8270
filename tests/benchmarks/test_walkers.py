"""The wavefunction that the benchmark of variational Monte Carlo trains is right.

Its energy is compared with the Hessian of psi, the gradient with the formula over
O = grad log |psi|, the plan's Fisher with O^T O.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import walkers
import walkers_model as model
from jax.flatten_util import ravel_pytree

import kfac_jax
from tests.helpers import oracles

SIZES = {"layers": 2, "width": 4, "pair_width": 3, "determinants": 2, "heads": 2}
KINDS = {
    "streams": {},
    "full": {"full": True},
    "attention": {"attention": True, "layers": 1},
    "attention, full": {"attention": True, "full": True},
}
LI = model.ATOMS["Li"]
WALKERS = 16  # two on each of the tests' devices


@functools.cache
def network(kind):
    """A system, a small network, parameters moved off their start, and walkers."""
    system, shape = LI, model.Shape(**SIZES | KINDS[kind])
    params = model.init_params(system, shape, 0, jnp.float64)
    noise = oracles.random_like(params, 0)
    params = jax.tree.map(lambda x, y: x + 0.1 * y, params, noise)
    return system, shape, params, model.init_walkers(system, WALKERS, 1, jnp.float64)


# ------------------------------------------------------------------------- the physics


@pytest.mark.parametrize("kind", KINDS)
def test_psi_changes_its_sign_when_equal_electrons_change_places(kind):
    system, shape, params, positions = network(kind)
    both = jax.jit(model.of_walkers(model.sign_and_log, system, shape))
    sign, log = both(params, positions)
    assert set(np.unique(sign)) == {-1.0, 1.0}
    electrons = positions.reshape(WALKERS, 3, 3)
    for pair, equal in (((0, 1), True), ((0, 2), False)):
        swapped = electrons.at[:, pair, :].set(electrons[:, pair[::-1], :])
        swapped_sign, swapped_log = both(params, swapped.reshape(WALKERS, 9))
        same = np.isclose(swapped_log, log, rtol=1e-10)
        assert same.all() if equal else not same.any()
        if equal:
            np.testing.assert_array_equal(swapped_sign, -sign)


def test_the_determinants_are_those_of_a_plain_sum():
    matrices = jnp.asarray(np.random.RandomState(0).normal(size=(2, 3, 3)))
    one = matrices[:, :1, :1]
    for some in (matrices, one):
        signs, logs = model._sign_and_log_determinants(some)
        np.testing.assert_allclose(signs * jnp.exp(logs), jnp.linalg.det(some))


def test_the_jastrow_factor_has_katos_slopes():
    alphas = {"parallel": jnp.full(1, 0.7), "antiparallel": jnp.full(1, 1.3)}

    def slope(i, j):
        def factor(r):
            others = 1.0 - jnp.eye(3)
            distances = others.at[i, j].set(r).at[j, i].set(r)
            return model._jastrow(LI, alphas, distances)

        return jax.jit(jax.grad(factor))(0.0)

    assert slope(0, 1) == pytest.approx(1 / 4)
    assert slope(0, 2) == pytest.approx(1 / 2)


@pytest.mark.parametrize("kind", ["full", "attention"])
def test_the_local_energy_is_that_of_the_hessian_of_psi(kind):
    system, shape, params, positions = network(kind)

    def naive(walker):
        def psi(x):
            sign, log = model.sign_and_log(system, shape, params, x)
            return sign * jnp.exp(log)

        laplacian = jnp.trace(jax.hessian(psi)(walker))
        a, b, c = walker.reshape(3, 3)
        r = jnp.linalg.norm
        attraction = 3 / r(a) + 3 / r(b) + 3 / r(c)
        repulsion = 1 / r(a - b) + 1 / r(a - c) + 1 / r(b - c)
        return -0.5 * laplacian / psi(walker) - attraction + repulsion

    found = jax.jit(model.of_walkers(model.local_energy, system, shape))
    expected = jax.jit(jax.vmap(naive))(positions)
    np.testing.assert_allclose(found(params, positions), expected, rtol=1e-8)


def test_walkers_move_and_some_stay():
    system, shape, params, positions = network("streams")
    move = jax.jit(functools.partial(model.moved, system, shape, steps=1))
    after = move(params, positions, jax.random.PRNGKey(0))
    stayed = (after == positions).all(1)
    assert 0 < stayed.sum() < WALKERS


# ----------------------------------------------------------- the gradient and the plan


def scores(system, shape, params, positions):
    """O of each walker, `[walkers, P]`, from a Jacobian of log psi alone."""
    logs_of = model.of_walkers(model.log_psi, system, shape)
    return oracles.jacobian(lambda p: logs_of(p, positions)[:, None], params)[:, 0]


def test_the_gradient_is_that_of_the_score_function():
    system, shape, params, positions = network("streams")
    # there the local energy is far off
    positions = positions.at[0, :3].set(jnp.asarray([0.0, 0.001, 0.0]))
    loss = jax.jit(model.native_loss(system, shape))
    energy, (aux, grads) = loss(params, positions)
    local = np.asarray(aux.local_energy)
    middle = local.mean()
    half = model.WINDOW * np.abs(local - middle).mean()
    limited = np.clip(local, middle - half, middle + half)
    assert (limited != local).any()
    o = scores(system, shape, params, positions)
    expected = (limited - limited.mean()) @ o / WALKERS
    assert energy == pytest.approx(local.mean())
    assert aux.variance == pytest.approx(local.var())
    np.testing.assert_allclose(ravel_pytree(grads)[0], expected, rtol=1e-7)


@pytest.mark.parametrize("kind", ["streams", "attention, full"])
def test_every_layer_is_found(kind):
    system, shape, params, positions = network(kind)
    curvature = kfac_jax.make_curvature(
        model.native_loss(system, shape),
        params,
        positions,
        has_aux=True,
        estimation_mode="fisher_exact",
        on_unmatched="error",
    )
    expected = {"w": "dense", "b": "dense", "pi": "scale", "sigma": "scale"}
    expected |= {"scale": "scale_and_shift", "shift": "scale_and_shift"}
    expected |= {"parallel": "shift", "antiparallel": "shift"}
    leaves = sum(len(layer.params) for layer in curvature.layers)
    assert leaves == len(jax.tree.leaves(params))
    for layer in curvature.layers:
        assert {expected[path.split("/")[-1]] for path in layer.params} == {layer.kind}
        assert layer.uses == (2 if "jastrow" in layer.name else 1)


@pytest.mark.slow
def test_the_native_plans_blocks_are_the_fishers():
    system, _, params, positions = network("streams")
    shape = model.Shape(**SIZES, jastrow=False)
    params = {name: x for name, x in params.items() if name != "jastrow"}
    curvature = kfac_jax.make_curvature(
        model.native_loss(system, shape),
        params,
        positions,
        has_aux=True,
        estimation_mode="fisher_exact",
        blocks=kfac_jax.blocks.Full(),
        on_unmatched="error",
    )

    @jax.jit
    def dense(params):
        _, statistics = curvature.value_and_statistics(params, positions)
        factors = curvature.init_factors(params)
        factors = curvature.update_factors(factors, statistics, 1)
        return curvature.approximation(factors).to_dense()

    o = scores(system, shape, params, positions)
    found, fisher = dense(params), 2 * o.T @ o / WALKERS  # 1 / variance = 2
    for layer in curvature.layers:
        block = oracles.block(found, params, *layer.params)
        expected = oracles.block(fisher, params, *layer.params)
        np.testing.assert_allclose(block, expected, atol=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:kfac_jax gives 2 parameter")
@pytest.mark.parametrize("kind", ["streams", "attention"])
def test_a_step_of_the_optimizer(kind):
    shape = model.Shape(**SIZES | KINDS[kind] | {"layers": 1})
    training = model.Training(LI, shape, WALKERS, 5, dtype=jnp.float64)
    before = training.params
    training.init(training.next_key())
    stats = training.step(training.next_key())
    local = np.asarray(stats["aux"].local_energy)
    np.testing.assert_allclose(stats["loss"], local.mean())
    changes = jax.tree.map(lambda x, y: np.abs(x - y).max(), before, training.params)
    assert all(0 < change < 1 for change in jax.tree.leaves(changes))


# ------------------------------------------------------------------ what is made of it


def measured(step, first=8.0):
    return {
        "init, s": 1.0,
        "first step, s": first - 1.0,
        "peak bytes": 2**30,
        "step, s": step,
        "gradient, s": 0.01,
    }


def test_tables():
    ok = {"batch": 128, "period": 5, "status": "ok"}
    failed = {"batch": 512, "period": 1, "status": "failed: published: a | b"}
    rows = [ok | {"here": measured(0.02), "published": measured(0.04, 4.0)}, failed]
    head, rule, *lines = walkers.times_table(rows).splitlines()
    assert "| 20 | 40 | **0.50** | 8 | 4 | **2.00** |" in lines[0]
    assert "| 2.00 | 4.00 |" in lines[0]
    assert "failed: published: a \\| b" in lines[1]
    columns = {x.replace("\\|", "").count("|") for x in (head, rule, *lines)}
    assert len(columns) == 1

    pair = {"here": [-1.0, -2.0], "published": [-1.0, -2.5]}
    rows = [ok | pair | {"largest relative difference": 0.2}, failed]
    lines = walkers.energies_table(rows).splitlines()
    assert "| -1.000000 | -2.000000 | -2.500000 | 2.0e-01 |" in lines[2]
    assert "failed" in lines[3]


def test_steps_are_averaged_over_places_of_the_period():
    """Two children answer what was written down, and see the same requests."""

    class Child:
        def __init__(self, refreshing):
            self.refreshing, self.asked = refreshing, []

        def ask(self, request):
            self.asked.append(request)
            if request == "first":
                return {}
            steps = [self.refreshing, 1.0, 1.0, 1.0, 1.0]
            return {"steps": steps, "gradients": [0.5, 0.6, 9.0]}

    children = {"here": Child(6.0), "published": Child(11.0)}
    row = walkers.times(walkers.parse(["--quick"]), children, 5)
    assert row["here"]["step, s"] == pytest.approx(2.0)
    assert row["published"]["step, s"] == pytest.approx(3.0)
    assert row["here"]["gradient, s"] == 0.6
    assert children["here"].asked == ["first", "turn", "turn"]
    assert children["published"].asked == children["here"].asked


def test_a_child_that_fails_is_in_its_row(monkeypatch):
    monkeypatch.setattr(walkers.pairs, "python_of", lambda name: sys.executable)
    monkeypatch.setattr(walkers.environments, "failure", lambda name: None)
    monkeypatch.setattr(walkers, "__file__", str(Path(json.__file__)))  # prints nothing
    row = walkers.compare(walkers.parse([]), 128, 1, walkers.times)
    assert row["status"].startswith("failed: here: ")
    monkeypatch.setattr(walkers.environments, "failure", lambda name: "not installed")
    row = walkers.compare(walkers.parse([]), 128, 1, walkers.times)
    assert row == {"batch": 128, "period": 1, "status": "failed: not installed"}
