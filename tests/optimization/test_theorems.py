"""The paper's theorems about the undamped update, with exact factors in float64.

Networks are in the library's layout, rows of cases: with `ā = [a, 1]` a layer is
`s = ā M`, and M, `[in + 1, out]`, is the transpose of the paper's W.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import losses
from tests.helpers.models import PAPER_MODEL, array, dense_params, exact_factors, mlp
from tests.helpers.oracles import matrix_power, vector

SIZES = (3, 4, 3, 2)
CASES = 24  # more than any factor's dimension, so that none is singular
MC_TOLERANCE = 5.0  # standard deviations of a Monte-Carlo mean

STRUCTURES = [kfac_jax.BlockDiagonal(), kfac_jax.BlockTridiagonal()]
structures = pytest.mark.parametrize("structure", STRUCTURES, ids=repr)

LOSSES = {
    "squared": lambda z, y: losses.squared_error(z, y).sum(-1).mean(),
    "sigmoid": lambda z, y: losses.sigmoid_binary_cross_entropy(z, y).sum(-1).mean(),
}
families = pytest.mark.parametrize("family", LOSSES)


def batch():
    """Inputs that are far from centred and white, and targets in (0, 1)."""
    mixing = np.array([[2.0, 0.3, -0.2], [0.0, 0.5, 0.4], [0.1, 0.0, 1.5]])
    x = array(1, CASES, SIZES[0]) @ jnp.asarray(mixing) + jnp.asarray([[1.0, -2, 0.5]])
    return x, jax.nn.sigmoid(array(2, CASES, SIZES[-1]))


def loss_of(network, family):
    return lambda params, x, y: LOSSES[family](network(params, x), y)


def update_of(structure, network, family, params, x, y):
    """From λ to `Δ = -(F̃ + λ I)⁻¹ ∇h` of the network as it stands."""
    loss_fn = loss_of(network, family)
    curvature, factors = exact_factors(loss_fn, params, x, y, structure=structure)

    @jax.jit
    def update(damping):
        grads = jax.grad(loss_fn)(params, x, y)
        solved = curvature.approximation(factors).solve(grads, damping)
        return jax.tree.map(jnp.negative, solved)

    return update


def distance(tree, other):
    """The relative difference."""
    a, b = vector(tree), vector(other)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def assert_same(tree, other, tolerance=1e-8):
    assert distance(tree, other) < tolerance


def assert_different(tree, other, least=0.01):
    assert distance(tree, other) > least


# ----------------------------------------------------------- Theorem 1: reparameterised


def homogeneous(a):
    """ā."""
    return jnp.concatenate([a, jnp.ones((len(a), 1), a.dtype)], 1)


def homogeneous_params(seed):
    return {
        f"layer{i}": array(seed + i, n + 1, m, scale=1 / np.sqrt(n))
        for i, (n, m) in enumerate(itertools.pairwise(SIZES))
    }


def plain_network(params, x):
    return transformed_network(params, x, None, None)


def transformed_network(params, x, phis, omegas):
    """`s⁺ = ā⁺ M⁺` and `ā⁺ = [φ(s⁺ Φ), 1] Ω`, `ā_0⁺ = [x, 1] Ω_0`, to `s_l⁺ Φ_l`."""
    a = homogeneous(x)
    for i in range(len(params)):
        a = a if omegas is None else a @ omegas[i]
        s = a @ params[f"layer{i}"]
        s = s if phis is None else s @ phis[i]
        a = homogeneous(jnp.tanh(s))
    return s


def invertible(seed, size):
    """A random matrix with singular values from 1/2 to 2."""
    u, _, v = np.linalg.svd(np.random.default_rng(seed).normal(size=(size, size)))
    return jnp.asarray(u * np.geomspace(0.5, 2, size) @ v)


def random_transforms():
    phis = [invertible(10 + i, n) for i, n in enumerate(SIZES[1:])]
    omegas = [invertible(20 + i, n + 1) for i, n in enumerate(SIZES[:-1])]
    return phis, omegas


def to_plain(params, phis, omegas):
    """`M = Ω M⁺ Φ`, by which both networks compute the same function."""
    return {
        f"layer{i}": omegas[i] @ params[f"layer{i}"] @ phis[i]
        for i in range(len(params))
    }


@pytest.mark.sampled(2)
@structures
@families
def test_the_update_does_not_depend_on_the_parameterisation(structure, family):
    phis, omegas = random_transforms()
    transformed = functools.partial(transformed_network, phis=phis, omegas=omegas)
    there, (x, y) = homogeneous_params(3), batch()
    here = to_plain(there, phis, omegas)
    np.testing.assert_allclose(transformed(there, x), plain_network(here, x))

    ours = update_of(structure, plain_network, family, here, x, y)
    theirs = update_of(structure, transformed, family, there, x, y)

    def both(damping):
        return to_plain(theirs(damping), phis, omegas), ours(damping)

    assert_same(*both(0.0))
    assert_different(*both(0.1))  # damping knows the parameters' scale
    plain = [
        jax.grad(loss_of(network, family))(params, x, y)
        for network, params in ((transformed, there), (plain_network, here))
    ]
    assert_different(to_plain(plain[0], phis, omegas), plain[1])  # so does the gradient


def trainer(rates, structure, network, family, params, steps=3):
    """From λ to the parameters after some steps, each on a batch of its own."""
    loss_fn, (x, y) = loss_of(network, family), batch()
    curvature = kfac_jax.make_curvature(
        loss_fn, params, x, y, estimation_mode="fisher_exact", structure=structure
    )
    init = kfac_jax.kfac(curvature, *rates).init

    @jax.jit
    def step(damping, params, state, *args):
        value, grads, statistics = curvature.value_grad_and_statistics(params, *args)
        updates, state = kfac_jax.kfac(curvature, *rates, damping).update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        return jax.tree.map(jnp.add, params, updates), state

    def train(damping):
        now, state = params, init(params)
        for k in range(steps):
            shifted = x + 0.2 * array(30 + k, *x.shape)
            now, state = step(damping, now, state, shifted, y)
        return now

    return train


@pytest.mark.sampled(2)
@structures
@pytest.mark.parametrize("rates", [(0.1, 0.9), (kfac_jax.QuadraticModel(), None)])
def test_whole_runs_do_not_depend_on_the_parameterisation(structure, rates):
    """With moving averages, momentum, and α and μ chosen by the exact Fisher."""
    phis, omegas = random_transforms()
    transformed = functools.partial(transformed_network, phis=phis, omegas=omegas)
    there = homogeneous_params(3)
    here = to_plain(there, phis, omegas)
    ours = trainer(rates, structure, plain_network, "squared", here)
    theirs = trainer(rates, structure, transformed, "squared", there)

    def both(damping):
        return to_plain(theirs(damping), phis, omegas), ours(damping)

    undamped = both(0.0)
    assert_same(*undamped, tolerance=1e-6)  # round-off grows along the run
    assert_different(undamped[1], here)  # it did move
    assert_different(*both(0.1))


# ------------------------------------------------------------- corollaries of Theorem 1


def to_sigmoid(params):
    """From a tanh net to the sigmoid net of the same function: `tanh(u) = 2σ(2u) - 1`.

    Activities are `a = 2 a' - 1`, hidden pre-activations `s' = 2 s`.
    """
    result = {}
    for i in range(len(params)):
        w, b = params[f"layer{i}"]["w"], params[f"layer{i}"]["b"]
        if i > 0:
            w, b = 2 * w, b - w.sum(0)
        if i < len(params) - 1:
            w, b = 2 * w, 2 * b
        result[f"layer{i}"] = {"w": w, "b": b}
    return result


@pytest.mark.sampled(2)
@structures
@families
def test_sigmoid_or_tanh_makes_no_difference(structure, family):
    params, (x, y) = dense_params(5, *SIZES), batch()
    sigmoid_network = functools.partial(mlp, activation=jax.nn.sigmoid)
    np.testing.assert_allclose(sigmoid_network(to_sigmoid(params), x), mlp(params, x))

    tanh = update_of(structure, mlp, family, params, x, y)
    sigmoid = update_of(structure, sigmoid_network, family, to_sigmoid(params), x, y)

    def both(damping):
        return to_sigmoid(tanh(damping)), sigmoid(damping)

    assert_same(*both(0.0))
    assert_different(*both(0.1))


@pytest.mark.sampled(2)
@structures
@families
def test_whitening_the_inputs_makes_no_difference(structure, family):
    params, (x, y) = dense_params(5, *SIZES), batch()
    mean = x.mean(0)
    covariance = np.cov(np.asarray(x), rowvar=False, bias=True)
    whitening = matrix_power(covariance, -0.5)
    white = (x - mean[None]) @ jnp.asarray(whitening)
    np.testing.assert_allclose(white.T @ white / CASES, np.eye(3), atol=1e-12)

    def to_white(params):
        w, b = params["layer0"]["w"], params["layer0"]["b"]
        first = {"w": jnp.linalg.inv(whitening) @ w, "b": b + mean @ w}
        return params | {"layer0": first}

    np.testing.assert_allclose(mlp(to_white(params), white), mlp(params, x))

    raw = update_of(structure, mlp, family, params, x, y)
    on_white = update_of(structure, mlp, family, to_white(params), white, y)

    def both(damping):
        return to_white(raw(damping)), on_white(damping)

    assert_same(*both(0.0))
    assert_different(*both(0.1))


# ------------------------------------- gradient descent on the centred and whitened net


def second_moments(params, x, family):
    """Each layer's ā and E[g gᵀ] under the model, from whole Jacobians."""
    activities, a = [], homogeneous(x)
    for i in range(len(params)):
        activities.append(a)
        s = a @ params[f"layer{i}"]
        a = homogeneous(jnp.tanh(s))
    fisher = {  # of -log r(y|z) over z: what the losses document
        "squared": np.full(s.shape, 2.0),
        "sigmoid": np.asarray(jax.nn.sigmoid(s) * jax.nn.sigmoid(-s)),
    }[family]

    def output(shifts, x):
        """The output of one case, with shifts added to the pre-activations."""
        a = jnp.append(x, 1.0)
        for i in range(len(params)):
            s = a @ params[f"layer{i}"] + shifts[i]
            a = jnp.append(jnp.tanh(s), 1.0)
        return s

    zeros = [jnp.zeros(n) for n in SIZES[1:]]
    jacobians = jax.jit(jax.vmap(jax.jacobian(output), (None, 0)))(zeros, x)
    moments = [np.einsum("noi,no,noj->ij", j, fisher, j) / CASES for j in jacobians]
    return activities, moments


