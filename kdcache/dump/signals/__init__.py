"""Signals: what each kind asks of a teacher, and how the answer becomes columns."""
