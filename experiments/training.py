"""A timed training loop for comparisons: curves, checkpoints, Ctrl-C and exact resume.

The clock runs only inside the compiled step (the transfer of its batch included).
Compilation is timed apart; evaluation, checkpoints and the progress bar are not timed.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from batches import Batch, Source
from jax import Array
from tqdm import tqdm

PyTree = Any
Evaluate = Callable[[PyTree], tuple[float, float]]  # params -> training, test error

TURN_SECONDS = 5.0


class Progress(NamedTuple):
    """What a step reports, scalars; NaN where the method has no such number."""

    loss: Array  # on the step's batch, before the step
    damping: Array  # lambda
    learning_rate: Array  # alpha
    momentum: Array  # mu


class Method(NamedTuple):
    """An optimizer under test, as two pure functions.

    A step is given the batch as a tuple, the loss function's arguments after the
    parameters; the iteration, int32 from 0; and the fraction of the run's budget that
    is used, float32 from 0 to 1, for schedules that end with the budget.
    """

    name: str
    init: Callable[[PyTree], PyTree]  # params -> state
    # (params, state, batch, iteration, fraction) -> (params, state, progress)
    step: Callable[
        [PyTree, PyTree, tuple[Array, ...], Array, Array],
        tuple[PyTree, PyTree, Progress],
    ]
    report: str = ""  # about the method, to be shown once
    # state -> averaged parameters, where the method keeps an average of its iterates
    average: Callable[[PyTree], PyTree] | None = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One row of a curve, measured after `iteration` steps.

    The errors are what the experiment measures on training and on test cases.
    """

    iteration: int
    seconds: float  # inside the compiled step, from the start; see `clock`
    train_error: float
    test_error: float
    loss: float
    damping: float
    learning_rate: float
    momentum: float
    averaged_error: float = math.nan  # on training cases, of the averaged parameters


@dataclass(kw_only=True)
class Run:
    """A method's progress so far. Params and state are donated to each step."""

    params: PyTree
    state: PyTree
    iteration: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be learned: the model, its loss and the data."""

    init_params: Callable[[int], PyTree]  # seed -> params
    loss_fn: Callable[..., Any]  # params, *batch -> a scalar
    batches: Source
    evaluate: Evaluate
    # output folder, runs -> nothing; draws what is shown besides the curves
    plot: Callable[[Path, dict[str, Run]], None] = lambda folder, runs: None


class Constants(Protocol):
    """An optimizer's constants: a frozen dataclass, whose fields are options."""

    def method(self, problem: Problem, params: PyTree, seed: int) -> Method:
        """The optimizer; params are for their shapes, the seed is of its samples."""
        ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to stop, and how often to save and to measure.

    The budget, which schedules follow, is the iterations if they are limited, else the
    seconds.
    """

    seconds: float  # may be infinite if the iterations are limited
    iterations: int | None = None
    checkpoint_every: float = 60.0  # seconds by the wall clock
    # iterations; besides, a few times at the start; None for only before and after
    evaluate_every: int | None = 25

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: one is not above 0.
        """
        if not self.seconds > 0 or (
            self.iterations is not None and self.iterations < 1
        ):
            raise ValueError(
                "A run takes more than 0 seconds and at least 1 iteration; got "
                f"{self.seconds} and {self.iterations}."
            )

    def budget(self, run: Run) -> tuple[float, float, str]:
        """What a run has used of its budget, the budget, and their unit."""
        if self.iterations is not None:
            return run.iteration, self.iterations, "it"
        return run.seconds, self.seconds, "s"

    def fraction(self, run: Run) -> np.float32:
        """How much of its budget a run has used, from 0 to 1."""
        used, budget, _ = self.budget(run)
        return np.float32(min(used / budget, 1.0))

    def reached(self, run: Run) -> bool:
        """Whether a run is over."""
        too_many = self.iterations is not None and run.iteration >= self.iterations
        return too_many or run.seconds >= self.seconds

    def evaluation_is_due(self, iteration: int) -> bool:
        """Whether to measure after this many steps."""
        if self.evaluate_every is None:
            return False
        return iteration in (1, 2, 5, 10, 15) or iteration % self.evaluate_every == 0


