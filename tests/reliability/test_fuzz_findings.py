"""What `tests/fuzz` found: the smallest plain program that once went wrong, of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kfac_jax
from kfac_jax.losses import squared_error
from tests.helpers import models, oracles

X = models.array(0, 4, 2)


def blocks_of(apply, params, x=X, **options):
    """The plan of a squared error, its dense matrix, and the exact one."""

    def loss_fn(params, x):
        return squared_error(jnp.sin(apply(params, x))).sum(-1).mean()

    plan, factors = models.exact_factors(loss_fn, params, x, **options)
    exact = oracles.ggn(
        lambda p: jnp.sin(apply(p, x)),
        lambda z: jnp.square(z).sum(),
        jax.tree.map(lambda w: w.astype(float), params),
    )
    return plan, np.asarray(plan.approximation(factors).to_dense()), exact


def assert_exact(plan, found, exact, params, *layers):
    """Each of these layers, named by its parameters, has the exact block."""
    assert {layer.params for layer in plan.layers} >= set(layers)
    for names in layers:
        np.testing.assert_allclose(
            oracles.block(found, params, *names),
            oracles.block(exact, params, *names),
            rtol=1e-9,
            atol=1e-13,
        )


def add(y, b):
    return y + jnp.broadcast_to(b, y.shape)


@pytest.mark.parametrize("width", [1, 2])
def test_one_bias_of_joined_weights_is_a_layer_by_itself(width):
    """It joined the last weight, which has only some of the outputs."""
    params = {
        "b": models.array(1, 2 * width),
        "v": models.array(2, 2, width),
        "w": models.array(3, 2, width),
    }

    def apply(p, x):
        return add(x @ jnp.concatenate([p["v"], p["w"]], -1), p["b"])

    full = {"v|w": kfac_jax.blocks.Full()}
    plan, found, exact = blocks_of(apply, params, blocks=full)
    assert_exact(plan, found, exact, params, ("v",), ("w",))
    (bias,) = (layer for layer in plan.layers if layer.params == ("b",))
    assert bias.kind == "shift" and bias.shape.outputs == 2 * width


def test_parameters_of_several_types_under_strict_promotion():
    """Three places added or joined them without saying in which type."""
    params = {"b": jnp.ones(3, jnp.float32), "w": models.array(1, 2, 3)}

    def apply(p, x):
        return add(x @ p["w"], p["b"].astype(float))

    plan, found, exact = blocks_of(apply, params, blocks=kfac_jax.blocks.Full())
    assert found.dtype == np.float64
    (layer,) = plan.layers
    assert layer.params == ("w", "b")
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)


TAGGED = {
    "dense": lambda p, x: kfac_jax.register_dense(
        add(x @ p["w"], p["b"]), x, p["w"], p["b"]
    ),
    "scale and shift": lambda p, x: kfac_jax.register_scale_and_shift(
        add(x * add(jnp.zeros_like(x), p["s"]), p["b"]), x, p["s"], p["b"]
    ),
}
SQUARE = {
    "b": models.array(1, 2),
    "s": models.array(2, 2),
    "w": models.array(3, 2, 2),
}


def own(name):
    """The parameters of one of these."""
    return {k: x for k, x in SQUARE.items() if k in {"dense": "wb"}.get(name, "sb")}


@pytest.mark.parametrize("name", TAGGED)
def test_the_bias_of_a_tagged_layer_may_be_used_elsewhere(name):
    """The other use was lost: bias and weight had a block of the tagged use only."""
    params = own(name)
    apply = lambda p, x: add(jnp.tanh(TAGGED[name](p, x)), p["b"])  # noqa: E731
    plan, found, exact = blocks_of(apply, params)
    weight = "w" if name == "dense" else "s"
    assert {layer.params: layer.uses for layer in plan.layers} == {
        ("b",): 2,
        (weight,): 1,
    }
    if name != "dense":
        assert_exact(plan, found, exact, params, ("s",))


@pytest.mark.parametrize("name", TAGGED)
def test_a_tagged_bias_with_a_factor_is_no_homogeneous_coordinate(name):
    """The factor was lost."""
    params = own(name)
    apply = lambda p, x: TAGGED[name](p | {"b": 3.0 * p["b"]}, x)  # noqa: E731
    plan, found, exact = blocks_of(apply, params, blocks=kfac_jax.blocks.Full())
    weight = "w" if name == "dense" else "s"
    assert_exact(plan, found, exact, params, ("b",), (weight,))


def test_a_tagged_bias_that_joins_no_weight_is_not_called_unused():
    """Two tags have the same weight and different biases."""
    params = {"b": models.array(1, 2), "c": models.array(2, 2), "w": SQUARE["w"]}

    def apply(p, x):
        h = jnp.tanh(TAGGED["dense"]({"w": p["w"], "b": p["b"]}, x))
        return TAGGED["dense"]({"w": p["w"], "b": p["c"]}, h)

    plan, found, exact = blocks_of(
        apply, params, blocks={"b|c": kfac_jax.blocks.Full()}
    )
    assert [layer.kind for layer in plan.layers] == ["shift", "shift", "dense"]
    assert_exact(plan, found, exact, params, ("b",), ("c",))


APPLIED = {
    "after a dense layer": lambda p, x: add(add(x @ p["w"], p["b"]), p["c"]),
    "by themselves": lambda p, x: add(add(x, p["b"]), p["c"]),
    "the first cut": lambda p, x: add(add(x, p["d"][:2]), p["c"]),
    "after a tag": lambda p, x: add(TAGGED["dense"](p, x), p["c"]),
}


@pytest.mark.parametrize("name", APPLIED)
def test_two_shifts_in_a_row_are_of_two_parameters(name):
    """The first was called unused, and its statistics went to the second."""
    made = {c: models.array(i, 3 if c == "d" else 2) for i, c in enumerate("bcd")}
    made["w"] = SQUARE["w"]
    names = {"by themselves": "bc", "the first cut": "cd"}.get(name, "bcw")
    params = {c: made[c] for c in names}
    plan, found, exact = blocks_of(APPLIED[name], params, blocks=kfac_jax.blocks.Full())
    assert sorted(x for layer in plan.layers for x in layer.params) == sorted(names)
    assert all((layer.uses, layer.kind) != (0, "unused") for layer in plan.layers)
    joined = [("c",), ("w", "b")] if "w" in names else [(c,) for c in names]
    assert_exact(plan, found, exact, params, *joined)


def test_a_tied_weight_of_which_one_use_has_no_gradient():
    """The norm of its zero factors was 0 / 0 when compiled, and so was all else."""
    params = {"t": models.array(2, 5, 3), "w": models.array(1, 2, 3)}

    def loss_fn(params, x, ids):
        def picked(h, t):
            del h
            return t[ids]

        own = jax.custom_jvp(picked)
        own.defjvp(lambda primals, tangents: jax.jvp(picked, primals, tangents))
        h = own(jnp.tanh(x @ params["w"]), params["t"])
        return squared_error(h @ params["w"].T).sum(-1).mean()

    args = X, jnp.arange(4)
    plan = kfac_jax.make_curvature(loss_fn, params, *args, estimation_mode="ggn_exact")

    @jax.jit
    def dense(params, *args):
        statistics = plan.value_grad_and_statistics(params, *args)[2]
        factors = plan.update_factors(plan.init_factors(params), statistics, 1)
        return factors["w"], plan.approximation(factors).to_dense()

    factors, found = dense(params, *args)
    assert not np.any(factors["output"])
    expected = np.kron(factors["transposed_output"], factors["transposed_input"])
    own = oracles.block(np.asarray(found), params, "w")
    np.testing.assert_allclose(own, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("examples", [2, 4])
def test_tagged_members_of_an_ensemble_for_each_example(examples):
    """Examples were taken for members: a crash, or wrong where there are as many."""
    params = {"b": models.array(1, 2, 3), "w": models.array(2, 2, 2, 3)}

    def apply(p, x):
        def one(x):
            copies = jnp.broadcast_to(x, (2, *x.shape))
            return jax.vmap(TAGGED["dense"])(p, copies).sum(0)

        return jax.vmap(one)(x)

    full = kfac_jax.blocks.Full()
    plan, found, exact = blocks_of(apply, params, X[:examples], blocks=full)
    assert [layer.params for layer in plan.layers] == [("w", "b")]
    assert_exact(plan, found, exact, params, ("w", "b"))


def test_a_table_and_its_half_have_one_hot_inputs():
    """The oracle had the half in the inputs; with two uses that is another A ⊗ G."""
    params, ids, others = {"t": models.array(1, 4, 3)}, [0, 0, 1], [2, 3, 3]

    def apply(p, x):
        del x
        return jnp.concatenate([p["t"][jnp.array(ids)] / 2, p["t"][jnp.array(others)]])

    _, found, exact = blocks_of(apply, params)
    a = np.diag(np.bincount(ids + others)) / 6
    g = np.einsum("titj->ij", np.reshape(exact, (4, 3, 4, 3)))
    np.testing.assert_allclose(found, np.kron(a, g), rtol=1e-9, atol=1e-13)


def scanned(function):
    """A function of a weight and a value, as the one step of a scan."""

    def run(w, x):
        return jax.lax.scan(lambda x, _: (function(w, x), None), x, length=1)[0]

    return run


def carried(function):
    """The same, with the weight in the carry."""

    def run(w, x):
        step = lambda carry, _: ((carry[0], function(*carry)), None)  # noqa: E731
        return jax.lax.scan(step, (w, x), length=2)[0][1]

    return run


def chosen(function):
    """The same, as a branch."""
    return lambda w, x: jax.lax.cond(x[0, 0] > -9, function, lambda w, x: x, w, x)


HANDED = {
    "checkpoint": jax.checkpoint,
    "carry of a scan": carried,
    "cond": chosen,
    "scan of cond": lambda function: scanned(chosen(function)),
}


@pytest.mark.parametrize("name", HANDED)
def test_a_slice_that_is_handed_over_and_not_used_is_no_use(name):
    """All operands of what has a body counted as needed: the slice was one too much."""
    params = {"u": models.array(1, 2, 2, 2), "w": models.array(2, 2, 2)}

    def apply(p, x):
        run = HANDED[name](lambda w, x: jnp.sin(x @ p["w"]))
        return run(p["u"][1], x)

    plan, _, exact = blocks_of(apply, params)
    kinds = {layer.name: layer.kind for layer in plan.layers}
    assert kinds == {"u": "unused", "w": "dense"}
    assert not exact[:8].any()


def test_a_slice_that_a_loop_hands_on_is_used_in_the_end():
    """One step puts it into the carry, the next but one uses it."""
    params = {"u": models.array(1, 2, 2, 2), "w": models.array(2, 2, 2)}

    def apply(p, x):
        def step(carry, _):
            first, second, x = carry
            return (second, p["u"][1], x @ first), None

        return jax.lax.scan(step, (p["w"], p["w"], x), length=3)[0][2]

    plan, _, exact = blocks_of(apply, params, on_unmatched="ignore")
    assert {layer.name: layer.kind for layer in plan.layers} == dict.fromkeys(
        params, "unmatched"
    )
    assert np.diag(exact)[4:8].all()


def test_what_a_custom_rule_has_a_gradient_for_is_reported():
    """Though the function itself does not use it."""
    params = {"u": models.array(1, 2, 2, 2), "w": models.array(2, 2, 2)}

    @jax.custom_vjp
    def own(w, x):
        del w
        return x

    own.defvjp(lambda w, x: (x, (w, x)), lambda saved, g: (saved[1].T @ g, g))

    def apply(p, x):
        return own(p["u"][1] * jnp.cos(p["u"][0]), jnp.sin(x @ p["w"]))

    def loss_fn(params, x):
        return squared_error(apply(params, x)).sum(-1).mean()

    assert jax.grad(loss_fn)(params, X)["u"].any()
    with pytest.warns(UserWarning, match="u: "):
        plan = kfac_jax.make_curvature(loss_fn, params, X)
    kinds = {layer.name: layer.kind for layer in plan.layers}
    assert kinds == {"u": "unmatched", "w": "dense"}


def test_outputs_that_are_the_same_for_all_examples():
    """Under vmap one row stands for all; exact curvature was three times too large."""
    params, y = {"w": models.array(1, 2, 3)}, models.array(2, 3, 3)
    x = jnp.arange(1.0, 3.0)

    def loss_fn(params, y):
        return jax.vmap(lambda y: squared_error(x @ params["w"], y).sum())(y).mean()

    options = {"on_unmatched": "ignore", "estimation_mode": "ggn_exact"}
    (layer,) = kfac_jax.make_curvature(loss_fn, params, y, **options).layers
    assert layer.kind == "unmatched"
    assert "do not depend on the batch" in layer.reason

    plan = kfac_jax.make_curvature(loss_fn, params, y)
    assert [layer.kind for layer in plan.layers] == ["dense"]

    @jax.jit
    @jax.vmap
    def dense(key):
        statistics = plan.value_grad_and_statistics(params, y, rng=key)[2]
        factors = plan.update_factors(plan.init_factors(params), statistics, 1)
        return plan.approximation(factors).to_dense()

    found = dense(jax.random.split(jax.random.key(0), 2000)).mean(0)
    exact = np.kron(np.outer(x, x), 2 * np.eye(3))
    np.testing.assert_allclose(found, exact, atol=0.1 * exact.max())


def sharded(function):
    """On one device, which has all of everything."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    return jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P())


