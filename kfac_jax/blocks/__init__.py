"""Approximations of one layer's block of the curvature matrix."""

from ._block import Block as Block
from ._block import Damped as Damped
from ._block import Spectrum as Spectrum
from ._layout import BlockShape as BlockShape
from .diagonal import Diagonal as Diagonal
from .eigen import Eigen as Eigen
from .full import Full as Full
from .identity import Identity as Identity
from .input_only import InputOnly as InputOnly
from .kronecker import Kronecker as Kronecker
from .kronecker_sum import KroneckerSum as KroneckerSum
from .tnt import TNT as TNT
