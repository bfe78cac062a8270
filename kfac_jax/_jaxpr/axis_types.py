"""Meshes with Explicit axes, where an array's type says how it is sharded.

On such a mesh JAX demands that operands agree in their shardings, and that operations
whose result could be sharded in several ways say which. The user's program is written
for that. The library's own computations are not: they run with the same axes as Auto
(`auto`), where the compiler decides. When they call the user's program in turn, its
axes are made Explicit again (`explicit`). Changing the types moves no data. Without
Explicit axes nothing in this module has any effect.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
from jax import Array
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def auto(function: Callable[..., Any], like: Any = None) -> Callable[..., Any]:
    """Runs a function with Explicit axes as Auto ones.

    Args:
      function: takes and returns trees of arrays. Arrays that it closes over have to go
        through `here`, functions of the user through `explicit`.
      like: a tree of arrays (or their types) like the results, which get the same
        shardings; None to replicate the results.

    Returns:
      A function of the same arguments. Without Explicit axes it only calls `function`.
    """

    def run(*args: Any) -> Any:
        # The mesh in context is empty where the caller has not set one, although the
        # arguments are sharded; then their types tell it.
        outer = jax.sharding.get_abstract_mesh()
        mesh = outer if _explicit(outer) else _explicit_mesh(args)
        if mesh is None:
            return function(*args)
        free = mesh.update_axis_types(dict.fromkeys(_explicit(mesh), AxisType.Auto))
        with jax.sharding.use_abstract_mesh(free):
            results = function(*_replicated(args, free))
        if like is None:
            return _replicated(results, mesh)
        return _like(results, like, mesh)

    return run


def explicit(function: Callable[[Any], Any], like: Any) -> Callable[[Any], Any]:
    """Runs a function with Explicit axes, within a function that `auto` runs.

    Args:
      function: takes one tree of arrays. Arrays that it closes over keep their types.
      like: a tree of arrays (or their types) like the argument, which gets the same
        shardings.

    Returns:
      A function from Auto arrays to Auto arrays. Where `like` has no Explicit axis it
      only calls `function`.
    """

    def run(tree: Any) -> Any:
        mesh = _explicit_mesh(like)
        outer = jax.sharding.get_abstract_mesh()
        if mesh is None or mesh == outer:
            return function(tree)
        with jax.sharding.use_abstract_mesh(mesh):
            results = function(_like(tree, like, mesh))
        return _replicated(results, outer)

    return run


def unsharded(tree: Any) -> Any:
    """Replicates arrays that are sharded over Explicit axes."""
    return jax.tree.map(lambda x: _cast(x, _mesh(x), P()) if _is_array(x) else x, tree)


def sharded_like(tree: Any, like: Any) -> Any:
    """Shards arrays over Explicit axes like those of a tree of the same structure."""
    mesh = _explicit_mesh(like)
    return tree if mesh is None else _like(tree, like, mesh)


def here(tree: Any) -> Any:
    """Replicates arrays that are on another mesh over the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.tree.map(lambda x: _moved(x, mesh), tree)


def on_mesh_of(x: Array, y: Array) -> Array:
    """Replicates x over the mesh of y, if x is on another mesh."""
    return _moved(x, _mesh(y))


def split_first(x: Array, arrays: Sequence[Any]) -> Array:
    """Shards the first axis of x like that of the first sharded array of a list.

    Nothing is sharded where the number of devices does not divide the axis.
    """
    for array in filter(_is_array, arrays):
        mesh, spec = _mesh(array), _spec(array)
        if _explicit(mesh) and spec and spec[0] is not None:
            return _cast(x, mesh, P(spec[0]))
    return x


def context_of(equation: Any) -> contextlib.AbstractContextManager[Any]:
    """A context that puts new equations on the mesh of a given equation."""
    mesh = equation.ctx.cur_abstract_mesh
    outer = jax.sharding.get_abstract_mesh()
    if mesh == outer or not (_explicit(mesh) or _explicit(outer)):
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def _is_array(x: Any) -> bool:
    return isinstance(x, Array | jax.core.ShapedArray)


def _sharding(x: Any) -> NamedSharding:
    aval: Any = x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)
    return aval.sharding


def _mesh(x: Any) -> AbstractMesh:
    mesh: Any = _sharding(x).mesh
    return mesh


def _spec(x: Any) -> P:
    return _sharding(x).spec


def _explicit(mesh: AbstractMesh) -> list[str]:
    """The names of a mesh's Explicit axes."""
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in pairs if kind == AxisType.Explicit]


def _explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh of the first array that is on one with Explicit axes; None without."""
    meshes = map(_mesh, filter(_is_array, jax.tree.leaves(tree)))
    return next((mesh for mesh in meshes if _explicit(mesh)), None)


def _moved(x: Any, mesh: AbstractMesh) -> Any:
    same = mesh.empty or not _is_array(x) or _mesh(x) == mesh
    return x if same else _cast(x, mesh, P())


def _replicated(tree: Any, mesh: AbstractMesh) -> Any:
    return jax.tree.map(lambda x: _cast(x, mesh, P()), tree)


def _like(tree: Any, like: Any, mesh: AbstractMesh) -> Any:
    def one(x: Any, y: Any) -> Any:
        is_typed = _is_array(y) and _explicit(_mesh(y))
        return _cast(x, mesh, _spec(y) if is_typed else P())

    return jax.tree.map(one, tree, like)


def _cast(x: Any, mesh: AbstractMesh, spec: P) -> Any:
    """Reshards an array; axes that the devices do not divide evenly are replicated."""
    if not isinstance(x, Array):
        return x
    divisible = [
        names if size % _size(mesh, names) == 0 else None
        for size, names in zip(x.shape, spec, strict=False)
    ]
    sharding = NamedSharding(mesh, P(*divisible, *[None] * (x.ndim - len(divisible))))
    # types on meshes with Auto axes only say nothing about shardings
    if _sharding(x) == sharding or not (_explicit(mesh) or _explicit(_mesh(x))):
        return x
    return jax.sharding.reshard(x, sharding)


def _size(mesh: AbstractMesh, names: Any) -> int:
    """The number of devices that one entry of a spec shards over."""
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(mesh.shape[name] for name in names if name is not None)
