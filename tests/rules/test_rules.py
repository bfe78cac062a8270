"""The rules for damping, learning rate and momentum, apart from any network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_jax import LevenbergMarquardt, QuadraticModel, SeparateDamping
from tests.helpers.models import PAPER_MODEL

OMEGA = (19 / 20) ** 5  # ω1 at the paper's T1 = 5


def plane(seed, dtype=np.float64):
    """A positive definite 2 × 2 matrix and a slope, as QuadraticModel.solve takes."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(2, 2))
    return (root @ root.T + 0.1 * np.eye(2)).astype(dtype), rng.normal(size=2).astype(
        dtype
    )


def model_change(matrix, slope, step):
    return slope @ step + 0.5 * step @ matrix @ step


# ------------------------------------------------------------------ Levenberg-Marquardt


@pytest.mark.parametrize(
    ("rho", "factor"),
    [
        (0.7500001, OMEGA),
        (1.0, OMEGA),
        (5.0, OMEGA),
        (0.75, 1.0),
        (0.5, 1.0),
        (0.25, 1.0),
        (0.2499999, 1 / OMEGA),
        (0.0, 1 / OMEGA),
        (-3.0, 1 / OMEGA),
        (-np.inf, 1 / OMEGA),
        (np.nan, 1 / OMEGA),
        (np.inf, 1 / OMEGA),  # the model foresaw nothing
    ],
)
def test_damping_falls_above_three_quarters_and_rises_below_a_quarter(rho, factor):
    rule = LevenbergMarquardt(150.0)
    assert rule.every == 5
    np.testing.assert_allclose(rule.omega, OMEGA, rtol=1e-15)
    for update in (rule.update, jax.jit(rule.update)):
        np.testing.assert_allclose(update(150.0, rho), 150.0 * factor, rtol=1e-12)


@pytest.mark.parametrize("every", [1, 5, 20])
def test_omega_depends_on_the_period(every):
    assert LevenbergMarquardt(every=every).omega == pytest.approx(0.95**every)
    assert LevenbergMarquardt(every=every, factor=0.5).omega == 0.5


def test_damping_stays_in_its_range():
    rule = LevenbergMarquardt(1.0, minimum=0.9, maximum=1.1)
    assert float(rule.update(1.0, 1.0)) == 0.9
    assert float(rule.update(1.0, 0.0)) == 1.1


def test_thresholds():
    rule = LevenbergMarquardt(1.0, factor=0.5, lower=0.6, upper=0.9)
    found = [float(rule.update(1.0, rho)) for rho in (0.5, 0.7, 0.95)]
    assert found == [2.0, 1.0, 0.5]


def test_rules_are_hashable_values():
    assert LevenbergMarquardt(2.0) == LevenbergMarquardt(2.0)
    assert hash(LevenbergMarquardt(2.0)) == hash(LevenbergMarquardt(2.0))
    assert hash(QuadraticModel(fraction=0.5)) == hash(QuadraticModel(fraction=0.5))
    assert QuadraticModel() == QuadraticModel(fraction=1.0)
    assert hash(SeparateDamping(2.0)) == hash(SeparateDamping(2.0))
    with pytest.raises(AttributeError):
        LevenbergMarquardt(2.0).initial = 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": -1.0}, "positive damping"),
        ({"initial": 0.0}, "positive damping"),
        ({"initial": float("inf")}, "positive damping"),
        ({"initial": float("nan")}, "positive damping"),
        ({"every": 0}, r"every \(T1\)"),
        ({"every": 2.5}, r"every \(T1\)"),
        ({"factor": 1.0}, r"factor \(ω1\)"),
        ({"factor": 0.0}, r"factor \(ω1\)"),
        ({"minimum": 2.0, "maximum": 1.0}, "minimum ≤ maximum"),
        ({"minimum": -1.0}, "0 ≤ minimum"),
        ({"lower": 0.75, "upper": 0.25}, "Need 0 < lower < upper"),
    ],
)
def test_levenberg_marquardt_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LevenbergMarquardt(**options)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_quadratic_model_refuses_fractions_outside_the_unit_interval(fraction):
    with pytest.raises(ValueError, match=r"fraction \(τ2\)"):
        QuadraticModel(fraction=fraction)


# --------------------------------------------------------------------- separate damping


@pytest.mark.parametrize("every", [1, 5, 20])
def test_candidates_are_the_papers(every):
    rule = SeparateDamping(every=every)
    omega = np.sqrt(19 / 20) ** every
    np.testing.assert_allclose(rule.omega, omega, rtol=1e-14)
    expected = [3.0, 3.0 * omega, 3.0 / omega]
    for candidates in (rule.candidates, jax.jit(rule.candidates)):
        np.testing.assert_allclose(candidates(3.0), expected, rtol=1e-14)
    assert SeparateDamping().every == 20
    assert SeparateDamping(every=every, factor=0.5).omega == 0.5


def test_candidates_stay_within_the_limits():
    rule = SeparateDamping(1.0, factor=0.5, minimum=0.8, maximum=1.5)
    np.testing.assert_allclose(rule.candidates(1.0), [1.0, 0.8, 1.5])
    np.testing.assert_allclose(rule.candidates(0.8), [0.8, 0.8, 1.5])