def centred_and_white(a):
    """Ω for which `ā Ω` is `[centred and white, 1]`."""
    a = np.asarray(a[:, :-1])
    whitening = matrix_power(np.cov(a, rowvar=False, bias=True), -0.5)
    omega = np.zeros((a.shape[1] + 1,) * 2)
    omega[:-1, :-1] = whitening
    omega[-1, :-1] = -a.mean(0) @ whitening
    omega[-1, -1] = 1
    return jnp.asarray(omega)


@families
def test_the_update_is_gradient_descent_on_the_centred_and_whitened_network(family):
    """Section 10: of the block-diagonal structure only. Unit gradients are centred."""
    params, (x, y) = homogeneous_params(3), batch()
    activities, moments = second_moments(params, x, family)
    omegas = [centred_and_white(a) for a in activities]
    # g⁺ = g Φᵀ, of second moment Φ G Φᵀ
    phis = [jnp.asarray(matrix_power(g, -0.5)) for g in moments]
    for a, g, omega, phi in zip(activities, moments, omegas, phis, strict=True):
        white = a @ omega
        np.testing.assert_allclose(
            white.T @ white / CASES, np.eye(len(omega)), atol=1e-10
        )
        np.testing.assert_allclose(phi @ g @ phi.T, np.eye(len(phi)), atol=1e-10)

    def descent(phis, omegas):
        network = functools.partial(transformed_network, phis=phis, omegas=omegas)
        invert = jnp.linalg.inv
        white = to_plain(params, [*map(invert, phis)], [*map(invert, omegas)])
        np.testing.assert_allclose(network(white, x), plain_network(params, x))
        grads = jax.grad(loss_of(network, family))(white, x, y)
        return to_plain(jax.tree.map(jnp.negative, grads), phis, omegas)

    structure = kfac_jax.BlockDiagonal()
    update = update_of(structure, plain_network, family, params, x, y)
    assert_same(update(0.0), descent(phis, omegas))
    assert_different(update(0.1), descent(phis, omegas))
    scaled_only = [jnp.diag(jnp.diag(omega)) for omega in omegas]
    assert_different(update(0.0), descent(phis, scaled_only))


