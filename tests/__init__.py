"""Tests, in folders like the package's. Run from the repository's root."""
