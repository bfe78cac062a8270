"""Random programs, with all that is promised of each.

`make fuzz` runs many more, see there. What failed becomes the smallest plain program
that does, in `tests/reliability/test_fuzz_findings.py`.
"""

import collections
import dataclasses
import os
import time

import hypothesis
import jax
import pytest

from tests.fuzz import checks, strategies
from tests.fuzz import programs as p

COUNT = int(os.environ.get("FUZZ_COUNT", "200"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
CHUNK = 25  # programs in one case, after which JAX forgets what it compiled
STEPS = (0,)  # the optimizer is tried on programs with these seeds, of ten
# and the sample space on these
ROWS = tuple(map(int, os.environ.get("FUZZ_ROWS", "1")))

SETTINGS = hypothesis.settings(
    deadline=None,
    database=None,
    derandomize=True,
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def chunks(count: int, size: int) -> list[int]:
    """How many programs each case runs."""
    return [size] * (count // size) + [count % size] * (count % size > 0)


@pytest.mark.slow
@pytest.mark.parametrize(("chunk", "count"), list(enumerate(chunks(COUNT, CHUNK))))
def test_random_programs(chunk, count, record_property):
    seen: collections.Counter[str] = collections.Counter()
    start = time.perf_counter()

    done: set[p.Program] = set()
    failed: list[p.Program] = []

    @hypothesis.seed(1000 * SEED + chunk)
    @hypothesis.settings(SETTINGS, max_examples=20 * count)
    @hypothesis.given(strategies.programs())
    def run(program):
        # Hypothesis varies what it has drawn: a program is new if more than data are
        known = dataclasses.replace(program, seed=0, flags=())
        enough = known in done or len(done) == count
        if enough and not failed:  # what has failed is shrunk, and run once more
            return
        failed.append(program)
        blocks = checks.check(
            program, steps=program.seed in STEPS, rows=program.seed in ROWS
        )
        failed.pop()
        done.add(known)
        seen["programs"] += 1
        seen.update(p.features(program))
        rows = {k: n for k, n in blocks.items() if "rows" in k}
        seen.update(rows)
        seen.update({f"{k} blocks": n for k, n in blocks.items() if k not in rows})

    try:
        run()
    finally:
        jax.clear_caches()
        seen["seconds"] = round(time.perf_counter() - start)
        record_property("fuzz", dict(seen))
