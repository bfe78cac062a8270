"""K-FAC as optax transformations: state, refresh, rates, damping."""
