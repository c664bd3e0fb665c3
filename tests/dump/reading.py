"""What the tests of teachers read: samples of mixed lengths, batches, and the plain models."""

import numpy as np
import torch
import transformers

from kdcache.dump.batches import Batch, pad
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.models.loading import load_tokenizer
from tests.dump import zoo as models

HEADS = {
    "lm": {
        **dict.fromkeys(models.ENCODER_DECODERS, "AutoModelForSeq2SeqLM"),
        **dict.fromkeys(models.CAUSAL, "AutoModelForCausalLM"),
        **dict.fromkeys(models.MASKED, "AutoModelForMaskedLM"),
    },
    "classifier": dict.fromkeys(models.CLASSIFIERS, "AutoModelForSequenceClassification"),
    "regressor": dict.fromkeys(models.CLASSIFIERS, "AutoModelForSequenceClassification"),
    "encoder": {**dict.fromkeys(models.ENCODERS, "AutoModel"), "t5": "T5EncoderModel"},
}
#: Rows of the world's text: long, short and in between.
ROWS = [4, 0, 9, 3, 27]


def plain(directory, architecture, head="lm", **options):
    """The transformers model itself."""
    auto = getattr(transformers, HEADS[head][architecture])
    return auto.from_pretrained(directory, **options).eval()


def encoded(directory, lines, target=False):
    """Ids of some lines and, as one sample more, the first token of the first line."""
    tokenizer = load_tokenizer(directory)
    ids = tokenizer(text_target=lines)["input_ids"] if target else tokenizer(lines)["input_ids"]
    return [*ids, ids[0][:1]]


def masked_samples(directory, samples, seed=5):
    """Samples in which some tokens are the mask token, and where it stands."""
    mask_id = load_tokenizer(directory).mask_token_id
    generator = np.random.Generator(np.random.PCG64(seed))
    chosen = [generator.random(len(ids)) < 0.3 for ids in samples]
    chosen[-1][:] = True  # a sample that is one masked token
    masked = [
        [mask_id if hit else token for token, hit in zip(ids, hits, strict=True)]
        for ids, hits in zip(samples, chosen, strict=True)
    ]
    return masked, chosen


def padded(samples, pad_id):
    """[B, T] ids and mask of lists, padded on the right."""
    lengths = np.array([len(ids) for ids in samples])
    column = Ragged(offsets_of(lengths), {"id": np.concatenate([np.array(s) for s in samples])})
    return pad(column, np.arange(len(samples)), pad_id)


def batch_of(teacher, samples, sources=None, segments=None):
    """A batch of lists of ids."""
    ids, mask = padded(samples, teacher.pad_id)
    types = None if segments is None else padded(segments, 0)[0]
    read = (None, None) if sources is None else padded(sources, teacher.pad_id)
    return Batch.from_numpy(ids, mask, types, *read, device=teacher.device)


def mask_of(chosen, width):
    """[B, T] bool of lists of bools."""
    at = torch.zeros(len(chosen), width, dtype=torch.bool)
    for row, hits in zip(at, chosen, strict=True):
        row[: len(hits)] = torch.as_tensor(hits)
    return at


def left_padded(samples, pad_id):
    """[B, T] ids, attention mask and positions of lists, padded on the left."""
    width = max(map(len, samples))
    ids = torch.full((len(samples), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, width - len(sample) :] = torch.tensor(sample)
        mask[row, width - len(sample) :] = 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def close(found, expected, **tolerances):
    """Equal but for float32 sums in another order, as each processor has its own."""
    torch.testing.assert_close(found, expected, **{"rtol": 1e-4, "atol": 5e-5, **tolerances})
