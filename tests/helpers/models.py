"""Small models in raw JAX that several test files share."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax import losses

# as the paper has it: without limits of momentum and length
PAPER_MODEL = kfac_jax.QuadraticModel(largest_momentum=None, longest=None)


def array(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """A seeded normal array."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.standard_normal(shape))


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fails where `jax.jit` of it would compile a second time."""
    traces = []

    def traced(*args, **kwargs):
        traces.append(None)
        assert len(traces) == 1, "traced again"
        return function(*args, **kwargs)

    return traced


def notes(curvature: Any, title: str) -> dict[str, str]:
    """What the report says below a title, by layer name."""
    lines = [*curvature.notes, "end"]
    if title not in lines:
        return {}
    start = lines.index(title) + 1
    stop = next(i for i, x in enumerate(lines) if i >= start and x[:1] != " ")
    return dict(line.strip().split(": ", 1) for line in lines[start:stop])


def classes(seed: int, count: int, *shape: int) -> jax.Array:
    """Seeded class indices."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, count, shape))


def dense_params(seed: int, *sizes: int, bias: bool = True) -> dict[str, Any]:
    """Weights `[in, out]` (and biases) of consecutive dense layers."""
    params = {}
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        params[f"layer{i}"] = {"w": array(seed + i, n, m, scale=1 / np.sqrt(n))}
        if bias:
            params[f"layer{i}"]["b"] = array(seed + 100 + i, m, scale=0.3)
    return params


