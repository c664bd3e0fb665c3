"""Soft labels as tensors: coded as they lie on disk, and decoded to what losses take."""
