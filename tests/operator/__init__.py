"""Curvature as an operator, and the groups that are inverted together."""