def dense(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """`x @ w + b`, for x of any rank."""
    y = x @ layer["w"]
    if "b" in layer:
        y = y + jnp.broadcast_to(layer["b"], y.shape)
    return y


def mlp(params: dict[str, Any], x: jax.Array, activation=jnp.tanh) -> jax.Array:
    """Dense layers with activations in between."""
    for i in range(len(params)):
        x = dense(params[f"layer{i}"], x if i == 0 else activation(x))
    return x


def linear(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """A deep linear net."""
    return mlp(params, x, activation=lambda x: x)


def mixing(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Positions `[b, s, i]` that see each other: the example's mean is taken off."""
    h = jnp.tanh(dense(params["layer0"], x))
    h = h - 0.5 * jnp.broadcast_to(h.mean(1, keepdims=True), h.shape)
    return dense(params["layer1"], h)


def assert_trees_equal(found: Any, expected: Any) -> None:
    """Bit by bit, and of one structure."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def assert_trees_close(
    found: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-12
) -> None:
    """Unless said otherwise, to rounding in float64."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol),
        found,
        expected,
    )


def on_host(tree: Any) -> Any:
    """What devices hold, fetched one by one.

    An index into an array that is spread over devices is a program with collectives. As
    many of those at a time as a state has leaves take more threads than there are, and
    can wait for each other for ever.
    """
    return jax.tree.map(np.asarray, tree)


# ------------------------------------------------------------------------ loss families


@dataclasses.dataclass(frozen=True)
class Family:
    """A loss: what registers it (cases in), one case's value, and targets to use."""

    mean_loss: Callable[[jax.Array, jax.Array], jax.Array]
    per_case: Callable[[jax.Array, jax.Array], jax.Array]
    targets: Callable[[tuple[int, ...]], jax.Array]


def _softmax(z, y):
    return losses.softmax_cross_entropy_with_integer_labels(z, y).mean()


def _softmax_case(z, y):
    return jax.nn.logsumexp(z) - z[y]


def _sigmoid(z, y):
    return losses.sigmoid_binary_cross_entropy(z, y).sum(-1).mean()


def _sigmoid_case(z, y):
    return (jnp.logaddexp(jnp.zeros(()), z) - y * z).sum()


def _squared(z, y):
    return losses.squared_error(z, y).sum(-1).mean()


def _squared_case(z, y):
    return ((z - y) ** 2).sum()


def _normal(z, y):
    kfac_jax.register_normal_predictive_distribution(z, y, variance=2.0)
    return jnp.square(z - y).sum(-1).mean() / 4


def log_cosh(z, y):
    """A convex loss that belongs to no family."""
    return jnp.log(jnp.cosh(z - y)).sum()


FAMILIES = {
    "softmax": Family(
        _softmax, _softmax_case, lambda shape: classes(7, shape[-1], *shape[:-1])
    ),
    "sigmoid": Family(
        _sigmoid, _sigmoid_case, lambda shape: classes(8, 2, *shape).astype(float)
    ),
    "squared": Family(_squared, _squared_case, lambda shape: array(9, *shape)),
    "normal": Family(
        _normal, lambda z, y: _squared_case(z, y) / 4, lambda shape: array(9, *shape)
    ),
    "log_cosh": Family(
        lambda z, y: losses.convex(log_cosh, z, y).mean(),
        log_cosh,
        lambda shape: array(10, *shape),
    ),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model with its loss, data and the function the oracles differentiate."""

    loss_fn: Callable[..., jax.Array]
    params: Any
    x: jax.Array
    y: jax.Array
    outputs: Callable[[Any], jax.Array]  # registered output as a function of params
    per_case: Callable[[jax.Array, jax.Array], jax.Array]

    @property
    def args(self) -> tuple[jax.Array, jax.Array]:
        """The loss function's arguments after the parameters."""
        return self.x, self.y


def problem(
    family: str = "softmax",
    apply: Callable[[Any, jax.Array], jax.Array] = mlp,
    params: Any = None,
    x: jax.Array | None = None,
) -> Problem:
    """A model `apply` under a loss; outputs `[b, s, o]` are registered as rows."""
    params = dense_params(0, 3, 4, 3) if params is None else params
    x = array(50, 6, 3) if x is None else x
    loss = FAMILIES[family]

    def rows(params, x):
        z = apply(params, x)
        return z.reshape(-1, z.shape[-1])

    def loss_fn(params, x, y):
        z = apply(params, x)
        return loss.mean_loss(
            z.reshape(-1, z.shape[-1]), y.reshape(-1, *y.shape[x.ndim - 1 :])
        )

    shape = jax.eval_shape(apply, params, x).shape
    y = loss.targets(shape)
    return Problem(loss_fn, params, x, y, lambda p: rows(p, x), loss.per_case)


# ------------------------------------------------------------------------ control flow


def custom_jvp(f):
    """As `custom_jvp` functions are often written: derivative rule by hand."""
    wrapped = jax.custom_jvp(f)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return wrapped


def custom_vjp(f):
    """With the derivative that it has anyway."""
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda *a: jax.vjp(f, *a), lambda pull, g: pull(g))
    return wrapped


def _nothing(params, x):
    return jnp.zeros((len(x), 1))


def _always(x):
    """A condition that is not known to be true."""
    return x[0, 0] > -1e9


EIGHT_DEVICES = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def mesh(devices, axis):
    """A mesh of one axis over so many devices, or over one where there are fewer."""
    size = devices if jax.device_count() >= devices else 1
    return jax.make_mesh((size,), (axis,), axis_types=(jax.sharding.AxisType.Auto,))


def _sharded(f):
    parts = jax.sharding.PartitionSpec("data")
    whole = jax.sharding.PartitionSpec()
    return jax.shard_map(
        f, mesh=mesh(2, "data"), in_specs=(whole, parts), out_specs=parts
    )


WRAPPERS = {  # of functions of parameters and data `[b, i]`, to outputs `[b, 1]`
    "jit": jax.jit,
    "nested jit": lambda f: jax.jit(jax.jit(f)),
    "remat": jax.checkpoint,
    "remat with policy": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.dots_saveable
    ),
    "remat in jit": lambda f: jax.jit(jax.checkpoint(f)),
    "cond": lambda f: lambda p, x: jax.lax.cond(_always(x), f, _nothing, p, x),
    "switch": lambda f: (
        lambda p, x: jax.lax.switch(
            _always(x).astype(int), [_nothing, f, _nothing], p, x
        )
    ),
    "scan": lambda f: (
        lambda p, x: jax.lax.scan(lambda c, x: (c, f(p, x)), 0, x[None])[1][0]
    ),
    "vmap": lambda f: lambda p, x: jax.vmap(lambda x: f(p, x[None])[0])(x),
    "shard_map": _sharded,
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "named call": jax.named_call,
}
"""What a network may be wrapped in without changing its layers."""


def statistics_to_factors(curvature, params, *args, rng=None):
    """The factors after one batch."""
    _, _, statistics = curvature.value_grad_and_statistics(params, *args, rng=rng)
    return curvature.update_factors(curvature.init_factors(params), statistics, 1)


def exact_factors(loss_fn, params, *args, **options):
    """The plan in `fisher_exact` mode, and its factors on one batch, under jit."""
    curvature = kfac_jax.make_curvature(
        loss_fn, params, *args, estimation_mode="fisher_exact", **options
    )
    compute = jax.jit(lambda p, *a: statistics_to_factors(curvature, p, *a))
    return curvature, compute(params, *args)


def places(plan, layer):
    """Where a layer's parameters are among all."""
    _, restore = jax.flatten_util.ravel_pytree(
        [np.zeros(shape) for shape in plan.tree.shapes]
    )
    index = restore(np.arange(sum(map(np.prod, plan.tree.shapes)), dtype=float))
    boxes = layer.boxes or (None,) * len(layer.leaves)
    own = [
        index[leaf] if box is None else index[leaf][box.slices]
        for leaf, box in zip(layer.leaves, boxes, strict=True)
    ]
    return np.concatenate([x.ravel() for x in own]).astype(int)
