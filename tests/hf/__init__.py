"""Tests of nnscaler_ring.hf; skipped where transformers is not installed."""
