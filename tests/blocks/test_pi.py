"""π of factored damping for each norm, against dense Kronecker products."""

import jax.numpy as jnp
import numpy as np
import pytest

from kfac_jax.blocks import TNT, BlockShape, Kronecker
from kfac_jax.blocks._tied import join, nearest_product
from tests.helpers import oracles

NORMS = ("trace", "frobenius", "spectral", "one")
DAMPING = 0.3


def factors(seed, lead=(), sizes=(4, 3), diagonal=(), scale=1.0):
    """Random factors, stacked along `lead`; diagonal ones for the sides named."""
    rng = np.random.default_rng(seed)
    result = {}
    for side, size in zip(("input", "output"), sizes, strict=True):
        count = int(np.prod(lead, dtype=int))
        each = np.stack([scale * oracles.random_psd(rng, size) for _ in range(count)])
        if side in diagonal:
            each = np.stack([np.diag(x) for x in each])
            result[side + "_diagonal"] = each.reshape(*lead, size)
        else:
            result[side] = each.reshape(*lead, size, size)
    return {name: jnp.asarray(x) for name, x in result.items()}


def shifts(block, given):
    """π √λ and √λ/π, from what is to be inverted."""
    damped = block.damp(given, jnp.asarray(DAMPING))
    inputs, outputs = (
        np.asarray(damped[side if side in damped else side + "_diagonal"].shift)
        for side in ("input", "output")
    )
    return inputs.reshape(-1), outputs.reshape(-1)


def dense(given, side, i):
    if side in given:
        x = np.asarray(given[side])
        return x.reshape(-1, *x.shape[-2:])[i]
    x = np.asarray(given[side + "_diagonal"])
    return np.diag(x.reshape(-1, x.shape[-1])[i])


def assert_is_the_papers(given, found, norm):
    inputs, outputs = found
    for i in range(max(len(inputs), len(outputs))):
        expected = oracles.pi(dense(given, "input", i), dense(given, "output", i), norm)
        root = np.sqrt(DAMPING)
        np.testing.assert_allclose(inputs[i], expected * root, rtol=1e-10)
        np.testing.assert_allclose(outputs[i], root / expected, rtol=1e-10)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("diagonal", [(), ("input",), ("output",), ("input", "output")])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_full_diagonal_and_stacked_factors(norm, diagonal, lead):
    given = factors(0, lead, diagonal=diagonal)
    assert_is_the_papers(given, shifts(Kronecker(pi=norm), given), norm)


@pytest.mark.parametrize("norm", NORMS)
def test_tied_weights_use_the_factors_of_the_nearest_product(norm):
    given = join(factors(1), factors(2, sizes=(3, 4)))
    found = shifts(Kronecker(pi=norm), given)
    assert_is_the_papers(nearest_product(given), found, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_marginals_are_balanced_after_scaling(norm):
    given = factors(3)
    scaled = given | {"output": given["output"] / jnp.trace(given["output"])}
    assert_is_the_papers(scaled, shifts(TNT(pi=norm), given), norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("diagonal", [(), ("input",)])
def test_the_spectrum_is_damped_alike(norm, diagonal):
    block, given = Kronecker(pi=norm), factors(4, diagonal=diagonal)
    spectrum = block.spectrum(given, BlockShape((), (), 4, 3))
    found = np.asarray(spectrum.eigenvalues(jnp.asarray(DAMPING), "factored"))
    a, g = dense(given, "input", 0), dense(given, "output", 0)
    expected = np.linalg.eigvalsh(oracles.factored_damping(a, g, DAMPING, norm))
    np.testing.assert_allclose(np.sort(found.reshape(-1)), expected, rtol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30, np.inf, np.nan])
def test_extreme_factors_of_single_precision(norm, scale):
    """π is what it is for those of ordinary size; 1 where it is not defined."""
    block, given = Kronecker(pi=norm), factors(5)
    given["output"] = given["output"] * scale
    given = {name: x.astype(jnp.float32) for name, x in given.items()}
    inputs, outputs = shifts(block, given)
    a, g = (dense(factors(5), side, 0) for side in ("input", "output"))
    usual = oracles.pi(a, g, norm)
    defined = 0 < scale < np.inf and norm != "one"
    expected = usual / np.sqrt(scale) if defined else 1.0
    np.testing.assert_allclose(inputs[0], expected * np.sqrt(DAMPING), rtol=1e-5)
    np.testing.assert_allclose(outputs[0], np.sqrt(DAMPING) / expected, rtol=1e-5)


def test_the_norms_differ():
    found = [float(shifts(Kronecker(pi=norm), factors(6))[0][0]) for norm in NORMS]
    assert len(set(np.round(found, 6))) == 4


@pytest.mark.parametrize("make", [Kronecker, TNT])
@pytest.mark.parametrize("wrong", ["nuclear", "Trace", "", 1])
def test_an_unknown_norm_is_refused_with_the_list(make, wrong):
    names = 'one of "trace", "frobenius", "spectral" or "one"'
    with pytest.raises(ValueError, match=f"pi must be {names}; got {wrong!r}"):
        make(pi=wrong)


def test_trace_is_the_default():
    assert Kronecker().pi == TNT().pi == "trace"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("diagonal", [(), ("input",), ("output",), ("input", "output")])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("sizes", [(4, 1), (1, 3), (1, 1)])
def test_a_number_is_damped_exactly(diagonal, lead, sizes):
    block, given = Kronecker(exact_scalars=True), factors(8, lead, sizes, diagonal)
    damped = block.damp(given, jnp.asarray(DAMPING))
    eigenvalues = block.spectrum(given, BlockShape(lead, (), *sizes)).eigenvalues(
        jnp.asarray(DAMPING), ""
    )
    found = {
        name: np.reshape(x.factor, (-1, *x.factor.shape[len(lead) :]))
        for name, x in damped.items()
    }
    for i in range(int(np.prod(lead, dtype=int))):
        a, g = dense(given, "input", i), dense(given, "output", i)
        expected = np.kron(a, g) + DAMPING * np.eye(len(a) * len(g))
        product = np.ones((1, 1))
        for side in ("input", "output"):
            name = side if side in found else side + "_diagonal"
            x = found[name][i] if side in found else np.diag(found[name][i])
            product = np.kron(product, x + damped[name].shift * np.eye(len(x)))
        np.testing.assert_allclose(product, expected, rtol=1e-12)
        own = np.sort(np.reshape(eigenvalues, (-1, len(a) * len(g)))[i])
        np.testing.assert_allclose(own, np.linalg.eigvalsh(expected), rtol=1e-10)


def test_exact_scalars_leave_other_layers_and_the_default_alone():
    given = factors(9, (), (4, 3))
    assert_is_the_papers(given, shifts(Kronecker(exact_scalars=True), given), "trace")
    given = factors(9, (), (4, 1))
    assert_is_the_papers(given, shifts(Kronecker(), given), "trace")
    with pytest.raises(TypeError, match="exact_scalars must be a bool"):
        Kronecker(exact_scalars=1)
