"""Small helpers that know nothing of curvature."""
