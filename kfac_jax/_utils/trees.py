"""Flattens parameter trees against the plan, with errors that name the leaf."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_jax._utils.arguments import dtype_of, is_array, shown


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """The parameters' structure, paths, shapes and types; static and hashable."""

    treedef: Any
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    def leaves(self, tree: Any, what: str) -> list[Any]:
        """Flattens a tree that must match the plan's parameters in structure and shape.

        Args:
          tree: the tree.
          what: how errors call it.

        Returns:
          Its leaves in the plan's order.

        Raises:
          TypeError: if a leaf is not real floating-point.
          ValueError: if structure or shapes differ.
        """
        found = self.masked_leaves(tree, what)
        if any(leaf is None for leaf in found):
            raise ValueError(
                f"{what} has parameters hidden by a mask, but this computation needs "
                "all "
                "of them. Use fixed rates and damping under optax.masked, or freeze "
                "parameters with blocks={path: None} and a mask after kfac."
            )
        return found

    def masked_leaves(self, tree: Any, what: str) -> list[Any | None]:
        """Like `leaves`, but leaves that `optax.masked` hides are None.

        Args:
          tree: the tree; a masked node may stand for a whole subtree.
          what: how errors call it.

        Returns:
          Its leaves in the plan's order.

        Raises:
          TypeError: if a leaf is not real floating-point.
          ValueError: if structure or shapes differ.
        """
        nodes, treedef = jax.tree.flatten(tree, is_leaf=_is_hidden)
        places = self._places(tree, treedef, what)
        result: list[Any | None] = [None] * len(self.paths)
        for node, place in zip(nodes, places, strict=True):
            for i in place:
                result[i] = None if _is_hidden(node) else node
        for i, (path, shape) in enumerate(zip(self.paths, self.shapes, strict=True)):
            if result[i] is not None:
                result[i] = _checked(result[i], what, path, shape)
        return result

    def restore(self, leaves: Sequence[Any], like: Any) -> Any:
        """Builds a tree in the structure of `like`, from leaves in the plan's order."""
        nodes, treedef = jax.tree.flatten(like, is_leaf=_is_hidden)
        places = self._places(like, treedef, "the tree")
        filled = [
            node if _is_hidden(node) else leaves[place[0]]
            for node, place in zip(nodes, places, strict=True)
        ]
        return jax.tree.unflatten(treedef, filled)

    def _places(self, tree: Any, treedef: Any, what: str) -> list[list[int]]:
        """For each node (a leaf, or a hidden subtree) the plan's leaves in it."""
        index_tree = jax.tree.unflatten(self.treedef, range(len(self.paths)))
        try:
            subtrees = treedef.flatten_up_to(index_tree)
        except (ValueError, TypeError, KeyError):
            subtrees = self._same_names(tree)
        if subtrees is None:
            raise ValueError(
                f"{what} must have the structure of the parameters the plan was made "
                f"for; got another: {self._difference(tree)}. Make a new plan with "
                "make_curvature, or pass the tree it was made with."
            )
        nodes = jax.tree.leaves(tree, is_leaf=_is_hidden)
        places = [jax.tree.leaves(sub) for sub in subtrees]
        fits = all(
            _is_hidden(node) or len(place) == 1
            for node, place in zip(nodes, places, strict=True)
        )
        if not fits or sum(map(len, places)) != len(self.paths):
            raise ValueError(
                f"{what} must have the structure of the parameters the plan was made "
                f"for; got another: {self._difference(tree)}. Pass the tree the plan "
                "was made with."
            )
        return places

    def _same_names(self, tree: Any) -> list[int] | None:
        """Matches leaves by path, in trees of other containers (flax's Variables)."""
        found = [_plain(path_name(p)) for p, _ in jax.tree.leaves_with_path(tree)]
        mine = [_plain(path) for path in self.paths]
        if sorted(found) != sorted(mine) or len(set(mine)) != len(mine):
            return None
        return [mine.index(name) for name in found]

    def _difference(self, tree: Any) -> str:
        paths = {path_name(path) for path, _ in jax.tree.leaves_with_path(tree)}
        missing = sorted(set(self.paths) - paths)
        extra = sorted(paths - set(self.paths))
        if not missing and not extra:
            return f"expected {self.treedef}, got {jax.tree.structure(tree)}"
        return f"missing {missing or 'nothing'}, unexpected {extra or 'nothing'}"


def _checked(leaf: Any, what: str, path: str, shape: tuple[int, ...]) -> Any:
    """A leaf that is an array, or the shape of one; numbers as arrays."""
    if is_array(leaf):
        leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        if leaf.shape != shape:
            raise ValueError(
                f"{what} must have the shapes of the plan's parameters; got shape "
                f"{leaf.shape} at '{path}', expected {shape}. Make a new plan with "
                "make_curvature for new shapes."
            )
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
    raise TypeError(
        f"{what} must hold real floating-point numbers, like the parameters; got "
        f"{shown(leaf)} at '{path}'."
    )


def _is_hidden(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _plain(path: str) -> str:
    return path.removesuffix("/value")


def path_name(path: Any) -> str:
    """Writes a path of keys as `a/0/b`; the tree's root as `params`."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "params"


def tree_spec(params: Any) -> TreeSpec:
    """Describes the parameters.

    Args:
      params: a pytree of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      The description.

    Raises:
      TypeError: if a leaf is not an array of real floating point.
      ValueError: if there are no parameters.
    """
    with_paths, treedef = jax.tree.flatten_with_path(params)
    if not with_paths:
        raise ValueError(
            f"params holds no arrays: expected at least one parameter, got {params!r}."
        )
    paths, shapes, dtypes = [], [], []
    for path, leaf in with_paths:
        name = path_name(path)
        dtype = dtype_of(leaf) if is_array(leaf) else None
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params must hold arrays of real floating point; got {shown(leaf)} at "
                f"'{name}'. Split integer or complex leaves off and pass them as "
                "arguments (or as real and imaginary parts)."
            )
        paths.append(name)
        shapes.append(tuple(jnp.shape(leaf)))
        dtypes.append(str(dtype))
    return TreeSpec(treedef, tuple(paths), tuple(shapes), tuple(dtypes))


def rebuilt(tree: Any) -> Any:
    """The same leaves, in containers that are built anew.

    The variables of flax nnx, such as running means among a loss function's arguments,
    may only be written in the trace in which they were made.
    """
    return jax.tree.map(lambda x: x, tree)
