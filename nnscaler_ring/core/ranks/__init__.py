"""Ranks: who they are, how they agree, how messages travel."""
