"""Layers: parameters with the equations that consume them, in one canonical layout."""

from .grouping import BlocksSpec as BlocksSpec
from .grouping import group as group
from .layer import CROSS as CROSS
from .layer import KINDS as KINDS
from .layer import Layer as Layer
from .layer import Link as Link
from .links import link as link
from .links import paired_rows as paired_rows
from .product_choice import choose_products as choose_products
