"""The experiment of quantum Monte Carlo: its physics, its statistics and its curvature.

Energies are compared with exact cases and with the Hessian of psi, gradients and the
Fisher with dense formulas over O = grad log |psi|.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfac_jax
from tests.experiments.test_parallel import LIMIT, start
from tests.helpers import oracles
from tests.helpers.models import assert_trees_close

WALKERS = 24
WINDOW = 5  # mean distances from the median, within which energies are kept
# of an average over SAMPLES of r, whose deviation is 0.87; steps are correlated
SAMPLES, RADIUS_TOLERANCE = 512 * 100, 0.03
TIME_TOLERANCE = 0.2  # relative, of the correlation time, whose error here is 7 %


pytestmark = pytest.mark.usefixtures("any_rank")


@functools.cache
def network(name, seed=0):
    """A system, parameters of a tiny network, moved off their start, and walkers."""
    import wavefunction_model as model
    from wavefunction_systems import SYSTEMS, atom

    system = SYSTEMS.get(name) or atom(name, (3,), np.nan)
    shape = model.Shape(layers=2, width=3, pair_width=2, determinants=2)
    params = model.init_params(system, shape, jnp.float64, jax.random.key(seed))
    noise = oracles.random_like(params, seed)
    params = jax.tree.map(lambda x, y: x + 0.1 * y, params, noise)
    rng = np.random.default_rng(seed)
    return system, params, jnp.asarray(rng.normal(size=(WALKERS, system.electrons, 3)))


def scores(system, params, walkers):
    """O of each walker, `[walkers, P]`, from a Jacobian of log psi alone."""
    from wavefunction_model import log_psi

    of_all = jax.vmap(functools.partial(log_psi, system), (None, 0))
    return oracles.jacobian(lambda p: of_all(p, walkers)[:, None], params)[:, 0]


# ---------------------------------------------------------------------------- physics


def test_the_local_energy_of_hydrogens_ground_state_is_the_same_everywhere():
    from wavefunction_sampling import local_energy
    from wavefunction_systems import SYSTEMS

    places = jnp.asarray(np.random.default_rng(0).normal(size=(50, 1, 3)))
    measure = functools.partial(
        local_energy, SYSTEMS["H"], lambda x: -jnp.linalg.norm(x)
    )
    np.testing.assert_allclose(jax.vmap(measure)(places), -0.5, atol=1e-12)


def test_the_local_energy_is_that_of_the_hessian_of_psi():
    from wavefunction_methods import energies
    from wavefunction_model import psi

    system, params, walkers = network("Li")

    def naive(electrons):
        flat = lambda x: psi(system, params, x.reshape(3, 3))  # noqa: E731
        laplacian = jnp.trace(jax.hessian(flat)(electrons.reshape(-1)))
        r = jnp.linalg.norm
        attraction = sum(3 / r(x) for x in electrons)
        (a, b, c) = electrons
        repulsion = 1 / r(a - b) + 1 / r(a - c) + 1 / r(b - c)
        return -0.5 * laplacian / flat(electrons.reshape(-1)) - attraction + repulsion

    found = jax.jit(functools.partial(energies, system))(params, walkers)
    expected = jax.jit(jax.vmap(naive))(walkers)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_potential_of_a_molecule():
    from wavefunction_systems import SYSTEMS, potential

    electrons = jnp.asarray([[0.0, 0.0, 0.0], [0.0, 0.0, 1.7]])
    attraction = 2 / 0.7 + 1 / 1.0 + 1 / 2.4
    expected = 1 / 1.7 + 1 / 1.4 - attraction
    assert potential(SYSTEMS["H2"], electrons) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "equal", "others"),
    [("Li", [(0, 1)], [(0, 2), (1, 2)]), ("three equal", [(0, 1), (1, 2), (0, 2)], [])],
)
def test_psi_changes_its_sign_when_equal_electrons_change_places(name, equal, others):
    from wavefunction_model import psi

    system, params, walkers = network(name)
    value = jax.jit(jax.vmap(lambda x: psi(system, params, x)))
    before = value(walkers)
    for pair in equal + others:
        swapped = value(walkers.at[:, pair, :].set(walkers[:, pair[::-1], :]))
        same = np.isclose(swapped, -before, rtol=1e-9)
        assert same.all() if pair in equal else not same.any()


def test_the_jastrow_factor_has_katos_slopes():
    from wavefunction_model import _cusp

    system, params, _ = network("Li")

    def slope(i, j):
        others = 1.0 - jnp.eye(3)
        at = lambda r: others.at[i, j].set(r).at[j, i].set(r)  # noqa: E731
        return jax.grad(lambda r: _cusp(system, params["cusp"], at(r)))(0.0)

    assert slope(0, 1) == pytest.approx(1 / 4)
    assert slope(0, 2) == pytest.approx(1 / 2)


# ------------------------------------------------------------------------- statistics


def test_the_sampler_finds_the_mean_radius_of_hydrogen():
    import wavefunction_sampling as sampling
    from wavefunction_systems import SYSTEMS

    log_psi = lambda x: -jnp.linalg.norm(x)  # noqa: E731

    @jax.jit
    def run(walkers):
        def one(walkers, _):
            walkers, acceptance = sampling.metropolis(log_psi, walkers, 5)
            return walkers, (jnp.linalg.norm(walkers.electrons, axis=-1), acceptance)

        return jax.lax.scan(one, walkers, length=150)

    first = sampling.start(SYSTEMS["H"], 512, jnp.float64, jax.random.key(0))
    _, (radii, acceptance) = run(first)
    radii = radii[50:]
    assert radii.size == SAMPLES
    assert radii.mean() == pytest.approx(1.5, abs=RADIUS_TOLERANCE)
    assert acceptance[50:].mean() == pytest.approx(0.5, abs=0.02)


def test_without_adaptation_the_width_stays():
    import wavefunction_sampling as sampling
    from wavefunction_systems import SYSTEMS

    first = sampling.start(SYSTEMS["H"], 8, jnp.float64, jax.random.key(0))
    after, _ = sampling.metropolis(lambda x: -(x**2).sum(), first, 2, 0.0)
    assert after.width == first.width
    assert not (after.electrons == first.electrons).all()


def test_the_standard_error_counts_correlation():
    from wavefunction_sampling import correlation_time, standard_error

    chains, times, correlation = 400, 1000, 0.8
    noise = np.random.default_rng(0).normal(size=(chains, times))
    series = [noise[:, 0] / (1 - correlation**2) ** 0.5]
    for now in noise.T[1:]:
        series.append(correlation * series[-1] + now)
    series = np.stack(series, 1)
    exact = (1 + correlation) / (1 - correlation)
    assert correlation_time(series) == pytest.approx(exact, rel=TIME_TOLERANCE)
    expected = (exact * series.var() / series.size) ** 0.5
    assert standard_error(series) == pytest.approx(expected, rel=TIME_TOLERANCE)


def test_outliers_are_brought_to_the_edge_of_the_window():
    from wavefunction_sampling import clipped

    energies = jnp.asarray([-3.0, -1.0, 0.0, 1.0, 95.0])
    found = clipped(energies, window=2.0)
    np.testing.assert_allclose(found, [-3.0, -1.0, 0.0, 1.0, 2 * 100 / 5])


# -------------------------------------------------------------------------- curvature


def test_both_routes_have_the_gradient_of_the_score_function():
    from wavefunction_methods import energies, surrogate, total_energy

    system, params, walkers = network("H2")
    near_nucleus = jnp.asarray([0.0, 0.01, -0.7])  # there the local energy is far off
    walkers = walkers.at[0, 0].set(near_nucleus)
    local = np.asarray(jax.jit(functools.partial(energies, system))(params, walkers))
    median = np.median(local)
    half = WINDOW * np.abs(local - median).mean()
    limited = np.clip(local, median - half, median + half)
    assert (limited != local).any()
    expected = (
        2 * ((limited - limited.mean()) @ scores(system, params, walkers)) / WALKERS
    )
    for function in (functools.partial(surrogate, system), total_energy(system)):
        both = jax.jit(jax.value_and_grad(function, has_aux=True))
        (energy, found), grads = both(params, walkers)
        assert energy == pytest.approx(local.mean())
        np.testing.assert_allclose(found, local, rtol=1e-9)
        np.testing.assert_allclose(ravel_pytree(grads)[0], expected, rtol=1e-8)


def test_the_plans_fisher_is_that_of_psi_squared():
    from wavefunction_methods import surrogate

    system, params, walkers = network("H2")
    o = scores(system, params, walkers)
    fisher = 4 * o.T @ o / WALKERS
    curvature = kfac_jax.make_curvature(
        functools.partial(surrogate, system),
        params,
        jax.ShapeDtypeStruct(walkers.shape, walkers.dtype),
        has_aux=True,
        estimation_mode="fisher_exact",
        blocks=kfac_jax.blocks.Full(),
        on_unmatched="error",
    )

    @jax.jit
    def run(params, v):
        _, _, statistics = curvature.value_grad_and_statistics(params, walkers)
        factors = curvature.init_factors(params)
        factors = curvature.update_factors(factors, statistics, 1)
        exact = curvature.matvec(params, v, walkers)
        return curvature.approximation(factors).to_dense(), exact

    v = oracles.random_like(params, 1)
    dense, exact = run(params, v)
    np.testing.assert_allclose(oracles.vector(exact), fisher @ oracles.vector(v))
    # a layer's block is exact, though its weight is used for all electrons
    for layer in curvature.layers:
        found = oracles.block(dense, params, *layer.params)
        expected = oracles.block(fisher, params, *layer.params)
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.slow
def test_both_routes_of_kfac_take_the_same_steps():
    """Without a memory: their averages give the first batches other weights."""
    from wavefunction_methods import OPTIMIZERS, Settings

    system, params, walkers = network("H2")
    ends = []
    for make in (OPTIMIZERS["kfac"], OPTIMIZERS["compat"]):
        route = make(system, Settings(decay=0.0), params, walkers)
        now, state = jax.tree.map(jnp.copy, params), route.init(params, walkers)
        for key in jax.random.split(jax.random.key(0), 3):
            now, state, local = route.step(now, state, walkers, key)
        ends.append((now, local))
        assert "single/0/w" in route.report()
    moved = oracles.vector(ends[0][0]) - oracles.vector(params)
    assert np.abs(moved).max() > 1e-3
    assert_trees_close(*ends, atol=1e-8)


@pytest.mark.parametrize("name", ["H", "He", "Li", "Be", "H2", "LiH"])
def test_every_parameter_of_the_wavefunctions_is_covered(name):
    from wavefunction_methods import surrogate

    system, params, walkers = network(name)
    shape = jax.ShapeDtypeStruct(walkers.shape, walkers.dtype)
    curvature = kfac_jax.make_curvature(
        functools.partial(surrogate, system),
        params,
        shape,
        has_aux=True,
        estimation_mode="fisher_exact",
        on_unmatched="error",
    )
    assert curvature.totals.covered == sum(x.size for x in jax.tree.leaves(params))
    assert all(layer.uses == 1 for layer in curvature.layers)


# -------------------------------------------------------------------------- the script


def run(folder, *options):
    process = start("wavefunction.py", "--output", str(folder), *options)
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, output
    return json.loads((folder / "energies.json").read_text())["results"]


@pytest.mark.slow
def test_a_quick_run_writes_numbers_and_a_plot(tmp_path):
    (result,) = run(tmp_path, "--quick", "--system", "He").values()
    assert result["met"] is False and result["target"] == 5e-3
    assert len(result["energies"]) == 6
    assert (tmp_path / "energies.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_hydrogen_reaches_its_target(tmp_path):
    options = ["--walkers", "128", "--steps", "150", "--evaluations", "50"]
    result = run(tmp_path, "--system", "H", *options)["H"]
    assert result["met"] and result["energy"] == pytest.approx(-0.5, abs=1e-3)


@pytest.mark.slow
def test_a_comparison_tunes_and_measures_every_optimizer(tmp_path):
    options = ["--seconds", "1", "--trials", "2", "--seeds", "1", "--walkers", "64"]
    command = ["wavefunction_compare.py", "--system", "He", "--output", str(tmp_path)]
    process = start(*command, *options)
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, output
    record = json.loads((tmp_path / "compared.json").read_text())["He"]
    for name in ("kfac", "spring", "minsr"):
        (result,) = record[name]["runs"]
        assert len(record[name]["trials"]) == 2 and record[name]["price"] > 0
        assert result["standard_error"] > 0
        scores = [trial["energy"] for trial in record[name]["trials"]]
        best = record[name]["trials"][int(np.argmin(scores))]
        assert best | record[name]["best"] == best
    assert (tmp_path / "compared.png").read_bytes().startswith(b"\x89PNG")
