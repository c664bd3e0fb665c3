"""Sweeps: many runs of one recipe over one cache, resumable, as one table."""
