"""Steps on several devices, against the same steps on one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_jax
from kfac_jax._jaxpr._compat import vary_like
from kfac_jax.sharding._planner import assign

CASES = 16
STEPS = 4
AXIS = kfac_jax.OverAxis("batch")
STRUCTURES = {
    "diagonal": None,
    "tridiagonal": kfac_jax.BlockTridiagonal(),
}
RULES = {
    "fixed": {"learning_rate": 0.1, "momentum": 0.9, "damping": 0.01},
    "adaptive": {
        "learning_rate": kfac_jax.QuadraticModel(fraction=1.0),
        "momentum": None,
        "damping": kfac_jax.LevenbergMarquardt(1.0, every=2),
        "factored_damping": kfac_jax.SeparateDamping(every=2),
    },
}


@functools.cache
def problem():
    return models.problem(
        "softmax",
        params=models.dense_params(0, 3, 8, 16, 4),
        x=models.array(50, CASES, 3),
    )


@functools.cache
def plan(structure):
    p = problem()
    options = (
        {} if STRUCTURES[structure] is None else {"structure": STRUCTURES[structure]}
    )
    return kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode="fisher_exact", **options
    )


def make_step(curvature, rules, distribution, average=None):
    tx = kfac_jax.kfac(
        curvature, inverse_every=2, distribution=distribution, **RULES[rules]
    )

    def step(params, state, *args):
        value, grads, statistics = curvature.value_grad_and_statistics(params, *args)
        if average is not None:
            grads = jax.tree.map(average, grads)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, value=value, args=args
        )
        return jax.tree.map(jnp.add, params, updates), state

    return tx, step


def mean(x):
    return jax.lax.pmean(x, "batch")


def part(x):
    """For gradients that JAX has summed over the devices."""
    return x / jax.lax.axis_size("batch")


def over_shard_map(step, devices, **options):
    batch = P("batch")
    return jax.jit(
        jax.shard_map(
            step,
            mesh=models.mesh(devices, "batch"),
            in_specs=(P(), P(), batch, batch),
            out_specs=P(),
            **options,
        )
    )


def over_pmap(step, devices):
    mapped = jax.pmap(
        step, "batch", in_axes=(None, None, 0, 0), devices=jax.devices()[:devices]
    )

    def split(params, state, *args):
        args = [x.reshape(devices, -1, *x.shape[1:]) for x in args]
        everywhere = mapped(params, state, *args)
        for leaf in jax.tree.leaves(everywhere):
            for each in leaf:
                np.testing.assert_array_equal(each, leaf[0])
        return jax.tree.map(lambda x: x[0], everywhere)

    return split


ROUTES = {
    "pmap": (over_pmap, mean),
    "shard_map": (over_shard_map, part),
    "shard_map, unchecked": (
        functools.partial(over_shard_map, check_vma=False),
        mean,
    ),
}


def trajectory(step, tx):
    p = problem()
    params, state = p.params, tx.init(p.params)
    for _ in range(STEPS):
        params, state = step(params, state, *p.args)
    return params, state._replace(inverses=None)  # of which bases are not unique


@functools.cache
def on_one_device(structure, rules):
    tx, step = make_step(plan(structure), rules, None)
    return trajectory(jax.jit(step), tx)


@models.EIGHT_DEVICES
@pytest.mark.parametrize(
    ("rules", "devices"), [("fixed", 1), ("fixed", 2), ("fixed", 8), ("adaptive", 8)]
)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("route", ROUTES)
def test_steps_are_those_of_one_device(route, structure, rules, devices):
    distribute, average = ROUTES[route]
    tx, step = make_step(plan(structure), rules, AXIS, average)
    found = trajectory(distribute(step, devices), tx)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
        found,
        on_one_device(structure, rules),
    )


# ------------------------------------------------------------- jit with sharded arrays


def split_first(x, axis, devices):
    """Over the first axis that can be divided."""
    for i, size in enumerate(x.shape):
        if size % devices == 0:
            return P(*[None] * i, axis)
    return P()


def split_last(x, axis, devices):
    return P(*[None] * (x.ndim - 1), axis) if x.shape[-1] % devices == 0 else P()


LAYOUTS = {  # mesh, how parameters lie on it, axes that share the inversions
    "batch": ({"data": 8}, lambda x: P(), ()),
    "batch, shared": ({"data": 8}, lambda x: P(), ("data",)),
    "batch and parameters, shared": (
        {"data": 8},
        lambda x: split_first(x, "data", 8),
        ("data",),
    ),
    "batch and outputs, on two axes, shared over one": (
        {"data": 4, "model": 2},
        lambda x: split_last(x, "model", 2),
        ("data",),
    ),
    "batch and outputs, shared over two axes": (
        {"data": 4, "model": 2},
        lambda x: split_last(x, "model", 2),
        ("data", "model"),
    ),
}


@models.EIGHT_DEVICES
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_on_sharded_arrays_are_those_on_one_device(layout, structure, rules):
    axes, place, shared = LAYOUTS[layout]
    mesh = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
    )
    p = problem()
    params = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, place(x))), p.params
    )
    args = jax.device_put(p.args, NamedSharding(mesh, P("data")))
    distribution = kfac_jax.OverMesh(mesh, shared) if shared else None
    tx, step = make_step(plan(structure), rules, distribution)
    step, state = jax.jit(step), tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, *args)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
        (params, state._replace(inverses=None)),
        on_one_device(structure, rules),
    )


# ----------------------------------------------------- statistics, collectives, owners


@models.EIGHT_DEVICES
@pytest.mark.parametrize("mode", ["fisher_exact", "fisher_empirical"])
@pytest.mark.parametrize("family", ["softmax", "squared"])
def test_statistics_that_jax_has_summed_count_for_all_devices(family, mode):
    """Without any distribution: as gradients, they are sums inside of shard_map."""
    p = models.problem(family, x=models.array(50, CASES, 3))
    curvature = kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode=mode
    )

    def factors(params, *args):
        statistics = curvature.value_grad_and_statistics(params, *args)[2]
        zero = curvature.init_factors(p.params)
        return statistics.weight, curvature.update_factors(zero, statistics, 1)

    batch = P("batch")
    shared = jax.shard_map(
        factors,
        mesh=models.mesh(8, "batch"),
        in_specs=(P(), batch, batch),
        out_specs=P(),
    )
    weight, found = jax.jit(shared)(p.params, *p.args)
    assert weight == 8
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14),
        found,
        jax.jit(factors)(p.params, *p.args)[1],
    )


@models.EIGHT_DEVICES
def test_parameters_that_vary_in_part():
    def loss_fn(params, x):
        z = (x @ params["w"]) * jnp.exp(params["s"])[None]
        return kfac_jax.losses.squared_error(z).sum(-1).mean()

    params, x = (
        {"w": models.array(0, 3, 2), "s": models.array(1, 2)},
        models.array(2, 8, 3),
    )
    with pytest.warns(UserWarning, match="exp"):
        curvature = kfac_jax.make_curvature(loss_fn, params, x)

    def inside(params, x):
        params = params | {"s": vary_like(params["s"], x)}
        return curvature.value_grad_and_statistics(params, x, rng=jax.random.key(0))[0][
            None
        ]

    mapped = jax.shard_map(
        inside,
        mesh=models.mesh(8, "batch"),
        in_specs=(P(), P("batch")),
        out_specs=P("batch"),
    )
    with pytest.raises(ValueError, match="gradients that are summed over the same"):
        jax.jit(mapped)(params, x)


@models.EIGHT_DEVICES
def test_every_block_on_two_devices():
    p = problem()
    for block in (
        kfac_jax.blocks.Eigen(),
        kfac_jax.blocks.Diagonal(),
        kfac_jax.blocks.Full(),
        kfac_jax.blocks.TNT(),
    ):
        curvature = kfac_jax.make_curvature(
            p.loss_fn, p.params, *p.args, blocks=block, estimation_mode="fisher_exact"
        )

        def run(distribution, route, curvature=curvature):
            tx = kfac_jax.scale_by_kfac(curvature, 0.1, distribution=distribution)

            def step(params, state, *args):
                _, grads, statistics = curvature.value_grad_and_statistics(
                    params, *args, factors=state.factors
                )
                if distribution is not None:
                    grads = jax.tree.map(part, grads)
                return tx.update(grads, state, params, statistics=statistics)

            return route(step)(p.params, tx.init(p.params), *p.args)[0]

        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
            run(AXIS, lambda step: over_shard_map(step, 2)),
            run(None, jax.jit),
        )


@models.EIGHT_DEVICES
def test_one_collective_brings_all_inverses():
    """Whatever the number of layers."""

    def collectives(sizes):
        params = models.dense_params(0, *sizes)
        p = models.problem("softmax", params=params, x=models.array(1, CASES, sizes[0]))
        curvature = kfac_jax.make_curvature(p.loss_fn, p.params, *p.args)
        tx = kfac_jax.scale_by_kfac(curvature, 0.1, distribution=AXIS)

        def update(grads, state, statistics):
            return tx.update(grads, state, statistics=statistics)[1].inverses

        traced = jax.jit(
            jax.shard_map(
                update,
                mesh=models.mesh(8, "batch"),
                in_specs=(P(), P(), P()),
                out_specs=P(),
            )
        ).lower(p.params, tx.init(p.params), curvature.zero_statistics(p.params))
        text = traced.as_text()
        return text.count('"stablehlo.all_gather"')

    assert collectives((3, 4, 4)) == collectives((3, 4, 5, 6, 7, 8, 4)) == 1


@models.EIGHT_DEVICES
def test_each_matrix_is_handed_to_the_function_once():
    stacks = [
        models.array(i, k, d, d) for i, (k, d) in enumerate([(3, 2), (1, 5), (8, 4)])
    ]
    seen = []

    def inside(stacks):
        def function(x):
            jax.debug.callback(lambda x: seen.append(x.shape), x)
            return 2 * x

        return AXIS.map(stacks, function)

    mapped = jax.shard_map(
        inside, mesh=models.mesh(8, "batch"), in_specs=P(), out_specs=P()
    )
    found = jax.jit(mapped)(stacks)
    jax.effects_barrier()
    for a, b in zip(found, stacks, strict=True):
        np.testing.assert_array_equal(a, 2 * b)
    assert sorted(seen) == sorted(
        [(1, d, d) for k, d in [(3, 2), (1, 5), (8, 4)] for _ in range(k)]
    )


def best_load(costs, devices):
    """The lowest largest load of all assignments, by trying them."""
    return min(
        max(
            sum(c for c, owner in zip(costs, owners, strict=True) if owner == device)
            for device in range(devices)
        )
        for owners in itertools.product(range(devices), repeat=len(costs))
    )


@given(
    sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=7),
    devices=st.integers(1, 3),
)
@settings(max_examples=100, deadline=None)
def test_owners_are_balanced(sizes, devices):
    """Longest first is within 4/3 - 1/(3 n) of the best there is (Graham 1969)."""
    owners = assign(sizes, devices)
    assert len(owners) == len(sizes)
    costs = [size**3 for size in sizes]
    loads = np.zeros(devices)
    np.add.at(loads, owners, costs)
    bound = (4 / 3 - 1 / (3 * devices)) * best_load(costs, devices)
    assert loads.max() <= bound * (1 + 1e-12)


@given(
    sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=60),
    devices=st.integers(1, 16),
)
@settings(max_examples=100, deadline=None)
def test_nobody_waits_longer_than_for_one_matrix(sizes, devices):
    """The device that ends last had the least to do when it got its last matrix."""
    owners = assign(sizes, devices)
    loads = np.zeros(devices)
    np.add.at(loads, owners, [size**3 for size in sizes])
    last = min(s**3 for s, o in zip(sizes, owners, strict=True) if o == loads.argmax())
    assert loads.max() - last <= loads.min()


@pytest.mark.parametrize(("layers", "limit"), [(8, 1.25), (16, 1.25), (24, 1.25)])
def test_equal_layers_are_shared_evenly(layers, limit):
    owners = assign([512] * 2 * layers, 8)
    assert max(map(owners.count, range(8))) / (2 * layers) <= limit / 8


def test_an_axis_that_does_not_exist():
    p = problem()
    tx, _ = make_step(plan("diagonal"), "fixed", kfac_jax.OverAxis("data"))
    statistics = plan("diagonal").zero_statistics(p.params)
    with pytest.raises(ValueError, match=r"axis of OverAxis\('data'\) does not exist"):
        tx.update(p.params, tx.init(p.params), p.params, statistics=statistics)


@models.EIGHT_DEVICES
def test_axes_that_a_mesh_lacks():
    mesh = models.mesh(2, "data")
    with pytest.raises(ValueError, match=r"shares over axes of its mesh, \('data',\)"):
        kfac_jax.OverMesh(mesh, ("model",))
    assert kfac_jax.OverMesh(mesh).axes == kfac_jax.OverMesh(mesh, "data").axes


def test_a_mesh_that_is_none():
    with pytest.raises(TypeError, match="OverMesh needs a jax"):
        kfac_jax.OverMesh(8)


@pytest.mark.parametrize("axis", [None, 3, (), "", ("a", 1)])
def test_an_axis_that_is_no_name(axis):
    with pytest.raises(TypeError, match="OverAxis needs the name of an axis"):
        kfac_jax.OverAxis(axis)


def test_gradients_that_stay_products_are_of_one_device():
    p = models.problem(params=models.dense_params(0, 3, 64, 64, 3))
    curvature = kfac_jax.make_curvature(
        p.loss_fn,
        p.params,
        *p.args,
        blocks=kfac_jax.blocks.Kronecker(gradient_products=True),
    )
    with pytest.raises(ValueError, match="no layers with gradient_products, got"):
        kfac_jax.kfac(curvature, distribution=AXIS)
