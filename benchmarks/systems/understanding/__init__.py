"""The table of the understanding and language modelling systems."""
