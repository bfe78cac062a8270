"""The environments of what this library is compared with, each one's packages apart.

    python benchmarks/environments.py            makes those that are missing
    python benchmarks/environments.py published  makes that one, if it is missing

An environment that cannot be made is no error, as the benchmark shows why instead: it
is then left with the reason in `failed.txt`, and tried again the next time. A complete
one has `ready.txt`, with what was installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OF_EXPERIMENTS = (
    "flax",
    "matplotlib",
    "mlxtend",
    "orbax-checkpoint",
    "pandas",
    "pooch",
    "rdata",
    "tqdm",
    "tyro",
)


class Environment(NamedTuple):
    """What is installed, and on which Python (else on the one that runs this)."""

    packages: tuple[str, ...]
    jax: str = "jax"
    python: str | None = None


THIS_PACKAGE = ("--editable", f"{ROOT}[experiments]")
ENVIRONMENTS = {
    # Has this package's import name, and fails on later releases of JAX.
    "published": Environment(
        ("jaxlib==0.9.1", "kfac-jax==0.0.8", *OF_EXPERIMENTS), "jax==0.9.1", "3.11"
    ),
    # This package on that release of JAX.
    "published-jax": Environment(
        ("jaxlib==0.9.1", *THIS_PACKAGE), "jax==0.9.1", "3.11"
    ),
    # The only Distributed Shampoo there is; of 2022, it names no versions of JAX.
    "shampoo": Environment(("optax-shampoo==0.0.6", *THIS_PACKAGE)),
    # Its import fails on later releases of optax.
    "psgd": Environment(("psgd-jax==0.2.9", "optax==0.2.6", *THIS_PACKAGE)),
}


class EnvironmentFailed(Exception):
    """An environment could not be made; the message says why, in a line."""


def folder(name: str) -> Path:
    """Where the environment is."""
    return ROOT / f".venv-{name}"


def failure(name: str) -> str | None:
    """Why the environment cannot be used; None if it can."""
    if (folder(name) / "ready.txt").exists():
        return None
    reason = folder(name) / "failed.txt"
    if reason.exists():
        return reason.read_text("utf-8").strip()
    return f"there is no {folder(name).name}; `make bench` makes it"


def make(name: str) -> None:
    """Makes the environment, unless it is there with what it should have."""
    environment, place = ENVIRONMENTS[name], folder(name)
    installs = "\n".join([_with_accelerator(environment.jax), *environment.packages])
    ready = place / "ready.txt"
    if ready.exists() and ready.read_text("utf-8") == installs:
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    print(f"Making {place.name}, some minutes.", flush=True)
    try:
        _run(find_python(environment.python), "-m", "venv", str(place))
        python = str(place / "bin" / "python")
        _run(python, "-m", "pip", "install", *installs.split("\n"))
    except EnvironmentFailed as error:
        print(f"{place.name} cannot be made: {error}", file=sys.stderr)
        (place / "failed.txt").write_text(f"{error}\n", "utf-8")
    else:
        ready.write_text(installs, "utf-8")


def find_python(version: str | None) -> str:
    """The path of a Python of that version that can make environments.

    Args:
        version: as in "3.11"; None for the Python that runs this.

    Returns:
        The one that runs this if it fits, or one on PATH or among pyenv's. (A pyenv
        shim may be on PATH and not run.)

    Raises:
        EnvironmentFailed: if there is none.
    """
    ours = "{}.{}".format(*sys.version_info)
    if version in (None, ours):
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = sorted(map(str, pyenv.glob(f"{version}.*/bin/python3")))
    check = (
        "import ensurepip, sys, venv; "
        f"sys.exit('{{}}.{{}}'.format(*sys.version_info) != {version!r})"
    )
    for python in (f"python{version}", *found):
        try:
            _run(python, "-c", check)
        except EnvironmentFailed:
            continue
        return shutil.which(python) or python
    raise EnvironmentFailed(f"found no Python {version} with venv; this is {ours}")


def _with_accelerator(jax: str) -> str:
    """That requirement of JAX, for the GPU that this environment's JAX is for."""
    for extra in ("cuda12", "cuda13"):
        try:
            importlib.metadata.version(f"jax-{extra}-plugin")
        except importlib.metadata.PackageNotFoundError:
            continue
        return jax.replace("jax", f"jax[{extra}]", 1)
    return jax


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError as error:
        raise EnvironmentFailed(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        lines = lines or done.stderr.splitlines()
        reason = lines[-1] if lines else f"status {done.returncode}"
        raise EnvironmentFailed(reason.strip())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=", ".join(ENVIRONMENTS)
    )
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(ENVIRONMENTS)
    if unknown:
        parser.error(
            f"expected some of {', '.join(ENVIRONMENTS)}; got {', '.join(unknown)}"
        )
    for name in arguments.names or ENVIRONMENTS:
        make(name)


if __name__ == "__main__":
    main()
