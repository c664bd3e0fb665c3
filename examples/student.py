"""A small Marian that reads and writes a cache's ids: the student of the other examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import MarianConfig, MarianMTModel

from kdcache.formats.cache import Cache


def new_student(
    cache: Cache, streams: Sequence[str], signal: str, size: int, dropout: float, seed: int
) -> MarianMTModel:
    """An encoder-decoder with random weights.

    Args:
        cache: an open cache.
        streams: source and target.
        signal: soft labels of the target; they may name more ids than the tokenizer has.
        size: width of the model.
        dropout: probability.
        seed: of the weights.
    """
    records = [cache.stream(name) for name in streams]
    tokenizer = cache.tokenizer(records[-1].tokenizer)
    pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    torch.manual_seed(seed)
    return MarianMTModel(
        MarianConfig(
            vocab_size=max(
                *(record.vocab_size for record in records), cache.logits(signal).vocab_size
            ),
            d_model=size,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=4 * size,
            decoder_ffn_dim=4 * size,
            max_position_embeddings=256,
            dropout=dropout,
            scale_embedding=True,
            pad_token_id=pad,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            forced_eos_token_id=tokenizer.eos_id,
            decoder_start_token_id=pad,
        )
    )
