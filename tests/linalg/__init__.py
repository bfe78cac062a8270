"""Inverses, eigendecompositions and second moments."""
