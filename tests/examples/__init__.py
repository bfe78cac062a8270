"""The examples' data, parts and programs."""
