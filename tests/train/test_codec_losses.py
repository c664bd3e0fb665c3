"""Every codec's stored labels through the fused loss, against torch's dense losses in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdcache.formats.codec import FullCodec, NucleusCodec, SampledCodec, ThresholdCodec, TopKCodec
from kdcache.labels.decoding import decode
from kdcache.labels.sparse_target import SparseTarget, densify
from kdcache.train.losses.fused_loss import LossTerm, fused_loss, hard_target
from tests.test_labels import N, V, round_trip, teacher

SAMPLED = SampledCodec(n=50)
CODECS = {
    "threshold": ThresholdCodec(),
    "threshold-float16": ThresholdCodec(c=1 / 32, values="float16"),
    "threshold-set": ThresholdCodec(temperatures=(0.5, 1, 2, 5)),
    "topk": TopKCodec(k=8),
    "nucleus": NucleusCodec(p=0.9, k_max=20),
    "sampled": SAMPLED,
    "full": FullCodec(),
    "full-float32": FullCodec(values="float32"),
}
CASES = [
    pytest.param(codec, temperature, id=f"{name}-{temperature:g}")
    for name, codec in CODECS.items()
    for temperature in (0.5, 1.0, 1.7, 2.0, 5.0, 10.0)
    if codec is not SAMPLED or temperature == 1
]


def in_float64(target: SparseTarget) -> SparseTarget:
    uniform = None if target.uniform is None else target.uniform.double()
    values, constant = target.values.double(), target.constant.double()
    return replace(target, values=values, uniform=uniform, constant=constant)


@pytest.mark.parametrize("block_rows", [None, 7])
@pytest.mark.parametrize(("codec", "temperature"), CASES)
def test_the_fused_mix_is_torchs_dense_mix(codec, temperature, block_rows):
    generator = torch.Generator().manual_seed(3)
    target = in_float64(decode(round_trip(teacher(), codec), temperature))
    labels = torch.randint(V, (N,), generator=generator)
    row_weight = torch.rand(N, generator=generator, dtype=torch.float64)
    ignored = torch.arange(0, N, 5)
    row_weight[ignored] = 0
    logits = 3 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    student, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    soft = LossTerm(target, temperature, 0.7 * temperature**2, row_weight)
    hard = LossTerm(hard_target(labels, V), 1.0, 0.3, row_weight)
    total, terms = fused_loss(student, [hard, soft], block_rows=block_rows)
    total.backward()

    labels[ignored] = -100
    dense = densify(target, V)
    cross_entropy = F.cross_entropy(other, labels, reduction="none")
    # Soft targets of torch's own cross-entropy; the label's entropy makes it a divergence.
    divergence = F.cross_entropy(other / temperature, dense, reduction="none") + target.constant
    expected = torch.stack([cross_entropy, divergence]) @ row_weight
    mixed = 0.3 * expected[0] + 0.7 * temperature**2 * expected[1]
    mixed.backward()

    torch.testing.assert_close(terms.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(total, mixed, rtol=1e-6, atol=0)
    scale = float(other.grad.abs().max())
    torch.testing.assert_close(student.grad, other.grad, rtol=1e-6, atol=1e-6 * scale)
    assert not student.grad[ignored].any()
    if temperature not in codec.drawn_temperatures:
        entropy = torch.special.xlogy(dense, dense).sum(1)
        torch.testing.assert_close(target.constant, entropy, rtol=1e-5, atol=1e-5)