RETURNED = {
    "checkpoint": (jax.checkpoint, ""),
    "cond": (
        lambda f: lambda w, x: jax.lax.cond(x[0, 0] > -9, f, lambda w, x: w, w, x),
        "returned by `cond`",
    ),
    "custom_jvp": (models.custom_jvp, ""),
    "custom_vjp": (models.custom_vjp, ""),
    "scan": (
        lambda f: (
            lambda w, x: jax.lax.scan(lambda k, _: (k, f(w, x)), 0.0, length=1)[1][0]
        ),
        "",
    ),
    "shard_map": (sharded, ""),
    "map": (
        lambda f: lambda w, x: jax.lax.map(lambda row: f(row, x), w),
        "",
    ),
}


@pytest.mark.parametrize("name", RETURNED)
def test_a_parameter_that_a_body_returns_is_not_called_unused(name):
    """It was, without a warning, and followed its plain gradient."""
    wrap, reason = RETURNED[name]
    params = {"w": models.array(1, 2, 2)}

    def apply(p, x):
        return x @ wrap(lambda w, x: 2 * w)(p["w"], x)

    options = {"blocks": kfac_jax.blocks.Full(), "on_unmatched": "ignore"}
    plan, found, exact = blocks_of(apply, params, **options)
    (layer,) = plan.layers
    if reason:
        assert layer.kind == "unmatched" and reason in layer.reason
    else:
        assert layer.kind == "dense"
        assert_exact(plan, found, exact, params, ("w",))


