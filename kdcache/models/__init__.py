"""Models: where they lie, our own, and what a pass of any of them is made to do."""
