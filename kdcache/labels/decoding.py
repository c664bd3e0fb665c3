"""Decoding: coded labels at a temperature and with a tail, to sparse targets."""

# N positions, E entries, D drawn entries, V vocabulary, n stored temperatures

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import RecipeError
from kdcache.formats.codec import Codec, Values
from kdcache.formats.codes import code_log_probs
from kdcache.formats.knots import interpolation_weights
from kdcache.labels.coded_labels import CodedLabels, entropy_nats
from kdcache.labels.sparse_target import SparseTarget

Tail = Literal["auto", "sampled", "uniform", "bucket", "renormalise"]


def resolve_tail(
    codec: Codec, temperatures: Sequence[float], temperature: float, tail: Tail
) -> Tail:
    """The tail that `auto` stands for, after checking that the codec can serve it.

    Args:
        codec: of the signal.
        temperatures: where the signal stores its tail.
        temperature: of the loss.
        tail: what the recipe asks for.

    Raises:
        RecipeError: the codec cannot serve this tail at this temperature.
    """
    drawn_fits = temperature in codec.drawn_temperatures
    if tail == "auto":
        tail = "sampled" if drawn_fits or codec.name == "sampled" else "uniform"
    if tail == "sampled" and not codec.has_drawn:
        raise RecipeError(
            f"tail 'sampled': codec {codec.name!r} draws no entries; use auto, uniform, "
            f"bucket or renormalise"
        )
    if tail == "sampled" and not drawn_fits:
        served = ", ".join(f"{t:g}" for t in codec.drawn_temperatures)
        other = "" if codec.name == "sampled" else ", tail uniform"
        raise RecipeError(
            f"temperature {temperature:g} with tail 'sampled': the drawn entries serve temperature "
            f"{served} only; use such a one{other} or a signal of another codec"
        )
    if tail != "sampled" and not codec.has_exact:
        raise RecipeError(
            f"tail {tail!r}: codec {codec.name!r} has no exact entries; use auto or sampled"
        )
    if tail in ("uniform", "bucket") and codec.has_tail:
        interpolation_weights(temperatures, temperature)
    return tail


def decode(coded: CodedLabels, temperature: float = 1.0, tail: Tail = "auto") -> SparseTarget:
    """Soft labels at a temperature, on the device the codes are on.

    Args:
        coded: the labels.
        temperature: of the teacher's distribution.
        tail: what stands for the ids that are not exact entries. `sampled`: the drawn
            entries, as they are, whose sum is 1 in the mean; `uniform`: the tail's mass at
            this temperature, spread evenly; `bucket`: the same mass on one extra class;
            `renormalise`: nothing, the exact entries are scaled to the sum 1 (a position
            without any gets no label). `auto`: sampled where entries were drawn for this
            temperature, else uniform. `full` leaves nothing out, so these agree.

    Returns:
        The target; its constant makes the loss a divergence, which for drawn entries holds
        in the mean: the stored entropy does that without bias. Where the draws store log-probs
        the label closes itself, by the sum of its values times them: that varies with the draws
        as the rest of the loss does, so next to no noise is left, and the rounding of uint8 codes
        leaves a bias of a thousandth of a nat.

    Raises:
        RecipeError: the codec cannot serve this tail at this temperature.
    """
    spec = coded.spec
    tail = resolve_tail(spec.codec, spec.temperatures, temperature, tail)
    if tail == "sampled":
        return _decode_drawn(coded, temperature)
    assert coded.num_exact is not None
    scaled = _exact_log_probs(coded) / temperature  # [E]
    rows = _rows_of(coded.num_exact, len(scaled))
    ids = _exact_ids(coded, len(scaled))
    head = _log_sum_exp(scaled, rows, coded)  # [N]
    if tail == "renormalise" or coded.tail is None:
        log_values = scaled - head[rows]
        values = log_values.exp()
        constant = torch.zeros_like(head).index_add_(0, rows, _times(values, log_values))
        return SparseTarget(rows, ids, values, None, None, constant)

    rest = _tail_log_sum(coded, temperature)  # [N]
    total = torch.logaddexp(head, rest)
    log_values = scaled - total[rows]
    values = log_values.exp()
    constant = torch.zeros_like(head).index_add_(0, rows, _times(values, log_values))
    log_mass = rest - total
    mass = log_mass.exp()
    if tail == "bucket":
        return SparseTarget(rows, ids, values, None, mass, constant + _times(mass, log_mass))
    num_tail = (spec.vocab_size - coded.num_exact).clamp(min=1).to(mass.dtype)
    uniform = mass / num_tail
    constant = constant + _times(mass, log_mass - num_tail.log())
    # The density of an exact entry is its own value: what the uniform part adds is taken off.
    return SparseTarget(rows, ids, values - uniform[rows], uniform, None, constant)


