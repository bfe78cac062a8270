"""One of several that train together: `multi_process.py RANK COUNT PORT KIND`.

Prints the parameters after some steps, as JSON. With COUNT 1 it trains alone. With the
kind `parts` each process keeps a part of the state of K-FAC, and in the midst they go
on from one that was whole in the memory of each; with `rows` they train by the natural
gradient in the sample space, in double precision.
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


def kfac(params, args, over):
    plan = kfac_jax.make_curvature(
        loss_fn, params, *args, estimation_mode="fisher_exact"
    )
    return plan, kfac_jax.kfac(plan, 0.1, 0.9, 0.1, inverse_every=2, devices=over)


def natural_gradient(params, args, over):
    plan = kfac_jax.make_curvature(
        loss_fn,
        params,
        *args,
        estimation_mode="fisher_exact",
        structure=kfac_jax.SampleSpace(),
    )
    tx = kfac_jax.natural_gradient(
        plan, 0.1, 1e-3, momentum=kfac_jax.Spring(0.9), devices=over
    )
    return plan, tx


def main(rank, count, port, kind):
    parts_of_state, rows = kind == "parts", kind == "rows"
    jax.config.update("jax_enable_x64", rows)
    dtype = np.float64 if rows else np.float32
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", count, rank)
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((CASES, 3)).astype(dtype)
    y = rng.integers(0, 4, CASES)
    params = {
        "first": rng.standard_normal((3, 8)).astype(dtype),
        "second": rng.standard_normal((8, 4)).astype(dtype),
    }
    over = kfac_jax.OverMesh(mesh, state_axes="data" if parts_of_state else ())
    plan, tx = (natural_gradient if rows else kfac)(params, (x, y), over)
    everywhere, parts = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    step = jax.jit(kfac_jax.make_step(plan, tx))

    def start(params):
        return params, tx.init(params)

    mine = slice(rank * CASES // count, (rank + 1) * CASES // count)
    batch = [jax.make_array_from_process_local_data(parts, a[mine]) for a in (x, y)]
    specs = P() if rows else kfac_jax.state_specs(over)
    lies = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    start = jax.jit(start, out_shardings=(everywhere, lies))
    params, state = start(params)
    for i in range(STEPS):
        if parts_of_state and i == STEPS // 2:
            whole = kfac_jax.whole_state(plan, (params, state), over)
            whole = jax.tree.map(np.asarray, whole)
            params, state = kfac_jax.spread_state(plan, whole, over)
        params, state, _ = step(params, state, jax.random.key(i), *batch)
    print(json.dumps({name: np.asarray(w).tolist() for name, w in params.items()}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
