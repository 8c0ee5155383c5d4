"""Partial results and how they are merged."""
