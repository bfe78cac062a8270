"""One of several that train together: `multi_process.py RANK COUNT PORT [parts]`.

Prints the parameters after some steps, as JSON. With COUNT 1 it trains alone. With
`parts` each process keeps a part of the state, and in the midst they go on from one
that was whole in the memory of each.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_jax

CASES, STEPS = 16, 5


def loss_fn(params, x, y):
    h = jnp.tanh(x @ params["first"])
    z = h @ params["second"]
    return kfac_jax.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()


def main(rank, count, port, parts_of_state=False):
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", count, rank)
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((CASES, 3)).astype(np.float32)
    y = rng.integers(0, 4, CASES)
    params = {
        "first": rng.standard_normal((3, 8)).astype(np.float32),
        "second": rng.standard_normal((8, 4)).astype(np.float32),
    }
    plan = kfac_jax.make_curvature(
        loss_fn, params, x, y, estimation_mode="fisher_exact"
    )
    over = kfac_jax.OverMesh(mesh, state_axes="data" if parts_of_state else ())
    tx = kfac_jax.kfac(plan, 0.1, 0.9, 0.1, inverse_every=2, devices=over)
    everywhere, parts = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    @jax.jit
    def step(params, state, x, y):
        _, grads, statistics = plan.value_grad_and_statistics(params, x, y)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return jax.tree.map(jnp.add, params, updates), state

    def start(params):
        return params, tx.init(params)

    mine = slice(rank * CASES // count, (rank + 1) * CASES // count)
    batch = [jax.make_array_from_process_local_data(parts, a[mine]) for a in (x, y)]
    specs = kfac_jax.state_specs(over)
    lies = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    start = jax.jit(start, out_shardings=(everywhere, lies))
    params, state = start(params)
    for i in range(STEPS):
        if parts_of_state and i == STEPS // 2:
            whole = kfac_jax.whole_state(plan, (params, state), over)
            whole = jax.tree.map(np.asarray, whole)
            params, state = kfac_jax.spread_state(plan, whole, over)
        params, state = step(params, state, *batch)
    print(json.dumps({name: np.asarray(w).tolist() for name, w in params.items()}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4:] == ["parts"])
