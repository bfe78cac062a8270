"""Layers: parameters with the equations that consume them, in one canonical layout."""

from ._grouping import BlocksSpec as BlocksSpec
from ._grouping import group as group
from ._layer import KINDS as KINDS
from ._layer import Layer as Layer
