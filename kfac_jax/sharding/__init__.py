"""Who does what on several devices, and how they exchange it."""

from ._over_axis import OverAxis as OverAxis
from ._over_axis import check as check
from ._over_axis import mean as mean
