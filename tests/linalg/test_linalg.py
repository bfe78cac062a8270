"""Inverses and eigendecompositions against numpy."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import linalg
from kfac_jax.linalg import _psd
from tests.helpers import models, oracles


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (2, 3, 3), (2, 2, 1, 1)])
def test_inverse_equals_numpy(shape):
    rng = np.random.default_rng(0)
    *lead, d, _ = shape
    x = np.stack(
        [
            oracles.random_psd(rng, d) + np.eye(d)
            for _ in range(np.prod(lead, dtype=int))
        ]
    ).reshape(shape)
    np.testing.assert_allclose(linalg.inverse(jnp.asarray(x)), np.linalg.inv(x), 1e-12)


@pytest.mark.parametrize("x", [[[-1.0]], [[0.0]], [[1.0, 2.0], [2.0, 1.0]]])
def test_inverse_of_what_is_not_positive_definite_is_nan(x):
    assert np.isnan(linalg.inverse(jnp.asarray(x))).all()


def test_inverse_many_keeps_order_shape_and_type():
    rng = np.random.default_rng(1)
    shapes = [(3, 3), (2, 2), (4, 3, 3), (1, 1), (2, 2), (2, 1, 2, 2)]
    matrices = []
    for *lead, d, _ in shapes:
        count = np.prod(lead, dtype=int)
        each = [oracles.random_psd(rng, d) + np.eye(d) for _ in range(count)]
        matrices.append(jnp.asarray(np.stack(each).reshape(*lead, d, d)))
    matrices[1] = matrices[1].astype(jnp.float32)
    shifts = [jnp.asarray(rng.random(x.shape[:-2]), x.dtype) for x in matrices]
    shifted = list(zip(matrices, shifts, strict=True))
    inverted = linalg.inverse_many(shifted)
    for (x, s), (inverse, finite) in zip(shifted, inverted, strict=True):
        assert finite
        assert inverse.dtype == x.dtype and inverse.shape == x.shape
        tolerance = 1e-5 if x.dtype == jnp.float32 else 1e-12
        eye = np.eye(x.shape[-1])
        expected = np.linalg.inv(np.asarray(x) + np.asarray(s)[..., None, None] * eye)
        np.testing.assert_allclose(inverse, expected, rtol=tolerance)
    assert linalg.inverse_many([]) == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("d", [127, 128, 257, 640, 1000])
def test_inverse_of_large_matrices(d):
    rng = np.random.default_rng(5)
    q, _ = np.linalg.qr(rng.normal(size=(d, d)))
    w = np.geomspace(1e-6, 1.0, d)
    found = linalg.inverse(jnp.asarray((q * w) @ q.T))
    np.testing.assert_allclose(found, (q / w) @ q.T, rtol=0, atol=1e-9 * 1e6)
    np.testing.assert_allclose(found, found.T, rtol=0, atol=1e-9 * 1e6)


def test_ill_conditioned_single_precision_loses_no_more_digits_than_it_must():
    d, condition = 600, 1e5
    rng = np.random.default_rng(6)
    q, _ = np.linalg.qr(rng.normal(size=(d, d)))
    w = np.geomspace(1.0 / condition, 1.0, d)
    x = ((q * w) @ q.T).astype(np.float32)
    expected = np.linalg.inv(x.astype(np.float64))
    found = np.asarray(linalg.inverse(jnp.asarray(x)))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < condition * np.finfo(np.float32).eps


def test_one_bad_matrix_does_not_spoil_its_batch():
    good, bad = jnp.eye(3), -jnp.eye(3)
    zero = jnp.zeros(())
    first, second, third = linalg.inverse_many(
        [(good, zero), (bad, zero), (good, zero + 1)]
    )
    np.testing.assert_allclose(first.inverse, np.eye(3))
    assert np.isnan(second.inverse).any()
    np.testing.assert_allclose(third.inverse, np.eye(3) / 2)
    assert [bool(x.finite) for x in (first, second, third)] == [True, False, True]


def test_eigh_reconstructs_and_clamps():
    x = oracles.random_psd(np.random.default_rng(2), 5, rank=2)
    w, u = linalg.eigh(jnp.asarray(x))
    assert (w >= 0).all()
    np.testing.assert_allclose((u * w[None]) @ u.T, x, atol=1e-12)
    w, _ = linalg.eigh(jnp.diag(jnp.array([-1e-9, 2.0])))
    np.testing.assert_array_equal(w, [0.0, 2.0])


def test_only_this_package_calls_lapack_for_decompositions():
    """Others go through its functions, which do not let batches wait for each other."""
    package = pathlib.Path(kfac_jax.__file__).parent
    calls = re.compile(r"(jnp|lax|scipy)\.linalg\.(eigh|eigvalsh|svd|qr)\b")
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if calls.search(path.read_text("utf-8"))
    }
    assert found == {"linalg/_coherence.py", "linalg/_psd.py"}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="looks at LAPACK's calls")
def test_eigh_takes_one_matrix_at_a_time_on_cpus():
    """Batched LAPACK calls at the same time can block for ever."""
    x = jnp.asarray(
        np.stack(
            [[oracles.random_psd(np.random.default_rng(i), 3)] * 2 for i in range(2)]
        )
    )
    mapped = jax.jit(jax.vmap(linalg.eigh))
    (call,) = re.findall(
        r"custom_call @lapack_\w*syevd.* : \((.*?)\)", mapped.lower(x).as_text()
    )
    assert re.match(r"tensor<(1x)?3x3xf64>", call)
    w, u = mapped(x)
    np.testing.assert_allclose(
        (u * w[..., None, :]) @ jnp.swapaxes(u, -1, -2), x, atol=1e-12
    )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="looks at LAPACK's calls")
def test_shared_inverses_take_one_matrix_at_a_time_on_cpus():
    """Several devices of one CPU have one pool of threads, which batches wait for."""
    x, shift = jnp.eye(600)[None], jnp.ones(1)

    def run(stacks, function):
        return [function(stack) for stack in stacks]

    lowered = jax.jit(
        lambda x: linalg.inverse_many([(x, shift)], run)[0].inverse
    ).lower(x)
    calls = re.findall(
        r"custom_call @lapack_\w*(?:potrf|trsm).*? : \((.*?)[,)]", lowered.as_text()
    )
    assert len(calls) >= 2
    for call in calls:
        assert re.match(r"tensor<(1x)?\d+x\d+xf64>", call), call
    np.testing.assert_allclose(
        jax.jit(lambda x: linalg.inverse_many([(x, shift)], run)[0].inverse)(x)[0],
        jnp.eye(600) / 2,
        atol=1e-12,
    )


@pytest.mark.parametrize("part", [0, 1])
def test_eigh_has_the_derivatives_of_jax(part):
    x = jnp.asarray(
        np.stack([oracles.random_psd(np.random.default_rng(i), 4) for i in range(2)])
    )
    weights = jnp.asarray(np.random.default_rng(9).standard_normal((2, 4, 4)))

    def loss(eigh, x):
        result = eigh((x + jnp.swapaxes(x, -1, -2)) / 2)[part]
        # squares: eigenvectors have no sign
        return jnp.vdot(weights[:, 0] if part == 0 else weights, result**2)

    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda x, f=f: loss(f, x)))(x)
        for f in (linalg.eigh, jnp.linalg.eigh)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-9), ours, theirs)


def naive_turn(x, basis):
    """Gram-Schmidt of `x @ basis`, column by column, the last one first."""
    columns = []
    for column in (x @ basis).T[::-1]:
        for q in columns:
            column = column - (q @ column) * q
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns[::-1], axis=1)


def test_a_turned_basis_is_that_of_gram_schmidt():
    rng = np.random.default_rng(5)
    x = np.stack([[oracles.random_psd(rng, 4) for _ in range(2)] for _ in range(3)])
    basis = np.linalg.qr(rng.standard_normal(x.shape))[0]
    found = jax.jit(linalg.turned_basis)(jnp.asarray(x), jnp.asarray(basis))
    expected = [naive_turn(x[i, j], basis[i, j]) for i in range(3) for j in range(2)]
    np.testing.assert_allclose(found.reshape(6, 4, 4), expected, atol=1e-10)


def test_turning_leaves_eigenvectors_and_leads_to_them():
    rng = np.random.default_rng(6)
    u = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    x = jnp.asarray((u * [0.0, 2.0, 4.0, 8.0]) @ u.T)  # singular, too
    turn = jax.jit(linalg.turned_basis)
    found = turn(x, jnp.asarray(u))
    np.testing.assert_allclose(np.abs(u.T @ found), np.eye(4), atol=1e-12)
    np.testing.assert_allclose(found[:, 1:], u[:, 1:], atol=1e-12)
    basis = jnp.eye(4)
    for _ in range(50):
        basis = turn(x, basis)
    np.testing.assert_allclose(np.abs(u.T @ basis), np.eye(4), atol=1e-10)
    assert np.isnan(turn(x.at[1, 1].set(jnp.nan), basis)).any()


def test_symmetrize():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 3, 3)))
    expected = (np.asarray(x) + np.asarray(x).transpose(0, 2, 1)) / 2
    np.testing.assert_allclose(linalg.symmetrize(x), expected, rtol=1e-15)


def test_trace_pi_equals_the_paper():
    rng = np.random.default_rng(4)
    a, g = oracles.random_psd(rng, 4), oracles.random_psd(rng, 2)
    found = linalg.trace_pi(jnp.asarray(np.trace(a) / 4), jnp.asarray(np.trace(g) / 2))
    np.testing.assert_allclose(found, oracles.pi(a, g), rtol=1e-14)


@pytest.mark.parametrize(
    ("a", "g"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (np.nan, 1.0), (np.inf, 1.0)]
)
def test_trace_pi_is_one_where_it_is_not_defined(a, g):
    pi = linalg.trace_pi(jnp.asarray(a), jnp.asarray(g))
    np.testing.assert_array_equal(pi, 1.0)


def test_sizes_one_apart_share_a_batch_and_rows_are_no_power_of_two_apart():
    for d in (24, 32, 64, 128, 250, 256, 500, 512, 768, 784, 1000, 1024, 4096):
        padded = _psd.padded(d)
        assert _psd.padded(d + 1) == padded or d == 24
        assert d <= padded <= 2 * d and padded % 8 == 0
        assert padded & (padded - 1) or padded <= 8
    assert [_psd.padded(d) for d in (1, 2, 3, 7, 8)] == [1, 2, 4, 8, 8]


def test_mean_rows():
    rng = np.random.default_rng(7)
    rows = [rng.random((2, 3)), rng.random((2, 5))]
    found = linalg.mean_rows([jnp.asarray(x) for x in rows])
    np.testing.assert_allclose(found, [x.mean(-1) for x in rows], rtol=1e-14)


@models.EIGHT_DEVICES
@pytest.mark.parametrize("several", [False, True])
def test_lapack_gets_one_matrix_at_a_time_where_cpu_devices_share_it(
    several, monkeypatch
):
    """And many at once where there is one, at both depths of the recursion."""
    monkeypatch.setattr(_psd, "several_cpu_devices", lambda: several)
    rng = np.random.default_rng(0)
    matrices = [
        np.stack([oracles.random_psd(rng, d) for _ in range(3)]) for d in (20, 300)
    ]
    shift = jnp.asarray([0.1, 0.2, 0.3])
    run = jax.jit(
        lambda *xs: [x for x, _ in linalg.inverse_many([(x, shift) for x in xs])]
    )
    found = run(*matrices)
    for x, inverse in zip(matrices, found, strict=True):
        shifted = x + np.asarray(shift)[:, None, None] * np.eye(x.shape[-1])
        np.testing.assert_allclose(inverse, np.linalg.inv(shifted), 1e-7, 1e-9)
    text = run.lower(*matrices).compile().as_text()
    calls = re.findall(
        r"= \(?f64\[([\d,]+)\][^=]*custom-call\([^\n]*(?:potrf|trsm)", text
    )
    batches = {math.prod(map(int, shape.split(",")[:-2])) for shape in calls}
    assert batches
    assert (batches == {1}) == several


def test_conditionals_need_shapes_that_fit():
    first, last = jnp.eye(3), jnp.eye(2)
    with pytest.raises(ValueError, match=r"must have X of shape \(3, 2\) between"):
        linalg.conditionals([(first, jnp.ones((2, 3)), last)])
