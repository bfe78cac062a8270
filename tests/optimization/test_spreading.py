"""States that devices keep rows of: the way there and back, for every kind of layer."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_jax
from kfac_jax.losses import squared_error
from tests.helpers import models

CASES = 8
AXIS = kfac_jax.OverAxis("data", state_axes="data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A kind of layer, and how it is to be approximated."""

    apply: Callable[[Any, jax.Array], jax.Array]
    shapes: dict[str, tuple[int, ...]]
    x: jax.Array
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def relu_net(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"][None])
    return jnp.tanh(h @ p["v"]) @ p["u"]


def scales(p, x):
    z = x * p["scale"][None] + p["shift"][None]
    return z @ p["w"] + p["c"][None, None]


def tied(p, tokens):
    h = jnp.tanh(p["table"][tokens] @ p["w"])
    return h @ p["table"].T


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


def convolved(p, images):
    dimensions = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(
        images, p["k"], (1, 1), "SAME", dimension_numbers=dimensions
    )
    return jnp.tanh(h).reshape(len(h), -1) @ p["w"]


NET = {"w": (3, 7), "b": (7,), "v": (7, 5), "u": (5, 2)}
X, TOKENS = models.array(0, CASES, 3), models.classes(1, 11, CASES)
dense = functools.partial(Model, apply=relu_net, shapes=NET, x=X)
MODELS = {
    "dense": dense(),
    "dense, tridiagonal": dense(options={"structure": kfac_jax.BlockTridiagonal()}),
    "diagonal": dense(options={"blocks": kfac_jax.blocks.Diagonal()}),
    "full": dense(options={"blocks": kfac_jax.blocks.Full()}),
    "tnt": dense(options={"blocks": kfac_jax.blocks.TNT()}),
    "identity": dense(options={"blocks": kfac_jax.blocks.Identity()}),
    "one layer left as it is": dense(options={"blocks": {"v": None}}),
    "scales, and a scalar": Model(
        apply=scales,
        shapes={"scale": (3,), "shift": (3,), "w": (3, 2), "c": ()},
        x=X,
        options={"on_unmatched": "ignore"},
    ),
    "generic": Model(
        apply=lambda p, x: x @ kfac_jax.register_generic(jnp.sin(p["w"])),
        shapes={"w": (3, 4)},
        x=X,
        options={"on_unmatched": "ignore"},
    ),
    "tied": Model(apply=tied, shapes={"table": (11, 4), "w": (4, 4)}, x=TOKENS),
    "embedding with diagonal factors": Model(
        apply=lambda p, x: jnp.tanh(p["table"][x]) @ p["w"],
        shapes={"table": (11, 4), "w": (4, 3)},
        x=TOKENS,
        options={"blocks": kfac_jax.blocks.Kronecker(max_factor_dim=8)},
    ),
    "scanned": Model(apply=scanned, shapes={"w": (5, 3, 3)}, x=X),
    "scanned as often as wide": Model(apply=scanned, shapes={"w": (3, 3, 3)}, x=X),
    "convolution": Model(
        apply=convolved,
        shapes={"k": (3, 3, 2, 5), "w": (80, 3)},
        x=models.array(2, CASES, 4, 4, 2),
    ),
}


@functools.cache
def setup(name):
    """The plan, parameters and arguments."""
    model = MODELS[name]
    params = {
        key: models.array(i, *shape, scale=0.5)
        for i, (key, shape) in enumerate(model.shapes.items())
    }
    out = jax.eval_shape(model.apply, params, model.x).shape

    def loss_fn(params, x, y):
        return squared_error(model.apply(params, x), y).sum(-1).mean()

    args = model.x, models.array(9, *out)
    curvature = kfac_jax.make_curvature(
        loss_fn, params, *args, estimation_mode="fisher_empirical", **model.options
    )
    return curvature, params, args


def kfac(curvature, distribution=None):
    return kfac_jax.kfac(
        curvature, 0.1, 0.9, 0.1, inverse_every=2, devices=distribution
    )


def step_of(curvature, tx, average=lambda x: x):
    def step(params, state, *args):
        _, grads, statistics = curvature.value_grad_and_statistics(params, *args)
        grads = jax.tree.map(average, grads)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def on_one_device(name):
    """After two steps, and after three."""
    curvature, params, args = setup(name)
    tx = kfac(curvature)
    step, found = jax.jit(step_of(curvature, tx)), [(params, tx.init(params))]
    for _ in range(3):
        found.append(step(*found[-1], *args))
    return found[2:]


FAST = {
    "dense, tridiagonal",
    "scales, and a scalar",
    "tied",
    "scanned as often as wide",
}


@pytest.mark.sampled(2)
@models.EIGHT_DEVICES
@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
)
def test_a_state_that_is_spread_goes_on_as_the_whole_one(name):
    curvature, _, args = setup(name)
    over = kfac_jax.OverMesh(models.mesh(8, "data"), state_axes="data")
    (params, state), after = on_one_device(name)
    spread = kfac_jax.spread_state(curvature, state, over)
    models.assert_trees_equal(kfac_jax.whole_state(curvature, spread, over), state)
    models.assert_trees_equal(kfac_jax.whole_state(curvature, spread), state)
    tx = kfac(curvature, over)
    like = tx.init(params)
    assert jax.tree.structure(spread) == jax.tree.structure(like)
    for x, y in zip(jax.tree.leaves(spread), jax.tree.leaves(like), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    params, spread = jax.jit(step_of(curvature, tx))(params, spread, *args)
    models.assert_trees_close(
        (params, kfac_jax.whole_state(curvature, spread, over)), after
    )


# ------------------------------------------------------------------- other routes


def mapped(function, devices, outs, *ins, **options):
    """Over the axis, compiled."""
    mesh = models.mesh(devices, "data")
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=outs, **options)
    )


