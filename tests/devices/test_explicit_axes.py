"""Steps on meshes whose axes are Explicit, against the same steps on one device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

import kfac_jax
from tests.devices.device_problem import (
    RULES,
    STEPS,
    STRUCTURES,
    make_step,
    on_one_device,
    problem,
    split_last,
)
from tests.helpers import models

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


LAYOUTS = {  # mesh, network, how parameters lie, axes that share work, and the state
    "batch": ({"data": 8}, batch_only, lambda x: P(), None, ()),
    "batch, shared": ({"data": 8}, batch_only, lambda x: P(), ("data",), ()),
    "parameters, shared": ({"data": 8}, gathered, split_rows, ("data",), ()),
    "parameters and state, shared": (
        {"data": 8},
        gathered,
        split_rows,
        ("data",),
        ("data",),
    ),
    "outputs, shared over one": (
        AXES,
        with_out_shardings,
        lambda x: split_last(x, "model", 2),
        ("data",),
        (),
    ),
    "auto_axes inside, shared over two": (
        AXES,
        left_to_the_compiler,
        lambda x: split_last(x, "model", 2),
        ("data", "model"),
        (),
    ),
    "auto_axes inside, shared over two, state over one": (
        AXES,
        left_to_the_compiler,
        lambda x: split_last(x, "model", 2),
        ("data", "model"),
        ("model",),
    ),
}


def loss_on(apply):
    def loss_fn(params, x, y):
        return models.FAMILIES["softmax"].mean_loss(apply(params, x), y)

    return loss_fn


def placed(mesh, place, p=None):
    p = problem() if p is None else p
    params = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, place(x))), p.params
    )
    return params, jax.device_put(p.args, NamedSharding(mesh, P("data")))


CASES = [  # the adaptive rules also take what fixed ones do
    ("batch", "diagonal", "adaptive"),
    pytest.param("batch", "tridiagonal", "fixed", marks=pytest.mark.slow),
    pytest.param("batch, shared", "tridiagonal", "adaptive", marks=pytest.mark.slow),
    pytest.param("parameters, shared", "diagonal", "adaptive", marks=pytest.mark.slow),
    pytest.param("parameters, shared", "tridiagonal", "fixed", marks=pytest.mark.slow),
    ("parameters, shared", "tridiagonal", "adaptive"),
    ("parameters and state, shared", "diagonal", "adaptive"),
    pytest.param(
        "parameters and state, shared", "tridiagonal", "fixed", marks=pytest.mark.slow
    ),
    ("auto_axes inside, shared over two, state over one", "diagonal", "adaptive"),
    pytest.param(
        "outputs, shared over one", "diagonal", "adaptive", marks=pytest.mark.slow
    ),
    pytest.param(
        "outputs, shared over one", "tridiagonal", "adaptive", marks=pytest.mark.slow
    ),
    pytest.param(
        "auto_axes inside, shared over two", "diagonal", "fixed", marks=pytest.mark.slow
    ),
    ("auto_axes inside, shared over two", "tridiagonal", "adaptive"),
]


@pytest.mark.sampled(4)
@models.EIGHT_DEVICES
@pytest.mark.parametrize(("layout", "structure", "rules"), CASES)
def test_steps_are_those_on_one_device(layout, structure, rules):
    axes, apply, place, shared, kept = LAYOUTS[layout]
    mesh = explicit_mesh(**axes)
    options = {"structure": STRUCTURES[structure]} if STRUCTURES[structure] else {}
    expected, (params, args) = on_one_device(structure, rules), placed(mesh, place)
    with jax.set_mesh(mesh):
        curvature = kfac_jax.make_curvature(
            loss_on(apply), params, *args, estimation_mode="fisher_exact", **options
        )
        distribution = kfac_jax.OverMesh(mesh, shared, kept) if shared else None
        tx = kfac_jax.kfac(
            curvature, inverse_every=2, devices=distribution, **RULES[rules]
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
        if kept:
            state = kfac_jax.whole_state(curvature, state, distribution)
    models.assert_trees_close((params, state._replace(inverses=None)), expected)


# ------------------------------------------------------- what else meets sharded arrays


@functools.cache
def plain(**options):
    p = problem()
    return kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode="fisher_exact", **options
    )


def sampled_step(params, args):
    """Draws targets; takes a number of cases that eight devices cannot share evenly."""
    p = problem()
    curvature = kfac_jax.make_curvature(
        p.loss_fn, params, *args, statistics_fraction=0.75, num_samples=2
    )
    tx = kfac_jax.kfac(
        curvature,
        kfac_jax.QuadraticModel(fraction=0.75),
        damping=kfac_jax.LevenbergMarquardt(1.0, every=1),
    )
    value, grads, statistics = curvature.value_grad_and_statistics(
        params, *args, rng=jax.random.key(0)
    )
    return tx.update(
        grads, tx.init(params), params, statistics=statistics, value=value, args=args
    )


def every_block(params, args):
    p, updates = problem(), []
    for block in (
        kfac_jax.blocks.Eigen(),
        kfac_jax.blocks.Diagonal(),
        kfac_jax.blocks.Full(),
        kfac_jax.blocks.TNT(),
        kfac_jax.blocks.Kronecker(gradient_products=True),
        kfac_jax.blocks.Kronecker(fit="frobenius"),
        None,
    ):
        mode = "inputs" if block is None else "fisher_empirical"
        curvature = kfac_jax.make_curvature(
            p.loss_fn, params, *args, estimation_mode=mode, blocks=block
        )
        tx = kfac_jax.scale_by_kfac(curvature, jnp.asarray(0.1), decay=jnp.asarray(0.9))
        if block is None:
            tx = kfac_jax.scale_by_inputs(curvature, -0.5)
        _, grads, statistics = curvature.value_grad_and_statistics(params, *args)
        updates.append(tx.update(grads, tx.init(params), statistics=statistics)[0])
    return updates


def exact_products(params, args):
    curvature = plain()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    return (
        curvature.matvec(params, params, *args),
        curvature.matvec(params, params, *args, matrix="hessian"),
        curvature.quadratic_form(params, [params, params], *args),
        curvature.quadratic_form(params, stacked, *args),
    )


def operators(params, args):
    curvature = plain()
    statistics = curvature.value_grad_and_statistics(params, *args)[2]
    factors = curvature.update_factors(curvature.init_factors(params), statistics, 1)
    operator = curvature.approximation(factors)
    return (
        operator.matvec(params),
        operator.solve(params, damping=0.1),
        operator.power(params, -0.5, damping=0.1),
        operator.logdet(0.1),
    )


def scanned(params, args):
    """Every other step gathers nothing; two seeds at once."""
    curvature = plain()
    tx = kfac_jax.kfac(curvature, 0.1, 0.9, 0.1, inverse_every=2)

    def run(scale):
        def step(carry, i):
            params, state = carry
            value, grads, statistics = jax.lax.cond(
                i % 2 == 0,
                lambda: curvature.value_grad_and_statistics(params, *args),
                lambda: (
                    *curvature.value_and_grad(params, *args),
                    curvature.zero_statistics(params),
                ),
            )
            updates, state = tx.update(grads, state, params, statistics=statistics)
            return (jax.tree.map(jnp.add, params, updates), state), value

        start = jax.tree.map(lambda x: scale * x, params)
        (end, _), values = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(3))
        return end, values

    return jax.vmap(run)(jnp.asarray([1.0, 1.1]))


PROGRAMS = {
    f.__name__: f
    for f in (sampled_step, every_block, exact_products, operators, scanned)
}


@pytest.mark.sampled(4)
@models.EIGHT_DEVICES
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_are_those_on_one_device(program):
    p, run = problem(), PROGRAMS[program]
    expected = jax.jit(run)(p.params, p.args)
    mesh = explicit_mesh(data=8)
    params, args = placed(mesh, lambda x: P())
    with jax.set_mesh(mesh):
        found = jax.jit(run)(params, args)
    models.assert_trees_close(found, expected)


@models.EIGHT_DEVICES
def test_vectors_that_are_sharded_stay_so():
    params, _ = placed(explicit_mesh(data=8), split_rows)
    operator = plain().approximation(plain().init_factors(problem().params))
    with jax.set_mesh(explicit_mesh(data=8)):
        found = jax.jit(operator.matvec)(params)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, params)


@models.EIGHT_DEVICES
def test_nothing_is_brought_together_for_statistics():
    """What is exchanged are sums, as many as there are without Explicit axes."""
    texts = []
    for kind in AxisType.Explicit, AxisType.Auto:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        args = jax.device_put(problem().args, NamedSharding(mesh, P("data")))
        params = {
            name: {"w": jax.device_put(layer["w"], NamedSharding(mesh, P()))}
            for name, layer in problem().params.items()
        }
        with jax.set_mesh(mesh):
            curvature = kfac_jax.make_curvature(
                problem().loss_fn,
                params,
                *args,
                estimation_mode="fisher_empirical",
                structure=kfac_jax.BlockTridiagonal(),
            )
            compute = jax.jit(curvature.value_grad_and_statistics)
            texts.append(compute.lower(params, *args).compile().as_text())
    assert not any(x in text for text in texts for x in ("all-gather(", "all-to-all("))
    assert len({text.count(" all-reduce(") for text in texts}) == 1


@pytest.mark.slow
@models.EIGHT_DEVICES
def test_without_a_mesh_in_the_context():
    """The arrays' types tell; and steps without `jit` do as well in a context."""
    mesh = explicit_mesh(data=8)
    p = models.problem("squared", params=models.dense_params(0, 3, 4), x=problem().x)
    curvature = kfac_jax.make_curvature(
        p.loss_fn, p.params, *p.args, estimation_mode="fisher_exact"
    )
    tx, step = make_step(curvature, "fixed", None)
    expected = jax.jit(step)(p.params, tx.init(p.params), *p.args)[0]
    params, args = placed(mesh, lambda x: P(), p)
    models.assert_trees_close(
        jax.jit(step)(params, tx.init(params), *args)[0], expected
    )
    with jax.set_mesh(mesh):
        models.assert_trees_close(step(params, tx.init(params), *args)[0], expected)
