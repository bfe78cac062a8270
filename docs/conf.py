"""Sphinx configuration. Pages are Markdown (MyST); `make docs` builds site/."""

import importlib.metadata
import pathlib

project = "kfac_jax"
author = copyright = "The kfac_jax authors"
release = importlib.metadata.version("kfac-optax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_design",
]
html_theme = "furo"
html_title = f"kfac_jax {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Notebooks run where they have changed since the last build. An error ends the build.
nb_execution_mode = "cache"
nb_execution_cache_path = str(
    pathlib.Path(__file__).parents[1] / ".cache" / "notebooks"
)
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_execution_show_tb = True

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
