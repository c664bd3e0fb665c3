"""Bytes on disk and back: numpy and pyarrow, neither torch nor transformers."""
