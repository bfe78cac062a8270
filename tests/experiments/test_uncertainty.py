"""The experiments on calibration: their scores, and quick runs."""

import numpy as np
import pytest

from tests.experiments.test_parallel import quick_rows


def test_scores():
    """Of four images, two of them with a confidence of 0.9 and 0.6 each."""
    import uncertainty

    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    turned = np.array([[0.5, 0.5], [0.2, 0.8], [0.4, 0.6]])
    found = uncertainty.scores(p, turned, np.array([0, 1, 1, 1]))
    assert found["error"] == pytest.approx(0.25)
    assert found["NLL"] == pytest.approx(-np.log([0.9, 0.1, 0.6, 0.6]).mean())
    assert found["ECE"] == pytest.approx(0.5 * abs(0.9 - 0.5) + 0.5 * abs(0.6 - 1.0))
    # of 12 pairs 8 are in order, and two are equal
    assert found["AUROC"] == pytest.approx((2 * 3 + 2 * 1 + 0.5 * 2) / 12)


@pytest.mark.slow
def test_a_quick_run_compares_all_methods(tmp_path):
    rows, output = quick_rows("uncertainty", tmp_path)
    assert len(rows) == 8 and "evidence" in output
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_scores_of_a_regression():
    """Of mixtures of two; the targets lie at 50 % and beyond 95 %."""
    import regression

    means, variances = np.array([[0.0, 0.0], [2.0, 0.0]]), np.ones((2, 2))
    y = np.array([1.0, 1.7])
    found = regression.scores(regression.Normal(means, variances), y)

    def density(x):
        return np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)

    nll = [-np.log(density(1.0)), -np.log(density(1.7))]
    assert found["NLL"] == pytest.approx(np.mean(nll))
    assert found["RMSE"] == pytest.approx(np.sqrt((0.0**2 + 1.7**2) / 2))
    assert found["in 90 %"] == pytest.approx(0.5)


@pytest.mark.slow
def test_a_quick_regression_compares_all_methods(tmp_path):
    rows, _ = quick_rows("regression", tmp_path)
    assert set(rows) == {"trained network", "ensemble of 2", "Laplace"}