def test_a_parameter_that_all_branches_return_as_it_is():
    params = {"w": models.array(1, 2, 2)}

    def apply(p, x):
        branches = lambda w, x: (w, jnp.sin(x)), lambda w, x: (w, x)
        w, x = jax.lax.cond(x[0, 0] > -9, *branches, p["w"], x)
        return x @ w

    plan, found, exact = blocks_of(apply, params, blocks=kfac_jax.blocks.Full())
    assert_exact(plan, found, exact, params, ("w",))


def test_exact_curvature_with_inputs_that_are_closed_over():
    """Only targets tell of the batch; positions that mix were taken for cases alone."""
    params = {"v": models.array(1, 2, 3), "w": models.array(2, 3, 2)}
    x, y = models.array(3, 4, 2, 2), models.array(4, 4, 2, 2)

    def loss_fn(params, x, y):
        h = jax.nn.relu(x @ params["v"])
        z = (h - 0.5 * h.mean(1, keepdims=True)) @ params["w"]
        return squared_error(z.reshape(8, 2), y.reshape(8, 2)).sum(-1).mean()

    def factors(loss_fn, *args):
        plan = kfac_jax.make_curvature(
            loss_fn, params, *args, estimation_mode="ggn_exact"
        )
        statistics = plan.value_grad_and_statistics(params, *args)[2]
        return plan.update_factors(plan.init_factors(params), statistics, 1)

    found = factors(lambda params, y: loss_fn(params, x, y), y)
    models.assert_trees_close(found, factors(loss_fn, x, y))


