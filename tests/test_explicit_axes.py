"""Steps on meshes whose axes are Explicit, against the same steps on one device."""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P
from test_sharding import RULES, STEPS, STRUCTURES, on_one_device, problem, split_last

import kfac_jax

AXES = {"data": 4, "model": 2}


def explicit_mesh(**axes):
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes)
    )


def batch_only(params, x):
    """As on one device: nothing that is contracted is sharded."""
    return models.mlp(params, x)


def gathered(params, x):
    """Parameters are brought together where they are used, as in FSDP."""
    whole = jax.tree.map(lambda w: reshard(w, P()), params)
    return models.mlp(whole, x)


def with_out_shardings(params, x):
    """Says of each product how it is sharded."""
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        x = x if i == 0 else jnp.tanh(x)
        spec = P("data", None if i == len(params) - 1 else "model")
        x = jnp.dot(x, layer["w"], out_sharding=spec)
        x = x + layer["b"][None]
    return reshard(
        x, P("data")
    )  # optax's loss picks classes, which JAX refuses to guess


def left_to_the_compiler(params, x):
    return jax.sharding.auto_axes(models.mlp, out_sharding=P("data"))(params, x)


def split_rows(x):
    return P("data") if x.shape[0] % 8 == 0 else P()


LAYOUTS = {  # axes of the mesh, the network, how parameters lie, axes that share
    "batch": ({"data": 8}, batch_only, lambda x: P(), None),
    "batch, shared": ({"data": 8}, batch_only, lambda x: P(), ("data",)),
    "parameters, shared": ({"data": 8}, gathered, split_rows, ("data",)),
    "outputs, shared over one": (
        AXES,
        with_out_shardings,
        lambda x: split_last(x, "model", 2),
        ("data",),
    ),
    "auto_axes inside, shared over two": (
        AXES,
        left_to_the_compiler,
        lambda x: split_last(x, "model", 2),
        ("data", "model"),
    ),
}


def loss_on(apply):
    def loss_fn(params, x, y):
        return models.FAMILIES["softmax"].mean_loss(apply(params, x), y)

    return loss_fn


def placed(mesh, place):
    p = problem()
    params = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, place(x))), p.params
    )
    return params, jax.device_put(p.args, NamedSharding(mesh, P("data")))


@models.EIGHT_DEVICES
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_those_on_one_device(layout, structure, rules):
    axes, apply, place, shared = LAYOUTS[layout]
    mesh = explicit_mesh(**axes)
    options = {"structure": STRUCTURES[structure]} if STRUCTURES[structure] else {}
    expected, (params, args) = on_one_device(structure, rules), placed(mesh, place)
    with jax.set_mesh(mesh):
        curvature = kfac_jax.make_curvature(
            loss_on(apply), params, *args, estimation_mode="fisher_exact", **options
        )
        distribution = kfac_jax.OverMesh(mesh, shared) if shared else None
        tx = kfac_jax.kfac(
            curvature, inverse_every=2, distribution=distribution, **RULES[rules]
        )

        def step(params, state, *args):
            value, grads, statistics = curvature.value_grad_and_statistics(
                params, *args
            )
            updates, state = tx.update(
                grads, state, params, statistics=statistics, value=value, args=args
            )
            return jax.tree.map(jnp.add, params, updates), state

        step, state = jax.jit(step), tx.init(params)
        before = jax.tree.map(jax.typeof, (params, state))
        for _ in range(STEPS):
            params, state = step(params, state, *args)
        assert jax.tree.map(jax.typeof, (params, state)) == before
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
        (params, state._replace(inverses=None)),
        expected,
    )
