"""One file for each approximation of a layer, and what they share."""
