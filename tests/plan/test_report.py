"""The report is a table a person can act on."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import pytest

import kfac_jax
from kfac_jax import blocks
from kfac_jax.losses import squared_error
from kfac_jax.operator import inverses
from kfac_jax.plan.group import abstract_factors, abstract_inverses
from tests.helpers import models

PARAMS = {
    "net": models.dense_params(0, 3, 4, 2),
    "temperature": jnp.ones(()),
    "unused": jnp.ones((2, 2)),
}
X = models.array(1, 5, 3)


def _network(params, x):
    z = models.mlp(params["net"], x)

    def step(carry, _):
        t, z = carry
        return (2 * t, z * jnp.exp(t)), None

    return jax.lax.scan(step, (params["temperature"], z), length=1)[0][1]


def _loss_fn(params, x):
    return squared_error(_network(params, x)).sum(-1).mean()


def _plan(**options):
    with pytest.warns(UserWarning):
        return kfac_jax.make_curvature(_loss_fn, PARAMS, X, **options)


def test_rows_say_what_approximates_each_parameter():
    plan = _plan()
    lines = {
        line.split()[0]: line.split()
        for line in plan.report().splitlines()
        if line.strip()
    }
    assert lines["parameter"] == "parameter shape kind uses block factors bytes".split()
    assert lines["net/layer0/w"] == [
        *("net/layer0/w", "[3×4]", "dense", "1", "Kronecker"),
        *("input[4×4]", "output[4×4]", "256", "B"),
    ]
    assert lines["net/layer0/b"] == ["net/layer0/b", "[4]"]
    assert lines["net/layer1/w"][2:5] == ["dense", "1", "Kronecker"]
    assert lines["temperature"][1:5] == ["[]", "unmatched", "1", "Diagonal"]
    assert lines["unused"][1:5] == ["[2×2]", "unused", "0", "Identity"]


def test_totals():
    plan = _plan()
    report, totals = plan.report(), plan.totals
    assert "4 layers, 31 parameters, 26 of them covered" in report
    assert (totals.parameters, totals.covered) == (31, 26)
    size = 8 * (4 * 4 + 4 * 4 + 5 * 5 + 2 * 2 + 1)
    # the identity block of the unused parameter is a scalar
    assert f"factors {size} B, inverses {size + 8} B." in report
    assert (totals.factor_bytes, totals.inverse_bytes) == (size, size + 8)
    assert "Parameters by kind: dense 26 (83.9%), unmatched 1 (3.2%)" in report
    assert totals.by_kind == {"dense": 26, "unmatched": 1, "unused": 4}


def test_costs():
    x, scanned = jnp.ones((5, 3)), {"w": jnp.ones((4, 3, 3)), "b": jnp.ones((4, 3))}

    def loss_fn(params, x):
        def step(x, p):
            return jnp.tanh(models.dense(p, x)), None

        x, _ = jax.lax.scan(step, x, params)
        return squared_error(x).sum(-1).mean()

    plan = kfac_jax.make_curvature(loss_fn, scanned, x, statistics_fraction=0.5)
    (layer,) = plan.layers
    assert layer.rows == 4 * 5
    assert plan.totals.inversion_cost == 4 * (4**3 + 3**3)
    assert plan.totals.gradient_cost == 3 * 4 * 5 * (4 * 3)
    assert plan.totals.statistics_cost == 0.5 * 4 * 5 * (4 * 4 + 3 * 3 + 4 * 3)
    report = plan.report()
    assert "One refresh of the inverses: 3.6e+02 multiply-adds, about " in report
    assert f"{0.5 * 37 / 36:.2f} × the gradient" in report


def test_what_is_not_covered_is_named_with_reason_and_line():
    report = _plan().report()
    _, _, uncovered = report.partition("Not covered by a layer:")
    reason = "enters the carry of a scan without a copy for each case"
    assert f"temperature: {reason}" in uncovered
    assert "unused: no gradient of a registered loss reaches it" in uncovered
    first = inspect.getsourcelines(_network)[1]
    assert f"test_report.py:{first + 7}" in uncovered  # the line with the scan
    assert "(_network)" in uncovered


def test_every_layer_knows_its_line():
    plan = _plan()
    line = inspect.getsourcelines(models.dense)[1] + 2
    assert f"models.py:{line}" in plan.layers[0].source


def test_str_is_the_report_and_shows_the_choice_of_blocks():
    plan = _plan(blocks={"net/layer0": None, "dense": blocks.Full()})
    assert str(plan) == plan.report()
    row = next(r for r in str(plan).splitlines() if r.startswith("net/layer0/"))
    assert row.split()[-3:] == ["none", "0", "B"]
    assert "full[10×10]" in str(plan)


def test_bytes_have_units():
    def loss_fn(w, x):
        return squared_error(x @ w).sum(-1).mean()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1000, 10), (4, 1000))]
    report = kfac_jax.make_curvature(loss_fn, *shapes).report()
    assert "3.8 MiB" in report and "input[1000×1000] output[10×10]" in report


def test_sides_that_are_too_long_are_seen_before_anything_is_allocated():
    """The full factor of this table's rows would take four terabytes."""
    rows, features = 10**6, 64

    def loss_fn(w, x):
        return squared_error(x @ w).sum(-1).mean()

    shapes = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, features), (8, rows))
    ]
    plan = kfac_jax.make_curvature(loss_fn, *shapes)
    assert f"input_diagonal[{rows}] output[{features}×{features}]" in plan.report()
    size = 4 * (rows + features**2)
    assert plan.totals.factor_bytes == plan.totals.inverse_bytes == size
    assert plan.totals.inversion_cost == features**3
    full = kfac_jax.make_curvature(
        loss_fn, *shapes, blocks=blocks.Kronecker(max_factor_dim=None)
    )
    assert f"input[{rows}×{rows}] output[{features}×{features}]" in full.report()
    assert "factors 3725.3 GiB" in full.report()


