"""Selection: teacher logits to coded soft labels, on the teacher's device.

Every codec's choice of entries and every rounding happens here. Draws are exact integer
arithmetic: probabilities are cut to fixed point before anything is summed, so neither block
size nor order of summation moves a drawn id, and every random number is a hash.

Source: systematic threshold sampling (Duffield, Lund & Thorup 2007, "Priority sampling for
estimation of arbitrary subset sums"; Madow 1949 for the systematic draw).
"""

# N positions, R rows of a block, V vocabulary, G groups of ids, E exact entries, D drawn entries

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kdcache.dump.codecs.block import Block, rows_and_ids
from kdcache.dump.codecs.coding import (
    HostColumns,
    code_entropy,
    code_gold,
    code_values,
    host_fields,
    mix64,
    shift_right,
    signed64,
)
from kdcache.dump.codecs.fixed_point import (
    FIXED_BITS,
    GROUP,
    MAX_ROWS,
    SUM_BITS,
    group_sums,
    locate,
)
from kdcache.dump.codecs.tails import log_tails, tail_sums
from kdcache.formats.codec import (
    Codec,
    NucleusCodec,
    SampledCodec,
    ThresholdCodec,
    TopKCodec,
)
from kdcache.formats.keyed import GOLDEN

#: Entries of one float32 block on a CPU: as many as still stay in its last-level cache.
BLOCK_ENTRIES = 1 << 19

Found = TypeVar("Found")


@dataclass(frozen=True)
class EncodedPositions:
    """Coded labels of N positions, on the device.

    Attributes:
        codec: that made them.
        vocab_size: V.
        tokens: field to [N] tensor: gold, entropy, tail_0...; counts are below.
        exact: field to [E] tensor: id (not for `full`), code; None without exact entries.
        drawn: field to [D] tensor: id, and code (a count for `sampled`, a log-prob for several
            temperatures); None without draws.
        num_exact: [N] int64.
        num_drawn: [N] int64.
    """

    codec: Codec
    vocab_size: int
    tokens: dict[str, Tensor]
    exact: dict[str, Tensor] | None
    drawn: dict[str, Tensor] | None
    num_exact: Tensor
    num_drawn: Tensor

    @classmethod
    def concat(cls, pieces: Sequence[EncodedPositions]) -> EncodedPositions:
        """Positions of some pieces (of one codec, at least one) one after another."""
        first = pieces[0]
        if len(pieces) == 1:
            return first

        def joined(columns: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([column[name] for column in columns]) for name in columns[0]}

        return cls(
            codec=first.codec,
            vocab_size=first.vocab_size,
            tokens=joined([piece.tokens for piece in pieces]),
            exact=None if first.exact is None else joined([_of(p.exact) for p in pieces]),
            drawn=None if first.drawn is None else joined([_of(p.drawn) for p in pieces]),
            num_exact=torch.cat([piece.num_exact for piece in pieces]),
            num_drawn=torch.cat([piece.num_drawn for piece in pieces]),
        )

    def to_host(self) -> HostColumns:
        """Column to field to flat numpy array, in the dtypes of the schema."""
        codec, vocab_size = self.codec, self.vocab_size
        tokens = dict(self.tokens)
        largest = {}
        if codec.has_exact and codec.name != "full":
            tokens["num_exact"] = self.num_exact
            largest["num_exact"] = codec.max_exact(vocab_size)
        if codec.has_drawn:
            tokens["num_drawn"] = self.num_drawn
            largest["num_drawn"] = codec.max_drawn(vocab_size)
        columns = {"tokens": host_fields(tokens, vocab_size, largest)}
        if self.exact is not None:
            columns["exact"] = host_fields(self.exact, vocab_size, {})
        if self.drawn is not None:
            count = {"code": codec.n} if isinstance(codec, SampledCodec) else {}
            columns["drawn"] = host_fields(self.drawn, vocab_size, count)
        return columns


