"""What is installed, what importing it reaches, and what pickles of states refer to."""

import functools
import importlib.metadata
import io
import json
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax
from kfac_jax import blocks
from tests.helpers import models

ROOT = pathlib.Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------- imports

# In a process of its own: what reaches for the network, or for another program.
IMPORT = """
import importlib, json, sys

path, names = json.loads(sys.argv[1])
sys.path[:0] = path
reached, importing = [], [None]

def hook(event, args):
    kind = event.split(".")[0]
    harmless = ("socket.__new__", "socket.gethostname", "socket.bind")
    if kind in ("socket", "urllib", "http", "ftplib", "subprocess"):
        if event not in harmless:
            reached.append([importing[0], kind, f"{event} {args!r:.200}"])

sys.addaudithook(hook)
for name in names:
    importing[0] = name
    importlib.import_module(name)
print(json.dumps(reached))
"""


def reached_by(names, *folders):
    """What importing the modules one after the other reaches for: triples.

    Which module, what kind of thing, and what.
    """
    path = [*map(str, folders), *(x for x in sys.path if x)]
    answer = subprocess.run(
        [sys.executable, "-c", IMPORT, json.dumps([path, names])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


def modules_of_the_package():
    folder = pathlib.Path(kfac_jax.__file__).parent
    files = sorted(folder.rglob("*.py"))
    names = [x.relative_to(folder.parent).with_suffix("").parts for x in files]
    return [".".join(x).removesuffix(".__init__") for x in names]


def test_importing_the_package_reaches_nothing():
    names = modules_of_the_package()
    assert {"kfac_jax", "kfac_jax.losses", "kfac_jax.compat.utils"} <= {*names}
    reached = reached_by(["jax", "optax", *names])
    assert not [x for x in reached if x[1] != "subprocess"]
    assert not [x for x in reached if x[0].startswith("kfac_jax")]


@pytest.mark.slow
def test_importing_the_experiments_reaches_no_network():
    names = sorted(x.stem for x in (ROOT / "experiments").glob("*.py"))
    assert "mnist" in names
    reached = reached_by(names, ROOT / "experiments")
    assert not [x for x in reached if x[1] != "subprocess"]


def test_a_module_that_reaches_for_the_network_is_noticed(tmp_path):
    """Else the tests above could not fail."""
    lines = [
        "import socket",
        "try:",
        "    socket.create_connection(('127.0.0.1', 9), 1)",
        "except OSError:",
        "    pass",
    ]
    (tmp_path / "reaching.py").write_text("\n".join(lines))
    kinds = {(name, kind) for name, kind, _ in reached_by(["reaching"], tmp_path)}
    assert kinds == {("reaching", "socket")}


# ------------------------------------------------------------------------------ wheel


def installed():
    """The files of what pip installed, without what pip and Python add.

    A build leaves kfac_optax.egg-info in the repository, which is on the path as well.
    """
    found = importlib.metadata.distributions(name="kfac-optax")
    (files,) = (x.files or [] for x in found if x.read_text("RECORD"))
    own = ("INSTALLER", "REQUESTED", "direct_url.json", "RECORD")
    return [x for x in files if x.name not in own and "__pycache__" not in x.parts]


def test_the_wheel_holds_the_package_only():
    """In `.ci/run`, whose last tests run against the wheel as it was built."""
    files = installed()
    if not any(x.parts[0] == "kfac_jax" for x in files):
        pytest.skip("an editable install has no files of its own")
    infos = {x.parts[0] for x in files if x.parts[0].endswith(".dist-info")}
    assert len(infos) == 1
    assert {x.parts[0] for x in files} == {"kfac_jax", *infos}
    package = {x.as_posix() for x in files if x.parts[0] == "kfac_jax"}
    assert {"kfac_jax/py.typed", "kfac_jax/references.bib"} <= package
    assert {x.rpartition(".")[2] for x in package} == {"bib", "py", "typed"}
    names = {"METADATA", "WHEEL", "top_level.txt", "LICENSE"}
    assert {x.name for x in files if x.parts[0] in infos} == names
    (top,) = (x for x in files if x.name == "top_level.txt")
    assert top.read_text().split() == ["kfac_jax"]
    expected = {f"{x.replace('.', '/')}" for x in modules_of_the_package()}
    found = {x.removesuffix(".py").removesuffix("/__init__") for x in package}
    data = {"kfac_jax/py.typed", "kfac_jax/references.bib"}
    assert found - data == expected


# ---------------------------------------------------------------------------- pickles


class Recording(pickle.Unpickler):
    """Unpickles, and notes every class and function that the pickle refers to."""

    def __init__(self, raw):
        super().__init__(io.BytesIO(raw))
        self.found = set()

    def find_class(self, module, name):
        self.found.add((module, name))
        return super().find_class(module, name)


OWN = {
    ("kfac_jax.statistics.averages", "Statistics"),
    ("kfac_jax.optimization.state", "Info"),
    ("kfac_jax.optimization.state", "KFACState"),
    ("kfac_jax.extras.averaging", "AverageIteratesState"),
    ("kfac_jax.compat._steps", "EstimatorState"),
    ("kfac_jax.compat._steps", "State"),
    ("optax._src.base", "EmptyState"),
}
"""Named tuples. A pickle that refers to nothing else holds arrays and containers."""

ARRAYS = ("numpy", "numpy._core", "numpy.core", "ml_dtypes", "jax._src.array")


def referred(tree):
    recording = Recording(pickle.dumps(tree))
    recording.load()
    return {
        (module, name)
        for module, name in recording.found
        if module not in ARRAYS and module.rpartition(".")[0] not in ARRAYS
    }


@functools.cache
def problem():
    p = models.problem(params=models.dense_params(0, 3, 4, 2))
    return p.loss_fn, p.params, p.args


OPTIONS = {
    "kronecker": ({}, {}),
    "tridiagonal": ({"structure": kfac_jax.BlockTridiagonal()}, {}),
    "eigen": ({"blocks": blocks.Eigen()}, {}),
    "diagonal": ({"blocks": blocks.Diagonal()}, {}),
    "products": ({"blocks": blocks.Kronecker(gradient_products=True)}, {}),
    "adaptive": (
        {},
        {
            "learning_rate": kfac_jax.QuadraticModel(),
            "momentum": None,
            "damping": kfac_jax.LevenbergMarquardt(1.0),
            "factored_damping": kfac_jax.SeparateDamping(),
        },
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pickles_of_states_hold_arrays_and_plain_containers(name):
    loss_fn, params, args = problem()
    of_plan, of_kfac = OPTIONS[name]
    curvature = kfac_jax.make_curvature(loss_fn, params, *args, **of_plan)
    tx = optax.chain(kfac_jax.kfac(curvature, **of_kfac), kfac_jax.average_iterates())
    value, grads, statistics = curvature.value_grad_and_statistics(
        params, *args, rng=jax.random.key(0)
    )
    _, state = tx.update(
        grads, tx.init(params), params, statistics=statistics, value=value, args=args
    )
    for convert in (np.asarray, jnp.asarray):
        for tree in (state, statistics, curvature.init_factors(params)):
            assert referred(jax.tree.map(convert, tree)) <= OWN
        found = referred(jax.tree.map(convert, state))
        assert ("kfac_jax.optimization.state", "KFACState") in found


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_pickles_of_the_optimizers_state_do_too(convert):
    loss_fn, params, args = problem()
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(lambda params, batch: loss_fn(params, *batch)),
        value_func_has_aux=False,
    )
    state = optimizer.init(params, jax.random.PRNGKey(0), args)
    found = referred(jax.tree.map(convert, state))
    assert ("kfac_jax.compat._steps", "State") in found and found <= OWN


def test_a_pickle_of_something_else_is_noticed():
    """Else the tests above could not fail."""
    assert referred({"rule": kfac_jax.LevenbergMarquardt(1.0)}) - OWN