def test_a_parameter_that_is_the_whole_tree_has_a_name():
    def loss_fn(w, x):
        z = jax.lax.scan(lambda w, _: (2 * w, x * w[None]), w, length=1)[1][0]
        return squared_error(z).sum(-1).mean()

    with pytest.warns(UserWarning) as caught:
        plan = kfac_jax.make_curvature(loss_fn, jnp.ones(3), X)
    assert "\n  : " not in str(caught[0].message)
    assert "\n  : " not in plan.report()


def test_factors_out_of_proportion_are_told():
    def loss_fn(params, x):
        z = x @ params["table"]
        return squared_error(jnp.sort(z, 0) + params["b"][None]).sum(-1).mean()

    shapes = {"table": (200, 2), "b": (2,)}
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    x = jax.ShapeDtypeStruct((8, 200), jnp.float32)
    report = kfac_jax.make_curvature(loss_fn, params, x).report()
    assert "Factors of over 64 × the parameters (see max_factor_dim):\n" in report
    assert "  table: 100 ×" in report and "  b: " not in report
    small = kfac_jax.blocks.Kronecker(max_factor_dim=64)
    plan = kfac_jax.make_curvature(loss_fn, params, x, blocks=small)
    assert "Factors of over" not in plan.report()


def test_a_table_of_positions_whose_examples_are_lost_has_no_factor_of_its_size():
    def loss_fn(params, x):
        z = jnp.sort(x, 0) + params["p"][None]
        return squared_error(z.reshape(len(z), -1)).sum(-1).mean()

    params = {"p": jax.ShapeDtypeStruct((16, 64), jnp.float32)}
    x = jax.ShapeDtypeStruct((8, 16, 64), jnp.float32)
    (layer,) = kfac_jax.make_curvature(loss_fn, params, x).layers
    assert layer.factor_shapes == {"input": (1, 1), "output_diagonal": (1024,)}


@pytest.mark.slow
@pytest.mark.parametrize("block", [None, blocks.Eigen(), blocks.TNT()])
@pytest.mark.parametrize("widths", [(128,) * 5, (192, 96, 160, 8)])
def test_the_memory_of_a_refresh_is_what_xla_says(block, widths):
    shapes = itertools.pairwise(widths)
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    x = jax.ShapeDtypeStruct((8, widths[0]), jnp.float32)

    def loss_fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return squared_error(x).sum(-1).mean()

    plan = kfac_jax.make_curvature(loss_fn, params, x, blocks=block)

    def refresh(factors, old, damping):
        moved = inverses.move(plan.groups, factors)
        return inverses.refresh(plan.groups, moved, old, damping)

    arguments = (
        abstract_factors(plan.groups),
        abstract_inverses(plan.groups),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    compiled = jax.jit(refresh).lower(*arguments).compile()
    found = compiled.memory_analysis().temp_size_in_bytes
    assert 0.6 < plan.totals.refresh_bytes / found < 1.5
    assert " beside them; statistics" in plan.report()
