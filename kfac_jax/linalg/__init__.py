"""Dense linear algebra of symmetric positive matrices."""

from ._coherence import Conditional as Conditional
from ._coherence import conditionals as conditionals
from ._coherence import pseudo_inverse as pseudo_inverse
from ._gram import gram as gram
from ._psd import Inverted as Inverted
from ._psd import diagonal as diagonal
from ._psd import eigh as eigh
from ._psd import finite_diagonals as finite_diagonals
from ._psd import inverse as inverse
from ._psd import inverse_many as inverse_many
from ._psd import inverse_root_many as inverse_root_many
from ._psd import mean_rows as mean_rows
from ._psd import symmetrize as symmetrize
from ._psd import trace_pi as trace_pi
from ._psd import turned_basis as turned_basis
