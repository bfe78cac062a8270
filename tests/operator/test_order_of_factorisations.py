"""Batched LAPACK calls come one after the other: two at a time can block for ever."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest

import kfac_jax
from kfac_jax.linalg import _psd
from kfac_jax.losses import squared_error
from kfac_jax.operator.inverses import compute
from tests.helpers import models

D = 6
PARAMS = {f"w{i}": models.array(i, D, D) for i in range(5)}
X, EDGE = models.array(5, 8, D), models.array(6, 4, D)


def linked(p, x, edge):
    """Two linked layers, and two that are used twice, which are by themselves."""
    x = jnp.tanh(jnp.tanh(x @ p["w0"]) @ p["w1"])
    for name in ("w2", "w3", "w2", "w3"):
        x = jnp.tanh(x @ p[name])
    return squared_error(x + edge.mean() * 0).sum(-1).mean()


def summed(p, x, edge):
    """Two layers of both losses, and two of one."""
    total = squared_error(jnp.tanh(jnp.tanh(x @ p["w2"]) @ p["w3"])).sum(-1).mean()
    for points in (x, edge):
        z = jnp.tanh(jnp.tanh(points @ p["w0"]) @ p["w1"])
        total += squared_error(z).sum(-1).mean()
    return total


PLANS = {
    "linked and single": (linked, {"structure": kfac_jax.BlockTridiagonal()}),
    "sums and single": (summed, {"blocks": kfac_jax.blocks.KroneckerSum()}),
}


def above(text):
    """For each batched LAPACK call of the compiled program, those it depends on."""
    defined = dict(re.findall(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*)$", text, re.M))
    operands = {
        name: re.findall(r"%([\w.\-]+)", rest.split("metadata=")[0])
        for name, rest in defined.items()
    }
    calls = [name for name, rest in defined.items() if re.search("potrf|trsm", rest)]
    found = {}
    for call in calls:
        seen, todo = set(), list(operands[call])
        while todo:
            name = todo.pop()
            if name not in seen and name in operands:
                seen.add(name)
                todo += operands[name]
        found[call] = seen
    return found


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="looks at LAPACK's calls")
@pytest.mark.parametrize("name", PLANS)
def test_no_two_are_independent(name, monkeypatch):
    """In a process with one device; of several, each takes one matrix at a time."""
    monkeypatch.setattr(_psd, "several_cpu_devices", lambda: False)
    loss_fn, options = PLANS[name]
    plan = kfac_jax.make_curvature(loss_fn, PARAMS, X, EDGE, **options)
    of_roots = [group.wants_roots for group in plan.groups]
    assert any(of_roots) and not all(of_roots)

    @jax.jit
    def inverted(factors):
        return compute(plan.groups, factors, 0.1)

    factors = plan.init_factors(PARAMS)
    found = above(inverted.lower(factors).compile().as_text())
    assert len(found) >= 4
    for first, second in itertools.combinations(found, 2):
        assert first in found[second] or second in found[first], (first, second)
