"""Rules that choose damping, learning rate and momentum: small frozen objects."""

from ._levenberg_marquardt import LevenbergMarquardt as LevenbergMarquardt
from ._quadratic_model import QuadraticModel as QuadraticModel
from ._quadratic_model import Solution as Solution
from ._refine import Refine as Refine
from ._refine import Refined as Refined
from ._refresh_schedule import RefreshSchedule as RefreshSchedule
from ._refresh_schedule import as_schedule as as_schedule
from ._separate_damping import SeparateDamping as SeparateDamping
from ._spring import Spring as Spring
