"""The approximate curvature as a linear operator."""
