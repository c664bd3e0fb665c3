"""Losses as functions of tensors, and the terms that a recipe puts together of them."""
