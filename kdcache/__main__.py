"""`python -m kdcache`, the same as `kdcache`."""

from kdcache.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
