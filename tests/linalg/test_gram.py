"""Second moments by halves: the same as one product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_jax import linalg
from kfac_jax._utils.dtypes import wide_dtype
from kfac_jax.linalg import _gram

# (rows, side): too small a side, too few rows, by halves, odd sides, too many rows
SHAPES = [(300, 191), (100, 200), (150, 192), (210, 257), (400, 333), (19_300, 192)]
DIVIDED = [(150, 192), (210, 257), (400, 333)]


def dots(function, x):
    text = str(jax.make_jaxpr(function)(x))
    return text.count("dot_general")


def gram(x):
    return linalg.gram(x, wide_dtype(x.dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_equals_one_product(shape, dtype):
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)
    wide = np.asarray(x, np.float64)
    found = gram(x)
    assert found.dtype == wide_dtype(dtype)
    tolerance = 1e-12 if dtype == jnp.float64 else 1e-4
    np.testing.assert_allclose(
        found, wide.T @ wide, rtol=tolerance, atol=10 * tolerance
    )


def test_keeps_leading_axes_and_maps():
    x = jax.random.normal(jax.random.key(0), (2, 3, 220, 200))
    expected = jnp.einsum("abri,abrj->abij", x, x)
    np.testing.assert_allclose(gram(x), expected, rtol=1e-10, atol=1e-10)
    mapped = jax.vmap(jax.vmap(gram))(x)
    np.testing.assert_allclose(mapped, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_which_shapes_are_divided(shape):
    # three products for CPUs and one for others, or one for all
    assert dots(gram, jnp.ones(shape)) == (4 if shape in DIVIDED else 1)


def test_does_three_quarters_of_the_arithmetic():
    x = jnp.ones((512, 512))

    def flops(function):
        return jax.jit(function).lower(x).compile().cost_analysis()["flops"]

    ratio = flops(gram) / flops(lambda x: _gram._product(x, x, x.dtype))
    assert 0.74 < ratio < 0.78