# ------------------------------------------------------------------------- Lemma: E[Dv]


def shifted_loss(params, shifts, x, y, family):
    """The mean loss, with shifts added to each case's pre-activations."""
    a = homogeneous(x)
    for i in range(len(params)):
        s = a @ params[f"layer{i}"] + shifts[i]
        a = homogeneous(jnp.tanh(s))
    return LOSSES[family](s, y)


def unit_gradients(params, x, y, family):
    """`g_i = Ds_i` of each case, `[n, d_i]`."""
    shifts = [jnp.zeros((CASES, n)) for n in SIZES[1:]]
    grads = jax.grad(shifted_loss, 1)(params, shifts, x, y, family)
    return [CASES * np.asarray(g) for g in grads]


def test_unit_gradients_have_mean_zero_over_all_the_targets_of_the_model():
    """`E[g_i | x] = Σ_y r(y|z) g_i = 0`, case by case; over other targets it is not."""
    params, (x, _) = homogeneous_params(3), batch()
    p = np.asarray(jax.nn.sigmoid(plain_network(params, x)))
    model = [np.zeros((CASES, n)) for n in SIZES[1:]]
    uniform = [np.zeros((CASES, n)) for n in SIZES[1:]]
    largest = 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=SIZES[-1]):
        y = np.broadcast_to(outcome, p.shape)
        likelihood = np.where(y == 1, p, 1 - p).prod(1, keepdims=True)
        for i, g in enumerate(unit_gradients(params, x, jnp.asarray(y), "sigmoid")):
            model[i] += likelihood * g
            uniform[i] += g / 2 ** SIZES[-1]
            largest = max(largest, np.abs(g).max())
    for mean, other in zip(model, uniform, strict=True):
        assert np.abs(mean).max() < 1e-14 * largest
        assert np.abs(other).max() > 1e-2