@pytest.mark.parametrize(
    ("changes", "best"),
    [
        ([-1.0, -2.0, -1.5], 1),
        ([-1.0, -2.0, -2.5], 2),
        ([-3.0, -2.0, -2.5], 0),
        ([-1.0, -1.0, -1.0], 0),
        ([-1.0, -2.0, -2.0], 1),
        ([-1.0, np.nan, -0.5], 0),
        ([-1.0, -np.inf, np.inf], 0),
        ([np.nan, np.nan, 1.0], 2),
        ([np.nan, np.inf, np.nan], 0),
    ],
)
def test_the_lowest_finite_model_wins_and_equals_change_nothing(changes, best):
    gammas = jnp.array([5.0, 6.0, 7.0])
    for select in (SeparateDamping().select, jax.jit(SeparateDamping().select)):
        assert float(select(gammas, jnp.array(changes))) == 5.0 + best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": 0.0}, "finite positive γ0, or None"),
        ({"initial": -1.0}, "finite positive γ0, or None"),
        ({"initial": float("nan")}, "finite positive γ0, or None"),
        ({"initial": float("inf")}, "finite positive γ0, or None"),
        ({"every": 0}, r"every \(T2\)"),
        ({"every": 2.0}, r"every \(T2\)"),
        ({"factor": 1.0}, r"factor \(ω2\)"),
        ({"factor": 0.0}, r"factor \(ω2\)"),
        ({"minimum": 2.0, "maximum": 1.0}, "minimum ≤ maximum"),
        ({"minimum": -1.0}, "0 ≤ minimum"),
    ],
)
def test_separate_damping_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SeparateDamping(**options)


# ---------------------------------------------------------------------- quadratic model


@pytest.mark.parametrize("seed", range(5))
def test_both_coefficients_solve_the_two_by_two_system(seed):
    matrix, slope = plane(seed)
    alpha, mu, change = PAPER_MODEL.solve(jnp.asarray(matrix), jnp.asarray(slope), None)
    expected = np.linalg.solve(matrix, -slope)
    np.testing.assert_allclose([alpha, mu], expected, rtol=1e-12)
    np.testing.assert_allclose(
        change, model_change(matrix, slope, expected), rtol=1e-12
    )
    np.testing.assert_allclose(change, 0.5 * slope @ expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_learning_rate_is_optimal_for_a_given_momentum(seed, mu):
    matrix, slope = plane(seed)
    alpha, kept, change = PAPER_MODEL.solve(
        jnp.asarray(matrix), jnp.asarray(slope), jnp.asarray(mu)
    )
    assert float(kept) == mu
    np.testing.assert_allclose(
        alpha, -(slope[0] + mu * matrix[0, 1]) / matrix[0, 0], rtol=1e-12
    )
    best = model_change(matrix, slope, np.array([alpha, mu]))
    np.testing.assert_allclose(change, best, rtol=1e-12)
    for other in (0.99, 1.01):
        assert model_change(matrix, slope, np.array([alpha * other, mu])) > best


def test_coefficients_do_not_depend_on_the_scale_of_the_directions():
    """`δ = α Δ + μ δ0` is the same vector however long Δ and δ0 are."""
    matrix, slope = plane(1)
    scale = np.array([1e-9, 1e7])
    solution = PAPER_MODEL.solve(
        jnp.asarray(matrix * np.outer(scale, scale)), jnp.asarray(slope * scale), None
    )
    expected = np.linalg.solve(matrix, -slope)
    np.testing.assert_allclose(
        np.array(solution[:2]) * scale, expected, rtol=1e-9, atol=0
    )


def test_first_step_has_no_momentum():
    matrix, slope = np.diag([4.0, 0.0]), np.array([-2.0, 0.0])
    solution = PAPER_MODEL.solve(jnp.asarray(matrix), jnp.asarray(slope), None)
    np.testing.assert_allclose(solution, [0.5, 0.0, -0.5], rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ratio", [1.0, -2.0, 1e-4])
def test_parallel_directions_give_the_one_dimensional_optimum(dtype, ratio):
    """With δ0 = c Δ the system is singular; the step along Δ is still optimal."""
    direction = np.array([1.0, ratio])
    matrix = jnp.asarray(3.0 * np.outer(direction, direction), dtype)
    slope = jnp.asarray(-1.5 * direction, dtype)
    alpha, mu, change = PAPER_MODEL.solve(matrix, slope, None)
    np.testing.assert_allclose(alpha + mu * ratio, 0.5, rtol=1e-3)
    np.testing.assert_allclose(change, -0.375, rtol=1e-3)


def test_nothing_to_do_gives_zeros():
    zero = jnp.zeros((2, 2)), jnp.zeros(2)
    np.testing.assert_array_equal(PAPER_MODEL.solve(*zero, None), [0, 0, 0])
    np.testing.assert_array_equal(
        PAPER_MODEL.solve(*zero, jnp.asarray(0.9)), [0, 0.9, 0]
    )


# ---------------------------------------------------------------------- in long runs


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_no_damping_reaches_zero_or_infinity(dtype):
    """From where it would never come back, however often it is multiplied."""
    limits = jnp.finfo(dtype)
    with jax.enable_x64(dtype == jnp.float64):
        for value, rho in ((limits.tiny, 1.0), (limits.max, 0.0)):
            damping = LevenbergMarquardt(1.0).update(dtype(value), rho)
            assert damping.dtype == dtype
            assert damping == value
            gammas = SeparateDamping(1.0).candidates(dtype(value))
            assert np.isfinite(gammas).all()
            assert (np.asarray(gammas) > 0).all()
