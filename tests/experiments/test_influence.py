"""The experiment on influence: its score, and a quick run."""

import numpy as np
import pytest

from tests.experiments.test_parallel import quick_rows


def test_agreement_is_that_of_ranks():
    """Of three queries over four halves: the same order, the opposite, and one swap."""
    import influence

    predicted = np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0], [9, 9, 9]])
    actual = np.array([[0.1, 4.0, 1.0], [0.2, 3.0, 2.0], [0.9, 2.0, 8.0], [1, 1, 7]])
    # 1 - 6 Σ d² / (n³ - n), with two ranks that differ by one
    np.testing.assert_allclose(
        influence.agreement(predicted, actual), [1.0, -1.0, 1 - 6 * 2 / 60]
    )


@pytest.mark.slow
def test_a_quick_run_compares_all_methods(tmp_path):
    rows, output = quick_rows("influence", tmp_path)
    assert len(rows) == 5 and "5 trainings" in output
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
