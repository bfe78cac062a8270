"""Equations with known solutions, the network, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import kfac_jax

Params = Any
"""A list of layers, each with `w` and `b`."""

Field = Callable[[Array], Array]
"""Maps points `[n, dimensions]` to values `[n, 1]`."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An equation on a unit cube, of which each side may belong to the boundary.

    Attributes:
        name: as on the command line.
        dimensions: of a point; for an equation in time its last coordinate is t.
        sizes: of the network's hidden layers.
        inside: points in the interior, in each step.
        edge: points on the boundary.
        residual: of a field at points; zero for a solution.
        solution: what is to be found.
        in_time: whether the side t = 1 is free.
    """

    name: str
    dimensions: int
    sizes: tuple[int, ...]
    inside: int
    edge: int
    residual: Callable[[Field, Array], Array]
    solution: Field
    in_time: bool = False

    def points(self, key: Array) -> tuple[Array, Array]:
        """Uniform points in the interior and on the boundary."""
        keys = jax.random.split(key, 3)
        shape = self.inside, self.dimensions
        inside = jax.random.uniform(keys[0], shape, float)
        edge = jax.random.uniform(keys[1], (self.edge, self.dimensions), float)
        sides = [(i, end) for i in range(self.dimensions) for end in (0.0, 1.0)]
        if self.in_time:
            sides.pop()  # t = 1 is free
        axes, ends = map(jnp.array, zip(*sides, strict=True))
        side = jax.random.randint(keys[2], (self.edge,), 0, len(axes))
        there = jnp.arange(self.dimensions)[None] == axes[side][:, None]
        return inside, jnp.where(there, ends[side][:, None], edge)

    def init(self, key: Array) -> Params:
        """Weights of variance one over their inputs; biases zero."""
        widths = (self.dimensions, *self.sizes, 1)
        keys = jax.random.split(key, len(widths) - 1)
        return [
            {"w": jax.random.normal(k, (i, o), float) / i**0.5, "b": jnp.zeros(o)}
            for k, i, o in zip(keys, widths[:-1], widths[1:], strict=True)
        ]

    def loss(self, params: Params, inside: Array, edge: Array) -> Array:
        """Mean squared residuals of the equation, and of the values on the boundary."""
        field = partial(network, params)
        error = kfac_jax.losses.squared_error
        residual, target = self.residual(field, inside), self.solution(edge)
        return (
            error(residual, jnp.zeros_like(residual)).sum(-1).mean()
            + error(field(edge), target).sum(-1).mean()
        )

    def relative_error(self, params: Params, points: Array) -> Array:
        """Of the values at points, in the L2 norm."""
        true = self.solution(points)
        return jnp.linalg.norm(network(params, points) - true) / jnp.linalg.norm(true)


def network(params: Params, x: Array) -> Array:
    """A perceptron with tanh."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def along(field: Field, x: Array, axis: int) -> tuple[Array, Array]:
    """First and second derivatives along an axis, by forward mode."""
    direction = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype)[axis], x.shape)

    def slope(x: Array) -> Array:
        return jax.jvp(field, (x,), (direction,))[1]

    return jax.jvp(slope, (x,), (direction,))


def laplacian(field: Field, x: Array, dimensions: int) -> Array:
    """The sum of second derivatives along the first axes."""
    return sum(
        (along(field, x, i)[1] for i in range(dimensions)), jnp.zeros((len(x), 1))
    )


def _poisson(
    name: str, dimensions: int, solution: Field, source: Field, **options: Any
) -> Problem:
    def residual(field: Field, x: Array) -> Array:
        return laplacian(field, x, dimensions) + source(x)

    return Problem(
        name=name,
        dimensions=dimensions,
        residual=residual,
        solution=solution,
        **options,
    )


def _product(x: Array) -> Array:
    return jnp.sin(jnp.pi * x).prod(-1, keepdims=True)


def _cosines(x: Array) -> Array:
    return jnp.cos(jnp.pi * x).sum(-1, keepdims=True)


def _cooling(x: Array) -> Array:
    return jnp.exp(-x[:, -1:]) * jnp.sin(2 * x[:, :-1]).sum(-1, keepdims=True)


def _heat(field: Field, x: Array) -> Array:
    """`u_t - Δu / 4`."""
    return (
        along(field, x, x.shape[-1] - 1)[0] - laplacian(field, x, x.shape[-1] - 1) / 4
    )


PROBLEMS = {
    "poisson2": _poisson(
        "poisson2",
        2,
        _product,
        lambda x: 2 * jnp.pi**2 * _product(x),
        sizes=(64, 64),
        inside=400,
        edge=120,
    ),
    "poisson5": _poisson(
        "poisson5",
        5,
        _cosines,
        lambda x: jnp.pi**2 * _cosines(x),
        sizes=(64, 64, 48, 48),
        inside=600,
        edge=200,
    ),
    "heat": Problem(
        name="heat",
        dimensions=5,
        sizes=(64, 64, 48, 48),
        inside=600,
        edge=200,
        residual=_heat,
        solution=_cooling,
        in_time=True,
    ),
}
"""Poisson's equation in two and in five dimensions, and heat in four and in time."""