def test_exact_curvature_of_outputs_that_no_data_enter():
    """The same for a table in place of inputs, repeated for all examples."""
    params = {"t": models.array(1, 2, 2), "w": models.array(2, 2, 2)}
    y = models.array(4, 4, 2, 2)

    def apply(params):
        h = jnp.tanh(jnp.broadcast_to(params["t"], y.shape)) @ params["w"]
        return h - 0.5 * h.mean(1, keepdims=True)

    def loss_fn(params, y):
        z = apply(params).reshape(8, 2)
        return squared_error(z, y.reshape(8, 2)).sum(-1).mean()

    options = {"on_unmatched": "ignore", "estimation_mode": "ggn_exact"}
    plan = kfac_jax.make_curvature(loss_fn, params, y, **options)
    statistics = plan.value_grad_and_statistics(params, y)[2]
    factors = plan.update_factors(plan.init_factors(params), statistics, 1)
    h = np.tanh(params["t"])
    mixed = np.eye(2) - 0.25  # over positions
    np.testing.assert_allclose(factors["w"]["input"], h.T @ h / 2, rtol=1e-9)
    # 2 for the square, a mean over 8 rows, of which 4 examples have 2 each
    g = 2 * np.trace(mixed.T @ mixed) * 4 / 8 * np.eye(2)
    np.testing.assert_allclose(factors["w"]["output"], g, rtol=1e-9)


