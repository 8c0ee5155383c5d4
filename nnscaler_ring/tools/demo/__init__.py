"""A demonstration: the same training on one device and on several ranks, side by side."""
