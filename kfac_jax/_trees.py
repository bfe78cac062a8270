"""Flattens parameter trees against the plan, with errors that name the leaf."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


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
        """Like `leaves`, but what `optax.masked` hides comes back as None.

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
                result[i] = None if _is_hidden(node) else _as_array(node)
        for leaf, path, shape in zip(result, self.paths, self.shapes, strict=True):
            if leaf is not None and jnp.shape(leaf) != shape:
                raise ValueError(
                    f"{what} has shape {jnp.shape(leaf)} at '{path}'; the plan was "
                    f"made for {shape}. Make a new plan with make_curvature for new "
                    "shapes."
                )
            if leaf is not None and not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"{what} has type {leaf.dtype} at '{path}'; expected real "
                    "floating-point numbers, like the parameter."
                )
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
        """Which of the plan's leaves each node (a leaf, or hidden) stands for."""
        index_tree = jax.tree.unflatten(self.treedef, range(len(self.paths)))
        try:
            subtrees = treedef.flatten_up_to(index_tree)
        except (ValueError, TypeError, KeyError):
            subtrees = self._same_names(tree)
        if subtrees is None:
            raise ValueError(
                f"{what} does not have the structure of the parameters the plan was "
                f"made for: {self._difference(tree)}. Make a new plan with "
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
                f"{what} does not have the structure of the parameters the plan was "
                f"made for: {self._difference(tree)}. Pass the tree the plan was made "
                "with."
            )
        return places

    def _same_names(self, tree: Any) -> list[int] | None:
        """Matches trees of one set of paths in other containers (flax's Variables)."""
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


def _as_array(leaf: Any) -> Any:
    """Numbers as arrays; arrays, and their shapes alone, as they are."""
    return leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)


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
        raise ValueError("params holds no arrays; expected at least one parameter.")
    paths, shapes, dtypes = [], [], []
    for path, leaf in with_paths:
        name = path_name(path)
        dtype = getattr(leaf, "dtype", None)
        if dtype is None and isinstance(leaf, float):
            dtype = jnp.result_type(leaf)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            got = type(leaf).__name__ if dtype is None else dtype
            raise TypeError(
                f"Parameter '{name}' is {got}; expected an array of real floating "
                "point. Split integer or complex leaves off and pass them as "
                "arguments (or as real and imaginary parts)."
            )
        paths.append(name)
        shapes.append(tuple(jnp.shape(leaf)))
        dtypes.append(str(dtype))
    return TreeSpec(treedef, tuple(paths), tuple(shapes), tuple(dtypes))