def _decode_drawn(coded: CodedLabels, temperature: float) -> SparseTarget:
    """Exact and drawn entries at a temperature that the draws serve."""
    assert coded.num_drawn is not None
    assert coded.drawn_id is not None
    drawn_rows = _rows_of(coded.num_drawn, len(coded.drawn_id))
    drawn_ids = coded.drawn_id.to(torch.int64)
    values: Tensor | None = None
    if coded.spec.codec.has_drawn_log_probs:
        values, drawn_values, constant = _weigh(coded, temperature, drawn_rows)
    else:
        constant = -entropy_nats(coded)
        drawn_values = _drawn_weights(coded)
        if coded.num_exact is not None:
            values = _exact_log_probs(coded).exp()
    if values is None:
        return SparseTarget(drawn_rows, drawn_ids, drawn_values, None, None, constant)
    assert coded.num_exact is not None
    exact_rows = _rows_of(coded.num_exact, len(values))
    # Entries of a position: exact ones first. Each moves down by what comes before it.
    before_exact = coded.num_drawn.cumsum(0) - coded.num_drawn
    before_drawn = coded.num_exact.cumsum(0)
    device = coded.gold.device
    exact_to = torch.arange(len(values), device=device) + before_exact[exact_rows]
    drawn_to = torch.arange(len(drawn_rows), device=device) + before_drawn[drawn_rows]

    def merge(exact: Tensor, drawn: Tensor) -> Tensor:
        merged = exact.new_empty(len(exact) + len(drawn))
        merged[exact_to] = exact
        merged[drawn_to] = drawn
        return merged

    return SparseTarget(
        merge(exact_rows, drawn_rows),
        merge(_exact_ids(coded, len(values)), drawn_ids),
        merge(values, drawn_values),
        None,
        None,
        constant,
    )


def _drawn_weights(coded: CodedLabels) -> Tensor:
    """[D] weights at temperature 1 of entries that were drawn for it alone."""
    assert coded.drawn_id is not None
    weight = coded.spec.codec.drawn_weight
    if coded.drawn_code is None:
        return torch.full(coded.drawn_id.shape, weight, device=coded.gold.device)
    return coded.drawn_code.to(torch.float32) * weight


