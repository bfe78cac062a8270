"""Programs of our own do what they do on the published release of kfac-jax.

`data/published_estimators.json` was recorded by running `published_estimators.py` with
that release installed in place of this library.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.compat.published_estimators import PROGRAMS

RECORDED = json.loads(
    (Path(__file__).parents[1] / "data" / "published_estimators.json").read_text(
        "utf-8"
    )
)
RTOL = 1e-9  # only rounding differs


def test_every_program_is_recorded() -> None:
    assert list(RECORDED["programs"]) == list(PROGRAMS)
    assert RECORDED["kfac-jax"] == "0.0.8"


# "batch sizes" has arrays without examples in its batch, which leaves doubts
@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:Which examples the registered outputs belong to")
@pytest.mark.parametrize("name", PROGRAMS)
def test_same_numbers(name: str) -> None:
    ours, theirs = PROGRAMS[name](), RECORDED["programs"][name]
    assert ours.keys() == theirs.keys()
    for what, expected in theirs.items():
        np.testing.assert_allclose(
            ours[what], expected, rtol=RTOL, atol=1e-11, err_msg=f"{what} of {name}"
        )