def test_a_table_that_is_a_product():
    """Its diagonal side was multiplied by arrays of another rank, which may raise."""
    params = {"a": models.array(0, 4, 2), "b": models.array(1, 2, 2)}
    ids = jnp.asarray([[0, 1], [2, 3], [1, 1]])

    def loss_fn(params, ids):
        return squared_error((params["a"] @ params["b"])[ids].sum(1)).sum(-1).mean()

    plan = kfac_jax.make_curvature(
        loss_fn, params, ids, estimation_mode="ggn_exact", on_unmatched="error"
    )
    assert [type(x.block).__name__ for x in plan.layers] == ["Kronecker"] * 2
    matrix = np.asarray(plan.at(params, ids).to_dense())
    assert np.linalg.eigvalsh(matrix).min() >= -1e-12 and np.trace(matrix) > 0


def test_a_single_example_keeps_its_axis_through_reshapes():
    """It is a part of any axis; a loop's carry had another one at its end."""
    x = models.array(0, 1, 2, 6)
    params = {"w": models.array(1, 3, 2, 3, 2), "o": models.array(2, 4, 6)}

    def apply(p, x):
        def step(h, w):  # [positions, 1, 6], heads of each position
            heads = jnp.einsum("hio,pbhi->pbho", w, h.reshape(2, 1, 2, 3))
            return jnp.tanh(heads.reshape(2, 1, 4) @ p["o"]), None

        h, _ = jax.lax.scan(step, x.swapaxes(0, 1), p["w"])
        return h.swapaxes(0, 1).reshape(1, 12)

    full = kfac_jax.blocks.Full()  # a warning would say that the example is lost
    plan, found, exact = blocks_of(apply, params, x, blocks={"o": full})
    assert plan.lost_examples == ""
    assert_exact(plan, found, exact, params, ("o",))


def test_a_single_example_is_the_same_whatever_branch_it_takes():
    """One branch has it at the front, the other behind the positions."""
    x = models.array(0, 1, 3, 2)
    params = {"w": models.array(1, 2, 2), "v": models.array(2, 2, 2)}

    def apply(p, x):
        def of_positions(x):  # [positions, 1, 2]
            return jnp.tanh(x.swapaxes(0, 1) @ p["v"]).reshape(1, 3, 2)

        h = jax.lax.cond(x.sum() > 0, lambda x: x @ p["w"], of_positions, x)
        return h.reshape(1, 6)

    full = kfac_jax.blocks.Full()
    plan, found, exact = blocks_of(apply, params, x, blocks=full)
    assert plan.lost_examples == ""
    assert_exact(plan, found, exact, params, ("w",))


@pytest.mark.parametrize("narrow", [float, jnp.float32], ids=["float64", "float32"])
def test_a_custom_rule_knows_the_constants_that_it_closes_over(narrow):
    """They are operands of its equation, too, which it does not read."""
    params = {"w": models.array(1, 2, 2), "v": models.array(2, 2, 2)}
    mask = jnp.array([[1.0, 0.0], [0.0, 1.0]], narrow)

    @jax.custom_jvp
    def function(w, v, x):
        h = (x @ w).astype(narrow)
        return (h @ (v.astype(narrow) * mask)).astype(float)

    @function.defjvp
    def rule(primals, tangents):
        return jax.jvp(function.fun, primals, tangents)

    def apply(p, x):
        return function(p["w"], p["v"], x) @ p["w"]

    plan, *_ = blocks_of(apply, params, on_unmatched="error")
    assert {layer.kind for layer in plan.layers} == {"dense"}


def test_a_custom_rule_agrees_to_the_precision_that_it_computes_in():
    """Which may be less than that of the function's operands."""
    params = {"w": models.array(1, 5, 2)}

    @jax.custom_jvp
    def product(x, w):
        return (x.astype(jnp.float16) @ w.astype(jnp.float16)).astype(float)

    @product.defjvp
    def rule(primals, tangents):  # rounds thirds
        (x, w), (u, v) = primals, tangents
        return product(x, w), 3 * (product(x, v / 3) + product(u, w / 3))

    x = models.array(2, 4, 5)
    plan, *_ = blocks_of(
        lambda p, x: product(x, p["w"]), params, x, on_unmatched="error"
    )
    assert [layer.kind for layer in plan.layers] == ["dense"]


