"""Where the bytes of a cache lie: disks and object stores, and how they come there whole."""
