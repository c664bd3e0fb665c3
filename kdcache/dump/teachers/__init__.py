"""Teachers of every kind, behind the interface of `kdcache.dump.teacher`."""
