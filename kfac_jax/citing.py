"""BibTeX of what a program uses."""

import dataclasses
import functools
import importlib.resources
import inspect
import types
from collections.abc import Iterator
from typing import Any

from kfac_jax import blocks
from kfac_jax._utils import arguments
from kfac_jax.curvature import Curvature
from kfac_jax.devices import OverAxis, OverMesh
from kfac_jax.laplace import Laplace
from kfac_jax.operator.structures import SampleSpace
from kfac_jax.optimization.sample_space_method import SampleSpaceMethod
from kfac_jax.plan import Layer
from kfac_jax.rules import Spring

OURS, WRAPPERS = "kfac_jax", ("kfac_jax", "optax")


def cite(*used: Any) -> str:
    """BibTeX entries for the papers behind what is in use.

    Args:
      *used: plans, transformations (chains of optax, too), operators, posteriors,
        blocks, rules, or modules such as `kfac_jax.influence`.

    Returns:
      One entry after the other: this library, Martens & Grosse 2015, and those of the
      parts that are found in what is given.

    Raises:
      TypeError: if nothing is given, or something that holds no part of this library.

    >>> import jax.numpy as jnp, kfac_jax
    >>> def loss_fn(w, x, y):
    ...     return kfac_jax.losses.squared_error(x @ w, y).sum(-1).mean()
    >>> w, x, y = jnp.ones((3, 2)), jnp.ones((8, 3)), jnp.zeros((8, 2))
    >>> curvature = kfac_jax.make_curvature(
    ...     loss_fn, w, x, y, blocks=kfac_jax.blocks.Eigen())
    >>> text = cite(curvature, kfac_jax.kfac(curvature))
    >>> "Eigenbasis" in text, "Convolution" in text
    (True, False)
    """
    if not used:
        raise TypeError("cite needs what is in use, such as cite(curvature, tx).")
    keys: set[str] = set()
    for thing in used:
        parts = list(_parts(thing, set()))
        if not parts:
            raise TypeError(
                "cite takes what this library made, such as a plan, a transformation "
                f"or a block: got {arguments.shown(thing)}, in which nothing is found."
            )
        keys.update(*map(_keys, parts))
    entries = _entries().items()
    return "\n\n".join(text for key, text in entries if key in keys | _ALWAYS)


def _parts(thing: Any, seen: set[int]) -> Iterator[Any]:
    """The objects, functions and modules of this library that something is made of."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    inside: list[Any] = []
    if isinstance(thing, types.ModuleType):
        name = thing.__name__
    elif isinstance(thing, types.MethodType | types.FunctionType | functools.partial):
        function = inspect.unwrap(getattr(thing, "func", thing))
        name = getattr(function, "__module__", "")
        if name.startswith(WRAPPERS):  # not what the user's functions hold
            cells: tuple[Any, ...] = getattr(function, "__closure__", None) or ()
            inside = [getattr(thing, "__self__", None), getattr(thing, "func", None)]
            inside += [*getattr(thing, "args", ()), *(x.cell_contents for x in cells)]
    else:
        name = type(thing).__module__
        if isinstance(thing, tuple | list):
            inside = list(thing)  # pyright: ignore[reportUnknownArgumentType]
        elif dataclasses.is_dataclass(thing) and name.startswith(OURS):
            inside = [getattr(thing, field.name) for field in dataclasses.fields(thing)]
    if name.startswith(OURS):
        yield thing
    for part in inside:
        yield from _parts(part, seen)


def _keys(part: Any) -> set[str]:
    """The entries for one object, function or module."""
    keys = set(_BY_MODULE.get(getattr(part, "__module__", ""), ()))
    if isinstance(part, types.ModuleType):
        keys |= set(_BY_MODULE.get(part.__name__, ()))
    for kind, found in _BY_TYPE.items():
        if isinstance(part, kind):
            keys |= set(found)
    if isinstance(part, Layer) and part.kind.startswith("conv"):
        keys.add("grosse2016kfc")
    if isinstance(part, Curvature):
        keys |= set(_BY_MODE.get(part.estimation_mode, ()))
    if getattr(part, "weight_sharing", None) == "reduce":
        keys.add("eschenhagen2023kronecker")
    if isinstance(part, SampleSpaceMethod) and part.decay:
        keys |= set(_BY_TYPE[Spring])
    if isinstance(part, blocks.Kronecker):
        keys |= set(_BY_FIT.get(part.fit, ()))
    if isinstance(part, OverAxis | OverMesh) and part.state_axes:
        keys.add("pauloski2021kaisa")
    return keys


def _entries() -> dict[str, str]:
    """The entries of references.bib by their keys, in its order."""
    file = importlib.resources.files("kfac_jax") / "references.bib"
    entries = file.read_text(encoding="utf-8").split("\n@")[1:]
    return {entry.split("{")[1].split(",")[0]: f"@{entry.strip()}" for entry in entries}


_ALWAYS = {"kfac_jax", "martens2015kfac"}
_BY_TYPE = {
    blocks.Eigen: ("george2018eigenbasis",),
    blocks.TNT: ("ren2021tnt",),
    blocks.InputOnly: ("benzing2022neurons",),
    blocks.KroneckerSum: ("dangel2024pinns",),
    SampleSpace: ("chen2024empowering",),
    Spring: ("goldshlager2024spring",),
    Laplace: ("ritter2018laplace", "daxberger2021redux"),
    OverAxis: ("ba2017distributed",),
    OverMesh: ("ba2017distributed",),
}
_BY_MODULE = {
    "kfac_jax.influence": ("grosse2023influence",),
    "kfac_jax.laplace": ("ritter2018laplace", "daxberger2021redux"),
    "kfac_jax.extras.averaging": ("polyak1992averaging",),
    "kfac_jax.extras.grafting": ("agarwal2020disentangling",),
}
_BY_MODE = {
    "ggn_exact": ("botev2017practical",),
    "ggn_curvature_prop": ("martens2012curvature",),
    "fisher_curvature_prop": ("martens2012curvature",),
}
_BY_FIT = {"kl": ("lin2025understanding",), "frobenius": ("vanloan1993kronecker",)}
