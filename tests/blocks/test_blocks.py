"""The operator of each block kind against dense numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax.blocks import TNT, Diagonal, Eigen, Full, Identity, Kronecker
from tests.helpers import models, oracles

DAMPING = 0.3
SAMPLES = 20_000
MC_TOLERANCE = 0.05  # of the largest variance, about 5 / √samples with a margin

PARAMS = {
    "layer0": {"b": models.array(0, 3), "w": models.array(1, 2, 3)},
    "layer1": {"b": models.array(2, 1), "w": models.array(3, 3, 1)},
    "norm": {"scale": models.array(4, 2)},
    "stack": models.array(5, 2, 2, 2),  # used transposed, scanned over
}


def _loss_fn(params, x, y):
    x = x * jnp.broadcast_to(params["norm"]["scale"], x.shape)
    x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w.T), None), x, params["stack"])
    dense = {k: v for k, v in params.items() if k.startswith("layer")}
    return kfac_jax.losses.squared_error(models.mlp(dense, x), y).sum(-1).mean()


X, Y = models.array(6, 5, 2), models.array(7, 5, 1)
KINDS = {
    "Kronecker": Kronecker(),
    "Kronecker, frobenius": Kronecker(pi="frobenius"),
    "Kronecker, spectral, long sides": Kronecker(pi="spectral", max_factor_dim=2),
    "Kronecker, fitted": Kronecker(fit="kl"),
    "Kronecker, fitted, long sides": Kronecker(fit="frobenius", max_factor_dim=2),
    "Diagonal": Diagonal(),
    "Full": Full(),
    "Identity": Identity(),
    "Eigen": Eigen(),
    "Eigen, long sides": Eigen(max_factor_dim=2),
    "TNT": TNT(),
    "TNT, long sides": TNT(max_factor_dim=2),
    "default": None,
}


def _random_factors(curvature, seed=0, rank=None, scale=1.0):
    """Random factors of the right shapes, whatever the loss."""
    rng = np.random.default_rng(seed)

    def one(name, like):
        if name.endswith(("diagonal", "diagonal_weight", "moments", "scale")):
            return jnp.asarray(scale * rng.random(like.shape), like.dtype)
        *lead, d, _ = like.shape
        if name.endswith("basis"):
            q, _ = np.linalg.qr(rng.standard_normal(like.shape))
            return jnp.asarray(q, like.dtype)
        each = [
            oracles.random_psd(rng, d, rank) for _ in range(np.prod(lead, dtype=int))
        ]
        return jnp.asarray(scale * np.stack(each).reshape(like.shape), like.dtype)

    return {
        layer: {name: one(name, like) for name, like in factors.items()}
        for layer, factors in curvature.init_factors(PARAMS).items()
    }


@functools.cache
def _plan(kind):
    return kfac_jax.make_curvature(_loss_fn, PARAMS, X, Y, blocks=KINDS[kind])


@functools.cache
def _case(kind):
    curvature = _plan(kind)
    factors = _random_factors(curvature)
    return curvature, factors, curvature.approximation(factors)


V = oracles.random_like(PARAMS, 8)
AT = oracles.indices(PARAMS)


def _matrix_places(layer):
    """For each independent matrix of a layer, its entries' places once raveled."""
    if layer.name == "stack":
        return list(AT["stack"].transpose(0, 2, 1))  # used as w.T
    if layer.name.startswith("layer"):
        return [np.vstack([AT[f"{layer.name}/w"], AT[f"{layer.name}/b"][None]])]
    return [place.reshape(1, 1) for place in AT["norm/scale"]]


