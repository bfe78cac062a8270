"""The growing batch against the paper's formula and that of its authors' program."""

import jax
import numpy as np
import pytest

from kfac_jax import ExponentialBatchSize

STEPS = np.arange(600)
WHOLE = 1e-6  # within so much of a whole number rounding down is left to chance


def papers(cases, initial=1000, steps=500):
    """`m_k = min(m_1 exp((k-1)/b), |S|)` for k = 1, 2, ..., as real numbers."""
    b = (steps - 1) / np.log(cases / initial)
    return np.minimum(initial * np.exp(STEPS / b), cases)


def programs(cases):
    """`1000 · 2^((k-1)/div)`, div = 499 / log2(|S|/1000), as real numbers."""
    div = 499 / np.log2(cases / 1000)
    return np.minimum(1000 * 2 ** (STEPS / div), cases)


@pytest.mark.parametrize("cases", [60_000, 20_000, 103_500])  # MNIST, CURVES, FACES
@pytest.mark.parametrize("formula", [papers, programs])
def test_the_papers_problems(cases, formula):
    batch_size = ExponentialBatchSize(1000, cases)
    sizes = np.array([batch_size(int(step)) for step in STEPS])
    expected = formula(cases)
    clear = np.abs(expected - np.round(expected)) > WHOLE
    assert clear.sum() > 490
    np.testing.assert_array_equal(sizes[clear], np.floor(expected[clear]))
    np.testing.assert_array_equal(sizes[~clear], np.round(expected[~clear]))
    assert (sizes[0], sizes[498] < cases, sizes[499]) == (1000, True, cases)


@pytest.mark.parametrize("distinct", [2, 5, 16, 500])
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_few_sizes_in_equal_ratios_that_never_exceed_the_papers(distinct, multiple_of):
    batch_size = ExponentialBatchSize(
        1000, 60_000, distinct=distinct, multiple_of=multiple_of
    )
    sizes = np.array([batch_size(int(step)) for step in STEPS])
    expected = papers(60_000)
    assert (sizes <= expected * (1 + 1e-9)).all()
    assert (np.diff(sizes) >= 0).all()
    assert (sizes % multiple_of == 0).all()
    assert batch_size.sizes == tuple(np.unique(sizes))
    assert len(batch_size.sizes) <= distinct
    ratio = 60 ** (1 / (distinct - 1))
    assert (sizes + multiple_of > expected / ratio).all()  # the next one is too large
    if distinct < 50:
        assert len(batch_size.sizes) == distinct
        grid = np.geomspace(1000, 60_000, distinct)
        np.testing.assert_allclose(batch_size.sizes, grid, atol=multiple_of)
        times = np.diff([np.argmax(sizes == size) for size in batch_size.sizes])
        assert times.max() - times.min() <= 1


def test_whole_numbers_are_met_exactly():
    assert ExponentialBatchSize(1, 125, steps=4).sizes == (1, 5, 25, 125)
    assert ExponentialBatchSize(1, 3**20, steps=21).sizes == tuple(
        3**i for i in range(21)
    )


def test_a_constant_size_and_numpy_steps():
    batch_size = ExponentialBatchSize(64, 64)
    assert batch_size.sizes == (64,)
    size = batch_size(np.int64(3))
    assert (size, type(size)) == (64, int)


def test_a_traced_step_is_refused():
    with pytest.raises(TypeError, match="concrete integer, outside of jit"):
        jax.jit(ExponentialBatchSize(10, 100))(3)


@pytest.mark.parametrize(
    ("step", "error", "match"),
    [
        (-1, ValueError, "counted from 0; got -1"),
        (1.0, TypeError, r"concrete integer.*got 1\.0"),
    ],
)
def test_bad_steps(step, error, match):
    with pytest.raises(error, match=match):
        ExponentialBatchSize(10, 100)(step)


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        ((0, 100), {}, ValueError, r"initial \(m_1\) must be at least 1; got 0"),
        ((10.0, 100), {}, TypeError, r"initial \(m_1\) must be an integer; got 10"),
        ((100, 10), {}, ValueError, r"final \(\|S\|\) must be at least 100; got 10"),
        ((10, 100), {"steps": 1}, ValueError, "steps must be at least 2; got 1"),
        ((10, 100), {"distinct": 1}, ValueError, "distinct must be at least 2"),
        ((10, 100), {"distinct": True}, TypeError, "distinct must be an integer"),
        (
            (10, 100),
            {"steps": 5, "distinct": 6},
            ValueError,
            r"distinct must be at most steps \(5\); got 6",
        ),
        ((10, 100), {"multiple_of": 0}, ValueError, "multiple_of must be at least 1"),
        ((10, 100), {"multiple_of": 16}, ValueError, "initial .* at least 16"),
    ],
)
def test_bad_settings(args, options, error, match):
    with pytest.raises(error, match=match):
        ExponentialBatchSize(*args, **options)
