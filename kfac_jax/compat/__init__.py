"""Names that programs written for the existing JAX K-FAC library use.

Its optimizer and what goes with it: adapters over this library, no part of which
depends on them. They are reached as attributes of the package: `kfac_jax.Optimizer`,
`kfac_jax.utils`,
`kfac_jax.tag_graph_matcher`, `kfac_jax.layers_and_loss_tags`,
`kfac_jax.curvature_blocks`, `kfac_jax.curvature_estimator`. New programs need none.
"""
