"""The sample space: rows `U = Bᵀ J` of every case, with the Fisher `F = Uᵀ U`.

`gram_matrix.py` has `T = U Uᵀ`, whose rows are never formed, of what `layer_rows.py`
gathers; `products.py` multiplies by U; `costs.py` says what T takes.
"""

from kfac_jax.statistics.sample_space.costs import lines as lines
from kfac_jax.statistics.sample_space.gram_matrix import NAME as NAME
from kfac_jax.statistics.sample_space.gram_matrix import gram as gram
from kfac_jax.statistics.sample_space.gram_matrix import sampled as sampled
from kfac_jax.statistics.sample_space.gram_matrix import statistics as statistics
from kfac_jax.statistics.sample_space.products import Products as Products
from kfac_jax.statistics.sample_space.products import products as products
