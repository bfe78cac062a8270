"""The benchmark of time to a target: when it is reached, and by which constants."""

import dataclasses
import math
from collections import Counter

import pytest
import time_to_target
from time_to_target_methods import METHODS, scheduled
from time_to_target_report import MISSED, success
from training import Point


def curve(*rows):
    """Points at steps with errors; a step takes two seconds."""
    rest = dict.fromkeys(("test_error", "loss", "damping", "learning_rate"), 0.0)
    rest["momentum"] = 0.0
    return [
        Point(iteration=step, seconds=2.0 * step, train_error=error, **rest)
        for step, error in rows
    ]


def test_success_is_interpolated_as_an_exponential():
    """From 8 at step 10 to 2 at step 20, 4 is halfway; a later rise changes nothing."""
    found = success(curve((0, 100.0), (10, 8.0), (20, 2.0), (30, 9.0)), 4.0)
    assert found.reached
    assert found == pytest.approx((15.0, 30.0))


def test_success_at_a_measurement_and_at_the_start():
    """What is measured needs no interpolation."""
    assert success(curve((0, 9.0), (10, 4.0)), 4.0) == pytest.approx((10.0, 20.0))
    assert success(curve((0, 3.0), (10, 2.0)), 4.0) == (0, 0.0)


@pytest.mark.parametrize("last", [4.1, math.nan, math.inf])
def test_what_is_not_reached_is_missed(last):
    """Also by a run that diverged."""
    found = success(curve((0, 9.0), (10, last)), 4.0)
    assert found == MISSED
    assert not found.reached


def test_constants_are_those_of_the_soonest_trial():
    """One that missed counts last, even with the lower error at its end."""
    adamw = METHODS["adamw"](batch=8, rate=0.1, warm_up=1)

    target = time_to_target.TASKS["autoencoder"].trial_target

    def trial(rate, seconds, last):
        constants = dataclasses.asdict(dataclasses.replace(adamw, rate=rate))
        names = {"task": "autoencoder", "optimizer": "adamw", "target": target}
        return {**names, "constants": constants, "seconds": seconds, "last": last}

    trials = [trial(0.1, None, 1.0), trial(0.2, 5.0, 2.0), trial(0.3, 4.0, 2.0)]
    assert time_to_target.best(trials, "autoencoder", "adamw").rate == 0.3
    assert time_to_target.best(trials[:1], "autoencoder", "adamw").rate == 0.1
    with pytest.raises(ValueError, match="Expected trials of kfac"):
        time_to_target.best(trials, "autoencoder", "kfac")


def test_every_optimizer_had_as_many_trials():
    """And all that the program lists are kept, no others."""
    kept = time_to_target.kept_trials()
    for task, optimizers in time_to_target.TRIALS.items():
        for name, listed in optimizers.items():
            trials = time_to_target._of(kept, task, name)
            found = [trial["constants"] for trial in trials]
            assert found == [dataclasses.asdict(constants) for constants in listed]
        counts = Counter(trial["optimizer"] for trial in kept if trial["task"] == task)
        assert len(set(counts.values())) == 1, counts


def test_rates_rise_then_fall():
    """To zero at the horizon, or not at all."""
    rising = [float(scheduled(step, 2, 6)) for step in range(7)]
    assert rising == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert [float(scheduled(step, 2, None)) for step in (0, 1, 99)] == [0.5, 1.0, 1.0]
