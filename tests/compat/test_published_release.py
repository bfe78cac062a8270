"""`Optimizer` does what the published release of kfac-jax does, number by number.

`data/published_release.json` was recorded by running `published_problems.py` with that
release installed in place of this library.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.compat.published_problems import CASES, run

RECORDED = json.loads(
    (Path(__file__).parents[1] / "data" / "published_release.json").read_text("utf-8")
)
RTOL = 1e-8  # only rounding differs, which ten steps amplify


def test_every_case_is_recorded() -> None:
    assert list(RECORDED["cases"]) == list(CASES)
    assert RECORDED["kfac-jax"] == "0.0.8"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CASES)
def test_same_steps(name: str) -> None:
    ours = run(CASES[name])
    theirs = RECORDED["cases"][name]
    assert ours.keys() == theirs.keys()
    for quantity, expected in theirs.items():
        # What is not computed is None there and here, NaN in this comparison.
        np.testing.assert_allclose(
            np.array(ours[quantity], float),
            np.array(expected, float),
            rtol=RTOL,
            atol=1e-12,
            err_msg=f"{quantity} of {name}",
        )
