"""Every refusal that has no test elsewhere, and a check that none is left without one.

`REASONS` are those why a parameter has no layer, `ERRORS` those that are raised. Their
keys are parts of the messages.
"""

import ast
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import kfac_jax
from kfac_jax.losses import squared_error
from tests.helpers import models

X, IMAGES = models.array(0, 4, 3), models.array(1, 4, 4, 2, 2)
conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1))


def loss_of(apply):
    def loss_fn(params, x):
        z = jnp.tanh(apply(params, x))
        return squared_error(z.reshape(len(z), -1)).sum(-1).mean()

    return loss_fn


def params_of(*shapes):
    """Parameters "a", "b", ..., of these shapes."""
    names = "abc"[: len(shapes)]
    return {
        name: models.array(i, *s)
        for i, (name, s) in enumerate(zip(names, shapes, strict=True))
    }


# ------------------------------------------------------ why a parameter has no layer


def tagged_under_vmap(p, x):
    def each(scale, x):
        return kfac_jax.register_scale_and_shift(x * scale, x, scale)

    return jax.vmap(each, (0, 1), 1)(p["a"], x)


def tagged_with_a_part(p, x):
    scale = p["a"][:3]
    y = x * jnp.broadcast_to(scale, x.shape)
    return kfac_jax.register_scale_and_shift(y, x, scale)


def tagged_with_two_shapes(p, x):
    scale, shift = p["a"], jnp.broadcast_to(p["b"], (3,))
    y = x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(shift, x.shape)
    return kfac_jax.register_scale_and_shift(y, x, scale, shift)


def tagged_with_a_repeated_weight(p, x):
    w = jnp.broadcast_to(p["a"], (3, 3))
    return kfac_jax.register_dense(x @ w, x, w)


def tagged_with_a_function_of_a_weight(p, x):
    w = jnp.exp(p["b"])
    return kfac_jax.register_dense(x @ w, x, w, p["a"])


def used_in_two_ways(p, x):
    total = jnp.ones(3) @ p["a"]
    return x @ (p["a"] / jnp.linalg.norm(total)) + total[None]


def in_a_loop(apply):
    """A scan over the parameters in a branch, which their maps cannot leave."""

    def applied(params, x):
        def run():
            stacked = jax.tree.map(lambda a: a[None], params)
            step = lambda _, p: (None, apply(p, x))  # noqa: E731
            return jax.lax.scan(step, None, stacked)[1][0]

        zeros = lambda: jax.tree.map(jnp.zeros_like, jax.eval_shape(run))  # noqa: E731
        return jax.lax.cond(x.sum() > -1e9, run, zeros)

    return applied


