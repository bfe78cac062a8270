"""The defaults on training tasks, by steps: finite, and ahead of AdamW's tuned runs."""

import json

import jax
import numpy as np
import pytest
import workloads
from workloads import compare, training

BASELINES = json.loads(compare.BASELINES.read_text("utf-8"))
NO_DOWNLOAD = [x for x in workloads.WORKLOADS if x not in workloads.OF_TEXT]


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_each_task_has_a_tuned_record(name):
    found = BASELINES["tasks"][name]
    assert set(found) - {"K-FAC"} == {"AdamW", "Nesterov", "Muon"}  # of some tasks
    for one in found.values():
        assert len(one["trials"]) == 24 and len(one["curves"]) == 3
        scores = [x for *_, x in one["trials"] if x is not None]
        assert np.isclose(min(scores), compare.end(one), rtol=1e-3)


@pytest.mark.slow  # the data are in a package of the extra "experiments"
@pytest.mark.parametrize("name", NO_DOWNLOAD)
def test_each_task_can_be_evaluated(name, user_settings):
    task = workloads.WORKLOADS[name]()
    params = task.init(jax.random.key(0))
    batch = task.batch(jax.random.key(1), task.train)
    assert np.isfinite(task.loss_fn(params, *batch))
    shapes = jax.eval_shape(lambda: (params, batch))
    assert jax.tree.leaves(shapes) == jax.tree.leaves(task.example())
    for data in (task.train, task.held_out):
        rows = tuple(x[:32] for x in data)
        loss, error = task.evaluate(params, *rows)
        assert np.isfinite(loss) and np.isfinite(error)


@pytest.mark.slow
@pytest.mark.parametrize("name", workloads.SHORT)
def test_the_defaults_are_ahead_of_tuned_adamw(name, user_settings):
    """One seed: never far above where it began, and at AdamW's last loss earlier."""
    task = workloads.WORKLOADS[name]()
    found = training.seeds(task, compare.of_kfac(task), 1)
    curve = np.asarray(found.curve[0])
    assert np.isfinite(curve).all()
    params = task.init(jax.random.key(0))
    assert float(found.largest[0]) < 10 * max(
        1.0, float(task.evaluate(params, *task.held_out)[0])
    )
    target = compare.end(BASELINES["tasks"][name]["AdamW"])
    steps = compare.steps_to({"curves": [curve]}, target)
    assert steps is not None and steps <= 0.9 * task.steps
