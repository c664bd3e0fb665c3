"""Divergences that are not linear in the teacher: reverse KL, Jensen-Shannon, total variation.

Each walks all V ids of a position with autograd, whose memory is up to thirteen times the logits';
over a large vocabulary use `linear_losses`, which makes them in blocks. What the cache left out of
a label matters more here than in the forward KL, where drawn entries are unbiased: a function that
is not linear in the teacher's probabilities is biased by any noise in them. So

* `reverse_kl` and `logit_mse` need a density: labels with a uniform tail, a bucket, or all ids;
* `jensen_shannon` and `total_variation` take drawn labels too, and are then biased upwards (by
  Jensen's inequality), the more the larger the codec's c.

`compiled` has torch.compile fuse that walk over the ids, which takes less time then, after some
seconds of compiling.

A tail, uniform or bucket, hides how the teacher's mass is spread in it, so by the data processing
inequality a bucket's divergences are at most those of the teacher's whole distribution.
"""

# N positions, V vocabulary, E listed entries of a target

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from kdcache.errors import TrainingError
from kdcache.labels.sparse_target import SparseTarget, densify
from kdcache.train.losses.loss_plan import LossTerm, check_term, compute_dtype

#: [N] losses of the positions of some logits [N, V] at a temperature.
RowLosses = Callable[[Tensor, SparseTarget, float], Tensor]
#: What ids give to a divergence, from the student's log-probs and the teacher's probabilities.
_Share = Callable[[Tensor, Tensor], Tensor]

# A probability that is 0 (underflow, or a masked id) counts as the smallest float32 in logs.
_TINY = torch.finfo(torch.float32).tiny
_LOG_ZERO = -1e30  # finite, so that a probability of 0 times it is 0