def test_a_call_in_a_loop_may_have_an_operand_that_it_does_not_read():
    """The loop's slice was left out, as what is computed from it leaves the loop."""
    params = {"w": models.array(1, 2, 2, 2), "b": models.array(2, 2)}

    @jax.jit
    def act(h, b, _):
        return jnp.tanh(add(h, b))

    def apply(p, x):
        def step(h, w):
            return act(h @ jnp.tril(w), p["b"], w), None

        return jax.lax.scan(step, x, p["w"])[0]

    plan, found, exact = blocks_of(apply, params, blocks=kfac_jax.blocks.Full())
    assert_exact(plan, found, exact, params, ("b",))


@pytest.mark.parametrize("tag", [True, False])
def test_a_tagged_layer_may_have_a_sum_as_its_bias(tag, any_rank):
    """Its weight was counted once for each term, and all terms but the first not."""
    params = {
        "w": models.array(1, 2, 3),
        "b": models.array(2, 3),
        "c": models.array(3, 3),
        "v": models.array(4, 3, 2),
    }

    def apply(p, x):
        bias = p["b"] + p["c"]
        z = x @ p["w"] + bias
        if tag:
            z = kfac_jax.register_dense(z, x, p["w"], bias)
        return jnp.tanh(z) @ p["v"]

    full = kfac_jax.blocks.Full()
    plan, found, exact = blocks_of(apply, params, blocks=full, on_unmatched="error")
    uses = {layer.params: layer.uses for layer in plan.layers}
    assert uses == {("w", "b"): 1, ("c",): 1, ("v",): 1}
    assert_exact(plan, found, exact, params, ("w", "b"), ("c",), ("v",))


def test_a_tagged_scale_may_have_a_sum_as_its_shift(any_rank):
    params = {"s": models.array(1, 2), "b": models.array(2, 2), "c": models.array(3, 2)}

    def apply(p, x):
        shift = p["b"] + p["c"]
        z = x * p["s"] + shift
        return kfac_jax.register_scale_and_shift(z, x, p["s"], shift)

    plan, found, exact = blocks_of(apply, params, on_unmatched="error")
    assert all(layer.uses == 1 for layer in plan.layers)
    assert sorted(p for layer in plan.layers for p in layer.params) == ["b", "c", "s"]
    diagonals = np.diag(found), np.diag(exact)
    np.testing.assert_allclose(*diagonals, rtol=1e-9)


def test_a_slice_by_number_leaves_the_loop_though_a_product_of_weights_stays():
    """`w[i] @ m` is followed in neither program, `v[i]` only in the one that has it."""
    params = {
        "m": models.array(1, 2, 2),
        "v": models.array(2, 3, 2, 2),
        "w": models.array(3, 3, 2, 2),
    }

    def apply(params, x):
        def step(i, h):
            w, v = params["w"][i], params["v"][i]

            def cell(carry, _):
                return jnp.tanh(h @ (w @ params["m"]) + carry), None

            return jnp.tanh(jax.lax.scan(cell, h, length=2)[0] @ v)

        return jax.lax.fori_loop(0, 3, step, x)

    plan, found, exact = blocks_of(
        apply, params, blocks=kfac_jax.blocks.Full(), on_unmatched="ignore"
    )
    kinds = {layer.name: layer.kind for layer in plan.layers}
    assert kinds["v"] == "dense"
    for k in range(3):
        own = np.arange(4 + 4 * k, 8 + 4 * k)  # after those of m
        np.testing.assert_allclose(
            found[np.ix_(own, own)], exact[np.ix_(own, own)], rtol=1e-9, atol=1e-12
        )


def test_uses_of_one_weight_in_two_types_are_rows_of_one_layer():
    """The sample space joined them as they were, which strict promotion refuses."""
    params = {"w": models.array(1, 2, 2).astype(jnp.float32)}

    def output(params, x):
        low = x.astype(jnp.float32) @ params["w"]
        return jnp.sin(jnp.tanh(low).astype(x.dtype) @ params["w"].astype(x.dtype))

    def loss_fn(params, x):
        return squared_error(output(params, x)).sum(-1).mean()

    plan = kfac_jax.make_curvature(
        loss_fn,
        params,
        X,
        estimation_mode="fisher_exact",
        structure=kfac_jax.SampleSpace(),
    )
    jacobian = np.asarray(jax.jacobian(output)(params, X)["w"], float).reshape(8, 4)
    expected = 2 * jacobian @ jacobian.T / len(X)
    np.testing.assert_allclose(plan.gram(params, X), expected, rtol=1e-4, atol=1e-6)
