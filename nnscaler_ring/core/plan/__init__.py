"""Planning: integers only, no torch."""
