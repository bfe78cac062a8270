"""Parameter trees against the plan: flattening with checks whose errors name the leaf."""

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
          ValueError: if structure or shapes differ.
        """
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != self.treedef:
            raise ValueError(
                f"{what} does not have the structure of the parameters the plan was "
                "made "
                f"for: {self._difference(tree)}. Make a new plan with make_curvature, "
                "or "
                "pass the tree it was made with."
            )
        for leaf, path, shape in zip(leaves, self.paths, self.shapes, strict=True):
            if jnp.shape(leaf) != shape:
                raise ValueError(
                    f"{what} has shape {jnp.shape(leaf)} at '{path}'; the plan was "
                    "made "
                    f"for {shape}. Make a new plan with make_curvature for new shapes."
                )
        return leaves

    def masked_leaves(self, tree: Any, what: str) -> list[Any | None]:
        """Like `leaves`, but leaves hidden by `optax.masked` come back as None."""

        def is_hidden(x: Any) -> bool:
            return isinstance(x, optax.MaskedNode)

        nodes, treedef = jax.tree.flatten(tree, is_leaf=is_hidden)
        if treedef != self.treedef or not any(map(is_hidden, nodes)):
            return list(self.leaves(tree, what))
        return [None if is_hidden(node) else node for node in nodes]

    def restore(self, leaves: Sequence[Any]) -> Any:
        """Builds a tree from leaves; None becomes a hidden leaf again."""
        nodes = [optax.MaskedNode() if leaf is None else leaf for leaf in leaves]
        return jax.tree.unflatten(self.treedef, nodes)

    def _difference(self, tree: Any) -> str:
        paths = {path_name(path) for path, _ in jax.tree.leaves_with_path(tree)}
        missing = sorted(set(self.paths) - paths)
        extra = sorted(paths - set(self.paths))
        if not missing and not extra:
            return f"expected {self.treedef}, got {jax.tree.structure(tree)}"
        return f"missing {missing or 'nothing'}, unexpected {extra or 'nothing'}"


def path_name(path: Any) -> str:
    """Writes a path of keys as `a/0/b`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tree_spec(params: Any) -> TreeSpec:
    """Describes the parameters.

    Args:
      params: a pytree of arrays or `jax.ShapeDtypeStruct`s.

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
                "point. "
                "Split integer or complex leaves off and pass them as arguments (or as "
                "real and imaginary parts)."
            )
        paths.append(name)
        shapes.append(tuple(jnp.shape(leaf)))
        dtypes.append(str(dtype))
    return TreeSpec(treedef, tuple(paths), tuple(shapes), tuple(dtypes))
