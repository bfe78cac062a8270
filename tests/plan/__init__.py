"""Layers, and the plan's checks and report."""