REASONS = {  # the parameters' shapes, and their use
    "multiplied with another parameter": (
        [(3, 2), (2, 2)],
        in_a_loop(lambda p, x: x @ (p["a"] @ p["b"])),
    ),
    "combined with another parameter by `mul`": (
        [(3, 2), (3, 2)],
        in_a_loop(lambda p, x: x @ (p["a"] * p["b"])),
    ),
    "joined and then combined by `mul`": (
        [(1, 2), (2, 2)],
        in_a_loop(
            lambda p, x: (
                x
                @ (
                    jnp.concatenate([p["a"], p["b"]])
                    * jnp.concatenate([p["b"], p["a"]])
                )
            )
        ),
    ),
    "repeated or only partly used by `dot_general`": (
        [(2,)],
        in_a_loop(lambda p, x: x @ jnp.broadcast_to(p["a"], (3, 2))),
    ),
    "repeated or only partly used by `mul`": (
        [(5,)],
        in_a_loop(lambda p, x: x * jnp.broadcast_to(p["a"][:3], x.shape)),
    ),
    "repeated or only partly used by `concatenate`": (
        [(5,)],
        in_a_loop(
            lambda p, x: jnp.concatenate([x, jnp.broadcast_to(p["a"][:3], x.shape)], 1)
        ),
    ),
    "repeated or only partly used by `gather`": (
        [(3,)],
        in_a_loop(
            lambda p, x: jnp.broadcast_to(p["a"], (2, 3))[(x[:, 0] > 0).astype(int)]
        ),
    ),
    "broadcast against data by `mul` in an unusual way": (
        [(3,)],
        lambda p, x: x + (p["a"] * x.sum())[None],
    ),
    "joined to data by `concatenate` without a copy for each case": (
        [(4, 1)],
        lambda p, x: jnp.concatenate([x, p["a"]], 1),
    ),
    "but an operand is not a view of a parameter": (
        [(2,), (3, 2)],
        in_a_loop(tagged_with_a_function_of_a_weight),
    ),
    "tagged as conv2d, but the layer's input is a parameter": (
        [(4, 3, 1, 1), (2, 2, 3, 1)],
        lambda p, x: kfac_jax.register_conv2d(p["a"], x[..., None, None], p["b"]),
    ),
    "but the layer's input is a parameter": (
        [(4, 3), (3, 2)],
        lambda p, x: (
            x[:, :2] + kfac_jax.register_dense(p["a"] @ p["b"], p["a"], p["b"])
        ),
    ),
    "tagged as dense, but a parameter is repeated or partly used": (
        [(3,)],
        in_a_loop(tagged_with_a_repeated_weight),
    ),
    "tagged as scale_and_shift under a vmap over its parameters": (
        [(3,)],
        tagged_under_vmap,
    ),
    "tagged as scale_and_shift, but a parameter is partly used": (
        [(5,)],
        in_a_loop(tagged_with_a_part),
    ),
    "tagged as scale_and_shift with shapes that do not match": (
        [(3,), ()],
        in_a_loop(tagged_with_two_shapes),
    ),
    "convolved in groups that do not match its axes": (
        [(3, 2, 2, 2, 2)],
        in_a_loop(
            lambda p, x: conv(
                x, p["a"].reshape(6, 2, 2, 2), padding="SAME", feature_group_count=2
            )
        ),
    ),
    "repeated or only partly used by `conv_general_dilated`": (
        [(2, 2)],
        in_a_loop(
            lambda p, x: conv(x, jnp.broadcast_to(p["a"], (3, 4, 2, 2)), padding="SAME")
        ),
    ),
    "its product with a constant is used in two ways": ([(3, 2)], used_in_two_ways),
    "convolved with data as the kernel": (
        [(4, 4, 2, 2)],
        lambda p, x: conv(p["a"], x, padding="SAME"),
    ),
    "consumed by `sort`, which is not a layer": (
        [(3,)],
        in_a_loop(lambda p, x: x + jnp.sort(p["a"])[None]),
    ),
    "enters `while`, which has no reverse mode: use scan, or fori_loop with fixed": (
        [(3,)],
        lambda p, x: jax.lax.while_loop(
            lambda x: x.sum() > 1.0, lambda x: x * p["a"][None], x
        ),
    ),
    "no gradient of a registered loss reaches it": ([(3,)], lambda p, x: x),
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason):
    shapes, apply = REASONS[reason]
    params = params_of(*shapes)
    x = IMAGES if "convol" in reason or "`conv_" in reason else X
    plan = kfac_jax.make_curvature(loss_of(apply), params, x, on_unmatched="ignore")
    assert any(reason in layer.reason for layer in plan.layers), plan


# ------------------------------------------------------------------ what is raised

W = {"w": models.array(2, 3, 2)}


def plain(params, x):
    return squared_error(x @ params["w"]).sum(-1).mean()


@functools.cache
def plan():
    return kfac_jax.make_curvature(plain, W, X, estimation_mode="ggn_exact")


def loss_within(control):
    """A loss registered where `control(function)` calls it."""

    def loss_fn(params, x):
        def inside():
            return squared_error(x @ params["w"]).sum(-1).mean()

        return control(inside)

    return kfac_jax.make_curvature(loss_fn, W, X, on_unmatched="ignore")