def encode_logits(
    logits: Tensor,
    gold: Tensor,
    draw_hash: Tensor,
    round_hash: Tensor,
    codec: Codec,
    temperatures: Sequence[float],
    block_rows: int | None = None,
) -> EncodedPositions:
    """Code the teacher's distributions at N positions.

    Args:
        logits: [N, V] float, unnormalised; -inf means that an id cannot come.
        gold: [N] int64 target ids.
        draw_hash: [N] int64, `position_hash` of purpose "draw" with its bits as they are.
        round_hash: [N] int64, the same of purpose "round".
        codec: how to make them sparse.
        temperatures: where to store the tail, ascending.
        block_rows: positions worked on at once; what fits the cache without it. No result
            depends on it.

    Returns:
        The coded labels, on the logits' device.

    Raises:
        NotFiniteError: a position has a NaN, a +inf or only -inf.
    """
    num_positions, vocab_size = logits.shape
    device = logits.device
    if block_rows is None:
        # Two float32 blocks in the last-level cache of a CPU; a GPU wants many rows.
        block_rows = (BLOCK_ENTRIES if device.type == "cpu" else 1 << 26) // vocab_size
    block_rows = max(1, min(block_rows, num_positions, MAX_ROWS))
    width = -(-vocab_size // GROUP) * GROUP
    with torch.inference_mode():
        buffers = torch.zeros(2, block_rows, width, dtype=torch.float32, device=device)
        pieces = []
        # An empty batch is one block without rows.
        for start in range(0, max(num_positions, 1), block_rows):
            rows = slice(start, start + block_rows)
            block = Block(logits[rows], buffers, start)
            _select(block, draw_hash[rows], codec)
            if codec.has_tail:
                block.tail_sums = tail_sums(block, temperatures)
            elif codec.name == "full":
                block.codes = _full_codes(block, round_hash[rows], codec)
            pieces.append(block.release())
        return _assemble(pieces, logits, gold, round_hash, codec, temperatures, block_rows)


def _select(block: Block, draw_hash: Tensor, codec: Codec) -> None:
    """Find a block's entries."""
    if isinstance(codec, ThresholdCodec):
        _threshold(block, draw_hash, codec)
    elif isinstance(codec, TopKCodec):
        _topk(block, codec)
    elif isinstance(codec, NucleusCodec):
        _nucleus(block, codec)
    elif isinstance(codec, SampledCodec):
        _sampled(block, draw_hash, codec)


def _threshold(block: Block, draw_hash: Tensor, codec: ThresholdCodec) -> None:
    """Ids of probability c or more; of the others systematic draws of weight c.

    With several temperatures an id's probability is the largest it has at any of them.
    """
    share = codec.c / len(codec.temperatures)  # such probabilities sum to one per temperature
    bits = min(FIXED_BITS, SUM_BITS + math.floor(math.log2(share)))
    one, unit = 1 << bits, codec.c / (1 << bits)
    probs = _largest_probs(block, codec.temperatures)
    torch.div(probs, unit, rounding_mode="trunc", out=block.scratch)
    fixed = block.padded_scratch
    sums = group_sums(fixed)  # [R, G]
    # Only a group that sums to one can hold an id of probability c or more.
    groups = (sums.view(-1) >= one).nonzero()[:, 0]
    members = fixed.view(-1, GROUP)[groups]
    hit, member = (members >= one).nonzero(as_tuple=True)
    block.exact = groups[hit] * GROUP + member
    fixed.view(-1)[block.exact] = 0
    sums.view(-1)[groups] = group_sums(members.masked_fill_(members >= one, 0))[:, 0]

    start = shift_right(draw_hash, 64 - bits)  # [R], u in [0, 1) as fixed point
    num_draws = (sums.sum(dim=-1) + start) >> bits
    rows = torch.arange(len(start), device=start.device).repeat_interleave(num_draws)
    # Turn k of a row, from 1, is drawn where the running sum reaches k - u.
    turn = torch.arange(1, len(rows) + 1, device=start.device)
    turn -= (num_draws.cumsum(0) - num_draws)[rows]
    block.drawn = locate(fixed, sums, rows, (turn << bits) - start[rows])


def _largest_probs(block: Block, temperatures: Sequence[float]) -> Tensor:
    """[R, V] largest probability of every id at the temperatures."""
    largest = None
    for temperature in temperatures:
        probs = block.probs
        if temperature != 1:  # from the peak, lest a cold one overflow
            shifted = torch.sub(block.logits, block.peak_logit[:, None], out=block.scratch)
            probs = torch.softmax(shifted.div_(temperature), dim=-1)
        largest = probs if largest is None else torch.maximum(largest, probs)
    return _of(largest)


def _sampled(block: Block, draw_hash: Tensor, codec: SampledCodec) -> None:
    """Independent draws with replacement, as distinct ids with counts."""
    one = 1 << FIXED_BITS
    torch.div(block.probs, 1 / one, rounding_mode="trunc", out=block.scratch)
    sums = group_sums(block.padded_scratch)  # [R, G]
    turn = torch.arange(1, codec.n + 1, device=draw_hash.device)
    hashed = mix64(draw_hash[:, None] + turn * signed64(GOLDEN))  # [R, n]
    point = shift_right(hashed, 64 - FIXED_BITS)
    # A row sums to 1 but for rounding; stretch [0, 1) to [0, sum) without leaving 64 bits.
    excess = sums.sum(dim=-1, keepdim=True) - one
    point += ((point >> FIXED_BITS // 2) * excess) >> FIXED_BITS // 2
    point = point.sort(dim=-1).values + 1
    rows = torch.arange(len(point), device=point.device).repeat_interleave(codec.n)
    places = locate(block.padded_scratch, sums, rows, point.flatten())  # [R x n], ascending
    block.drawn, block.counts = torch.unique_consecutive(places, return_counts=True)


def _topk(block: Block, codec: TopKCodec) -> None:
    """The k most probable ids."""
    k = codec.max_exact(block.probs.shape[1])
    ids = block.probs.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values  # [R, k]
    block.exact = (ids + block.row_places()).flatten()


def _nucleus(block: Block, codec: NucleusCodec) -> None:
    """The fewest most probable ids that reach p."""
    vocab_size = block.probs.shape[1]
    probs, ids = block.probs.topk(codec.max_exact(vocab_size), dim=-1)  # [R, k_max]
    before = probs.cumsum(dim=-1) - probs
    ids = ids.masked_fill(before >= codec.p, vocab_size).sort(dim=-1).values
    block.exact = (ids + block.row_places())[ids < vocab_size]


def _full_codes(block: Block, round_hash: Tensor, codec: Codec) -> Tensor:
    """[R, V] codes of all ids."""
    log_probs = block.logits - (block.peak_logit - block.peak.log())[:, None]
    ids = torch.arange(log_probs.shape[1], device=log_probs.device)
    return code_values(codec, log_probs, round_hash[:, None], ids, codec.range_nats)


def _assemble(
    blocks: Sequence[Block],
    logits: Tensor,
    gold: Tensor,
    round_hash: Tensor,
    codec: Codec,
    temperatures: Sequence[float],
    block_rows: int,
) -> EncodedPositions:
    """All blocks as one, coded."""
    num_positions, vocab_size = logits.shape
    # One softmax serves all: its peak gives the log-sum-exp back.
    peak_logit, peak, mean_logit = (
        torch.cat([getattr(block, name) for block in blocks])
        for name in ("peak_logit", "peak", "mean_logit")
    )
    log_sum = peak_logit - peak.log()  # [N]
    unclear = mean_logit.isnan().nonzero()[:, 0]  # 0 x -inf of an id that cannot come
    for rows in torch.split(unclear, block_rows):
        some = logits[rows].to(torch.float32)
        probs = torch.softmax(some, dim=-1)
        mean_logit[rows] = torch.where(probs > 0, probs * some, 0).sum(dim=-1)
    gold_logits = logits.gather(1, gold[:, None])[:, 0].to(torch.float32)
    tokens = {
        "gold": code_gold(gold_logits - log_sum),
        "entropy": code_entropy(log_sum - mean_logit, vocab_size, round_hash),
    }

    def codes(rows: Tensor, ids: Tensor, range_nats: float) -> Tensor:
        log_probs = logits[rows, ids].to(torch.float32) - log_sum[rows]
        return code_values(codec, log_probs, round_hash[rows], ids, range_nats)

    exact = drawn = None
    num_exact = num_drawn = torch.zeros_like(gold)
    if codec.name == "full":
        exact = {"code": torch.cat([_of(block.codes) for block in blocks]).flatten()}
        num_exact = torch.full_like(gold, vocab_size)
    elif codec.has_exact:
        rows, ids = rows_and_ids([(block.first, _of(block.exact)) for block in blocks], vocab_size)
        exact = {"id": ids, "code": codes(rows, ids, codec.range_nats)}
        num_exact = torch.bincount(rows, minlength=num_positions)
    if codec.has_tail:
        sums = torch.cat([_of(block.tail_sums) for block in blocks])
        tail = log_tails(sums, logits, log_sum, (rows, ids), num_exact, temperatures, block_rows)
        tail = tail.to(torch.float16)  # [N, n]
        tokens |= {f"tail_{i}": tail[:, i] for i in range(len(temperatures))}
    if codec.has_drawn:
        rows, ids = rows_and_ids([(block.first, _of(block.drawn)) for block in blocks], vocab_size)
        drawn = {"id": ids}
        num_drawn = torch.bincount(rows, minlength=num_positions)
        if isinstance(codec, SampledCodec):
            drawn["code"] = torch.cat([_of(block.counts) for block in blocks])
        elif codec.has_drawn_log_probs:
            drawn["code"] = codes(rows, ids, codec.drawn_range_nats)
    return EncodedPositions(codec, vocab_size, tokens, exact, drawn, num_exact, num_drawn)


def _of(found: Found | None) -> Found:
    """What the codec promises to have found."""
    assert found is not None
    return found
