"""Everything that reads jaxprs: nothing outside this package knows JAX's internals."""
