"""Whether another distribution with a package of this name is installed."""

import importlib.metadata
import sys
import warnings
from collections.abc import Iterable

OTHER = "kfac-jax"


def warn_of_the_other(path: Iterable[str] | None = None) -> None:
    """Warns if the existing JAX K-FAC library lies in the same place.

    Both have a package `kfac_jax`: what was installed last has replaced files of the
    other. That library is told by its folder `_src`.

    Args:
      path: where to look; None for `sys.path`.
    """
    where = sys.path if path is None else list(path)
    for found in importlib.metadata.distributions(name=OTHER, path=where):
        if any(file.parts[:2] == ("kfac_jax", "_src") for file in found.files or ()):
            warnings.warn(
                f"The distribution {OTHER} {found.version} is installed beside "
                "kfac-optax: both have a package kfac_jax, and one has replaced files "
                f"of the other. Run `pip uninstall {OTHER} kfac-optax`, then install "
                "the one that you want. Programs for that library run with this one, "
                "see docs/migration.md.",
                stacklevel=3,
            )
