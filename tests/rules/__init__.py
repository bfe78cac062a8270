"""Damping, learning rate, momentum and refreshes."""
