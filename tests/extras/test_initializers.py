"""Sparse initialisation: how many weights, which, and of what size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_jax.extras.initializers import sparse_normal

KEY = jax.random.key(0)
MC_TOLERANCE = 5.0  # standard deviations of a Monte-Carlo mean


def counts(weights, *units):
    """How many weights into each unit are not zero."""
    others = tuple(i for i in range(weights.ndim) if i not in units)
    return np.count_nonzero(np.asarray(weights), axis=others)


def test_fifteen_normal_weights_into_each_unit_of_a_dense_layer():
    weights = np.asarray(sparse_normal()(KEY, (784, 1000)))
    np.testing.assert_array_equal(counts(weights, 1), 15)
    values = weights[weights != 0]
    assert abs(values.mean()) < MC_TOLERANCE / np.sqrt(values.size)
    assert abs((values**2).mean() - 1) < MC_TOLERANCE * np.sqrt(2 / values.size)
    assert abs((values**4).mean() - 3) < MC_TOLERANCE * np.sqrt(96 / values.size)


@pytest.mark.parametrize("incoming", [1, 3, 4, 5])
def test_all_sets_of_inputs_are_equally_likely(incoming):
    """Pairs, too, which a draw with replacement or of neighbours would get wrong."""
    inputs, units = 5, 20_000
    weights = np.asarray(sparse_normal(incoming)(KEY, (inputs, units)))
    chosen = (weights != 0).astype(float)
    p = incoming / inputs
    pair = p * (incoming - 1) / (inputs - 1)
    expected = np.full((inputs, inputs), pair) + (p - pair) * np.eye(inputs)
    deviation = np.sqrt(expected * (1 - expected) / units)
    difference = np.abs(chosen @ chosen.T / units - expected)
    assert (difference <= MC_TOLERANCE * deviation).all()


def test_fewer_inputs_than_weights_are_all_used():
    weights = sparse_normal()(KEY, (4, 3))
    np.testing.assert_array_equal(counts(weights, 1), 4)


@pytest.mark.parametrize(
    ("shape", "options", "units"),
    [
        ((3, 3, 8, 16), {}, (3,)),  # a convolution, HWIO
        ((16, 8, 3, 3), {"in_axis": 1, "out_axis": 0}, (0,)),  # OIHW
        ((40, 30), {"in_axis": -1, "out_axis": -2}, (0,)),  # units first
        ((32, 4, 8), {"in_axis": 0, "out_axis": (1, 2)}, (1, 2)),  # heads
        ((4, 8, 32), {"in_axis": (0, 1)}, (2,)),  # back from heads
        ((6, 30, 20), {"batch_axis": 0}, (0, 2)),  # experts
    ],
)
def test_units_of_convolutions_heads_and_experts(shape, options, units):
    weights = sparse_normal(7, **options)(KEY, shape)
    assert weights.shape == shape
    np.testing.assert_array_equal(counts(weights, *units), 7)


def test_units_and_keys_differ():
    init = sparse_normal(2)
    weights = np.asarray(init(KEY, (50, 40)))
    assert len(np.unique(weights, axis=1).T) == 40
    assert (weights != np.asarray(init(jax.random.key(1), (50, 40)))).any()
    np.testing.assert_array_equal(weights, init(KEY, (50, 40)))
    stacked = np.asarray(sparse_normal(2, batch_axis=0)(KEY, (2, 50, 40)))
    assert (stacked[0] != stacked[1]).any()


def test_types_and_scale():
    unit = sparse_normal(2)(KEY, (6, 3))
    assert unit.dtype == jnp.float64
    twice = sparse_normal(2, 2.0, dtype=jnp.float32)
    assert twice(KEY, (6, 3)).dtype == jnp.float32
    weights = twice(KEY, (6, 3), jnp.bfloat16)
    assert weights.dtype == jnp.bfloat16
    np.testing.assert_array_equal(counts(weights, 1), 2)
    np.testing.assert_allclose(sparse_normal(2, 3.0)(KEY, (6, 3)), 3 * unit)


def test_jitted_and_vmapped():
    init = functools.partial(sparse_normal(3), shape=(10, 4))
    np.testing.assert_allclose(jax.jit(init)(KEY), init(KEY), rtol=1e-12)
    keys = jax.random.split(KEY, 5)
    for weights in jax.vmap(init)(keys):
        np.testing.assert_array_equal(counts(weights, 1), 3)


def test_in_flax():
    from flax import linen as nn

    layer = nn.Dense(6, kernel_init=sparse_normal(), param_dtype=jnp.float32)
    kernel = layer.init(KEY, jnp.ones((1, 20), jnp.float32))["params"]["kernel"]
    np.testing.assert_array_equal(counts(kernel, 1), 15)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((0,), ValueError, "incoming must be at least 1; got 0"),
        ((1.5,), TypeError, r"incoming must be an integer; got 1\.5"),
        ((15, -1.0), ValueError, r"stddev must be finite and at least 0; got -1\.0"),
        ((15, float("nan")), ValueError, "stddev must be finite"),
    ],
)
def test_bad_settings(args, error, match):
    with pytest.raises(error, match=match):
        sparse_normal(*args)


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ((5,), {}, r"in_axis=-2 is out of range for the shape \(5,\).* not for biases"),
        ((), {}, "in_axis=-2 is out of range"),
        ((5, 4), {"out_axis": 2}, "out_axis=2 is out of range"),
        ((5, 4), {"in_axis": 1}, "must be different axes of the shape"),
        ((5, 4), {"in_axis": (0, -2)}, "must be different axes"),
        ((5, 4), {"batch_axis": 0}, "must be different axes"),
    ],
)
def test_bad_shapes(shape, options, match):
    with pytest.raises(ValueError, match=match):
        sparse_normal(**options)(KEY, shape)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_bad_types(dtype):
    with pytest.raises(TypeError, match="real floating point; got"):
        sparse_normal()(KEY, (5, 4), dtype)
