"""Teachers to caches: corpus, tokens, teacher, selection, one module per signal."""