def twice(inside):
    start = 0, jnp.zeros(())
    return jax.lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, inside() / 2 + c[1]), start
    )[1]


def sometimes(inside):
    return jax.lax.cond(inside() > -1.0, inside, lambda: 0.0)


def changed():
    def by_size(params, x):
        layer = x @ params["w"] if len(x) == 4 else x[:, :2] * params["w"][:1]
        return squared_error(layer).sum(-1).mean()

    made = kfac_jax.make_curvature(by_size, W, X, estimation_mode="ggn_exact")
    made.value_grad_and_statistics(W, X[:3])


def hidden():
    value, _, statistics = plan().value_grad_and_statistics(W, X)
    tx = kfac_jax.kfac(plan(), kfac_jax.QuadraticModel())
    node = {"w": optax.MaskedNode()}
    tx.update(node, tx.init(W), node, statistics=statistics, value=value, args=(X,))


def with_transposed_factors():
    factors = plan().init_factors(W)
    plan().approximation({"w": {**factors["w"], "input": jnp.eye(2)}})


def product_with(activation):
    def loss_fn(params, x):
        return squared_error(activation(x @ params["w"])).sum(-1).mean()

    kfac_jax.make_curvature(loss_fn, W, X).matvec(W, W, X)


def integer_labels():
    logits = jnp.ones((4, 3))
    kfac_jax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.ones(3, int))


def disagreeing():
    y = jnp.ones((6, 2))
    kfac_jax.make_curvature(
        lambda p, x, y: squared_error(x @ p["w"], y).mean(), W, X, y
    )


def unmatched(**options):
    apply = in_a_loop(lambda p, x: x @ jnp.exp(p["a"]))
    kfac_jax.make_curvature(loss_of(apply), params_of((3, 2)), X, **options)


def full_of_mixed_examples():
    apply = lambda p, x: jnp.sort(x, axis=0) @ p["a"]  # noqa: E731
    block = {"a": kfac_jax.blocks.Full()}
    kfac_jax.make_curvature(loss_of(apply), params_of((3, 2)), X, blocks=block)


def full_of_a_generic():
    apply = lambda p, x: x @ kfac_jax.register_generic(p["a"])  # noqa: E731
    block = {"a": kfac_jax.blocks.Full()}
    kfac_jax.make_curvature(loss_of(apply), params_of((3, 2)), X, blocks=block)


