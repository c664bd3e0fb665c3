"""Formats to students: streams a cache and distils; never loads a teacher."""
