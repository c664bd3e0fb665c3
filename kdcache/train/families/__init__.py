"""Families of students: what each reads, what it predicts, and how it is scored while it trains."""

from __future__ import annotations

from kdcache.train.families.causal_lm import CausalLM
from kdcache.train.families.classifier import Classifier
from kdcache.train.families.encoder_decoder import EncoderDecoder
from kdcache.train.families.family import Family, Setting
from kdcache.train.families.masked_lm import MaskedLM
from kdcache.train.families.masked_seq2seq import MaskedSeq2Seq
from kdcache.train.families.multi_task import MultiTask

__all__ = ["FAMILIES", "Family", "Setting"]

#: By a student's kind in its recipe.
FAMILIES: dict[str, Family] = {
    "encoder_decoder": EncoderDecoder(),
    "masked_lm": MaskedLM(),
    "masked_seq2seq": MaskedSeq2Seq(),
    "classifier": Classifier(),
    "causal_lm": CausalLM(),
    "multi_task": MultiTask(),
}
