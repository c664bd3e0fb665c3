"""Runs: the training loop, its checkpoints, its ranks and its checks."""