@pytest.mark.sampled(3)
@models.EIGHT_DEVICES
@pytest.mark.parametrize(
    "name",
    [
        "dense, tridiagonal",
        "scales, and a scalar",
        "tied",
        pytest.param("convolution", marks=pytest.mark.slow),
        pytest.param("scanned as often as wide", marks=pytest.mark.slow),
    ],
)
def test_a_state_is_spread_inside_of_shard_map(name):
    curvature, _, args = setup(name)
    tx, specs, batch = kfac(curvature, AXIS), kfac_jax.state_specs(AXIS), P("data")
    (params, state), after = on_one_device(name)
    cut = functools.partial(kfac_jax.spread_state, curvature, devices=AXIS)
    join = functools.partial(kfac_jax.whole_state, curvature, devices=AXIS)
    spread = mapped(cut, 8, specs, P())(state)
    models.assert_trees_equal(mapped(join, 8, P(), specs)(spread), state)
    models.assert_trees_equal(kfac_jax.whole_state(curvature, spread), state)
    step = step_of(curvature, tx, lambda x: x / jax.lax.axis_size("data"))
    step = mapped(step, 8, (P(), specs), P(), specs, batch, batch)
    params, spread = step(params, spread, *args)
    models.assert_trees_close((params, kfac_jax.whole_state(curvature, spread)), after)


@models.EIGHT_DEVICES
def test_a_state_is_spread_inside_of_pmap():
    curvature, _, _ = setup("dense")
    (_, state), _ = on_one_device("dense")

    def there_and_back(state, _):
        spread = kfac_jax.spread_state(curvature, state, AXIS)
        return spread.factors, kfac_jax.whole_state(curvature, spread, AXIS)

    route = jax.pmap(there_and_back, "data", in_axes=(None, 0))
    factors, found = route(state, jnp.zeros(8))
    assert factors["v"]["input"].shape == (8, 1, 7)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[3], y), found, state)


