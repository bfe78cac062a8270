"""Training processes that are killed at random moments, and go on bitwise.

`make kills` kills a hundred, a few are killed among the slow tests.
"""

import collections
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tqdm")  # the experiments' training loop

SCRIPT = Path(__file__).with_name("killed_training.py")
LIMIT = 300  # seconds without a word
EXPERIMENTS = SCRIPT.parents[2] / "experiments"
STEPS = 12
REFRESH_EVERY = 3
KILLS = int(os.environ.get("KFAC_KILLS", "6"))
MOMENTS = ("refresh", "saving", "training", "anywhere")


class Kill(NamedTuple):
    """When a process is to die: some time after it said something."""

    said: list[str]  # nothing: after its start
    delay: float  # seconds


class Life(NamedTuple):
    """What one process said, and when; and whether it ended by itself."""

    said: list[list[str]]
    times: list[float]  # seconds since its start
    finished: bool

    def numbers(self, word: str) -> list[int]:
        """The numbers that it said after a word."""
        return [int(words[1]) for words in self.said if words[0] == word]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, and programs that are compiled once for all lives."""
    given = [os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join([str(EXPERIMENTS), *filter(None, given)]),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def live(folder: Path, environment: dict[str, str], kill: Kill | None = None) -> Life:
    """Runs the process to its end, or to the kill."""
    options = [str(folder), str(STEPS), str(REFRESH_EVERY)]
    command = [sys.executable, str(SCRIPT), *options]
    errors = folder.with_suffix(".stderr")
    said: list[list[str]] = []
    times: list[float] = []
    began = time.monotonic()
    with (
        errors.open("w") as stream,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=stream, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            if kill is not None and not kill.said:
                time.sleep(kill.delay)
                process.kill()
            for line in process.stdout:
                said.append(line.split())
                times.append(time.monotonic() - began)
                if kill is not None and said[-1] == kill.said:
                    time.sleep(kill.delay)
                    process.kill()
            process.wait(LIMIT)
        finally:
            process.kill()
    finished = process.returncode == 0
    assert finished or process.returncode == -signal.SIGKILL, errors.read_text()
    return Life(said, times, finished)


class Uninterrupted(NamedTuple):
    """A run that nobody kills: how it ends, and the longest time of each part of it."""

    last: list[str]  # what it says at its end
    life: float  # seconds
    parts: dict[str, float]  # seconds after each word


@pytest.fixture(scope="module")
def uninterrupted(environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    first = live(folder / "compiles", environment)
    second = live(folder / "compiled", environment)
    assert first.said == second.said
    assert second.said[-1][0] == "finished"
    parts: dict[str, float] = {}
    for words, at, after in zip(
        second.said, second.times, second.times[1:], strict=False
    ):
        parts[words[0]] = max(parts.get(words[0], 0.0), after - at)
    return Uninterrupted(second.said[-1], second.times[-1], parts)


def draw(rng: random.Random, moment: str, timing: Uninterrupted, done: int) -> Kill:
    """A moment to die at, after the steps that are on disk."""
    if moment == "anywhere":
        return Kill([], rng.uniform(0, timing.life))
    word = "saving" if moment == "saving" else "training"
    numbers = list(range(done + 1, min(done + 3, STEPS) + 1))
    if moment == "refresh":
        due = [n for n in numbers if n <= REFRESH_EVERY or n % REFRESH_EVERY == 0]
        numbers = due or numbers
    # early more often: who is killed late is killed in the next part
    delay = timing.parts[word] * rng.random() ** 2
    return Kill([word, str(rng.choice(numbers))], delay)


@pytest.mark.slow
def test_killed_runs_lose_no_step_and_end_bitwise_as_uninterrupted_ones(
    uninterrupted, environment, tmp_path
):
    """What was said to be saved is what the next life begins from, or later steps."""
    rng = random.Random(0)
    kills = runs = 0
    during: collections.Counter[str] = collections.Counter()
    while kills < KILLS:
        folder, done, finished = tmp_path / str(runs), 0, False
        runs += 1
        while not finished:
            kill = None
            if kills < KILLS and done < STEPS:
                kill = draw(rng, MOMENTS[kills % len(MOMENTS)], uninterrupted, done)
            life = live(folder, environment, kill)
            finished = life.finished
            if not finished:
                kills += 1
                during[life.said[-1][0] if life.said else "starting"] += 1
            assert all(k >= done for k in life.numbers("resumed")), (kill, life.said)
            done = max([done, *life.numbers("saved")])
            if finished:
                assert life.said[-1] == uninterrupted.last, (kill, life.said)
    print(f"{kills} kills in {runs} runs of {STEPS} steps; after saying {dict(during)}")
