"""Whether what lies in a cache is what was written, and mending what is not."""
