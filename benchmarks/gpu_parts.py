"""Parts of a step by themselves: how precise products are, and how to invert.

On a GPU a product of float32 matrices is by default one of numbers rounded to TF32 (ten
bits), which is several times as fast. The first table says what that does to the
products that K-FAC takes. The second compares the library's inverse, by Cholesky's
decomposition, with iterations that are nothing but products of matrices.

Errors are against float64, on the same device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kfac_jax import linalg

PRECISIONS = ("default", "high", "highest")
ALGORITHMS = ("BF16_BF16_F32_X3", "TF32_TF32_F32_X3")  # of GPUs
COUNT = jax.ShapeDtypeStruct((), jnp.int32)
CONDITIONS = (1e2, 1e4, 1e6)
TARGETS = (1e-3, 1e-5)
MOST = 32  # iterations
SECONDS, LEAST, SLOW = 0.3, 5, 0.1  # of timing one thing

Row = dict[str, Any]


class Sizes(NamedTuple):
    """Of the matrices in both tables."""

    rows: tuple[tuple[int, int], ...] = ((65536, 1024), (8192, 4096))
    sides: tuple[int, int, int] = (12, 3072, 768)
    stacks: tuple[tuple[int, int], ...] = ((12, 768), (16, 1024), (12, 3072))


TINY = Sizes(((64, 8), (32, 16)), (2, 12, 8), ((2, 8),))


def timed(call: Callable[[], Any]) -> float:
    """Median seconds, after a first call that is not counted."""
    _seconds(call)
    took = [_seconds(call)]
    least = LEAST if took[0] < SLOW else 2 if took[0] < 10 * SLOW else 1
    while len(took) < least or sum(took) < SECONDS:
        took.append(_seconds(call))
    return median(took)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


class Compiler:
    """Compiles several functions at the same time, in threads."""

    def __init__(self) -> None:
        """With as many threads as there are cores."""
        self._pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    def __call__(
        self,
        function: Callable[..., Any],
        *args: Any,
        precision: str = "highest",
        double: bool = False,
    ) -> Callable[..., Any]:
        """Starts to compile.

        Args:
            function: it.
            *args: arrays or shapes.
            precision: that of products which ask for none.
            double: whether numbers of Python are in float64.

        Returns:
            What runs the function, as soon as it is compiled; where that failed, it
            raises the error.
        """

        def failing(*_: Any, error: Exception) -> Any:
            raise error

        try:
            with jax.enable_x64(double), jax.default_matmul_precision(precision):
                lowered = jax.jit(function).lower(*args)
        except Exception as error:  # whoever runs it reports this
            return partial(failing, error=error)
        future = self._pool.submit(lowered.compile)

        def run(*args: Any) -> Any:
            with jax.enable_x64(double):
                return future.result()(*args)

        return run


def wide(x: Any) -> Any:
    """In float64."""
    return x.astype(jnp.float64)


def distance(x: Array, y: Array) -> Array:
    """The relative distance of x from y, in the Frobenius norm, in float64."""
    return jnp.sqrt(jnp.square(wide(x) - wide(y)).sum() / jnp.square(wide(y)).sum())


def _attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """The row with what is measured, or with the error."""
    try:
        return row | measure()
    except Exception as error:  # it is reported, and fails the run
        return row | {"error": f"{type(error).__name__}: {error}"[:500]}


# --------------------------------------------------------------------------- precision


def precision(sizes: Sizes = Sizes()) -> Iterator[Row]:  # noqa: B008 - immutable
    """Seconds and errors of products, and of eigendecompositions.

    Args:
        sizes: of the matrices.

    Yields:
        Rows with `what`, `shape`, `precision`, `seconds` and `error of result`.
    """
    compiler, key = Compiler(), jax.random.key(0)
    for r, d in sizes.rows:
        x = jax.nn.relu(jax.random.normal(key, (r, d)))
        yield from _product("linalg.gram", (r, d), _gram, [x], compiler)
    k, i, o = sizes.sides
    a, g = (_damped(key, k, n, 1e2) for n in (i, o))
    v = jax.random.normal(key, (k, i, o))
    yield from _product("A⁻¹ V G⁻¹", (k, i, o), _two_sided, [a, v, g], compiler)
    for k, d in sizes.stacks:
        # it has no products, so that no precision changes it
        row = {"what": "linalg.eigh", "shape": (k, d, d), "precision": "default"}
        yield _attempt(row, partial(_eigh, _damped(key, k, d, 1e4), compiler))


def _gram(x: Array) -> Array:
    return linalg.gram(x, x.dtype)


def _two_sided(a: Array, v: Array, g: Array) -> Array:
    return a @ v @ g


def _product(
    what: str,
    shape: Sequence[int],
    function: Callable[..., Array],
    args: Sequence[Array],
    compiler: Compiler,
) -> Iterator[Row]:
    on_gpu = jax.default_backend() == "gpu"
    names = (*PRECISIONS, *(ALGORITHMS if on_gpu else ()))
    of_wide = compiler(lambda *x: function(*map(wide, x)), *args, double=True)
    compiled = {name: compiler(function, *args, precision=name) for name in names}
    exact = of_wide(*args)
    far = compiler(distance, jax.eval_shape(function, *args), exact, double=True)
    for name, run in compiled.items():

        def measure(run: Callable[..., Any] = run) -> Row:
            error = float(far(run(*args), exact))
            return {"seconds": timed(lambda: run(*args)), "error of result": error}

        yield _attempt({"what": what, "shape": shape, "precision": name}, measure)


def _eigh(a: Array, compiler: Compiler) -> Row:
    def again(w: Array, u: Array, a: Array) -> Array:
        w, u = wide(w), wide(u)
        return distance((u * w[:, None]) @ jnp.swapaxes(u, -1, -2), a)

    decompose = compiler(linalg.eigh, a)
    w, u = decompose(a)
    error = compiler(again, w, u, a, double=True)(w, u, a)
    return {"seconds": timed(lambda: decompose(a)), "error of result": float(error)}


def _damped(key: Array, k: int, d: int, condition: float) -> Array:
    """Positive definite matrices, `[k, d, d]`, with eigenvalues down from 1."""
    with jax.enable_x64(True):
        return _with_condition(key, jnp.float64(condition), k, d)


@partial(jax.jit, static_argnums=(2, 3))
def _with_condition(key: Array, condition: Array, k: int, d: int) -> Array:
    """Of one basis for all, and logarithms of eigenvalues that are even."""
    basis, _ = jnp.linalg.qr(jax.random.normal(key, (d, d), jnp.float64))
    powers = jax.random.uniform(key, (k, 1, d), jnp.float64)
    powers = powers.at[..., 0].set(0.0).at[..., 1].set(1.0)
    matrices = (basis * condition**-powers) @ basis.T
    return linalg.symmetrize(matrices).astype(jnp.float32)


# ---------------------------------------------------------------------------- inverses


def inverses(sizes: Sizes = Sizes()) -> Iterator[Row]:  # noqa: B008 - immutable
    """Seconds and residuals of inverses.

    Args:
        sizes: of the matrices.

    Yields:
        Rows with `method`, `shape`, `precision`, and by condition what is left,
        `‖X A − I‖ / √n`, the largest of the stack. Those of iterations also have how
        many it takes until that is below each of `TARGETS` (None if it never is), and
        with it the seconds.
    """
    compiler = Compiler()
    for k, d in sizes.stacks:
        stacks = {x: _damped(jax.random.key(1), k, d, x) for x in CONDITIONS}
        some = stacks[CONDITIONS[0]]
        compare = compiler(_compared, some, some, double=True)
        waiting: list[tuple[Row, Callable[[], Row]]] = []
        for name in PRECISIONS:
            row = {"method": "linalg.inverse", "shape": (k, d, d), "precision": name}
            run = compiler(linalg.inverse, some, precision=name)
            waiting.append((row, partial(_direct, stacks, run, compare)))
        for method in ITERATIONS:
            for name in ("default", "highest"):
                row = {"method": method, "shape": (k, d, d), "precision": name}
                run = compiler(partial(_run, method), some, COUNT, precision=name)
                left = partial(_history, method)
                lefts = compiler(left, some, precision=name, double=True)
                waiting.append((row, partial(_iterated, stacks, run, lefts)))
        for row, measure in waiting:
            yield _attempt(row, measure)


def residual(x: Array, a: Array) -> Array:
    """`‖X A − I‖ / √n`, the largest of a stack, in float64."""
    left = wide(x) @ wide(a) - jnp.eye(a.shape[-1], dtype=jnp.float64)
    return jnp.sqrt(jnp.square(left).sum((-2, -1)).max() / a.shape[-1])


def _compared(x: Array, a: Array) -> tuple[Array, Array]:
    """What is left of an inverse, and how far it is from the exact one."""
    return residual(x, a), distance(x, linalg.inverse(wide(a)))


def _direct(
    stacks: dict[float, Array], run: Callable[..., Any], compare: Callable[..., Any]
) -> Row:
    found: Row = {}
    for condition, a in stacks.items():
        left, error = compare(run(a), a)
        found[f"{condition:.0e}"] = {"residual": float(left), "error": float(error)}
    some = stacks[CONDITIONS[0]]
    return {"seconds": timed(lambda: run(some)), "conditions": found}


State = tuple[Array, Array]
"""X, and A or what the iteration makes of `X A`."""


def _newton_schulz(state: State) -> State:
    """`X ← X (2 I − A X)`, which forgets its errors: X converges to A's inverse."""
    x, a = state
    return x @ (_twice(a) - a @ x), a


