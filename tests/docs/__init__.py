"""The code in README and documentation."""