def reverse_kl(
    logits: Tensor,
    target: SparseTarget,
    temperature: float = 1.0,
    *,
    temperature_squared: bool = True,
    mask: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Mean KL divergence from student to teacher, sum p (ln p - ln s).

    Args:
        logits: [N, V] float, the student's.
        target: the teacher's density at `temperature`.
        temperature: what the student's logits are divided by.
        temperature_squared: whether the result is multiplied by T^2.
        mask: [N] bool, positions that count, whatever the others' logits hold; None for all.
        compiled: whether torch.compile fuses the walk over the ids.

    Returns:
        Scalar in nats (times T^2); 0 where no position counts. With a bucket the tail is one class
        on both sides. Where the teacher has no mass the student's costs 87 nats times itself.

    Raises:
        TrainingError: the target has no density outside its entries, or its shape, an id or the
            temperature does not fit; or torch cannot compile here.

    Source: Gu et al. 2024, MiniLLM: Knowledge Distillation of Large Language Models.
    """
    rows = partial(reverse_kl_rows, compiled=compiled)
    return _mean(rows, logits, target, temperature, temperature_squared, mask)


def jensen_shannon(
    logits: Tensor,
    target: SparseTarget,
    temperature: float = 1.0,
    *,
    temperature_squared: bool = True,
    mask: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Mean Jensen-Shannon divergence: the mean KL of student and teacher to their mixture.

    Args and Returns as `reverse_kl`; at most ln 2 (times T^2) for labels whose mass is 1. Drawn
    labels are taken, with an upward bias.

    Source: Lin 1991, Divergence measures based on the Shannon entropy.
    """
    rows = partial(jensen_shannon_rows, compiled=compiled)
    return _mean(rows, logits, target, temperature, temperature_squared, mask)


def total_variation(
    logits: Tensor,
    target: SparseTarget,
    temperature: float = 1.0,
    *,
    temperature_squared: bool = False,
    mask: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Mean total variation distance, half the L1 distance of student and teacher.

    Args and Returns as `reverse_kl`; a number without unit. Drawn labels are taken, with an
    upward bias.

    Source: Wen et al. 2023, f-Divergence Minimization for Sequence-Level Knowledge Distillation.
    """
    rows = partial(total_variation_rows, compiled=compiled)
    return _mean(rows, logits, target, temperature, temperature_squared, mask)


def logit_mse(
    logits: Tensor,
    target: SparseTarget,
    temperature: float = 1.0,
    *,
    temperature_squared: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean squared difference of student's and teacher's logits over the listed ids.

    A cache holds log-probs, which are logits up to a constant of each position, so both sides are
    taken from their mean over the position's entries. Over all ids (codec `full`) this is the
    squared distance of centred logits.

    Args and Raises as `reverse_kl`; nats squared, each position the mean over its entries, 0 where
    it has none. A drawn entry's weight is no log-prob, so drawn labels are refused here too (and
    renormalised ones, which cannot be told from them; tail bucket lists the same entries).

    Source: Ba & Caruana 2014, Do Deep Nets Really Need to be Deep?
    """
    return _mean(logit_mse_rows, logits, target, temperature, temperature_squared, mask)


def reverse_kl_rows(
    logits: Tensor, target: SparseTarget, temperature: float, compiled: bool = False
) -> Tensor:
    """[N] reverse KL of each position."""
    _need_density("reverse_kl", logits, target)
    return _sum_over_ids(_reverse_share, logits, target, temperature, compiled)


def jensen_shannon_rows(
    logits: Tensor, target: SparseTarget, temperature: float, compiled: bool = False
) -> Tensor:
    """[N] Jensen-Shannon divergence of each position."""
    return _sum_over_ids(_mixture_share, logits, target, temperature, compiled)


def total_variation_rows(
    logits: Tensor, target: SparseTarget, temperature: float, compiled: bool = False
) -> Tensor:
    """[N] total variation distance of each position."""
    return _sum_over_ids(_absolute_share, logits, target, temperature, compiled)


def logit_mse_rows(logits: Tensor, target: SparseTarget, temperature: float) -> Tensor:
    """[N] mean squared difference of the centred logits of each position's entries."""
    _need_density("logit_mse", logits, target)
    listed = logits[target.rows, target.ids].to(compute_dtype(logits)) / temperature  # [E]
    teacher = target.values.to(listed)
    if target.uniform is not None:
        teacher = teacher + target.uniform.to(listed)[target.rows]
    difference = listed - teacher.clamp(min=_TINY).log()
    zeros = difference.new_zeros(len(logits))
    counts = zeros.index_add(0, target.rows, torch.ones_like(difference)).clamp(min=1)
    centre = zeros.index_add(0, target.rows, difference) / counts
    squared = (difference - centre[target.rows]) ** 2
    return zeros.index_add(0, target.rows, squared) / counts


def _mean(
    rows: RowLosses,
    logits: Tensor,
    target: SparseTarget,
    temperature: float,
    temperature_squared: bool,
    mask: Tensor | None,
) -> Tensor:
    """Mean over the positions that count."""
    check_term(logits.shape, LossTerm(target, temperature, row_weight=mask))
    if mask is not None:
        # Before the loss: a gradient of 0 times one that is not finite would not be 0.
        logits = logits.masked_fill(~mask[:, None], 0.0)
    losses = rows(logits, target, temperature)
    if temperature_squared:
        losses = losses * temperature**2
    if mask is None:
        return losses.sum() / max(1, len(losses))
    return torch.where(mask, losses, 0.0).sum() / mask.sum().clamp(min=1)


def _need_density(name: str, logits: Tensor, target: SparseTarget) -> None:
    """Refuses labels whose entries are no density of their ids."""
    if target.uniform is None and target.bucket is None and len(target.rows) < logits.numel():
        raise TrainingError(
            f"{name}: the labels have no density outside their entries (drawn or renormalised "
            "ones); expected tail uniform or bucket, or codec full"
        )


def _sum_over_ids(
    share: _Share, logits: Tensor, target: SparseTarget, temperature: float, compiled: bool
) -> Tensor:
    """[N] sum of all ids' shares; those in a bucket are one."""
    logits = logits.to(compute_dtype(logits))
    # Rounding may leave a probability a little below 0 where a uniform part was taken off it.
    teacher = densify(target, logits.shape[1]).to(logits).clamp_(min=0.0)  # [N, V]
    bucket = listed = None
    if target.bucket is not None:
        bucket, listed = target.bucket.to(logits), torch.zeros_like(teacher, dtype=torch.bool)
        listed[target.rows, target.ids] = True
    if not compiled:
        return _id_sums(share, logits, teacher, temperature, listed, bucket)
    from torch._dynamo.exc import TorchDynamoException  # takes a while

    try:
        # As a tensor, for a number that moves would be compiled anew each time.
        return _compiled(share)(logits, teacher, logits.new_tensor(temperature), listed, bucket)
    except TorchDynamoException as error:
        raise TrainingError(
            f"divergence: torch.compile: {str(error).strip().splitlines()[0]}; it needs a C++ "
            "compiler (on a GPU Triton): install one, or leave `compiled` out"
        ) from None


@cache
def _compiled(share: _Share) -> Callable[..., Tensor]:
    """The sums of a share as one walk over the ids, for any number of positions."""

    def sums(*args: Tensor) -> Tensor:
        return _id_sums(share, *args)

    return torch.compile(sums, dynamic=True)


def _id_sums(
    share: _Share,
    logits: Tensor,
    teacher: Tensor,
    temperature: Tensor | float,
    listed: Tensor | None,
    bucket: Tensor | None,
) -> Tensor:
    """[N] sums of all ids' shares.

    Args:
        share: of each id.
        logits: [N, V].
        teacher: [N, V] probabilities.
        temperature: of the logits.
        listed: [N, V] ids outside the bucket; None where there is none.
        bucket: [N] the teacher's mass of all others.
    """
    log_probs = torch.log_softmax(logits / temperature, dim=1).clamp(min=_LOG_ZERO)  # [N, V]
    shares = share(log_probs, teacher)
    if listed is None or bucket is None:
        return shares.sum(1)
    tail = share(_log_rest(log_probs, listed), bucket)
    return shares.masked_fill(listed.logical_not(), 0.0).sum(1) + tail


def _log_rest(log_probs: Tensor, listed: Tensor) -> Tensor:
    """[N] log of the student's mass on ids that are not listed, never by a difference."""
    # Where all are listed the sum is over V of these, so no probability and no gradient.
    return log_probs.masked_fill(listed, _LOG_ZERO).logsumexp(1)


def _reverse_share(log_probs: Tensor, teacher: Tensor) -> Tensor:
    return log_probs.exp() * (log_probs - teacher.clamp(min=_TINY).log())


def _mixture_share(log_probs: Tensor, teacher: Tensor) -> Tensor:
    student = log_probs.exp()
    log_mixture = ((student + teacher) / 2).clamp(min=_TINY).log()
    from_student = student * (log_probs - log_mixture)
    return 0.5 * (from_student + torch.xlogy(teacher, teacher) - teacher * log_mixture)


def _absolute_share(log_probs: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (log_probs.exp() - teacher).abs()