def _coupled(state: State) -> State:
    """`X ← X (2 I − M)`, `M ← M (2 I − M)`: M = X A is known without A.

    Errors of M stay in X.
    """
    x, m = state
    t = _twice(m) - m
    return x @ t, m @ t


def _twice(like: Array) -> Array:
    return 2 * jnp.eye(like.shape[-1], dtype=like.dtype)


ITERATIONS = {
    "Newton-Schulz": _newton_schulz,
    "coupled Newton": _coupled,
}


def start(a: Array, coupled: bool) -> State:
    """`X = I / λ`, with λ the largest eigenvalue by ten steps of power iteration.

    That is at most the eigenvalue, and far above half of it; below that, iterations
    would diverge.
    """
    v = jax.random.normal(jax.random.key(2), (*a.shape[:-1], 1), a.dtype)
    for _ in range(10):
        v = v / jnp.linalg.norm(v, axis=-2, keepdims=True)
        v = a @ v
    largest = jnp.linalg.norm(v, axis=-2, keepdims=True)
    x = jnp.eye(a.shape[-1], dtype=a.dtype) / largest
    return x, a / largest if coupled else a


def _run(method: str, a: Array, count: Array) -> Array:
    """The inverse after so many iterations."""
    begin = start(a, method == "coupled Newton")
    step = lambda _, state: ITERATIONS[method](state)  # noqa: E731
    return jax.lax.fori_loop(0, count, step, begin)[0]


