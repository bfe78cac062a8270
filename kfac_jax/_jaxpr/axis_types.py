"""Meshes with Explicit axes, where the types of arrays say how they are sharded.

There an operation whose result may be sharded in several ways has to be told which, and
operands must agree. The user's program is written for that. The library's own
computations are not: they run with the same axes as Auto (`auto`), where the compiler
decides, and what they call of the user's in turn as it was (`explicit`). Going from one
to the other moves no data. Without Explicit axes none of this does anything.
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
    """Runs a function with the Explicit axes as Auto ones.

    Args:
      function: of arrays, in trees. What it closes over has to go through `here` or
        `explicit`.
      like: arrays (or their types) in a tree as the results are, which get their
        shardings; None to replicate.

    Returns:
      The function of the arguments as they are; itself where no axis is Explicit.
    """

    def run(*args: Any) -> Any:
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
    """Runs a function with Explicit axes, from where `auto` made them Auto.

    Args:
      function: of one argument, a tree of arrays. What it closes over is as it was.
      like: arrays (or their types) in a tree as the argument is, whose shardings it
        gets.

    Returns:
      The function of Auto arrays, to such; itself where `like` has no Explicit axis.
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


def whole(tree: Any) -> Any:
    """Replicates arrays that are sharded over Explicit axes."""
    return jax.tree.map(lambda x: _cast(x, _mesh(x), P()) if _is_array(x) else x, tree)


def sharded_like(tree: Any, like: Any) -> Any:
    """Shards arrays over Explicit axes as those in a tree of the same structure are."""
    mesh = _explicit_mesh(like)
    return tree if mesh is None else _like(tree, like, mesh)


def here(tree: Any) -> Any:
    """Replicates arrays of another mesh than the present one on that."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.tree.map(lambda x: _moved(x, mesh), tree)


def on_mesh_of(x: Array, y: Array) -> Array:
    """Replicates x on the mesh of y, where that is another."""
    return _moved(x, _mesh(y))


def split_first(x: Array, arrays: Sequence[Any]) -> Array:
    """Shards the first axis as the first of arrays that does, where that divides it."""
    for array in filter(_is_array, arrays):
        mesh, spec = _mesh(array), _spec(array)
        if _explicit(mesh) and spec and spec[0] is not None:
            return _cast(x, mesh, P(spec[0]))
    return x


def context_of(equation: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which new equations are on the mesh that the given one is on."""
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
    """The first mesh with Explicit axes of arrays."""
    meshes = map(_mesh, filter(_is_array, jax.tree.leaves(tree)))
    return next((mesh for mesh in meshes if _explicit(mesh)), None)


def _moved(x: Any, mesh: AbstractMesh) -> Any:
    same = mesh.empty or not _is_array(x) or _mesh(x) == mesh
    return x if same else _cast(x, mesh, P())


def _replicated(tree: Any, mesh: AbstractMesh) -> Any:
    return jax.tree.map(lambda x: _cast(x, mesh, P()), tree)


def _like(tree: Any, like: Any, mesh: AbstractMesh) -> Any:
    def one(x: Any, y: Any) -> Any:
        known = _is_array(y) and _explicit(_mesh(y))
        return _cast(x, mesh, _spec(y) if known else P())

    return jax.tree.map(one, tree, like)


def _cast(x: Any, mesh: AbstractMesh, spec: P) -> Any:
    """An array on a mesh; along axes that cannot be divided so it is not sharded."""
    if not isinstance(x, Array):
        return x
    kept = [
        names if size % _size(mesh, names) == 0 else None
        for size, names in zip(x.shape, spec, strict=False)
    ]
    sharding = NamedSharding(mesh, P(*kept, *[None] * (x.ndim - len(kept))))
    if _sharding(x) == sharding or not (_explicit(mesh) or _explicit(_mesh(x))):
        return x
    return jax.sharding.reshard(x, sharding)


def _size(mesh: AbstractMesh, names: Any) -> int:
    """Over how many devices the names of a spec's entry shard."""
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(mesh.shape[name] for name in names if name is not None)
