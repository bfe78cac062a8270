"""Small programs with estimators and optimizers, for either library.

As `published_problems.py`, this file runs on the published release of kfac-jax and on
this library alike:

    python tests/compat/published_estimators.py tests/data/published_estimators.json

There it runs every program in float64 and writes what it found, and the versions of
kfac-jax and JAX. `test_published_estimators.py` compares this library with that file.

All modes are exact. Of each array two numbers are kept: its sum, and one with weights
that tell its entries apart.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)  # before there are arrays

KEY = jax.random.PRNGKey(0)
Found = dict[str, list[float]]


def _array(seed: int, *shape: int) -> jax.Array:
    # The stream of RandomState is frozen, whatever the version of NumPy.
    return jnp.asarray(np.random.RandomState(seed).normal(size=shape))


def _digest(tree: Any) -> list[float]:
    numbers = []
    for leaf in jax.tree.leaves(tree):
        x = np.asarray(leaf, float).reshape(-1)
        numbers += [x.sum(), x @ np.cos(np.arange(x.size))]
    return [float(x) for x in numbers]


PARAMS = {
    "a": {"b": _array(0, 4), "w": _array(1, 3, 4)},
    "c": {"w": _array(2, 4, 2)},
}
X, Y = _array(3, 6, 3), _array(4, 6, 2)
LABELS = jnp.arange(6) % 2
ARGS = PARAMS, (X, Y)
V = jax.tree.map(lambda x: jnp.cos(x) + 0.5, PARAMS)


def _outputs(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"][None])
    return hidden @ params["c"]["w"]


def _errors(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    z = _outputs(params, batch[0])
    kfac_jax.register_squared_error_loss(z, batch[1])
    return jnp.square(z - batch[1]).sum(-1), z


def _loss(params: Any, batch: Any) -> jax.Array:
    return _errors(params, batch)[0].mean()


# --- estimators -----------------------------------------------------------------------


def _updated(func: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    estimator = kfac_jax.BlockDiagonalCurvature(func=func, **options)
    state = estimator.init(KEY, ARGS, [-1, 1], -1, True)
    state = estimator.update_curvature_matrix_estimate(
        state, 0.0, 1.0, 0.0, 6, KEY, ARGS, "fisher_exact"
    )
    return estimator, state


def _powers(estimator: Any, state: Any, use_cached: bool = False) -> Found:
    def power(p: float, exact: bool) -> list[float]:
        return _digest(
            estimator.multiply_matpower(state, V, 0.1, p, exact, use_cached, None)
        )

    pairs = [(-1, True), (-1, False), (1, True)]
    pairs += [] if use_cached else [(1, False)]
    return {f"power {p}, exact {exact}": power(p, exact) for p, exact in pairs}


def _blocks(estimator: Any, state: Any) -> Found:
    return {"blocks": _digest(estimator.to_diagonal_block_dense_matrix(state))}


def returned_values() -> Found:
    """What a function returns besides registering its loss does not matter."""

    def several(params: Any, batch: Any) -> Any:
        errors, z = _errors(params, batch)
        return [[errors, z], {"more": z.sum()}]

    functions = {"per case": lambda *args: _errors(*args)[0], "several": several}
    found: Found = {}
    for name, function in functions.items():
        estimator, state = _updated(function)
        found |= {f"{name}: {k}": x for k, x in _blocks(estimator, state).items()}
        exact = kfac_jax.ImplicitExactCurvature(function)
        found[f"{name}: fisher"] = _digest(exact.multiply_fisher(ARGS, V))
    return found


def blocks_by_tag() -> Found:
    """None is accepted for tags that no layer has."""
    classes = kfac_jax.curvature_blocks
    found: Found = {}
    for ctor in (classes.DenseFull, classes.DenseDiagonal):
        blocks = {"dense": ctor, "conv2d": None, "generic": None}
        estimator, state = _updated(_loss, layer_tag_to_block_ctor=blocks)
        known = _blocks(estimator, state) | _powers(estimator, state)
        found |= {f"{ctor.__name__}: {name}": x for name, x in known.items()}
    return found


def powers() -> Found:
    """Of Kronecker-factored blocks, averaged over two batches, and as cached before."""
    estimator, state = _updated(_loss)
    found = _powers(estimator, state)
    cached = estimator.update_cache(state, 0.1, [-1, 1], -1, True, None)
    later = estimator.update_curvature_matrix_estimate(
        cached, 0.5, 1.5, 0.0, 6, KEY, (PARAMS, (2 * X, Y)), "ggn_exact"
    )
    found |= _blocks(estimator, later)
    known = _powers(estimator, later, use_cached=True)
    return found | {f"cached {name}": x for name, x in known.items()}


# --- exact products -------------------------------------------------------------------


def _two_losses(z: jax.Array) -> None:
    kfac_jax.register_squared_error_loss(z, Y, weight=0.5)
    kfac_jax.register_softmax_cross_entropy_loss(2 * z, LABELS, weight=3.0)


LOSSES: dict[str, Callable[[jax.Array], Any]] = {
    "squared error": lambda z: kfac_jax.register_squared_error_loss(z, Y),
    "normal": lambda z: kfac_jax.register_normal_predictive_distribution(
        z, Y, variance=0.25, weight=2.0
    ),
    "softmax": lambda z: kfac_jax.register_softmax_cross_entropy_loss(z, LABELS),
    "sigmoid": lambda z: kfac_jax.register_sigmoid_cross_entropy_loss(z, Y > 0),
    "two": _two_losses,
}


def exact_products(name: str) -> Found:
    """Products with the matrices."""

    def func(params: Any, batch: Any) -> jax.Array:
        z = _outputs(params, batch[0])
        LOSSES[name](z)
        return z.sum(-1)

    exact = kfac_jax.ImplicitExactCurvature(func)
    return {
        "fisher": _digest(exact.multiply_fisher(ARGS, V)),
        "ggn": _digest(exact.multiply_ggn(ARGS, V)),
    }


# --- preconditioners ------------------------------------------------------------------


def _preconditioner(func: Callable[..., Any], **options: Any) -> Any:
    return kfac_jax.OptaxPreconditioner(
        func,
        damping=0.1,
        estimation_mode="fisher_exact",
        pmap_axis_name=None,
        **options,
    )


def _preconditioned(func: Any, params: Any, batch: Any, **options: Any) -> Found:
    """Updates of two steps, the second with the inverses of the first."""
    preconditioner = _preconditioner(func, inverse_update_period=2, **options)
    args = params, batch
    state = preconditioner.init(args, KEY)
    transform = preconditioner.as_gradient_transform()
    gradient = jax.grad(func)(*args)
    found: Found = {}
    for step in range(2):
        scaled = jax.tree.map(lambda x, s=step: (1 + s) * x, batch)
        state = preconditioner.maybe_update(state, (params, scaled), KEY)
        updates, _ = transform.update(
            gradient, transform.init(params), params, precond_state=state
        )
        found[f"step {step}"] = _digest(updates)
        state = preconditioner.increment_count(state)
    return found


def _reshaped(x: Any, params: Any) -> Any:
    """A dense layer whose weight is kept as `[rows, columns, out]`."""
    (w,) = params
    return x @ w.reshape(-1, w.shape[-1])


def _reshaped_parameters(equations: Any, **_: Any) -> Mapping[str, Any]:
    return kfac_jax.tag_graph_matcher._dense_parameter_extractor(
        [e for e in equations if e.primitive.name != "reshape"]
    )


def custom_patterns() -> Found:
    """A pattern of the program's own, in front of the default ones."""
    matcher = kfac_jax.tag_graph_matcher
    pattern = matcher.GraphPattern(
        name="reshaped",
        tag_primitive=kfac_jax.layers_and_loss_tags.layer_tag,
        compute_func=_reshaped,
        parameters_extractor_func=_reshaped_parameters,
        example_args=[np.zeros((5, 6)), [np.zeros((2, 3, 4))]],
    )
    params = {"image": _array(5, 2, 3, 4), "out": _array(6, 4, 2)}

    def loss(params: Any, batch: Any) -> jax.Array:
        x = jnp.concatenate([batch[0], batch[0] ** 2], axis=1)
        z = jnp.tanh(_reshaped(x, [params["image"]])) @ params["out"]
        kfac_jax.register_squared_error_loss(z, batch[1])
        return jnp.square(z - batch[1]).sum(-1).mean()

    patterns = (pattern, *matcher.DEFAULT_GRAPH_PATTERNS)
    return _preconditioned(
        loss, params, (X, Y), auto_register_kwargs={"graph_patterns": patterns}
    )


