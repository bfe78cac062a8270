"""Steps on several devices, against the same steps on one."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_jax
from kfac_jax._jaxpr._compat import vary_like
from kfac_jax.devices import over_axis, planner
from kfac_jax.devices.planner import (
    ALL,
    assign,
    divide,
    pack,
    shared_cost,
    shared_entries,
)
from kfac_jax.linalg._psd import inverse_stack, padded
from kfac_jax.linalg._shared import LEAVES, Columns, shared_inverse
from tests.devices.device_problem import (
    AXIS,
    CASES,
    STEPS,
    STRUCTURES,
    make_step,
    mean,
    mean_of_all,
    on_one_device,
    over_pmap,
    over_shard_map,
    part,
    plan,
    problem,
    split_last,
    trajectory,
)
from tests.helpers import models

DEVICES = pytest.mark.parametrize(  # adaptive rules take what fixed ones do, and more
    ("rules", "devices"),
    [
        pytest.param("fixed", 1, marks=pytest.mark.slow),
        pytest.param("fixed", 2, marks=pytest.mark.slow),
        pytest.param("fixed", 8, marks=pytest.mark.slow),
        ("adaptive", 8),
    ],
)


LINKED_FIRST = pytest.mark.parametrize(  # linked layers have statistics of all kinds
    "structure", [pytest.param("diagonal", marks=pytest.mark.slow), "tridiagonal"]
)


ROUTES = {
    "pmap": (over_pmap, mean),
    "shard_map": (over_shard_map, part),
    "shard_map, unchecked": (
        functools.partial(over_shard_map, check_vma=False),
        mean,
    ),
}


@pytest.mark.sampled(3)
@models.EIGHT_DEVICES
@DEVICES
@LINKED_FIRST
@pytest.mark.parametrize("route", ROUTES)
def test_steps_are_those_of_one_device(route, structure, rules, devices):
    distribute, average = ROUTES[route]
    tx, step = make_step(plan(structure), rules, AXIS, average)
    found = trajectory(distribute(step, devices), tx)
    models.assert_trees_close(
        found,
        on_one_device(structure, rules),
    )


# ---------------------------------------------------------------- devices keep rows

ROWS = kfac_jax.OverAxis("batch", state_axes="batch")


def rows_over_shard_map(step, tx, devices, average, **options):
    """The same with the state in parts, and made whole at the end."""
    specs, batch = kfac_jax.state_specs(ROWS), P("batch")
    mapped = functools.partial(
        jax.shard_map, mesh=models.mesh(devices, "batch"), **options
    )
    init = mapped(tx.init, in_specs=P(), out_specs=specs)
    ins, outs = (P(), specs, batch, batch), (P(), specs)
    return jax.jit(init), jax.jit(mapped(step, in_specs=ins, out_specs=outs))


def rows_over_pmap(step, tx, devices, average):
    some = jax.devices()[:devices]
    start = jax.pmap(tx.init, "batch", devices=some)
    mapped = jax.pmap(step, "batch", in_axes=(None, 0, 0, 0), devices=some)

    def split(params, state, *args):
        args = [x.reshape(devices, -1, *x.shape[1:]) for x in args]
        params, state = mapped(params, state, *args)
        return jax.tree.map(lambda x: x[0], models.on_host(params)), state

    def init(params):
        return start(
            jax.tree.map(lambda x: jnp.broadcast_to(x, (devices, *x.shape)), params)
        )

    return init, split


def joined(state, specs):
    """What pmap has stacked, with rows behind each other."""
    return state._replace(
        **{
            name: jax.tree.map(
                lambda x, rows=rows: x.reshape(-1, *x.shape[2:]) if rows else x[0],
                models.on_host(getattr(state, name)),
            )
            for name, rows in zip(state._fields, specs, strict=True)
        }
    )


ROWS_ROUTES = {
    "pmap": (rows_over_pmap, mean),
    "shard_map": (rows_over_shard_map, part),
    "shard_map, unchecked": (
        functools.partial(rows_over_shard_map, check_vma=False),
        mean,
    ),
}


@models.EIGHT_DEVICES
@DEVICES
@LINKED_FIRST
@pytest.mark.parametrize(
    "route",
    [
        "shard_map",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ROWS_ROUTES
            if x != "shard_map"
        ),
    ],
)
def test_devices_that_keep_rows_step_as_one_device(route, structure, rules, devices):
    distribute, average = ROWS_ROUTES[route]
    tx, step = make_step(plan(structure), rules, ROWS, average)
    init, step = distribute(step, tx, devices, average)
    p = problem()
    params, state = p.params, init(p.params)
    for _ in range(STEPS):
        params, state = step(params, state, *p.args)
    if route == "pmap":
        state = joined(state, [s != P() for s in kfac_jax.state_specs(ROWS)])
    state = kfac_jax.whole_state(plan(structure), state)
    models.assert_trees_close(
        (params, state._replace(inverses=None)),
        on_one_device(structure, rules),
    )


# ------------------------------------------------------------- jit with sharded arrays


def split_first(x, axis, devices):
    """Over the first axis that can be divided."""
    for i, size in enumerate(x.shape):
        if size % devices == 0:
            return P(*[None] * i, axis)
    return P()


LAYOUTS = {  # mesh, how parameters lie on it, axes that share the work and the state
    "batch": ({"data": 8}, lambda x: P(), (), ()),
    "batch, shared": ({"data": 8}, lambda x: P(), ("data",), ()),
    "batch and state, shared": ({"data": 8}, lambda x: P(), ("data",), ("data",)),
    "batch and state, shared by two": (
        {"data": 2},
        lambda x: P(),
        ("data",),
        ("data",),
    ),
    "batch and parameters, shared": (
        {"data": 8},
        lambda x: split_first(x, "data", 8),
        ("data",),
        (),
    ),
    "batch, parameters and state, shared": (
        {"data": 8},
        lambda x: split_first(x, "data", 8),
        ("data",),
        ("data",),
    ),
    "batch and outputs, on two axes, shared over one": (
        {"data": 4, "model": 2},
        lambda x: split_last(x, "model", 2),
        ("data",),
        (),
    ),
    "batch and outputs, shared over two axes": (
        {"data": 4, "model": 2},
        lambda x: split_last(x, "model", 2),
        ("data", "model"),
        (),
    ),
    "batch and outputs, shared over two axes, state over one": (
        {"data": 4, "model": 2},
        lambda x: split_last(x, "model", 2),
        ("data", "model"),
        ("model",),
    ),
}


# what all three do at once, and two axes
FAST_LAYOUTS = (
    "batch, parameters and state, shared",
    "batch and outputs, shared over two axes, state over one",
)


@pytest.mark.sampled(2)
@models.EIGHT_DEVICES
@pytest.mark.parametrize(
    ("rules", "structure"),
    [
        pytest.param("fixed", "diagonal", marks=pytest.mark.slow),
        pytest.param("fixed", "tridiagonal", marks=pytest.mark.slow),
        pytest.param("adaptive", "diagonal", marks=pytest.mark.slow),
        ("adaptive", "tridiagonal"),
    ],
)
@pytest.mark.parametrize(
    "layout",
    [
        name if name in FAST_LAYOUTS else pytest.param(name, marks=pytest.mark.slow)
        for name in LAYOUTS
    ],
)
def test_steps_on_sharded_arrays_are_those_on_one_device(layout, structure, rules):
    axes, place, shared, kept = LAYOUTS[layout]
    mesh = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
    )
    p = problem()
    params = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, place(x))), p.params
    )
    args = jax.device_put(p.args, NamedSharding(mesh, P("data")))
    distribution = kfac_jax.OverMesh(mesh, shared, kept) if shared else None
    tx, step = make_step(plan(structure), rules, distribution)
    step, state = jax.jit(step), tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, *args)
    if kept:
        state = kfac_jax.whole_state(plan(structure), state, distribution)
    models.assert_trees_close(
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
    assert weight == CASES
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14),
        found,
        jax.jit(factors)(p.params, *p.args)[1],
    )


@models.EIGHT_DEVICES
def test_parameters_that_vary_in_part():
    def loss_fn(params, x):
        s = kfac_jax.register_generic(params["s"])
        z = (x @ params["w"]) * jnp.exp(s)[None]
        return kfac_jax.losses.squared_error(z).sum(-1).mean()

    params, x = (
        {"w": models.array(0, 3, 2), "s": models.array(1, 2)},
        models.array(2, 8, 3),
    )
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


@pytest.mark.slow
@models.EIGHT_DEVICES
def test_every_block_on_two_devices():
    p = problem()
    for block in (
        kfac_jax.blocks.Eigen(),
        kfac_jax.blocks.Diagonal(),
        kfac_jax.blocks.Full(),
        kfac_jax.blocks.TNT(),
        kfac_jax.blocks.Kronecker(fit="kl"),
        None,
    ):
        mode = "inputs" if block is None else "fisher_exact"
        curvature = kfac_jax.make_curvature(
            p.loss_fn, p.params, *p.args, blocks=block, estimation_mode=mode
        )

        def run(distribution, route, curvature=curvature, inputs=block is None):
            tx = kfac_jax.scale_by_kfac(curvature, 0.1, devices=distribution)
            if inputs:
                scale = kfac_jax.scale_by_inputs
                tx = scale(curvature, -0.5, devices=distribution)

            def step(params, state, *args):
                _, grads, statistics = curvature.value_grad_and_statistics(
                    params, *args, factors=state.factors
                )
                if distribution is not None:
                    grads = jax.tree.map(part, grads)
                return tx.update(grads, state, params, statistics=statistics)

            return route(step)(p.params, tx.init(p.params), *p.args)[0]

        models.assert_trees_close(
            run(AXIS, lambda step: over_shard_map(step, 2)),
            run(None, jax.jit),
        )


@models.EIGHT_DEVICES
@pytest.mark.parametrize("state_axes", [(), "batch"])
def test_a_sum_of_two_products_on_two_devices(state_axes):
    """Of an interior and a boundary, of which each device has a half."""
    params = models.dense_params(0, 3, 4, 2)
    args = models.array(1, 8, 3), models.array(2, 4, 3)

    def loss_fn(params, inside, edge):
        total = jnp.zeros(())
        for x in (inside, edge):
            z = models.mlp(params, x)
            total += kfac_jax.losses.squared_error(z, jnp.ones_like(z)).sum(-1).mean()
        return total

    curvature = kfac_jax.make_curvature(
        loss_fn,
        params,
        *args,
        estimation_mode="fisher_empirical",
        blocks=kfac_jax.blocks.KroneckerSum(),
    )

    def updates(devices, arguments):
        tx = kfac_jax.scale_by_kfac(curvature, 0.1, devices=devices)

        @jax.jit
        def step(*args):
            _, grads, statistics = curvature.value_grad_and_statistics(params, *args)
            return tx.update(grads, tx.init(params), statistics=statistics)[0]

        return step(*arguments)

    mesh = models.mesh(2, "batch")
    over = kfac_jax.OverMesh(mesh, axes="batch", state_axes=state_axes)
    split = jax.device_put(args, jax.NamedSharding(mesh, P("batch")))
    models.assert_trees_close(updates(over, split), updates(None, args))


@models.EIGHT_DEVICES
@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_device_keeps_an_eighth_of_the_state(structure):
    """Of layers of uneven sizes, in bytes of what lies on it."""
    params = models.dense_params(0, 97, 128, 61, 90, 40)
    p = models.problem("softmax", params=params, x=models.array(1, CASES, 97))
    options = {"structure": STRUCTURES[structure]} if STRUCTURES[structure] else {}
    curvature = kfac_jax.make_curvature(p.loss_fn, p.params, *p.args, **options)
    over = kfac_jax.OverMesh(models.mesh(8, "batch"), state_axes="batch")
    state = kfac_jax.kfac(curvature, devices=over).init(p.params)
    kept = {device: 0 for device in jax.devices()}
    for leaf in jax.tree.leaves((state.factors, state.inverses, state.velocity)):
        for shard in leaf.addressable_shards:
            kept[shard.device] += shard.data.nbytes
    alone = kfac_jax.kfac(curvature).init(p.params)
    parts = alone.factors, alone.inverses, alone.velocity
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(parts))
    report = kfac_jax.sharing_report(curvature, over)
    assert {*kept.values()} == {report.state_bytes}
    assert report.whole_state_bytes == whole
    assert report.state_bytes <= 1.3 / 8 * whole


COLLECTIVE = r" = (\(?\w+\[.*) (all-reduce|all-gather|reduce-scatter)(?:-start)?\("


def received(result, kind, devices):
    """Bytes that each device gets by one collective that goes around a ring."""
    size = 0
    for bits, shape in re.findall(r"[a-z](\d+)\[([\d,]*)\]", result):
        size += int(bits) // 8 * math.prod(map(int, filter(None, shape.split(","))))
    if kind == "reduce-scatter":
        return (devices - 1) * size
    return (1 + (kind == "all-reduce")) * (devices - 1) / devices * size


def collectives(sizes, route, state_axes, structure="diagonal"):
    """The plan, the distribution, and (results, kind) in a compiled step."""
    params = models.dense_params(0, *sizes)
    p = models.problem("softmax", params=params, x=models.array(1, CASES, sizes[0]))
    options = {"structure": STRUCTURES[structure]} if STRUCTURES[structure] else {}
    curvature = kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode="fisher_empirical", **options
    )
    mesh = models.mesh(8, "batch")
    batch = P("batch")
    if route == "jit":
        over = kfac_jax.OverMesh(mesh, state_axes=state_axes)
        tx, step = make_step(curvature, "fixed", over)
        mapped, state = step, tx.init(p.params)
        args = jax.device_put(p.args, NamedSharding(mesh, batch))
    else:
        over = kfac_jax.OverAxis("batch", state_axes)
        checked = route == "shard_map"
        tx, step = make_step(curvature, "fixed", over, part if checked else mean_of_all)
        specs = kfac_jax.state_specs(over)
        map_it = functools.partial(jax.shard_map, mesh=mesh, check_vma=checked)
        state = map_it(tx.init, in_specs=P(), out_specs=specs)
        state = jax.jit(state).eval_shape(p.params)
        ins, outs = (P(), specs, batch, batch), (P(), specs)
        mapped, args = map_it(step, in_specs=ins, out_specs=outs), p.args
    compiled = jax.jit(mapped).lower(p.params, state, *args).compile()
    return curvature, over, re.findall(COLLECTIVE, compiled.as_text())


@pytest.mark.sampled(4)
@models.EIGHT_DEVICES
@pytest.mark.parametrize("state_axes", [(), "batch"])
@pytest.mark.parametrize("route", ["jit", "shard_map", "shard_map, unchecked"])
def test_collectives_do_not_grow_with_layers(route, state_axes):
    _, _, few = collectives((3, 4, 4), route, state_axes)
    _, _, many = collectives((3, 4, 5, 6, 7, 8, 4), route, state_axes)
    assert sorted(kind for _, kind in few) == sorted(kind for _, kind in many)
    assert 0 < len(few) <= 10


@pytest.mark.sampled(4)
@models.EIGHT_DEVICES
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("state_axes", [(), "batch"])
@pytest.mark.parametrize("route", ["jit", "shard_map, unchecked"])
def test_the_report_says_what_is_moved(route, state_axes, structure):
    """As much as the compiled step does, gradients and few numbers apart."""
    curvature, over, found = collectives(
        (97, 128, 61, 90, 40), route, state_axes, structure
    )
    report = kfac_jax.sharing_report(curvature, over, {"batch": 8})
    expected = report.statistics_bytes + report.update_bytes + report.refresh_bytes
    gradient = 8 * sum(map(math.prod, curvature.tree.shapes))
    expected += received(f"f64[{gradient // 8}]", "all-reduce", 8)
    moved = sum(received(result, kind, 8) for result, kind in found)
    np.testing.assert_allclose(moved, expected, rtol=0.01)


@models.EIGHT_DEVICES
def test_the_report_names_the_owners_of_a_step(monkeypatch):
    """Of linked layers of one size: their order is not that of their names."""
    params = models.dense_params(0, 7, 7, 7, 7)
    p = models.problem("softmax", params=params, x=models.array(1, CASES, 7))
    curvature = kfac_jax.make_curvature(
        p.loss_fn,
        p.params,
        *p.args,
        estimation_mode="fisher_empirical",
        structure=kfac_jax.BlockTridiagonal(),
    )
    seen, roots = {}, kfac_jax.OverAxis.roots

    def noted(over, shifted):
        def allot(stacks, *rest):
            allotment = planner.allot(stacks, *rest)
            (division,) = allotment.divisions
            seen.update(zip(shifted, division.owners.tolist(), strict=True))
            return allotment

        with monkeypatch.context() as patch:
            patch.setattr(over_axis, "allot", allot)
            return roots(over, shifted)

    monkeypatch.setattr(kfac_jax.OverAxis, "roots", noted)
    tx, step = make_step(curvature, "fixed", AXIS, part)
    jax.eval_shape(over_shard_map(step, 8), p.params, tx.init(p.params), *p.args)
    owners = kfac_jax.sharing_report(curvature, AXIS, {"batch": 8}).owners
    assert len(set(seen.values())) == 6
    assert seen == {(layer, side): owners[layer][side][0] for layer, side in seen}


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
    owners = assign(sizes, devices, share=False)
    assert len(owners) == len(sizes)
    costs = [size**3 for size in sizes]
    loads = np.zeros(devices)
    np.add.at(loads, owners, costs)
    bound = (4 / 3 - 1 / (3 * devices)) * best_load(costs, devices)
    assert loads.max() <= bound * (1 + 1e-12)


def all_loads(sizes, owners, devices):
    loads = np.zeros(devices)
    for size, owner in zip(sizes, owners, strict=True):
        if owner == ALL:
            loads += shared_cost(size, devices, LEAVES)
        else:
            loads[owner] += size**3
    return loads


@given(
    sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=60),
    devices=st.integers(1, 16),
    share=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_nobody_waits_longer_than_for_one_matrix(sizes, devices, share):
    """The device that ends last had the least to do when it got its last matrix."""
    owners = assign(sizes, devices, share)
    loads = all_loads(sizes, owners, devices)
    own = [s**3 for s, o in zip(sizes, owners, strict=True) if o == loads.argmax()]
    assert loads.max() - min(own, default=0) <= loads.min() * (1 + 1e-12)


@given(
    sizes=st.lists(st.integers(1024, 8000), min_size=1, max_size=40),
    devices=st.integers(1, 64),
)
@settings(max_examples=100, deadline=None)
def test_what_is_too_much_for_one_belongs_to_all(sizes, devices):
    """Then no device has more than twice its part; what all do twice is little."""
    owners = assign(sizes, devices)
    total = sum(size**3 for size in sizes)
    for size, owner in zip(sizes, owners, strict=True):
        assert (owner == ALL) == (size**3 > total / devices)
    by_all = sum(shared_cost(s, 1, LEAVES) for s in sizes) / devices
    twice = sum(LEAVES * (s / LEAVES) ** 3 for s in sizes)
    loads = all_loads(sizes, owners, devices)
    assert loads.max() <= 2 * max(total / devices, by_all) + 2 * twice


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    sizes=st.data(),
    devices=st.integers(1, 9),
)
@settings(max_examples=100, deadline=None)
def test_every_matrix_has_one_place(counts, sizes, devices):
    stacks = [(k, sizes.draw(st.integers(1, 3000))) for k in counts]
    for (k, _), division in zip(stacks, divide(stacks, devices), strict=True):
        if division.shared:
            assert (division.owners == ALL).all()
            continue
        assert sorted(division.order) == list(range(k))
        assert division.counts.sum() == k
        places = set(zip(division.owners, division.places, strict=True))
        assert len(places) == k
        for owner, place in places:
            assert 0 <= place < division.counts[owner] <= division.slots
            at = division.order[division.first[owner] + place]
            assert division.owners[at] == owner
            assert division.places[at] == place


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    data=st.data(),
    devices=st.integers(1, 9),
)
@settings(max_examples=100, deadline=None)
def test_what_devices_exchange_is_packed(counts, data, devices):
    """Each device writes its slots in turn; every result is where it is looked for."""
    stacks = [(k, data.draw(st.integers(1, 6))) for k in counts]
    divisions = divide(stacks, devices, share=False)
    sizes = [d**2 for _, d in stacks]
    packing = pack(divisions, sizes)
    own = np.full((devices, packing.length), -1)
    for i, division in enumerate(divisions):
        for device, start in enumerate(packing.starts[i]):
            first, count = division.first[device], division.counts[device]
            written = np.zeros((division.slots, sizes[i]), int)
            mine = division.order[first : first + count]
            written[:count] = 1 + 100 * i + mine[:, None]
            own[device, start : start + written.size] = written.reshape(-1)
    for i, division in enumerate(divisions):
        for j, (owner, place) in enumerate(
            zip(division.owners, division.places, strict=True)
        ):
            start = packing.starts[i][owner] + place * sizes[i]
            assert (own[owner, start : start + sizes[i]] == 1 + 100 * i + j).all()
    used = [
        sum(d.counts[k] * s for d, s in zip(divisions, sizes, strict=True))
        for k in range(devices)
    ]
    assert packing.length <= max(used) + max(
        d.slots * s for d, s in zip(divisions, sizes, strict=True)
    )


def convolution(inputs, outputs, kernel):
    return [inputs * kernel**2, outputs]


def stage(inputs, width, count, outputs):
    """Bottleneck blocks, the first with a projection."""
    sizes = [*convolution(inputs, outputs, 1)]
    for block in range(count):
        sizes += convolution(outputs if block else inputs, width, 1)
        sizes += convolution(width, width, 3)
        sizes += convolution(width, outputs, 1)
    return sizes


SIZES = {
    "equal layers": [512] * 16,
    "three times as many": [512] * 48,
    "ResNet-50": [
        *convolution(3, 64, 7),
        *stage(64, 64, 3, 256),
        *stage(256, 128, 4, 512),
        *stage(512, 256, 6, 1024),
        *stage(1024, 512, 3, 2048),
        *(2049, 1000),
    ],
    "GPT-2": 12 * [769, 2304, 769, 768, 769, 3072, 3073, 768],
}


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        ("equal layers", 1.25),
        ("three times as many", 1.25),
        ("ResNet-50", 1.5),
        ("GPT-2", 1.5),
    ],
)
def test_work_is_shared_evenly(model, limit):
    sizes = [padded(d) for d in SIZES[model]]
    loads = all_loads(sizes, assign(sizes, 8), 8)
    assert loads.max() <= limit / 8 * sum(d**3 for d in sizes)


@jax.jit
@functools.partial(
    jax.shard_map, mesh=models.mesh(8, "batch"), in_specs=P(), out_specs=P()
)
def inverse_by_all(x):
    over, me = kfac_jax.OverAxis("batch"), jax.lax.axis_index("batch")
    return shared_inverse(x, Columns(me, 8, over._join_columns))


def spread_matrices(count, size, smallest):
    """Symmetric, eigenvalues from 1 down to the smallest."""
    rng = np.random.default_rng(size)
    basis = np.linalg.qr(rng.standard_normal((count, size, size)))[0]
    return (basis * np.geomspace(1, smallest, size)) @ basis.swapaxes(-1, -2)


@models.EIGHT_DEVICES
@pytest.mark.parametrize(("count", "size"), [(1, 48), (3, 40), (2, 6), (2, 18)])
def test_an_inverse_by_all_devices(count, size):
    x = spread_matrices(count, size, 1e-2)
    np.testing.assert_allclose(inverse_by_all(x), np.linalg.inv(x), 1e-9, 1e-9)
    assert not np.isfinite(np.asarray(inverse_by_all(-x))[:, 0, 0]).any()


@models.EIGHT_DEVICES
def test_all_devices_round_no_worse_than_one():
    """In float32 with a condition number of 1e5."""
    x = spread_matrices(2, 256, 1e-5).astype(np.float32)
    exact = np.linalg.inv(x.astype(float))

    def error(found):
        return np.linalg.norm(np.asarray(found) - exact) / np.linalg.norm(exact)

    assert 1e-6 < error(inverse_by_all(x)) < 2 * error(jax.jit(inverse_stack)(x))


@models.EIGHT_DEVICES
def test_what_all_devices_do_is_counted():
    """Products and gathered entries of the compiled inversion, leaves' roots apart."""
    size = 512
    x = jax.ShapeDtypeStruct((1, size, size), jnp.float64)
    compiled = inverse_by_all.lower(x).compile()
    leaves = LEAVES * (size / LEAVES) ** 3
    multiply_adds = compiled.cost_analysis()["flops"] / 2
    expected = shared_cost(size, 8, LEAVES) - leaves
    np.testing.assert_allclose(multiply_adds, expected, rtol=0.05)
    found = re.findall(COLLECTIVE, compiled.as_text())
    moved = sum(received(result, kind, 8) for result, kind in found)
    expected = 7 / 8 * 8 * shared_entries(size, LEAVES)
    np.testing.assert_allclose(moved, expected, rtol=0.01)


@models.EIGHT_DEVICES
def test_a_large_factor_is_inverted_by_all_devices(monkeypatch):
    """In a step, with the limit lowered to the size of a test."""
    monkeypatch.setattr(planner, "_SMALLEST_SHARED", 8)
    owners = kfac_jax.sharing_report(plan("diagonal"), AXIS, {"batch": 8}).owners
    assert () in [own for part in owners.values() for own in part.values()]
    distribute, average = ROUTES["shard_map"]
    tx, step = make_step(plan("diagonal"), "fixed", AXIS, average)
    models.assert_trees_close(
        trajectory(distribute(step, 8), tx),
        on_one_device("diagonal", "fixed"),
    )


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
        kfac_jax.kfac(curvature, devices=AXIS)
