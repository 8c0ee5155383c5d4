"""Measurements of nnscaler_ring; see benchmarks/README.md."""
