"""Codecs on the device: a distribution to the coded entries of a soft label."""
