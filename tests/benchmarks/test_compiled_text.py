"""What the benchmark of compiled costs counts in a program's text."""

import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(scope="module")
def text() -> ModuleType:
    return importlib.import_module("compiled_text")


def compiled(function, *args) -> str:
    return jax.jit(function).lower(*args).compile().as_text()


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        (jnp.linalg.cholesky, [5 * 6**3 / 3]),
        (lambda x: jax.scipy.linalg.solve_triangular(x, x[..., :2]), [5 * 6 * 6 * 2]),
        (lambda x: jnp.linalg.eigh(x)[1], [9 * 5 * 6**3]),
        (lambda x: jnp.linalg.qr(x)[0], [4 / 3 * 5 * 6**3] * 2),
        (lambda x: x @ x, []),
    ],
)
def test_calls_of_lapack(text: ModuleType, function, flops: list[float]) -> None:
    program = compiled(function, jnp.broadcast_to(jnp.eye(6), (5, 6, 6)))
    assert text.library_calls(program) == pytest.approx(flops)
    assert text.library_calls(program, in_every_step=True) == pytest.approx(flops)


def test_calls_below_a_conditional(text: ModuleType) -> None:
    def function(due, x):
        once = jnp.linalg.cholesky(x[1:, 1:])
        rest = jax.lax.cond(
            due, lambda x: jax.jit(jnp.linalg.cholesky)(2 * x), lambda x: x, x
        )
        return once, rest

    program = compiled(function, True, jnp.eye(4))
    assert sorted(text.library_calls(program)) == pytest.approx([9.0, 64 / 3])
    assert text.library_calls(program, in_every_step=True) == pytest.approx([9.0])


def test_calls_in_a_loop_count_once(text: ModuleType) -> None:
    program = compiled(
        lambda x: jax.lax.map(jnp.linalg.cholesky, x), jnp.ones((7, 3, 3))
    )
    assert text.library_calls(program, in_every_step=True) == pytest.approx([9.0])


def test_an_unknown_routine_is_refused(text: ModuleType) -> None:
    program = compiled(lambda x: jnp.linalg.eigvals(x), jnp.eye(3))
    with pytest.raises(ValueError, match="add what it costs to LIBRARY"):
        text.library_calls(program)


def test_instructions(text: ModuleType) -> None:
    small = compiled(jnp.sin, jnp.ones(3))
    large = compiled(lambda x: jnp.sin(x @ x.T).sum(), jnp.ones((3, 3)))
    assert 0 < text.instructions(small) < text.instructions(large)