def _dense(kind, damping=0.0, mode="exact"):
    """The damped curvature, from the factors, by the paper's formulas."""
    curvature, factors, _ = _case(kind)
    size = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    result = np.zeros((size, size))
    for layer in curvature.layers:
        own = {k: np.asarray(v) for k, v in factors[layer.name].items()}
        places = _matrix_places(layer)
        lead = len(places)
        for i, place in enumerate(places):
            rows = place.reshape(-1)
            if "moments" in own:
                bases = [
                    own[f"{side}_basis"].reshape(lead, d, d)[i]
                    if f"{side}_basis" in own
                    else np.eye(d)
                    for side, d in zip(("input", "output"), place.shape, strict=True)
                ]
                u = np.kron(*bases)
                s = own["moments"].reshape(lead, -1)[i]
                block = (u * (s + damping)) @ u.T
            elif own.keys() & {"input", "input_diagonal"}:
                a, g = (
                    own[side].reshape(lead, d, d)[i]
                    if side in own
                    else np.diag(own[f"{side}_diagonal"].reshape(lead, d)[i])
                    for side, d in zip(("input", "output"), place.shape, strict=True)
                )
                if "scale" in own:
                    a = a / own["scale"].reshape(lead)[i]
                if isinstance(layer.block, TNT):
                    g = g / np.trace(g)
                if mode == "factored":
                    norm = layer.block.pi
                    block = oracles.factored_damping(a, g, damping, norm)
                else:
                    block = np.kron(a, g) + damping * np.eye(len(rows))
            elif "diagonal" in own:
                d = own["diagonal"].reshape(lead, -1)[i]
                block = np.diag(d + damping)
            elif "full" not in own:
                block = (1 + damping) * np.eye(len(rows))
            else:
                break
            result[np.ix_(rows, rows)] = block
        if "full" in own:
            full = own["full"]
            slices = len(full) if full.ndim == 3 else 1
            rows = np.stack(places).reshape(slices, -1)
            for r, f in zip(rows, full.reshape(slices, *full.shape[-2:]), strict=True):
                result[np.ix_(r, r)] = f + damping * np.eye(len(r))
    return result


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_to_dense_matvec_diagonal_and_trace(kind):
    _, _, op = _case(kind)
    dense = _dense(kind)
    np.testing.assert_allclose(op.to_dense(), dense, atol=1e-13)
    product = oracles.vector(op.matvec(V))
    np.testing.assert_allclose(product, dense @ oracles.vector(V), rtol=1e-11)
    diagonal = op.diagonal()
    assert jax.tree.structure(diagonal) == jax.tree.structure(PARAMS)
    np.testing.assert_allclose(oracles.vector(diagonal), np.diag(dense), rtol=1e-12)
    np.testing.assert_allclose(op.trace(), np.trace(dense), rtol=1e-12)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("mode", ["factored", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_solve_and_powers(kind, mode):
    _, _, op = _case(kind)
    dense = _dense(kind, DAMPING, mode)
    v = oracles.vector(V)
    exponents = (-1.0, -0.5, 0.5, 1.0)

    @jax.jit
    def compute(op):
        solved = op.solve(V, DAMPING, mode)
        return solved, [op.power(V, p, DAMPING, mode) for p in exponents]

    solved, powers = compute(op)
    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    expected = np.linalg.solve(dense, v)
    np.testing.assert_allclose(oracles.vector(solved), expected, **tolerance)
    for exponent, found in zip(exponents, powers, strict=True):
        expected = oracles.matrix_power(dense, exponent) @ v
        np.testing.assert_allclose(oracles.vector(found), expected, **tolerance)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("mode", ["factored", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_logdet(kind, mode):
    _, _, op = _case(kind)
    expected = np.linalg.slogdet(_dense(kind, DAMPING, mode))[1]
    np.testing.assert_allclose(op.logdet(DAMPING, mode), expected, rtol=1e-11)


@pytest.mark.parametrize("kind", ["Kronecker", "Full", "Eigen", "TNT"])
def test_samples_have_the_inverse_as_covariance(kind):
    _, _, op = _case(kind)
    keys = jax.random.split(jax.random.key(0), SAMPLES)

    def draw(key):
        drawn = op.sample(key, DAMPING, "exact")
        return jax.flatten_util.ravel_pytree(drawn)[0]

    x = np.asarray(jax.jit(jax.vmap(draw))(keys))
    expected = np.linalg.inv(_dense(kind, DAMPING))
    atol = MC_TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(x.T @ x / SAMPLES, expected, atol=atol)
    np.testing.assert_allclose(x.mean(0), 0.0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_solve_inverts_matvec_and_goes_through_jit(kind):
    _, _, op = _case(kind)
    # the third axis of this tiny stack makes some random factors nearly singular
    back = jax.jit(lambda op, v: op.solve(op.matvec(v), 0.0))(op, V)
    np.testing.assert_allclose(oracles.vector(back), oracles.vector(V), rtol=1e-6)
    leaves = jax.tree.leaves(op)
    assert len(leaves) == len(jax.tree.leaves(op.factors))


# ------------------------------------------------------------------- degenerate factors


@jax.jit
def _damped(op):
    """Everything that damping makes well-defined, in both modes."""
    return [
        (
            op.solve(V, 1e-3, mode),
            op.power(V, -0.5, 1e-3, mode),
            op.logdet(1e-3, mode),
            op.sample(jax.random.key(0), 1e-3, mode),
        )
        for mode in ("factored", "exact")
    ]


DEGENERATE = {
    "zero": {"scale": 0.0},
    "rank one": {"rank": 1},
    "tiny": {"scale": 1e-200},
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("kind", ["Kronecker", "Diagonal", "Full", "Eigen", "TNT"])
def test_degenerate_factors_stay_finite_with_damping(kind, name):
    curvature = _plan(kind)
    op = curvature.approximation(_random_factors(curvature, 3, **DEGENERATE[name]))
    results = _damped(op)
    assert np.isfinite(oracles.vector(results)).all()
    if name == "zero":  # what is left is λ I, also in factored form
        for solved, *_ in results:
            np.testing.assert_allclose(
                oracles.vector(solved), oracles.vector(V) * 1e3, rtol=1e-9
            )


def test_one_by_one_layers():
    def loss_fn(w, x, y):
        return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()

    w, x, y = jnp.ones((1, 1)), models.array(0, 4, 1), models.array(1, 4, 1)
    _, factors = models.exact_factors(loss_fn, w, x, y)
    curvature = kfac_jax.make_curvature(loss_fn, w, x, y)
    op = curvature.approximation(factors)
    f = 2 * float((x**2).mean())
    np.testing.assert_allclose(op.to_dense(), [[f]], rtol=1e-13)
    np.testing.assert_allclose(op.solve(w, 0.1, "exact"), [[1 / (f + 0.1)]], rtol=1e-12)
    np.testing.assert_allclose(
        op.solve(w, 0.1), [[1 / (np.sqrt(f) + np.sqrt(0.1)) ** 2]], rtol=1e-12
    )


def test_a_hopeless_condition_number_stays_finite():
    curvature = _plan("Kronecker")
    factors = jax.tree.map(
        lambda x: x + 1e14 * jnp.ones_like(x), _random_factors(curvature, rank=1)
    )
    op = curvature.approximation(factors)
    for mode in ("factored", "exact"):
        assert np.isfinite(oracles.vector(op.solve(V, 1.0, mode))).all()


# --------------------------------------------------------------- layers without a block


def test_a_layer_without_a_block_is_the_identity_without_damping():
    curvature = kfac_jax.make_curvature(
        _loss_fn, PARAMS, X, Y, blocks={"layer1": None, "dense": Kronecker()}
    )
    op = curvature.approximation(_random_factors(curvature))
    for result in (op.solve(V, 0.7), op.matvec(V), op.power(V, -0.5, 0.7)):
        jax.tree.map(np.testing.assert_array_equal, result["layer1"], V["layer1"])
    dense = np.asarray(op.to_dense())
    rows = np.concatenate([AT["layer1/w"].ravel(), AT["layer1/b"].ravel()])
    np.testing.assert_array_equal(dense[np.ix_(rows, rows)], np.eye(len(rows)))


# ------------------------------------------------------------------------- narrow types


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_of_narrow_parameters(kind, dtype):
    """Factors are float32; vectors keep their type; nothing promotes by accident."""
    params = jax.tree.map(lambda a: a.astype(dtype), PARAMS)
    args = X.astype(dtype), Y.astype(dtype)
    curvature = kfac_jax.make_curvature(_loss_fn, params, *args, blocks=KINDS[kind])
    factors = _random_factors(curvature)
    assert all(f.dtype == jnp.float32 for f in jax.tree.leaves(factors))
    op = curvature.approximation(curvature.init_factors(params) | factors)
    v = jax.tree.map(lambda a: a.astype(dtype), V)

    @jax.jit
    def compute(op):
        results = {
            "matvec": op.matvec(v),
            "solve": op.solve(v, 0.1),
            "solve exact": op.solve(v, 0.1, "exact"),
            "power": op.power(v, -0.5, 0.1),
            "diagonal": op.diagonal(),
            "sample": op.sample(jax.random.key(0), 0.1),
        }
        return results, (op.trace(), op.logdet(0.1)), op.to_dense()

    results, scalars, dense = compute(op)
    for name, result in results.items():
        for leaf in jax.tree.leaves(result):
            assert leaf.dtype == dtype, name
            assert jnp.isfinite(leaf).all(), name
    assert all(jnp.isfinite(x) for x in scalars)
    assert dense.shape == (len(oracles.vector(v)),) * 2


# ------------------------------------------------------------------------------- errors


def test_bad_arguments_are_refused():
    curvature, factors, op = _case("Kronecker")
    with pytest.raises(ValueError, match=r"damping \(λ\) must be at least 0; got -1"):
        op.solve(V, -1.0)
    with pytest.raises(
        ValueError, match='must be "factored" or "exact"; got \'wrong\''
    ):
        op.logdet(1.0, "wrong")
    with pytest.raises(ValueError, match=r"the vector .* at 'norm/scale'"):
        op.matvec(V | {"norm": {"scale": jnp.ones(3)}})
    with pytest.raises(ValueError, match="factors must have an entry for each layer"):
        curvature.approximation({"wrong": factors["norm/scale"]})


def test_blocks_are_frozen_hashable_and_equal():
    for block in (Kronecker, Diagonal, Full, Identity, Eigen, TNT):
        assert block() == block() and hash(block()) == hash(block())
        with pytest.raises(dataclasses.FrozenInstanceError):
            block().anything = 1
