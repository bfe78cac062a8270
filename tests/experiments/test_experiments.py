"""What the experiments feed; they themselves are run by hand."""

import doctest
import importlib

import jax
import numpy as np
import pytest

import kfac_jax


def test_an_epoch_holds_each_case_once_and_arrays_stay_together():
    from batches import Batches

    batches = Batches((np.arange(12), 10 * np.arange(12)), size=4, seed=0)
    epoch = [batches(i) for i in range(3)]
    assert sorted(np.concatenate([x for x, _ in epoch])) == list(range(12))
    assert all((y == 10 * x).all() for x, y in epoch)
    assert not all((batches(i)[0] == batches(i + 3)[0]).all() for i in range(3))


def test_batches_are_functions_of_the_iteration():
    from batches import Batches, GrowingBatches, Windows

    sources = [
        lambda: Batches((np.arange(12),), size=4, seed=0),
        lambda: GrowingBatches((np.arange(12),), lambda i: 2 + i, seed=0),
        lambda: Windows(np.arange(50), length=5, size=3, seed=0),
    ]
    for make in sources:
        forth = make()
        there = [forth(i) for i in range(7)]
        for i in reversed(range(7)):
            np.testing.assert_array_equal(make()(i), there[i])


def test_growing_batches_hold_no_case_twice_and_arrays_stay_together():
    from batches import GrowingBatches

    arrays = np.arange(12), 10 * np.arange(12)
    batches = GrowingBatches(arrays, lambda i: 4 + 4 * i, seed=0)
    for i in range(3):
        x, y = batches(i)
        assert len(set(x)) == 4 + 4 * i
        np.testing.assert_array_equal(y, 10 * x)


def test_targets_are_the_next_characters_and_stay_in_the_text():
    from batches import Windows

    source = Windows(np.arange(7), length=5, size=200, seed=0)
    inputs, targets = source(0)
    np.testing.assert_array_equal(targets, inputs + 1)
    assert set(inputs[:, 0]) == {0, 1}


def test_every_parameter_of_the_experiments_networks_is_covered():
    from functools import partial

    import classifier
    import transformer

    shape = transformer.Shape(vocabulary=11, context=6, width=8, layers=2, heads=2)
    tokens = np.zeros((4, 6), np.int32)
    images = np.zeros((4, 28, 28, 1), np.float32)
    of_text = partial(transformer.loss_fn, heads=shape.heads)
    for loss_fn, params, batch in (
        (of_text, transformer.init_params(shape, 0), (tokens, tokens)),
        (classifier.loss_fn, classifier.init_params(0), (images, tokens[:, 0])),
    ):
        with jax.numpy_rank_promotion("allow"):
            curvature = kfac_jax.make_curvature(
                loss_fn, params, *batch, on_unmatched="error"
            )
        count = sum(x.size for x in jax.tree.leaves(params))
        assert curvature.totals.covered == count


@pytest.mark.parametrize("size", [0, 13])
def test_a_batch_size_out_of_range_is_refused(size):
    from batches import Batches

    with pytest.raises(ValueError, match="from 1 to 12"):
        Batches((np.arange(12),), size=size, seed=0)


@pytest.mark.parametrize("name", ["batches", "methods", "parallel_training"])
def test_the_examples_in_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
