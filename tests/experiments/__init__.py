"""The experiments' data, parts and programs."""
