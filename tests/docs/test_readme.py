"""The code of README and documentation runs as written."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax
from tests.helpers import models

ROOT = pathlib.Path(__file__).parents[2]


def test_the_readme_runs_as_written(user_settings, capsys):
    text = (ROOT / "README.md").read_text()
    _run(text)
    printed = capsys.readouterr().out.strip().splitlines()
    assert float(printed[-1].removeprefix("loss ")) < 0.3
    table = re.search(r"prints\n\n```\n(.*?)```", text, flags=re.DOTALL)
    assert table and _cells(printed[:-1]) == _cells(table[1].strip().splitlines())


@pytest.mark.slow
def test_a_block_and_a_loss_of_the_users_own(user_settings, capsys):
    text = (ROOT / "docs" / "extending.md").read_text()
    scope = _run(text)
    first, last = (
        float(line.removeprefix("loss "))
        for line in capsys.readouterr().out.strip().splitlines()
    )
    assert last < first - 0.3
    block = text.split("class InputOnly")[1].split("```")[0]
    assert len(block.splitlines()) < 50
    curvature, params = scope["curvature"], scope["params"]
    args = scope["x"], scope["counts"]
    statistics = curvature.value_grad_and_statistics(
        params, *args, rng=jax.random.key(0)
    )[2]
    factors = curvature.update_factors(curvature.init_factors(params), statistics, 1)
    op = curvature.approximation(factors)
    a = np.asarray(factors["w2"]["input"])
    h = np.tanh(np.asarray(args[0] @ params["w1"] + params["b1"]))
    np.testing.assert_allclose(a, h.T @ h / len(h), rtol=1e-3, atol=1e-5)
    for mode in ("factored", "exact"):
        solved = op.solve(params, 0.1, mode)["w2"]
        expected = np.linalg.solve(a + 0.1 * np.eye(len(a)), params["w2"])
        np.testing.assert_allclose(solved, expected, rtol=1e-3, atol=1e-4)
    _is_the_fisher_of_its_samples(scope["Poisson"]())


@pytest.mark.slow
@models.EIGHT_DEVICES
def test_the_guide_for_several_devices(user_settings, capsys):
    pytest.importorskip("orbax.checkpoint")
    text = (ROOT / "docs" / "devices.md").read_text()
    scope = _run(text)
    printed = capsys.readouterr().out.strip()
    assert f"```\n{printed}\n```" in text
    curvature, two = scope["curvature"], scope["over_two"]
    state = kfac_jax.whole_state(curvature, scope["state_two"], two)
    assert state.step == 1
    assert scope["state"].batches == 1
    assert np.isfinite(scope["value"])


@models.EIGHT_DEVICES
def test_the_table_of_memory_and_communication(user_settings):
    text = (ROOT / "docs" / "devices.md").read_text()
    scope = {}
    exec(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0], scope)
    layouts = {
        "none": kfac_jax.OverAxis(("a", "b")),
        "one of two axes, of size 2": kfac_jax.OverAxis(("a", "b"), "b"),
        "all": kfac_jax.OverAxis(("a", "b"), ("a", "b")),
    }
    for name, over in layouts.items():
        report = kfac_jax.sharing_report(scope["curvature"], over, {"a": 4, "b": 2})
        kept = report.state_bytes, report.statistics_bytes
        moved = report.update_bytes, report.refresh_bytes
        cells = [f"{count / 2**20:.1f}" for count in (*kept, *moved)]
        assert f"| {name} | {' | '.join(cells)} |" in text


def test_the_page_on_migration(user_settings):
    """Both programs learn, and every option of the constructor is in its table."""
    text = (ROOT / "docs" / "migration.md").read_text()
    scope = _run(text)
    assert scope["stats"]["loss"] < 0.9
    assert scope["value"] < 0.9
    named = {*re.findall(r"`(\w+)", text)}
    accepted = """damping_lower_threshold damping_upper_threshold invalid_metric_value
    forbid_setting_attributes_after_finalize modifiable_attribute_exceptions
    should_vmap_estimator_samples include_per_param_norms_in_stats"""
    options = inspect.signature(kfac_jax.Optimizer).parameters
    assert set(options) - named == {*accepted.split()}


def _is_the_fisher_of_its_samples(distribution):
    """`B Bᵀ` is the Hessian, and the samples' second moment, also by `Bᵀ`'s adjoint."""
    z, counts = jnp.array([[-1.0, 0.5]]), jnp.array([[3.0, 0.0]])
    flat = lambda function: lambda u: function(u.reshape(1, 2)).reshape(-1)  # noqa: E731
    root = jax.jacobian(flat(lambda r: distribution.multiply_root(z, (counts,), r)))
    other = jax.jacobian(
        flat(lambda v: distribution.multiply_root_transpose(z, (counts,), v))
    )
    b = root(jnp.zeros(2))
    np.testing.assert_allclose(other(jnp.zeros(2)), b.T, rtol=1e-6)

    def nll(u):
        return distribution.negative_log_likelihood(u.reshape(1, 2), (counts,)).sum()

    np.testing.assert_allclose(b @ b.T, jax.hessian(nll)(z.reshape(-1)), rtol=1e-6)
    many = jnp.broadcast_to(z, (20000, 2))
    g = distribution.sample_gradient(many, (counts,), jax.random.key(0))
    error = 5 * np.sqrt((2 * np.exp(2 * z) + np.exp(z)) / len(many)).max()
    np.testing.assert_allclose(g.mean(0), [0.0, 0.0], atol=error)
    np.testing.assert_allclose(g.T @ g / len(g), b @ b.T, rtol=0, atol=error)


@pytest.mark.slow
def test_a_structure_of_the_users_own(user_settings, capsys):
    """Its groups damp by what they say, relative to each layer's curvature."""
    scope = _run((ROOT / "docs" / "internals.md").read_text())
    assert "relative to each layer" in capsys.readouterr().out
    curvature, params, x = scope["curvature"], scope["params"], scope["x"]
    args = x, x[:, :2]
    key = jax.random.key(0)
    balanced = curvature.at(params, *args, rng=key)
    plain = kfac_jax.make_curvature(scope["loss_fn"], params, *args)
    operator = plain.at(params, *args, rng=key)
    found = balanced.solve(params, 0.1)
    for name, diagonal in operator.diagonal().items():
        expected = operator.solve(params, 0.1 * diagonal.mean())[name]
        np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-6)
    assert not np.allclose(found["w2"], operator.solve(params, 0.1)["w2"], rtol=1e-2)


def _run(text):
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(code, scope)
    return scope


def _cells(lines):
    return [line.split() for line in lines if not line.startswith("---")]
