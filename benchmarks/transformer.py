"""What discovery, compilation and statistics of deep transformers cost.

    python benchmarks/transformer.py            four models, about two minutes
    python benchmarks/transformer.py --quick    a smoke test

Layers are scanned and rematerialised, or written out one by one. Memory is what the
compiled program says it needs for temporaries.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any, NamedTuple

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp

import kfac_jax


class Sizes(NamedTuple):
    """Of the model and its data."""

    shallow: int = 12
    deep: int = 48
    width: int = 128
    heads: int = 4
    tokens: int = 128
    batch: int = 16
    vocabulary: int = 96


QUICK = Sizes(shallow=2, deep=4, width=16, heads=2, tokens=8, batch=2, vocabulary=11)


def init_params(sizes: Sizes, depth: int) -> dict[str, Any]:
    """Parameters as abstract arrays, the layers' stacked."""
    d, h = sizes.width, sizes.heads
    layer = {
        "norm1": (d,),
        "qkv": (d, 3, h, d // h),
        "out": (h, d // h, d),
        "norm2": (d,),
        "up": (d, 4 * d),
        "up_bias": (4 * d,),
        "down": (4 * d, d),
        "down_bias": (d,),
    }
    shapes = {
        "tokens": (sizes.vocabulary, d),
        "positions": (sizes.tokens, d),
        "layers": {name: (depth, *shape) for name, shape in layer.items()},
        "norm": (d,),
        "head": (d, sizes.vocabulary),
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def _layer(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    q, k, v = jnp.einsum("btd,dchk->cbthk", _normalize(x, p["norm1"]), p["qkv"])
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    mixed = jnp.einsum("bhts,bshk->bthk", weights, v)
    x = x + jnp.einsum("bthk,hkd->btd", mixed, p["out"])
    up = jax.nn.gelu(_normalize(x, p["norm2"]) @ p["up"] + p["up_bias"])
    return x + up @ p["down"] + p["down_bias"]


def make_loss(scanned: bool) -> Any:
    """Next-token cross entropy; its layers in a checkpointed scan, or one by one."""

    def loss_fn(params: Any, ids: jax.Array) -> jax.Array:
        x = params["tokens"][ids[:, :-1]] + params["positions"]
        if scanned:
            body = jax.checkpoint(lambda x, p: (_layer(x, p), None))
            x, _ = jax.lax.scan(body, x, params["layers"])
        else:
            depth = len(params["layers"]["up"])
            for i in range(depth):
                layer = params["layers"]
                x = _layer(x, {name: layer[name][i] for name in layer})
        logits = _normalize(x, params["norm"]) @ params["head"]
        values = kfac_jax.losses.softmax_cross_entropy_with_integer_labels(
            logits, ids[:, 1:]
        )
        return values.sum(-1).mean()

    return loss_fn


def unstack(params: Any) -> Any:
    """Each layer's parameters as leaves of their own."""
    depth = params["layers"]["up"].shape[0]
    each = {
        name: [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for _ in range(depth)]
        for name, x in params["layers"].items()
    }
    return params | {"layers": each}


def measure(sizes: Sizes, depth: int, scanned: bool) -> dict[str, float]:
    """Seconds to plan and to compile, and MiB of temporaries."""
    params, loss_fn = init_params(sizes, depth), make_loss(scanned)
    params = params if scanned else unstack(params)
    ids = jax.ShapeDtypeStruct((sizes.batch, sizes.tokens + 1), jnp.int32)
    start = time.perf_counter()
    curvature = kfac_jax.make_curvature(loss_fn, params, ids, on_unmatched="error")
    result = {"plan, s": time.perf_counter() - start}
    key = jax.eval_shape(lambda: jax.random.key(0))
    programs = {
        "gradient": lambda p, x, k: jax.value_and_grad(loss_fn)(p, x),
        "statistics": lambda p, x, k: curvature.value_grad_and_statistics(p, x, rng=k),
    }
    for name, program in programs.items():
        start = time.perf_counter()
        compiled = jax.jit(program).lower(params, ids, key).compile()
        result[f"{name}: compile, s"] = time.perf_counter() - start
        memory = compiled.memory_analysis()
        used = memory.temp_size_in_bytes + memory.output_size_in_bytes
        result[f"{name}: memory, MiB"] = used / 2**20
    result["factors, MiB"] = (
        sum(layer.factor_bytes for layer in curvature.layers) / 2**20
    )
    return result


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    args = parser.parse_args()
    sizes = QUICK if args.quick else Sizes()
    measure(QUICK._replace(vocabulary=7), 1, True)  # imports and first-use caches
    rows = {
        "scanned, shallow": measure(sizes, sizes.shallow, True),
        "scanned, deep": measure(sizes, sizes.deep, True),
        "one by one, shallow": measure(sizes, sizes.shallow, False),
    }
    start = time.perf_counter()
    params = unstack(init_params(sizes, sizes.deep))
    ids = jax.ShapeDtypeStruct((sizes.batch, sizes.tokens + 1), jnp.int32)
    kfac_jax.make_curvature(make_loss(False), params, ids, on_unmatched="error")
    rows["one by one, deep"] = {"plan, s": time.perf_counter() - start}
    for name, row in rows.items():
        print(name + ": " + ", ".join(f"{k} {v:.3g}" for k, v in row.items()))
    deep, shallow = rows["scanned, deep"], rows["scanned, shallow"]
    compile_ratio = deep["statistics: compile, s"] / shallow["statistics: compile, s"]
    allowed = deep["gradient: memory, MiB"] + deep["factors, MiB"]
    targets = {
        "plan of the deep model, one by one (s)": (
            rows["one by one, deep"]["plan, s"],
            2.0,
        ),
        "compilation, deep : shallow, scanned": (compile_ratio, 1.5),
        "memory : that of the gradient plus factors, deep": (
            deep["statistics: memory, MiB"] / allowed,
            1.3,
        ),
    }
    for name, (value, limit) in targets.items():
        verdict = "met" if value <= limit else "MISSED"
        print(f"{name}: {value:.2f}, target <= {limit}: {verdict}")


if __name__ == "__main__":
    main()