class Interrupt:
    """Turns the first Ctrl-C into a flag; a second one stops at once.

    A step's inputs are donated: cut in the middle, it would leave nothing to save.
    """

    requested = False

    def __enter__(self) -> Interrupt:
        """Takes over Ctrl-C."""
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives Ctrl-C back."""
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        tqdm.write("Ctrl-C: finishing this step, then saving (again: stop at once).")


class Trainer:
    """One method under way: compiled once, then brought forward in slices of time."""

    def __init__(
        self,
        method: Method,
        run: Run,
        problem: Problem,
        *,
        limits: Limits,
        save: Callable[[Run], None] = lambda run: None,
    ) -> None:
        """Compiles the first step, unless the run is already at its limit.

        Args:
            method: the optimizer.
            run: where to start; brought forward in place.
            problem: for its batches, of which every new shape compiles the step again,
                and its errors.
            limits: when to stop.
            save: what keeps the run as it is then.
        """
        self.method, self.run = method, run
        self._batches, self._evaluate = problem.batches, problem.evaluate
        self._steps: dict[Any, Callable[..., Any]] = {}  # by the batch's shapes
        self.limits, self._keep = limits, save
        self._progress = Progress(*[np.float32(np.nan)] * len(Progress._fields))
        self._diverged = False
        self._saved_at = time.monotonic()
        if self.finished:
            print(f"{method.name}: already at its limit, {run.iteration} iterations.")
            return
        print(f"{method.name}: compiling ...", end=" ", flush=True)
        self._step_for(self._inputs())
        print(f"{run.compile_seconds:.1f} s.")
        if not run.curve:
            self._measure()

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.limits.reached(self.run) or self._diverged

    def advance(self, seconds: float, bar: tqdm, interrupt: Interrupt) -> None:
        """Steps on for some seconds, or until finished or interrupted."""
        end = self.run.seconds + seconds
        while self.run.seconds < end and not (self.finished or interrupt.requested):
            inputs = self._inputs()
            step = self._step_for(inputs)
            self._progress = _timed_step(step, self.run, inputs)
            _show(bar, self.run, self.limits, self._progress)
            if self.limits.evaluation_is_due(self.run.iteration):
                self._measure()
            if time.monotonic() - self._saved_at > self.limits.checkpoint_every:
                self.save()
            self._diverged = not np.isfinite(self._progress.loss)

    def save(self) -> None:
        """Writes a checkpoint."""
        self._keep(self.run)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """Measures and saves where the run has come to."""
        if not self.run.curve or self.run.curve[-1].iteration < self.run.iteration:
            self._measure()
        self.save()

    def _inputs(self) -> tuple[Batch, np.int32, np.float32]:
        """What the next step needs beside params and state."""
        iteration = self.run.iteration
        fraction = self.limits.fraction(self.run)
        return self._batches(iteration), np.int32(iteration), fraction

    def _step_for(self, inputs: tuple[Batch, np.int32, np.float32]) -> Any:
        shapes = tuple(array.shape for array in inputs[0])
        if shapes not in self._steps:
            self._steps[shapes] = _compile(self.method, self.run, inputs)
        return self._steps[shapes]

    def _measure(self) -> None:
        train_error, test_error = self._evaluate(self.run.params)
        averaged_error = math.nan
        if self.method.average is not None:
            averaged_error, _ = self._evaluate(self.method.average(self.run.state))
        progress = {k: float(v) for k, v in self._progress._asdict().items()}
        self.run.curve.append(
            Point(
                iteration=self.run.iteration,
                seconds=self.run.seconds,
                train_error=train_error,
                test_error=test_error,
                averaged_error=averaged_error,
                **progress,
            )
        )


def start(
    constants: Constants,
    problem: Problem,
    seed: int,
    limits: Limits,
    save: Callable[[Run], None] = lambda run: None,
    restore: Callable[[Run], Run] = lambda run: run,
) -> Trainer:
    """A method under way from its first parameters, or what `restore` makes of them."""
    params = problem.init_params(seed)
    method = constants.method(problem, params, seed)
    run = restore(Run(params=params, state=method.init(params)))
    return Trainer(method, run, problem, limits=limits, save=save)


def train_in_turns(trainers: Sequence[Trainer], interrupt: Interrupt) -> None:
    """Runs all to their limits in short turns, so a slow spell of the machine hits all.

    Args:
        trainers: the methods.
        interrupt: the flag that Ctrl-C raises.
    """
    with ExitStack() as stack:
        bars = [
            stack.enter_context(_progress_bar(t, i)) for i, t in enumerate(trainers)
        ]
        while not (interrupt.requested or all(t.finished for t in trainers)):
            for trainer, bar in zip(trainers, bars, strict=True):
                trainer.advance(TURN_SECONDS, bar, interrupt)
    for trainer in trainers:
        trainer.close()


def _compile(method: Method, run: Run, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    """The compiled step; its time, tracing included, adds to `run.compile_seconds`."""
    start = time.perf_counter()
    step = jax.jit(method.step, donate_argnums=(0, 1))
    compiled = step.lower(run.params, run.state, *inputs).compile()
    run.compile_seconds += time.perf_counter() - start
    return compiled


def clock() -> float:
    """Seconds, of which only differences mean something.

    On CPUs it is the process's own time, of all its threads: another program that keeps
    the machine busy takes none of a method's budget. An accelerator's time is not seen
    there, and the wall clock is taken.
    """
    on_cpu = jax.default_backend() == "cpu"
    return time.process_time() if on_cpu else time.perf_counter()


def _timed_step(
    step: Callable[..., Any], run: Run, inputs: tuple[Any, ...]
) -> Progress:
    """One step; `run` moves on by one iteration and by the time it took."""
    start = clock()
    run.params, run.state, progress = step(run.params, run.state, *inputs)
    jax.block_until_ready(run.params)
    run.seconds += clock() - start
    run.iteration += 1
    return jax.device_get(progress)


def _progress_bar(trainer: Trainer, position: int) -> tqdm:
    used, budget, unit = trainer.limits.budget(trainer.run)
    counts = f"{{n:.0f}}/{{total:.0f}} {unit}"
    return tqdm(
        desc=f"{trainer.method.name:<8}",
        initial=used,
        total=budget,
        position=position,
        bar_format=f"{{desc}} {{percentage:3.0f}}%|{{bar}}| {counts}{{postfix}}",
    )


def _show(bar: tqdm, run: Run, limits: Limits, progress: Progress) -> None:
    symbols = dict(zip(("loss", "λ", "α", "μ"), progress, strict=True))
    known = [f"{s} {value:.3g}" for s, value in symbols.items() if not np.isnan(value)]
    bar.set_postfix_str(f"it {run.iteration} {' '.join(known)}", refresh=False)
    bar.update(min(limits.budget(run)[0], bar.total) - bar.n)
