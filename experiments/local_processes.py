"""Several commands that run at once on this machine; where one fails, none goes on."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import IO

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Ended = tuple[int | None, int]  # which command, None for this process; its exit status


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run_together(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None
) -> int:
    """Runs commands at once, until all have succeeded or one has failed.

    What the first prints is seen at once. Of the others only errors are kept, and shown
    if one is the first to fail. Whatever happens, Ctrl-C included, none is left running
    at the end. To be called by the main thread.

    Args:
        commands: programs with their arguments.
        environment: of them all; by default that of this process.

    Returns:
        0, or the status of the first that failed as a shell would say it; 128 + its
        number if a signal stopped this process.
    """
    ended: SimpleQueue[Ended] = SimpleQueue()
    with ExitStack() as stack:
        stack.enter_context(_signals_into(ended))
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        processes: list[subprocess.Popen[str]] = []
        stack.callback(_kill, processes)
        # A child starts with SIGINT blocked: Ctrl-C reaches them all, this one decides.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for command, file in zip(commands, files, strict=True):
                first = not processes
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        text=True,
                        stdin=subprocess.DEVNULL,
                        stdout=None if first else subprocess.DEVNULL,
                        stderr=None if first else file,
                    )
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for index, process in enumerate(processes):
            Thread(target=_wait, args=(index, process, ended), daemon=True).start()
        for _ in processes:
            index, status = ended.get()
            if status:
                _kill(processes)
                return _report(index, status, files)
    return 0


def _wait(
    index: int, process: subprocess.Popen[str], ended: SimpleQueue[Ended]
) -> None:
    ended.put((index, process.wait()))


def _kill(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Ends them at once: JAX keeps SIGTERM for itself, and there is nothing to save."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def _report(index: int | None, status: int, files: Sequence[IO[str]]) -> int:
    """Says on stderr which failed and why; returns the exit status as shells do."""
    if index is None:
        print(f"\nStopped by {signal.Signals(-status).name}.", file=sys.stderr)
        return 128 - status
    if index > 0:  # those of the first were seen
        files[index].seek(0)
        print(f"\n{files[index].read().rstrip()}", file=sys.stderr)
    how = f"with exit status {status}"
    if status < 0:
        how = f"by signal {-status}"
    print(f"\nProcess {index} of {len(files)} ended {how}.", file=sys.stderr)
    return status if status > 0 else 128 - status


@contextmanager
def _signals_into(ended: SimpleQueue[Ended]) -> Iterator[None]:
    """Meanwhile signals that would end this process are put into the queue instead."""

    def note(number: int, frame: object) -> None:
        ended.put((None, -number))

    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