def _history(method: str, a: Array) -> Array:
    """What is left after 1, 2, ... iterations, until it is below all targets."""

    def step(carry: Any) -> Any:
        count, state, left = carry
        state = ITERATIONS[method](state)
        return count + 1, state, left.at[count].set(residual(state[0], a))

    def goes_on(carry: Any) -> Array:
        count, _, left = carry
        last = left[jnp.maximum(count - 1, 0)]
        return (count < MOST) & ~(last < min(TARGETS)) & (last < 1e6)

    empty = jnp.full(MOST, jnp.nan, jnp.float64).at[0].set(1.0)
    begin = jnp.int32(0), start(a, method == "coupled Newton"), empty
    return jax.lax.while_loop(goes_on, step, begin)[2]


def _iterated(
    stacks: dict[float, Array], run: Callable[..., Any], lefts: Callable[..., Any]
) -> Row:
    some, found = stacks[CONDITIONS[0]], {}
    few, many = (jnp.int32(x) for x in (MOST // 4, 3 * MOST // 4))
    short, long = (timed(partial(run, some, x)) for x in (few, many))
    each = (long - short) / (MOST // 2)
    for condition, a in stacks.items():
        known = [x for x in lefts(a).tolist() if x == x] or [float("inf")]
        own: Row = {"residual": min(known), "iterations to it": _first(known, None)}
        for target in TARGETS:
            count = _first(known, target)
            seconds = None if count is None else short + each * (count - MOST // 4)
            own[f"{target:.0e}"] = {"iterations": count, "seconds": seconds}
        found[f"{condition:.0e}"] = own
    return {"seconds": each, "conditions": found}


def _first(left: Sequence[float], target: float | None) -> int | None:
    """After how many iterations what is left is below a target, or least of all."""
    limit = min(left) if target is None else target
    return next((k for k, x in enumerate(left, 1) if x <= limit), None)
