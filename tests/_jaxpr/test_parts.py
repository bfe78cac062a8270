"""Which part of a parameter a value is, against index arrays that are moved along."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from kfac_jax._jaxpr.graph import build
from kfac_jax._jaxpr.parts import part_of
from kfac_jax.losses import squared_error


def literal(atom):
    return getattr(atom, "val", None)


def found(function, shape):
    graph = build(jax.make_jaxpr(function)(jnp.zeros(shape, int)))
    return part_of(graph, 0, graph.inputs[0], shape, literal)


def check(function, shape):
    """The part, if the function moves the entries of one box, and in their order."""
    index = np.arange(np.prod(shape)).reshape(shape)
    moved = np.asarray(function(jnp.asarray(index)))
    part = found(function, shape)
    corners = [np.unravel_index(at, shape) for at in (moved.min(), moved.max())]
    box = index[tuple(slice(a, b + 1) for a, b in zip(*corners, strict=True))]
    is_box = np.array_equal(box.ravel(), moved.ravel())
    if part is not None:
        assert is_box and part.shape == moved.shape
        np.testing.assert_array_equal(index[part.box.slices].ravel(), moved.ravel())
    return part is not None, is_box


BOXES = [
    (lambda w: w[1], (3, 4, 2)),
    (lambda w: w[:, 1:3], (3, 4, 2)),
    (lambda w: jnp.split(w, 2, axis=1)[1], (3, 4, 2)),
    (lambda w: w[2, 1:], (3, 4, 2)),
    (lambda w: w[1][None].reshape(2, 4), (3, 4, 2)),
    (lambda w: w.reshape(3, 2, 2, 2)[:, 1], (3, 4, 2)),
    (lambda w: w.reshape(12, 2)[4:8], (3, 4, 2)),
    (lambda w: w.reshape(24)[8:16].reshape(4, 2), (3, 4, 2)),
    (lambda w: jax.lax.dynamic_slice_in_dim(w, 1, 1, 0)[0], (3, 4, 2)),
    (lambda w: w[:, :, 1:2].squeeze(-1), (3, 4, 2)),
]
OTHERS = [
    (lambda w: w[::2], (4, 2)),
    (lambda w: w[:, ::-1], (4, 2)),
    (lambda w: w[1].T, (3, 4, 2)),
    (lambda w: w.reshape(8)[1:4], (4, 2)),
    (lambda w: w[:, :1].T, (4, 2)),
    (lambda w: w * 2, (4, 2)),
]


@pytest.mark.parametrize("function, shape", BOXES)
def test_boxes(function, shape):
    assert check(function, shape) == (True, True)


@pytest.mark.parametrize("function, shape", OTHERS)
def test_other_parts(function, shape):
    assert found(function, shape) is None


@pytest.mark.slow
def test_chains_of_random_slices_and_reshapes():
    rng = np.random.default_rng(0)
    seen = [0, 0]

    def chain(steps):
        def function(w):
            for step in steps:
                w = step(w)
            return w

        return function

    for _ in range(150):
        steps, shape, now = [], (4, 6, 2), (4, 6, 2)
        for _ in range(int(rng.integers(1, 5))):
            if rng.random() < 0.5:
                axis = int(rng.integers(len(now)))
                a, b = sorted(rng.choice(now[axis] + 1, 2, replace=False).tolist())
                cut = (*[slice(None)] * axis, slice(a, b))
                steps.append(lambda w, cut=cut: w[cut])
                now = (*now[:axis], b - a, *now[axis + 1 :])
            else:
                size = int(np.prod(now))
                first = int(
                    rng.choice([n for n in range(1, size + 1) if size % n == 0])
                )
                now = (first, size // first)
                steps.append(lambda w, now=now: w.reshape(now))
        is_part, is_box = check(chain(steps), shape)
        seen[0] += is_part
        seen[1] += is_box
    # the others are boxes again after a reshape whose entries had no steps by axis
    assert seen[0] > 50 and seen[0] >= 0.85 * seen[1]


def test_a_plan_of_large_stacked_parameters_takes_no_memory():
    """No array as large as the parameter is made to find its parts."""
    params = {"w": jax.ShapeDtypeStruct((6, 2048, 2048), jnp.float32)}
    x = jax.ShapeDtypeStruct((4, 2048), jnp.float32)

    def loss_fn(p, x):
        for i in range(6):
            x = jnp.tanh(x @ p["w"][i])
        return squared_error(x).sum(-1).mean()

    tracemalloc.start()
    plan = kfac_jax.make_curvature(loss_fn, params, x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(plan.layers) == 6
    assert peak < 2**24  # an index of the parameter would be twelve times as large
