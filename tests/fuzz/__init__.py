"""The model fuzzer: random JAX programs, and an oracle for each."""
