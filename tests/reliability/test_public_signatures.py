"""Every public function, called with wrong values for every one of its arguments.

Values are made by kind, and from a valid one: `public_calls` has a valid call of each
function, and says what is legal after all. An error must be a TypeError or ValueError
of this library that names the argument, says what is expected, and what came.
"""

import inspect
import pathlib
import re
import traceback

import jax
import jax.numpy as jnp
import pytest

import kfac_jax
from kfac_jax.compat import _native_blocks
from tests import test_public_names as names
from tests.reliability import public_calls, public_calls_compat

PACKAGE = str(pathlib.Path(kfac_jax.__file__).parent)
USERS = ("loss_fn", "logcosh", "of_batch")  # functions of the tables, as of a user
TABLES = {
    "plans": public_calls.plans,
    "transformations": public_calls.transformations,
    "devices": public_calls.devices,
    "registrations": public_calls.registrations,
    "losses": public_calls.loss_functions,
    "rules": public_calls.rules,
    "blocks": public_calls.blocks,
    "linalg": public_calls.linear_algebra,
    "optimizer": public_calls_compat.of_optimizer,
    "estimators": public_calls_compat.estimators,
    "helpers": public_calls_compat.helpers,
}


@pytest.fixture(autouse=True)
def no_defaults_are_set(monkeypatch):
    monkeypatch.setattr(_native_blocks, "_registered", {})


COMPAT_MODULES = (
    "curvature_blocks",
    "curvature_estimator",
    "layers_and_loss_tags",
    "optimizer",
    "tag_graph_matcher",
    "utils",
)
WITHOUT = {  # what is public and not called with anything wrong, and why
    "AverageIteratesState": "made by init",
    "Curvature": "made by make_curvature",
    "Curvature.over": "what it refuses is in test_operator_of_data",
    "Curvature.gathered": "the same",
    "Gathered": "made by Curvature.gathered",
    "cite": "what it refuses is in test_citing",
    "GraftState": "made by init",
    "Health": "a result",
    "Info": "made by update",
    "KFACState": "made by init",
    "Layer": "made by make_curvature",
    "MultiStepsState": "made by init",
    "NaturalGradientState": "made by init",
    "SharingReport": "made by sharing_report",
    "Statistics": "made by a plan; update looks at it",
    "Totals": "made by a plan",
    "Approximation": "made by a plan",
    "blocks.Block": "abstract; its methods are called by the library",
    "blocks.BlockShape": "made by make_curvature",
    "blocks.Damped": "a result",
    "blocks.Spectrum": "a result",
    "distributions.Distribution": "abstract; its methods are called by the library",
    "distributions.RegisteredLoss": "made by the library; checked when registered",
    "influence.Top": "a result",
    **dict.fromkeys(
        (f"influence.{name}" for name in names.INFLUENCE.split() if name != "Top"),
        "what they refuse is in test_influence",
    ),
    **dict.fromkeys(
        (f"laplace.{name}" for name in names.LAPLACE.split()),
        "what they refuse is in test_laplace",
    ),
    "linalg.Conditional": "a result",
    "linalg.Inverted": "a result",
    "LayerVjpData": "a container of a program's own",
    "OptaxPreconditionState": "made by init",
    "utils.register_state_class": "a decorator of a program's own classes",
    **{
        name: "names a block; an instance is refused, see test_compat_modules"
        for name in names.COMPAT.split()
        if isinstance(getattr(kfac_jax, name), type)
        and issubclass(getattr(kfac_jax, name), kfac_jax.CurvatureBlock)
    },
}


