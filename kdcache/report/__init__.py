"""Caches, runs and sweeps become pictures and pages."""
