"""Layers: parameters with the equations that consume them, in one canonical layout."""

from ._grouping import BlocksSpec as BlocksSpec
from ._grouping import group as group
from ._layer import CROSS as CROSS
from ._layer import KINDS as KINDS
from ._layer import Layer as Layer
from ._layer import Link as Link
from ._links import link as link
from ._links import paired_rows as paired_rows
from ._products import choose_products as choose_products