@models.EIGHT_DEVICES
@pytest.mark.parametrize("kept", ["model", ("data", "model")])
def test_some_axes_of_a_mesh_keep_parts(kept):
    curvature, _, _ = setup("dense")
    (_, state), _ = on_one_device("dense")
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    over = kfac_jax.OverMesh(mesh, state_axes=kept)
    spread = kfac_jax.spread_state(curvature, state, over)
    rows = spread.factors["v"]["input"]
    assert rows.addressable_shards[0].data.shape == (1 if len(kept) == 2 else 4, 7)
    models.assert_trees_equal(kfac_jax.whole_state(curvature, spread, over), state)


@models.EIGHT_DEVICES
@pytest.mark.parametrize("into", [1, 2, 8])
def test_a_state_moves_between_meshes(into):
    """From two devices: arrays that are committed to them go to the others."""
    curvature, _, _ = setup("dense")
    (_, state), _ = on_one_device("dense")
    two = kfac_jax.OverMesh(models.mesh(2, "data"), state_axes="data")
    spread = kfac_jax.spread_state(curvature, state, two)
    over = kfac_jax.OverMesh(models.mesh(into, "data"), state_axes="data")
    for whole in (
        kfac_jax.whole_state(curvature, spread),
        kfac_jax.whole_state(curvature, spread, two),
    ):
        moved = kfac_jax.spread_state(curvature, whole, over)
        for x in jax.tree.leaves(moved):
            assert x.sharding.device_set == set(over.mesh.devices.flat)
        models.assert_trees_equal(kfac_jax.whole_state(curvature, moved, over), state)


@models.EIGHT_DEVICES
def test_a_state_is_spread_under_jit():
    curvature, _, _ = setup("dense")
    (_, state), _ = on_one_device("dense")
    over = kfac_jax.OverMesh(models.mesh(8, "data"), state_axes="data")

    @jax.jit
    def there_and_back(state):
        spread = kfac_jax.spread_state(curvature, state, over)
        return spread, kfac_jax.whole_state(curvature, spread, over)

    spread, found = there_and_back(state)
    models.assert_trees_equal(spread, kfac_jax.spread_state(curvature, state, over))
    models.assert_trees_equal(found, state)


@models.EIGHT_DEVICES
def test_a_state_that_was_spread_compiles_its_step_once():
    curvature, params, args = setup("dense")
    over = kfac_jax.OverMesh(models.mesh(8, "data"), state_axes="data")
    start = params, kfac(curvature).init(params)
    params, state = kfac_jax.spread_state(curvature, start, over)
    step = jax.jit(models.traced_once(step_of(curvature, kfac(curvature, over))))
    for _ in range(3):
        params, state = step(params, state, *args)
    assert step._cache_size() <= 1  # or 0, where JAX has forgotten it


@models.EIGHT_DEVICES
def test_without_state_axes_the_state_is_whole_and_lies_on_the_mesh():
    curvature, _, _ = setup("dense")
    (_, state), _ = on_one_device("dense")
    over = kfac_jax.OverMesh(models.mesh(8, "data"))
    moved = kfac_jax.spread_state(curvature, state, over)
    models.assert_trees_equal(moved, state)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(moved))
    assert kfac_jax.whole_state(curvature, moved, over) is moved
    axis = kfac_jax.OverAxis("data")
    assert kfac_jax.spread_state(curvature, state, axis).factors == state.factors


def test_specs_without_parts_say_that_all_is_the_same():
    for over in (None, kfac_jax.OverAxis("data")):
        assert set(kfac_jax.state_specs(over)) == {P()}


# ------------------------------------------------------- states inside of other states


def masked(curvature, distribution=None):
    return optax.masked(kfac(curvature, distribution), {"w": True, "v": False} | REST)


def chained(curvature, distribution=None):
    return optax.chain(
        kfac_jax.scale_by_kfac(curvature, 0.1, devices=distribution),
        optax.trace(0.9),
        optax.scale_by_learning_rate(0.1),
    )