def public():
    """The names of all that can be called, as `test_public_names` pins them."""
    modules = {"linalg": names.LINALG, "losses": names.LOSSES, "blocks": names.BLOCKS}
    modules |= {"laplace": names.LAPLACE, "influence": names.INFLUENCE}
    modules_of = (*names.MODULES, *COMPAT_MODULES)
    found = {*names.TOP.split(), *names.COMPAT.split()} - {*modules_of}
    found |= {f"{m}.{n}" for m, listed in modules.items() for n in listed.split()}
    found |= {f"Curvature.{name}" for name in names.CURVATURE.split()}
    operator = "Approximation"
    found |= {operator, *(f"{operator}.{name}" for name in names.OPERATOR.split())}
    found |= {f"distributions.{name}" for name in names.DISTRIBUTIONS.split()}
    of_utils = {
        f"utils.{name}"
        for name, value in vars(kfac_jax.utils).items()
        if inspect.isfunction(value)
        and value.__module__.startswith("kfac_jax.compat")
        and not name.startswith("_")
    }
    return found | of_utils | {"initializers.sparse_normal"}


def test_every_public_name_is_in_a_table():
    listed = [name for table in TABLES.values() for name in table()]
    assert len(listed) == len(set(listed))
    # methods of rules, and what transformations and initializers are made of
    more = {name for name in listed if "()" in name or name.split(".")[0] in listed}
    assert {*listed} - more | {*WITHOUT} == public() - more
    assert not {*WITHOUT} & {*listed}


def test_arguments_of_the_calls_are_those_of_the_signatures():
    for table in TABLES.values():
        for name, entry in table().items():
            parameters = inspect.signature(entry.function).parameters.values()
            expected = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
            assert {*entry.arguments} == expected, name
            for part in (entry.legal, entry.own, entry.skipped, entry.words):
                assert {*part} <= expected, name


# ------------------------------------------------------------------------ wrong values


def _is_array(x):
    return isinstance(x, jax.Array)


def _map_leaves(function, value):
    return jax.tree.map(lambda x: function(x) if _is_array(x) else x, value)


def _first_leaf(function, value):
    leaves, treedef = jax.tree.flatten(value)
    place = next(i for i, x in enumerate(leaves) if _is_array(x))
    leaves[place] = function(leaves[place])
    return jax.tree.unflatten(treedef, leaves)


def _as_complex(x):
    return x.astype(complex) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _as_integer(x):
    return x.astype(int) if jnp.issubdtype(x.dtype, jnp.floating) else x


class Nothing:
    """An object that is good for nothing."""


