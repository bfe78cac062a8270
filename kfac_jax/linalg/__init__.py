"""Dense linear algebra of symmetric positive matrices."""

from ._checked import conditionals as conditionals
from ._checked import diagonal as diagonal
from ._checked import eigh as eigh
from ._checked import finite_diagonals as finite_diagonals
from ._checked import gram as gram
from ._checked import inverse as inverse
from ._checked import inverse_many as inverse_many
from ._checked import inverse_root_many as inverse_root_many
from ._checked import mean_rows as mean_rows
from ._checked import pseudo_inverse as pseudo_inverse
from ._checked import symmetrize as symmetrize
from ._checked import trace_pi as trace_pi
from ._checked import turned_basis as turned_basis
from ._coherence import Conditional as Conditional
from ._psd import Inverted as Inverted
