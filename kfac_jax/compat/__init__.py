"""Names of the published JAX K-FAC library, for programs written for it."""