REST = {"b": True, "u": True}
AROUND = {"masked": masked, "chained": chained}


@models.EIGHT_DEVICES
@pytest.mark.parametrize("kind", AROUND)
def test_states_in_other_states_are_found(kind):
    curvature, params, args = setup("dense")
    tx = AROUND[kind](curvature)
    step = jax.jit(step_of(curvature, tx))
    params, state = step(params, tx.init(params), *args)
    after = step(params, state, *args)
    over = kfac_jax.OverMesh(models.mesh(8, "data"), state_axes="data")
    here, spread = kfac_jax.spread_state(curvature, (params, state), over)
    for x in jax.tree.leaves((here, spread)):
        assert len(x.sharding.device_set) == 8
    models.assert_trees_equal(kfac_jax.whole_state(curvature, spread), state)
    tx = AROUND[kind](curvature, over)
    assert jax.tree.structure(tx.init(params)) == jax.tree.structure(spread)
    found = jax.jit(step_of(curvature, tx))(here, spread, *args)
    models.assert_trees_close(kfac_jax.whole_state(curvature, found, over), after)


# ------------------------------------------------------------------------------ errors


def states():
    """A plan, its state, and a state of another plan."""
    curvature, params, _ = setup("dense")
    other, weights, _ = setup("tied")
    return curvature, kfac(curvature).init(params), kfac(other).init(weights)


def cut(state):
    return state._replace(factors=jax.tree.map(lambda x: x[:2], state.factors))


