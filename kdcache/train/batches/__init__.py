"""Order, gathering and batches: what a student reads of a cache, and when."""