def scale_tags() -> Found:
    """Each of several scales and shifts is tagged by itself."""
    params = {
        "scales": [1 + 0.1 * _array(7, 3), 1 + 0.1 * _array(8, 3)],
        "shift": _array(9, 3),
        "w": _array(10, 3, 2),
    }
    register = kfac_jax.register_scale_and_shift

    def loss(params: Any, batch: Any) -> jax.Array:
        h = batch[0]
        for scale in params["scales"]:
            h = jnp.tanh(register(h * scale[None], h, scale=scale, shift=None))
        shift = params["shift"]
        h = jnp.tanh(register(h + shift[None], h, scale=None, shift=shift))
        z = h @ params["w"]
        kfac_jax.register_squared_error_loss(z, batch[1])
        return jnp.square(z - batch[1]).sum(-1).mean()

    return _preconditioned(loss, params, (X, Y))


# --- optimizers -----------------------------------------------------------------------

RATES = {"learning_rate": 0.05, "momentum": 0.8, "damping": 0.01}
EXACT = {"l2_reg": 0.0, "estimation_mode": "fisher_exact", "num_burnin_steps": 0}


def _copied(tree: Any) -> Any:
    """Arrays of its own: the published release donates what a step is given."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def _trained(
    optimizer: Any, params: Any, batch: Any, steps: int = 4, func_state: Any = None
) -> Found:
    params, func_state = _copied((params, func_state))
    has_state = func_state is not None
    given = {"func_state": func_state} if has_state else {}
    state = optimizer.init(params, KEY, batch, func_state)
    stats: dict[str, Any] = {}
    for step in range(steps):
        result = optimizer.step(
            params,
            state,
            jax.random.PRNGKey(step),
            data_iterator=iter([batch]),
            global_step_int=step,
            **given,
            **RATES,
        )
        params, state, *more, stats = result
        if has_state:
            given = {"func_state": more[0]}
    found = {"params": _digest(params), "loss": [float(stats["loss"])]}
    for name in ("batch_size", "data_seen"):
        found[name] = [float(stats[name])]
    if has_state:
        found["func_state"] = _digest(given["func_state"])
    if "aux" in stats:
        found["aux"] = _digest(stats["aux"])
    return found


def list_parameters() -> Found:
    """Lists in lists, and tuples."""
    params = [[_array(1, 3, 4), _array(0, 4)], ({"w": _array(2, 4, 2)},)]

    def loss(params: Any, batch: Any) -> jax.Array:
        (w, b), (last,) = params
        return _loss({"a": {"w": w, "b": b}, "c": last}, batch)

    optimizer = kfac_jax.Optimizer(jax.value_and_grad(loss), **EXACT)
    return _trained(optimizer, params, (X, Y))


def batch_sizes() -> Found:
    """The first array of a batch is none of cases."""

    def loss(params: Any, batch: Any) -> jax.Array:
        return _loss(params, (batch["x"] + batch["at"][None], batch["y"]))

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss),
        batch_size_extractor=lambda batch: batch["x"].shape[0],
        **EXACT,
    )
    return _trained(optimizer, PARAMS, {"at": _array(11, 3), "x": X, "y": Y})


def function_states() -> Found:
    """Steps that carry a state of the function, with and without auxiliary data."""

    def loss(params: Any, seen: Any, batch: Any) -> Any:
        value = _loss(params, batch) * (1.0 + 0.0 * seen["count"])
        mean = 0.9 * seen["mean"] + 0.1 * batch[0].mean(0)
        return value, {"count": seen["count"] + 1.0, "mean": mean}

    def more(params: Any, seen: Any, rng: Any, batch: Any) -> Any:
        value, new = loss(params, seen, batch)
        del rng
        return value, (new, {"square": value**2})

    start = {"count": jnp.zeros(()), "mean": jnp.zeros(3)}
    found: Found = {}
    for name, function, options in (
        ("state", loss, {}),
        ("state, key and aux", more, {"value_func_has_rng": True}),
    ):
        optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(function, has_aux=True),
            value_func_has_state=True,
            value_func_has_aux=function is more,
            **options,
            **EXACT,
        )
        trained = _trained(optimizer, PARAMS, (X, Y), func_state=start)
        found |= {f"{name}: {k}": x for k, x in trained.items()}
    return found


def three_optimizers() -> Found:
    """In one process, with other options and problems, in turn."""

    def narrow(params: Any, batch: Any) -> jax.Array:
        z = batch[0] @ params["c"]["w"]
        targets = (batch[1] > 0).astype(z.dtype)
        kfac_jax.register_sigmoid_cross_entropy_loss(z, targets)
        return (jax.nn.softplus(z) - targets * z).sum(-1).mean()

    small = {"c": {"w": _array(12, 3, 2)}}
    kinds = [
        (_loss, PARAMS, {"inverse_update_period": 1}),
        (_loss, PARAMS, {"curvature_ema": 0.5, "norm_constraint": 1e-3}),
        (narrow, small, {}),
    ]
    running = []
    for function, params, options in kinds:
        optimizer = kfac_jax.Optimizer(jax.value_and_grad(function), **options, **EXACT)
        state = optimizer.init(params, KEY, (X, Y))
        running.append((optimizer, _copied(params), state))
    for step in range(3):
        for i, (optimizer, params, state) in enumerate(running):
            params, state, _ = optimizer.step(
                params,
                state,
                jax.random.PRNGKey(step),
                data_iterator=iter([((1 + step) * X, Y)]),
                **RATES,
            )
            running[i] = optimizer, params, state
    return {f"optimizer {i}": _digest(x[1]) for i, x in enumerate(running)}


PROGRAMS: dict[str, Callable[[], Found]] = {
    "returned values": returned_values,
    "blocks by tag": blocks_by_tag,
    "powers": powers,
    **{
        f"exact products, {name}": functools.partial(exact_products, name)
        for name in LOSSES
    },
    "custom patterns": custom_patterns,
    "scale tags": scale_tags,
    "list parameters": list_parameters,
    "batch sizes": batch_sizes,
    "function states": function_states,
    "three optimizers": three_optimizers,
}


def main() -> None:
    """Write what every program found to the file named on the command line."""
    recordings = {
        "kfac-jax": version("kfac-jax"),
        "jax": version("jax"),
        "programs": {name: program() for name, program in PROGRAMS.items()},
    }
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(recordings, file, indent=1, allow_nan=False)
        file.write("\n")


if __name__ == "__main__":
    main()