def _weigh(
    coded: CodedLabels, temperature: float, drawn_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of exact [E] and drawn [D] entries at a temperature; [N] sums of value x ln t.

    An id is drawn with its largest probability at any of the codec's temperatures, over c. So it
    weighs c times the ratio of its probability here to the largest: c itself, whatever its code
    lost, where it is the largest. Elsewhere the rounding of uint8 codes biases weights by some
    tenths of a percent, up to one where nearly equal probabilities make a row flat.
    """
    assert coded.num_exact is not None
    assert coded.drawn_code is not None
    codec = coded.spec.codec
    exact = _exact_log_probs(coded)  # [E]
    drawn = _log_probs(coded.drawn_code, codec.values, codec.drawn_range_nats)  # [D]
    exact_rows = _rows_of(coded.num_exact, len(exact))
    largest = drawn.new_full(drawn.shape, -torch.inf)
    for other in codec.drawn_temperatures:
        log_sum = _log_sum(coded, exact, exact_rows, other)  # [N]
        here = drawn / other - log_sum[drawn_rows]
        largest = torch.maximum(largest, here)
        if other == temperature:
            drawn_here, exact_here = here, exact / other - log_sum[exact_rows]
    values = exact_here.exp()
    drawn_values = (drawn_here - largest).exp() * codec.drawn_weight
    constant = torch.zeros_like(log_sum).index_add_(0, exact_rows, _times(values, exact_here))
    constant.index_add_(0, drawn_rows, drawn_values * drawn_here)
    return values, drawn_values, constant


def _log_sum(coded: CodedLabels, exact: Tensor, exact_rows: Tensor, temperature: float) -> Tensor:
    """[N] log-sum-exp of all log-probs over a stored temperature; 0 by definition at 1."""
    assert coded.tail is not None
    if temperature == 1:
        return torch.zeros(coded.gold.shape, device=coded.gold.device)
    tail = coded.tail[:, coded.spec.temperatures.index(temperature)].to(torch.float32)
    return torch.logaddexp(_log_sum_exp(exact / temperature, exact_rows, coded), tail)


def _rows_of(counts: Tensor, num_entries: int) -> Tensor:
    """[E] int64 position of each entry, from [N] counts."""
    rows = torch.arange(len(counts), device=counts.device)
    return rows.repeat_interleave(counts, output_size=num_entries)


def _exact_ids(coded: CodedLabels, num_entries: int) -> Tensor:
    """[E] int64 ids of the exact entries."""
    if coded.exact_id is not None:
        return coded.exact_id.to(torch.int64)
    return torch.arange(num_entries, device=coded.gold.device) % coded.spec.vocab_size


def _exact_log_probs(coded: CodedLabels) -> Tensor:
    """[E] float32 nats at temperature 1."""
    assert coded.exact_code is not None
    codec = coded.spec.codec
    return _log_probs(coded.exact_code, codec.values, codec.range_nats)


def _log_probs(codes: Tensor, values: Values, range_nats: float) -> Tensor:
    """[E] float32 nats at temperature 1 from codes."""
    if values != "uint8":
        return codes.to(torch.float32)
    table = torch.from_numpy(code_log_probs(range_nats).astype(np.float32))
    return table.to(codes.device)[codes.to(torch.int64)]


def _log_sum_exp(values: Tensor, rows: Tensor, coded: CodedLabels) -> Tensor:
    """[N] log-sum-exp of the [E] exact entries by position; -inf for a position without any."""
    assert coded.num_exact is not None
    if coded.exact_id is None:
        return values.view(-1, coded.spec.vocab_size).logsumexp(dim=1)  # [N, V] -> [N]
    peak = values.new_full(coded.num_exact.shape, -torch.inf).scatter_reduce_(
        0, rows, values, "amax"
    )
    shift = peak.clamp(min=torch.finfo(values.dtype).min)
    total = torch.zeros_like(peak).index_add_(0, rows, (values - shift[rows]).exp())
    return total.log() + shift


def _tail_log_sum(coded: CodedLabels, temperature: float) -> Tensor:
    """[N] float32 f(1/temperature) in nats; -inf where no mass is in the tail."""
    assert coded.num_exact is not None
    assert coded.tail is not None
    weights = interpolation_weights(coded.spec.temperatures, temperature)
    knots = coded.tail.to(torch.float32)  # [N, n]
    num_tail = (coded.spec.vocab_size - coded.num_exact).to(torch.float32)
    empty = knots.isneginf().any(dim=1) | (num_tail == 0)
    knots = torch.cat([num_tail.clamp(min=1).log()[:, None], knots], dim=1)
    knots = knots.masked_fill(empty[:, None], 0)
    w = torch.from_numpy(weights).to(knots)
    return (knots * w).sum(dim=1).masked_fill(empty, -torch.inf)


def _times(probs: Tensor, log_probs: Tensor) -> Tensor:
    """Products p ln p, 0 at p = 0."""
    return torch.where(probs > 0, probs * log_probs, 0)
