"""The commands, a file each: its arguments, and what it does with them.

Everything heavy is imported when a command runs, so that `--help`, `inspect` and `verify` start
without torch.
"""
