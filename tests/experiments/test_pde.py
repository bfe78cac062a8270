"""The equations, their points, and a run of three steps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("any_rank")


@pytest.fixture(params=["poisson2", "poisson5", "heat"])
def problem(request):
    from pde_problems import PROBLEMS

    return PROBLEMS[request.param]


def test_solutions_solve(problem):
    inside, _ = problem.points(jax.random.key(0))
    residual = problem.residual(problem.solution, inside[:20])
    np.testing.assert_allclose(residual, 0, atol=1e-10)
    assert (
        np.abs(problem.residual(lambda x: problem.solution(x) ** 2, inside)).max() > 1
    )


def test_points_are_inside_and_on_every_side_but_the_last_time(problem):
    inside, edge = problem.points(jax.random.key(1))
    assert inside.shape == (problem.inside, problem.dimensions)
    assert ((inside > 0) & (inside < 1)).all()
    on = [(edge[:, i] == end) for i in range(problem.dimensions) for end in (0, 1)]
    expected = [True] * len(on)
    expected[-1] = not problem.in_time
    assert [bool(x.any()) for x in on] == expected
    assert jnp.stack(on).any(0).all()


@pytest.mark.sampled(2)
def test_the_loss_is_that_of_exact_derivatives(problem):
    from pde_problems import network

    params = problem.init(jax.random.key(2))
    inside, edge = (x[:6] for x in problem.points(jax.random.key(3)))
    own = {"poisson2": 2, "poisson5": 5, "heat": 4}[problem.name]

    def value(x):
        return network(params, x[None])[0, 0]

    trace = [jnp.diag(jax.hessian(value)(x))[:own].sum() for x in inside]
    if problem.in_time:
        slopes = [jax.grad(value)(x)[-1] for x in inside]
        residual = [s - t / 4 for s, t in zip(slopes, trace, strict=True)]
    else:
        factor = 2 if own == 2 else 1
        u = problem.solution(inside)[:, 0]
        residual = [t + factor * np.pi**2 * v for t, v in zip(trace, u, strict=True)]
    wall = network(params, edge) - problem.solution(edge)
    expected = np.mean(np.square(residual)) + np.mean(np.square(wall))
    found = problem.loss(params, inside, edge)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.slow
def test_three_steps_of_each_kind(tmp_path, capsys):
    from pde import main

    options = ["--problem", "poisson2", "--quick", "--output", str(tmp_path)]
    methods = ["kfac-sum", "natural", "adam", "lbfgs"]
    with jax.numpy_dtype_promotion("standard"):
        assert main([*options, "--methods", *methods]) == 0
    found = json.loads((tmp_path / "pde.json").read_text())["results"]["poisson2"]
    assert [*found] == methods
    assert all(np.isfinite(x["errors"]).all() for x in found.values())
    assert {"errors.png", "fields.png"} <= {x.name for x in tmp_path.iterdir()}
    assert main([*options, "--methods", "newton"]) == 1
    assert "expected methods among" in capsys.readouterr().err