ERRORS = {  # the type, and what raises it
    "must have an entry for each layer of the plan": (
        ValueError,
        lambda: plan().approximation({}),
    ),
    "Use what this very plan returned": (ValueError, with_transposed_factors),
    "so that it is not always computed": (ValueError, lambda: loss_within(sometimes)),
    "which kfac_jax cannot bring out": (ValueError, lambda: loss_within(twice)),
    "which has no forward mode; exact products with the curvature need one": (
        ValueError,
        lambda: product_with(models.custom_vjp(jnp.tanh)),
    ),
    "The loss depends on parameters through a `while` loop at": (
        ValueError,
        lambda: product_with(
            lambda h: jax.lax.while_loop(lambda h: h.sum() > 9.0, jnp.tanh, h)
        ),
    ),
    "Expected one batch size": (ValueError, disagreeing),
    "Make a new plan with make_curvature for these arguments": (ValueError, changed),
    "has parameters hidden by a mask": (ValueError, hidden),
    "statistics_fraction (τ1) must be in (0, 1]": (
        ValueError,
        lambda: kfac_jax.make_curvature(plain, W, X, statistics_fraction=2.0),
    ),
    "estimation_mode must be one of": (
        ValueError,
        lambda: kfac_jax.make_curvature(plain, W, X, estimation_mode="fisher"),
    ),
    "l2 (η) must be finite and at least 0": (
        ValueError,
        lambda: kfac_jax.make_curvature(plain, W, X, l2=-1.0),
    ),
    "must return a pair (loss, aux)": (
        TypeError,
        lambda: kfac_jax.make_curvature(plain, W, X, has_aux=True),
    ),
    "decay (ε) must be in [0.0, 1.0); got 2.0.": (
        ValueError,
        lambda: kfac_jax.kfac(plan(), decay=2.0),
    ),
    "momentum must be a number, a schedule or None; got 'nesterov'.": (
        TypeError,
        lambda: kfac_jax.kfac(plan(), momentum="nesterov"),
    ),
    "devices must be None, kfac_jax.OverAxis(axis name) or": (
        TypeError,
        lambda: kfac_jax.kfac(plan(), devices="data"),
    ),
    "measures whole steps; use kfac(...)": (
        TypeError,
        lambda: kfac_jax.scale_by_kfac(plan(), kfac_jax.LevenbergMarquardt(1.0)),
    ),
    "norm_constraint limits steps of a given learning rate": (
        ValueError,
        lambda: kfac_jax.kfac(plan(), kfac_jax.QuadraticModel(), norm_constraint=1.0),
    ),
    "norm_constraint must be a number, a schedule, \"auto\" or None; got '1'.": (
        TypeError,
        lambda: kfac_jax.kfac(plan(), 0.1, norm_constraint="1"),
    ),
    "every (T1) must be an integer ≥ 1": (
        ValueError,
        lambda: kfac_jax.LevenbergMarquardt(1.0, every=0),
    ),
    "factor (ω1) must be in (0, 1)": (
        ValueError,
        lambda: kfac_jax.LevenbergMarquardt(1.0, factor=1.0),
    ),
    "fraction (τ2) must be in (0, 1]": (
        ValueError,
        lambda: kfac_jax.QuadraticModel(fraction=0.0),
    ),
    "Make a new plan with make_curvature, or pass the tree it was made with": (
        ValueError,
        lambda: plan().init_factors({"v": W["w"]}),
    ),
    "Pass the tree the plan was made with.": (
        ValueError,
        lambda: kfac_jax.make_curvature(
            lambda p, x: plain(p["net"], x), {"net": {**W, "b": jnp.ones(2)}}, X
        ).init_factors({"net": W["w"]}),
    ),
    "Make a new plan with make_curvature for new shapes": (
        ValueError,
        lambda: plan().init_factors({"w": jnp.ones((3, 3))}),
    ),
    "blocks must hold blocks, not classes": (
        TypeError,
        lambda: kfac_jax.make_curvature(plain, W, X, blocks=kfac_jax.blocks.Full),
    ),
    "Full() sums within an example, and ": (UserWarning, full_of_mixed_examples),
    "use Diagonal(), Identity() or None": (ValueError, full_of_a_generic),
    "expects params of real floating point; got": (
        TypeError,
        lambda: kfac_jax.average_iterates().init({"n": jnp.ones(2, jnp.int32)}),
    ),
    "incoming must be an integer": (
        TypeError,
        lambda: kfac_jax.initializers.sparse_normal(1.5),
    ),
    "incoming must be at least 1": (
        ValueError,
        lambda: kfac_jax.initializers.sparse_normal(0),
    ),
    "every (T2) must be an integer": (
        ValueError,
        lambda: kfac_jax.SeparateDamping(every=0),
    ),
    "initial (m_1) must be an integer; got 1.5.": (
        TypeError,
        lambda: kfac_jax.ExponentialBatchSize(1.5, 10),
    ),
    "final (|S|) must be at least 10; got 5.": (
        ValueError,
        lambda: kfac_jax.ExponentialBatchSize(10, 5),
    ),
    "step is counted from 0; got": (
        ValueError,
        lambda: kfac_jax.ExponentialBatchSize(10, 20)(-1),
    ),
    "are expected for logits": (ValueError, integer_labels),
    "expected a method counts(statistics, weight), got one called factors": (
        TypeError,
        lambda: type("Old", (kfac_jax.blocks.Block,), {"factors": None}),
    ),
    "that no layer covers a diagonal block": (UserWarning, unmatched),
    "tag it with register_generic": (
        ValueError,
        functools.partial(unmatched, on_unmatched="error"),
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    error, function = ERRORS[message]
    catch = pytest.warns if error is UserWarning else pytest.raises
    with catch(error, match=re.escape(message)):
        function()


# ------------------------------------------------------------------ none is left out

SOURCE = pathlib.Path(kfac_jax.__file__).parent
TESTS = pathlib.Path(__file__).parents[1]
WITHOUT = {
    "used as indices by `gather`": "parameters that index are compared with 0 first",
}
"""Messages that cannot be provoked, and why."""


def text(node):
    """A string as it is written in the source, with `{}` for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "{}"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text, node.values))
    return "{}"


def messages():
    """Strings in what is raised, and in what says why something is no layer."""
    finders = ("layers", "_jaxpr")  # where functions return reasons
    makers = ("Refused", "_refuse", "_bare_layer", "OtherUse", "warn")
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            function = getattr(node, "func", None)
            called = getattr(function, "id", getattr(function, "attr", ""))
            targets = [getattr(t, "id", "") for t in getattr(node, "targets", [])]
            says = isinstance(node, ast.Raise) or called in makers
            reason = isinstance(node, ast.Return) and file.parent.name in finders
            if not (says or reason or targets == ["reason"]):
                continue
            inner = [part for part in ast.walk(node) if isinstance(part, ast.JoinedStr)]
            parts = {id(v) for joined in inner for v in joined.values}
            for part in ast.walk(node):
                if id(part) not in parts and len(re.findall(r"\w+ ", text(part))) > 2:
                    yield f"{file.name}:{node.lineno}", text(part)


def expectations(function):
    """What a test compares messages with: `match=`, what is `in` them or equal."""
    for node in ast.walk(function):
        if isinstance(node, ast.keyword) and node.arg == "match":
            yield node.value
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
            yield node.left
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq):
            yield node.comparators[0]


def expected_by_tests():
    """Phrases in what tests expect, and in what that is taken from: tables, loops.

    Without what is special in regular expressions.
    """
    for file in sorted(TESTS.rglob("test_*.py")):
        body = ast.parse(file.read_text()).body
        tables = {
            target.id: node.value
            for node in body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for function in body:
            if not isinstance(function, ast.FunctionDef):
                continue
            found = [*expectations(function)]
            if any(isinstance(x, ast.Name) for f in found for x in ast.walk(f)):
                names = [x.id for x in ast.walk(function) if isinstance(x, ast.Name)]
                local = [*ast.walk(function)]
                found += [x.iter for x in local if isinstance(x, ast.For)]
                found += [x.value for x in local if isinstance(x, ast.Assign)]
                found += function.decorator_list
                found += [tables[name] for name in names if name in tables]
            for node in (x for f in found for x in ast.walk(f)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield from re.split(r"\\.|[.*|?+^$\n\[\]{}]", node.value)


def fits(phrase, message):
    """Whether a phrase is part of a message, but for what is filled in there."""
    parts = message.split("{}")
    if re.fullmatch(".+".join(map(re.escape, parts)), phrase):
        return True
    return (" " in phrase.strip() and len(phrase) >= 10) and any(
        phrase in part or overlap(part, phrase) or overlap(phrase, part)
        for part in parts
    )


def overlap(left, right):
    """Whether one ends as the other begins."""
    return any(left.endswith(right[:n]) for n in range(10, len(right) + 1))


def test_every_message_is_expected_by_a_test():
    phrases = {*expected_by_tests(), *REASONS, *ERRORS, *WITHOUT}
    missing = [
        f"{place}: {message}"
        for place, message in messages()
        if message not in WITHOUT and not any(fits(p, message) for p in phrases)
    ]
    assert not missing, "\n".join(missing)
