"""Caches made of what others dumped, and what others read made of caches."""