def wrong_values(value):
    """By name: values of other kinds, and variations of a valid one."""
    values = {
        "none": None,
        "text": "text",
        "negative": -1.5,
        "nan": float("nan"),
        "fraction": 2.5,
        "bool": True,
        "complex": 1.0 + 1.0j,
        "list": [1.5],
        "tree": {"other": jnp.ones(2)},
        "function": lambda *_: 0.0,
        "object": Nothing(),
        "shape": jnp.ones((2, 3, 5, 7)),
    }
    leaves = [x for x in jax.tree.leaves(value) if _is_array(x)]
    if any(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        values["complex"] = _map_leaves(_as_complex, value)
        values["integers"] = _map_leaves(_as_integer, value)
    if leaves and not _is_array(value):
        values["inner_text"] = _first_leaf(lambda x: "text", value)
        values["inner_shape"] = _first_leaf(lambda x: x[None], value)
    return values


def run(entry, arguments):
    positional, keywords = [], {}
    parameters = [*inspect.signature(entry.function).parameters.values()]
    spread = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    left = dict(arguments)
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            positional += left.pop(p.name)
        elif p.kind is p.POSITIONAL_ONLY or (
            spread and p.kind is p.POSITIONAL_OR_KEYWORD
        ):
            positional.append(left.pop(p.name))
    keywords |= left
    # as users have it: numbers of different types, and shapes of different rank
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        entry.function(*positional, **keywords)


def replaced(entry, argument, value):
    """The arguments with a wrong value for one; for the first of several `*args`."""
    parameters = inspect.signature(entry.function).parameters
    kind = parameters[argument].kind if argument in parameters else None
    if kind is inspect.Parameter.VAR_POSITIONAL:
        value = (value, *entry.arguments[argument][1:])
    return {**entry.arguments, argument: value}


def valid(entry, argument):
    value = entry.arguments[argument]
    parameters = inspect.signature(entry.function).parameters
    kind = parameters[argument].kind if argument in parameters else None
    return value[0] if kind is inspect.Parameter.VAR_POSITIONAL else value


def among(reasons, argument, name):
    """Whether a wrong value is declared."""
    listed = {one for key in reasons.get(argument, {}) for one in key.split()}
    return name in listed or "*" in listed


def is_theirs(error):
    """Whether it comes from a function of the user's."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("public_calls" in x.filename and x.name in USERS for x in frames)


def complaint(error, argument, entry):
    """What is wrong with an error; empty if nothing is."""
    if argument in entry.own and is_theirs(error):
        return ""
    if not isinstance(error, TypeError | ValueError):
        return "is of another type"
    *_, last = traceback.extract_tb(error.__traceback__)
    if not last.filename.startswith(PACKAGE):
        return f"comes from {last.filename}:{last.lineno}"
    word = entry.words.get(argument, argument)
    text = str(error)
    if not re.search(rf"\b{word}\b", text, re.IGNORECASE):
        return "does not name the argument"
    if not re.search(
        r"\b(must|expect|expects|expected|need|needs|at least)\b", text, re.I
    ):
        return "does not say what is expected"
    if not re.search(r"\bgot\b", text):
        return "does not say what came"
    return ""


def problems(entry):
    """What goes wrong with wrong values, in words."""
    for argument in entry.arguments:
        for name, value in wrong_values(valid(entry, argument)).items():
            if among(entry.skipped, argument, name):
                continue
            legal = among(entry.legal, argument, name)
            try:
                run(entry, replaced(entry, argument, value))
            except Exception as error:
                why = complaint(error, argument, entry)
                if legal:
                    why = "is declared legal"
                if why:
                    yield f"{argument}={name} {why}: {type(error).__name__}: {error}"
            else:
                if not legal:
                    yield f"{argument}={name} is accepted"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("table", TABLES)
def test_wrong_values_are_refused_with_an_error_that_says_so(table):
    found = []
    for name, entry in TABLES[table]().items():
        run(entry, entry.arguments)
        found += [f"{name}: {problem}" for problem in problems(entry)]
    assert not found, "\n".join(found)


def misspelt(name):
    """Two letters swapped, or one added: `dampnig`."""
    if len(name) > 3 and name[-2] != name[-3]:
        return name[:-3] + name[-2] + name[-3] + name[-1]
    return name + "_"


@pytest.mark.parametrize("table", TABLES)
def test_misspelt_keywords_are_refused(table):
    """By Python, which names them, or by us, who name what is missing."""
    for entry in TABLES[table]().values():
        parameters = inspect.signature(entry.function).parameters.values()
        spread = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        positional = (inspect.Parameter.VAR_POSITIONAL,)
        if spread:
            positional += (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
        by_position = {p.name for p in parameters if p.kind in positional}
        for keyword in {*entry.arguments} - by_position - {*entry.typos}:
            wrong = misspelt(keyword)
            arguments = {**entry.arguments, wrong: entry.arguments[keyword]}
            del arguments[keyword]
            with pytest.raises((TypeError, ValueError), match=f"{wrong}|{keyword}"):
                run(entry, arguments)
        for keyword in entry.typos:  # declared to be accepted
            run(entry, {**entry.arguments, misspelt(keyword): 1})


def test_a_misspelt_keyword_of_update_is_told():
    """Optax has update take any keyword, so it is `statistics` that is missing."""
    entry = public_calls.transformations()["kfac().update"]
    arguments = dict(entry.arguments)
    arguments["statistcs"] = arguments.pop("statistics")
    message = r"needs the step's statistics.*Expected the keyword statistics, got stat"
    with pytest.raises(ValueError, match=f"{message}istcs"):
        run(entry, arguments)


# --------------------------------------------------------------- what they say, exactly

MESSAGES = {  # by message: the table, the function, and the wrong argument
    "loss_fn must be a function; got": ("plans", "make_curvature", "loss_fn", 3),
    "damping_schedule must be a function or None; got": (
        *("estimators", "OptaxPreconditioner"),
        *("damping_schedule", 3),
    ),
    "rng must be a random key, such as jax.random.key(0); got 3.": (
        *("plans", "Curvature.value_grad_and_statistics"),
        *("rng", 3),
    ),
    "data must be an array; got 'a'.": (
        *("registrations", "register_loss"),
        *("data", ("a",)),
    ),
    "targets must be an array of real numbers; got 'a'.": (
        *("losses", "losses.squared_error"),
        *("targets", "a"),
    ),
    "x must be square matrices, an array [..., d, d]; got float64[3].": (
        *("linalg", "linalg.eigh"),
        *("x", jnp.ones(3)),
    ),
    "rows must be a list or tuple of": (
        *("linalg", "linalg.mean_rows"),
        *("rows", 3),
    ),
    "args[0] must be an array; got 'a'. Pass what is no array through a closure, or "
    "functools.partial.": ("plans", "make_curvature", "args", ("a",)),
    "norm_to_scale_identity_weight_per_block: expected None, got 'a'. kfac_jax adds "
    "the same λ I to each block.": (
        *("estimators", "OptaxPreconditioner"),
        *("norm_to_scale_identity_weight_per_block", "a"),
    ),
    "args must be arrays with a leading axis; got 3.": (
        *("helpers", "utils.first_dim_is_size"),
        *("args", (3,)),
    ),
    "vectors (one tree with a leading axis) must hold equally many of each leaf; got "
    "[1, 2].": (
        *("plans", "Curvature.quadratic_form"),
        *("vectors", {"w": jnp.ones((1, 3, 2)), "b": jnp.ones((2, 2))}),
    ),
    "shape must hold integers; got 3. Expected one, or a tuple of them.": (
        *("rules", "initializers.sparse_normal()"),
        *("shape", 3),
    ),
    "blocks must give a Block (kfac_jax.blocks) or None for each layer; got 3 for "
    "layer": ("plans", "make_curvature", "blocks", lambda layer: 3),
    "rows must be an array [..., r, d]; got shape (3,).": (
        *("linalg", "linalg.gram"),
        *("rows", jnp.ones(3)),
    ),
    "x and basis must have one shape; got (3, 3) and (2, 2).": (
        *("linalg", "linalg.turned_basis"),
        *("basis", jnp.eye(2)),
    ),
    "rows must be arrays that differ in their last axis only, at least one; got shapes "
    "[].": ("linalg", "linalg.mean_rows", "rows", []),
    "mean_a and mean_g must have one shape; got () and (2,).": (
        *("linalg", "linalg.trace_pi"),
        *("mean_g", jnp.ones(2)),
    ),
    "shifted[0] must have a shift of shape () for matrices (2, 2); got (1,).": (
        *("linalg", "linalg.inverse_many"),
        *("shifted", [(jnp.eye(2), jnp.ones(1))]),
    ),
    "axis must be one of the 2 axes of the logits; got 2.": (
        *("losses", "losses.softmax_cross_entropy"),
        *("axis", 2),
    ),
    "where must be an array of bools that broadcasts to the logits (4, 3); got "
    "float64[3].": ("losses", "losses.softmax_cross_entropy", "where", jnp.ones(3)),
    "matrix and slope must have shapes (2, 2) and (2,); got (2, 2) and (3,).": (
        *("rules", "QuadraticModel.solve"),
        *("slope", jnp.ones(3)),
    ),
    "gammas and changes must have shape (3,), from candidates; got (3,) and (2,).": (
        *("rules", "SeparateDamping.select"),
        *("changes", jnp.ones(2)),
    ),
    "state_axes must be the name of an axis, or a tuple of names; got": (
        *("devices", "OverAxis"),
        *("state_axes", 3),
    ),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages(message):
    table, name, argument, value = MESSAGES[message]
    entry = TABLES[table]()[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        run(entry, {**entry.arguments, argument: value})


def test_an_iterator_that_is_none():
    entry = public_calls_compat.of_optimizer()["Optimizer.step"]
    batches = {"batch": None, "data_iterator": [public_calls_compat.BATCH]}
    with pytest.raises(TypeError, match=r"data_iterator must be an iterator of batche"):
        run(entry, {**entry.arguments, **batches})