@pytest.mark.parametrize(
    "distribution",
    [
        kfac_jax.distributions.Bernoulli(),
        kfac_jax.distributions.Categorical(),
        kfac_jax.distributions.Normal(),
        kfac_jax.distributions.NormalWithVariance(),
    ],
    ids=lambda d: type(d).__name__,
)
def test_sampled_gradients_have_mean_zero_where_targets_have_not(distribution):
    """`E[Dz] = 0` for what the library draws, and so for all that it pulls back."""
    samples, z = 4000, array(7, 5, 2)
    keys = jax.random.split(jax.random.key(0), samples)
    draw = jax.jit(jax.vmap(lambda key: distribution.sample_gradient(z, (), key)))
    draws = np.asarray(draw(keys))
    error = draws.std(0) / np.sqrt(samples)
    assert (np.abs(draws.mean(0)) < MC_TOLERANCE * error).all()
    targets = {1: jnp.zeros((5,), int), 0: jnp.zeros((5, 2))}[distribution.event_rank]
    if isinstance(distribution, kfac_jax.distributions.NormalWithVariance):
        targets = jnp.zeros((5,))
    fixed = distribution.target_gradient(z, (targets,))
    assert (np.abs(fixed) > MC_TOLERANCE * error).mean() > 0.5


# ---------------------------------------- section 7: preconditioned conjugate gradients


def conjugate_gradients(theta, rhs, hessian, preconditioner, steps):
    """The textbook's iterates for `hessian θ = rhs`, `preconditioner` close to H⁻¹."""
    r = rhs - hessian @ theta
    z = preconditioner @ r
    p, iterates = z, []
    for _ in range(steps):
        alpha = (r @ z) / (p @ hessian @ p)
        theta = theta + alpha * p
        new_r = r - alpha * (hessian @ p)
        new_z = preconditioner @ new_r
        p = new_z + (new_r @ new_z) / (r @ z) * p
        r, z = new_r, new_z
        iterates.append(theta)
    return np.stack(iterates)


def sum_of_linear(params, x):
    """Two inputs through a layer each: quadratic in θ, and no diagonal of blocks."""
    first, second = params["first"], params["second"]
    half = x[:, 3:] @ second["w"] + second["b"][None]
    return x[:, :3] @ first["w"] + half


@pytest.mark.sampled(2)
@structures
def test_momentum_on_a_quadratic_is_preconditioned_conjugate_gradients(structure):
    """The factors stay: the same batch each time, and a model linear in θ."""
    rng = np.random.default_rng(4)
    mixing = jnp.asarray(np.eye(5) + 0.6 * rng.normal(size=(5, 5)))
    x, y = array(5, CASES, 5) @ mixing, array(6, CASES, 2)
    params = {
        "first": {"w": array(7, 3, 2)},
        "second": {"w": array(8, 2, 2), "b": array(9, 2)},
    }
    loss_fn = loss_of(sum_of_linear, "squared")
    curvature, factors = exact_factors(loss_fn, params, x, y, structure=structure)
    theta, unravel = jax.flatten_util.ravel_pytree(params)
    gradient = jax.grad(lambda t: loss_fn(unravel(t), x, y))
    hessian = np.asarray(jax.jit(jax.jacobian(gradient))(theta))
    rhs = hessian @ np.asarray(theta) - np.asarray(gradient(theta))
    preconditioner = np.linalg.inv(curvature.approximation(factors).to_dense())
    steps = 5
    expected = conjugate_gradients(
        np.asarray(theta), rhs, hessian, preconditioner, steps
    )
    minimum = np.linalg.solve(hessian, rhs)

    def iterates(momentum):
        tx = kfac_jax.kfac(curvature, PAPER_MODEL, momentum, 0.0)

        @jax.jit
        def step(params, state):
            value, grads, statistics = curvature.value_grad_and_statistics(params, x, y)
            updates, state = tx.update(
                grads, state, params, statistics=statistics, value=value, args=(x, y)
            )
            return jax.tree.map(jnp.add, params, updates), state

        now, state, result = params, tx.init(params), []
        for _ in range(steps):
            now, state = step(now, state)
            result.append(vector(now))
        return np.stack(result)

    np.testing.assert_allclose(iterates(None), expected, rtol=1e-6, atol=1e-9)
    # one step does not end it, and without momentum it is steepest descent
    away = np.linalg.norm(expected - minimum, axis=1)
    assert away[1] > 1e-2 * np.linalg.norm(minimum)
    assert_different(iterates(0.0)[2], expected[2], least=1e-3)
