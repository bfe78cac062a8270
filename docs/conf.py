"""Sphinx configuration. Pages are Markdown (MyST); `make docs` builds site/."""

import importlib.metadata

project = "kfac_jax"
author = "The kfac_jax authors"
release = importlib.metadata.version("kfac-optax")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = f"kfac_jax {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# The README is shown as the first page, and its links are relative to the repository.
suppress_warnings = ["myst.xref_missing"]

# Single backticks mean code in docstrings, as they do in Markdown.
default_role = "code"
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
}
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
# Attributes are a list in the docstring of their class. As entries of their own they
# would be twice in the index where a base class documents one, too.
napoleon_use_ivar = True
