"""The benchmarks' logic; little is measured."""
