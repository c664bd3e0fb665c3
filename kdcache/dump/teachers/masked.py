"""Teachers that fill in masked tokens: BERT, RoBERTa, ModernBERT, DistilBERT and their like."""

from __future__ import annotations

from kdcache.dump.teachers.model import LanguageTeacher


class MaskedTeacher(LanguageTeacher):
    """Token t is predicted by the state at t; `ids` are what stands there, masks included."""

    kind = "masked_lm"
    places = ("masked",)
    sides = ("encoder",)