WRONG = {
    "or a tree with it; got a dict. Restore": lambda curvature, state, _: (
        kfac_jax.whole_state(curvature, state._asdict())
    ),
    "or a tree with it; got ()": lambda curvature, state, _: kfac_jax.spread_state(
        curvature, (), AXIS
    ),
    "of another plan: expected": lambda curvature, _, other: kfac_jax.whole_state(
        curvature, other._replace(velocity=())
    ),
    "the structure of the parameters": lambda curvature, _, other: (
        kfac_jax.spread_state(curvature, other, AXIS)
    ),
    "Expected rows of an array of shape (3, 7) in the state; got (3, 7)": (
        lambda curvature, state, _: kfac_jax.whole_state(curvature, state)
    ),
    "Expected rows of an array of shape (5, 5) in the state; got (2, 5)": (
        lambda curvature, state, _: kfac_jax.whole_state(curvature, cut(state))
    ),
    "Expected whole arrays of an array of shape (5, 5) in the state": (
        lambda curvature, state, _: kfac_jax.spread_state(curvature, cut(state), AXIS)
    ),
    "devices must be None, kfac_jax.OverAxis": lambda curvature, state, _: (
        kfac_jax.whole_state(curvature, state, 8)
    ),
    "kfac_jax.OverMesh(mesh); got 'data'": lambda curvature, state, _: (
        kfac_jax.spread_state(curvature, state, "data")
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_states_that_do_not_fit(message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        WRONG[message](*states())


def state_of_eight(curvature, params):
    over = kfac_jax.OverMesh(models.mesh(8, "data"), state_axes="data")
    return kfac_jax.spread_state(curvature, kfac(curvature).init(params), over)


@models.EIGHT_DEVICES
@pytest.mark.parametrize("make", [kfac, chained])
@pytest.mark.parametrize("devices", [1, 2, None])
def test_a_state_of_another_number_of_devices(make, devices):
    """What is said before anything is computed, even without jit."""
    curvature, params, _ = setup("dense")
    over, statistics = None, curvature.zero_statistics(params)
    if devices is not None:
        over = kfac_jax.OverMesh(models.mesh(devices, "data"), state_axes="data")
    tx, state = make(curvature, over), state_of_eight(curvature, params)
    if make is chained:
        state = (state._replace(velocity=()), *tx.init(params)[1:])
    with pytest.raises(ValueError, match="another number of devices goes through"):
        tx.update(params, state, params, statistics=statistics)


@models.EIGHT_DEVICES
def test_a_whole_state_where_devices_keep_rows():
    curvature, params, _ = setup("dense")
    over = kfac_jax.OverMesh(models.mesh(8, "data"), state_axes="data")
    state, statistics = kfac(curvature).init(params), curvature.zero_statistics(params)
    with pytest.raises(ValueError, match="another number of devices goes through"):
        kfac(curvature, over).update(params, state, params, statistics=statistics)


@pytest.mark.parametrize("block", [kfac_jax.blocks.Eigen(), kfac_jax.blocks.TNT()])
def test_blocks_with_a_basis_have_no_rows(block):
    _, params, args = setup("dense")
    loss_fn = setup("dense")[0].loss_fn
    curvature = kfac_jax.make_curvature(loss_fn, params, *args, blocks={"v": block})
    over = kfac_jax.OverAxis("data", state_axes="data")
    if isinstance(block, kfac_jax.blocks.TNT):  # its factors are averages
        kfac(curvature, over)
        return
    with pytest.raises(ValueError, match=r"With state_axes devices keep rows .*\['v'"):
        kfac(curvature, over)


def test_parts_along_axes_that_do_not_share():
    with pytest.raises(ValueError, match="OverAxis cuts the state along some of its"):
        kfac_jax.OverAxis("data", state_axes="model")
    with pytest.raises(
        ValueError,
        match=r"shares over, \('data',\): expected some of them, got \['model'\]",
    ):
        kfac_jax.OverMesh(models.mesh(1, "data"), state_axes="model")


def test_a_report_needs_the_sizes_of_axes():
    curvature = setup("dense")[0]
    over = kfac_jax.OverAxis(("data", "model"))
    with pytest.raises(ValueError, match=r"got none for \['model'\]. Pass axis_sizes="):
        kfac_jax.sharing_report(curvature, over, {"data": 4})
    with pytest.raises(TypeError, match="devices must be None"):
        kfac_jax.sharing_report(curvature, "data")
    with pytest.raises(TypeError, match="devices must be an OverAxis or OverMesh, for"):
        kfac_jax.sharing_report(curvature, None)


def test_a_report_of_what_kfac_refuses():
    dense, params, args = setup("dense")
    curvature = kfac_jax.make_curvature(
        dense.loss_fn, params, *args, blocks=kfac_jax.blocks.Eigen()
    )
    with pytest.raises(ValueError, match="Give them Kronecker blocks, or leave state_"):
        kfac_jax.sharing_report(curvature, AXIS, {"data": 4})


ROUTES = {
    "pmap without a name": lambda f, x: jax.pmap(f)(x[None]),
    "pmap over another axis": lambda f, x: jax.pmap(f, "batch")(x[None]),
    "jit": lambda f, x: jax.jit(f)(x),
    "shard_map over another axis": lambda f, x: jax.shard_map(
        f, mesh=models.mesh(1, "batch"), in_specs=P(), out_specs=P()
    )(x),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("state_axes", [(), "data"])
@pytest.mark.parametrize("route", ROUTES)
def test_an_axis_that_is_not_there(route, state_axes):
    curvature, params, _ = setup("dense")
    tx = kfac(curvature, kfac_jax.OverAxis("data", state_axes))

    def step(x):
        state = tx.init(params)
        statistics = curvature.zero_statistics(params)
        return tx.update(params, state, params, statistics=statistics)[0], x

    with pytest.raises(ValueError, match=r"axis of OverAxis\('data'\) does not exist"):
        ROUTES[route](step, jnp.zeros(()))


@models.EIGHT_DEVICES
def test_what_jax_says_of_cases_that_devices_cannot_divide():
    """The documentation quotes it; the library adds nothing."""
    mesh, x = models.mesh(8, "data"), jnp.zeros((12, 2))
    with pytest.raises(ValueError, match="divi"):
        jax.device_put(x, NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match="not evenly divisible"):
        mapped(lambda x: x, 8, P("data"), P("data"))(x)
