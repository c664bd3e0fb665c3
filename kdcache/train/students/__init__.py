"""Students: how one is built, what it puts out, and what stands beside it while it learns."""
