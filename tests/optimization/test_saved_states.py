"""A state that another version of JAX wrote goes on as it would have there.

`tests/data/state.pickle` was written under JAX 0.8.0 by this file as a program:

    python -m tests.optimization.test_saved_states tests/data/state.pickle

Write it anew only if the state's own layout changes, and say so in CHANGELOG.md.
"""

import pathlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax
from tests.helpers import models

FILE = pathlib.Path(__file__).parents[1] / "data" / "state.pickle"
BEFORE, AFTER = 4, 6  # steps until it was written, and in all


def loss_fn(params, x, y):
    h = jnp.tanh(models.dense(params["hidden"], x))
    z = models.dense(params["output"], h)
    return kfac_jax.losses.squared_error(z, y).sum(-1).mean()


def train(steps, at=None):
    """Parameters and state after those steps, as NumPy arrays in single precision."""
    rng = np.random.default_rng(0)
    sizes = {"hidden": (3, 5), "output": (5, 2)}
    params = {
        name: {"w": rng.normal(size=shape), "b": np.zeros(shape[1])}
        for name, shape in sizes.items()
    }
    x, y = rng.normal(size=(16, 3)), rng.normal(size=(16, 2))
    params, x, y = jax.tree.map(lambda a: jnp.asarray(a, "float32"), (params, x, y))
    curvature = kfac_jax.make_curvature(
        loss_fn,
        params,
        x,
        y,
        estimation_mode="ggn_exact",
        structure=kfac_jax.BlockTridiagonal(),
    )
    tx = kfac_jax.kfac(
        curvature,
        kfac_jax.QuadraticModel(),
        None,
        kfac_jax.LevenbergMarquardt(1.0, every=2),
        inverse_every=5,
        factored_damping=kfac_jax.SeparateDamping(every=5),
    )

    @jax.jit
    def step(params, state):
        value, grads, statistics = curvature.value_grad_and_statistics(params, x, y)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=(x, y)
        )
        return optax.apply_updates(params, updates), state

    params, state = (params, tx.init(params)) if at is None else at
    for _ in range(steps):
        params, state = step(params, state)
    return jax.device_get((params, state))


def test_a_state_that_another_jax_wrote_goes_on():
    saved = pickle.loads(FILE.read_bytes())
    assert saved["state"].step == BEFORE
    with jax.enable_x64(False):
        fresh = train(AFTER)
        found = train(AFTER - BEFORE, (saved["params"], saved["state"]))
    assert found[1].step == AFTER
    assert found[1].info.inverse_refreshes == fresh[1].info.inverse_refreshes
    pairs = zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(fresh), strict=True
    )
    for (path, x), (other, y) in pairs:
        assert path == other
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=5e-3, atol=1e-4, err_msg=str(path))


if __name__ == "__main__":
    params, state = train(BEFORE)
    saved = {"jax": jax.__version__, "params": params, "state": state}
    pathlib.Path(sys.argv[1]).write_bytes(pickle.dumps(saved))
