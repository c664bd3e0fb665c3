import numpy as np
import torch

from kdcache.dump.batches import Batch, pad, plan_batches
from kdcache.formats.ragged import Ragged, offsets_of


def test_batches_hold_every_sample_once_within_the_budget():
    generator = np.random.Generator(np.random.PCG64(1))
    src, tgt = generator.integers(1, 40, (2, 500))
    plan = plan_batches(src, tgt, 300)
    assert sorted(np.concatenate(plan).tolist()) == list(range(500))
    sizes = [len(rows) * (src[rows].max() + tgt[rows].max()) for rows in plan]
    assert max(sizes) <= 300
    padded, real = sum(sizes), src.sum() + tgt.sum()
    assert padded / real < 1.5
    assert plan_batches(src, tgt, 300)[7].tolist() == plan[7].tolist()
    assert [rows.tolist() for rows in plan_batches(src[:2], tgt[:2], 1)] in ([[0], [1]], [[1], [0]])
    assert plan_batches(src[:0], tgt[:0], 300) == []


def test_pad():
    column = Ragged(offsets_of(np.array([2, 0, 3])), {"id": np.array([5, 6, 7, 8, 9], "u2")})
    ids, mask = pad(column, np.array([2, 0, 1]), 1)
    assert ids.tolist() == [[7, 8, 9], [5, 6, 1], [1, 1, 1]]
    assert mask.tolist() == [[True] * 3, [True, True, False], [False] * 3]


def test_a_batch_of_arrays():
    ids, mask = np.array([[5, 6], [7, 0]]), np.array([[True, True], [True, False]])
    batch = Batch.from_numpy(ids, mask, source_ids=ids + 1, source_mask=mask)
    assert batch.segments is None
    assert batch.source_ids.tolist() == [[6, 7], [8, 1]]
    for rows in (torch.tensor([1]), torch.tensor([False, True])):
        one = batch.select(rows)
        assert one.ids.tolist() == [[7, 0]]
        assert one.segments is None
        assert one.source_mask.tolist() == [[True, False]]
