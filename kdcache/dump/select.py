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

import torch
from torch import Tensor

from kdcache.dump.coding import (
    HostColumns,
    code_entropy,
    code_gold,
    code_values,
    host_fields,
    mix64,
    shift_right,
    signed64,
)
from kdcache.errors import ModelError
from kdcache.formats.codec import (
    Codec,
    NucleusCodec,
    SampledCodec,
    ThresholdCodec,
    TopKCodec,
)
from kdcache.formats.keyed import GOLDEN

#: Fractional bits of the fixed point; the weight of one draw is 1 in it.
FIXED_BITS = 40

#: Ids summed in one piece before draws are located.
GROUP = 64

#: Sums of this many rows, each below 2^52, fit int64.
MAX_BLOCK_ROWS = 1024

#: A sum of exponentials outside these bounds is taken again with its peak factored out.
SAFE_SUM = (1e-30, 1e30)


@dataclass(frozen=True)
class EncodedPositions:
    """Coded labels of N positions, on the device.

    Attributes:
        codec: that made them.
        vocab_size: V.
        tokens: field to [N] tensor: gold, entropy, tail_0...; counts are below.
        exact: field to [E] tensor: id (not for `full`), code; None without exact entries.
        drawn: field to [D] tensor: id, and code (a count) for `sampled`; None without draws.
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


@dataclass
class _Entries:
    """Entries of some rows, rows ascending and ids ascending within a row."""

    rows: Tensor  # [E] int64
    ids: Tensor  # [E] int64
    values: Tensor  # [E] float32 log-probs of exact entries, int64 counts of drawn ones


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
        ModelError: a position has a NaN, a +inf or only -inf.
    """
    num_positions, vocab_size = logits.shape
    device = logits.device
    if block_rows is None:
        # Two float32 blocks in the last-level cache of a CPU; a GPU wants many rows.
        block_rows = (1 << 19 if device.type == "cpu" else 1 << 26) // vocab_size
    block_rows = max(1, min(block_rows, num_positions, MAX_BLOCK_ROWS))
    blocks = []
    with torch.no_grad():
        probs = torch.empty(block_rows, vocab_size, dtype=torch.float32, device=device)
        scratch = torch.zeros(block_rows, -(-vocab_size // GROUP) * GROUP, device=device)
        # An empty batch is one block without rows.
        for start in range(0, max(num_positions, 1), block_rows):
            rows = slice(start, start + block_rows)
            block = _Block(logits[rows], probs, scratch, start)
            blocks.append(
                _encode_block(block, draw_hash[rows], round_hash[rows], codec, temperatures)
            )
        return _assemble(blocks, logits, gold, round_hash, codec, temperatures)


class _Block:
    """The dense quantities of R rows of logits that every codec needs."""

    def __init__(self, logits: Tensor, probs: Tensor, scratch: Tensor, start: int) -> None:
        self.start = start
        self.logits = logits.to(torch.float32)  # [R, V]
        self.grouped = scratch[: len(logits)]  # [R, G x GROUP], zeros after the last id
        self.scratch = self.grouped[:, : logits.shape[1]]  # [R, V]
        self.probs = torch.softmax(self.logits, dim=-1, out=probs[: len(logits)])  # [R, V]
        self.peaks = _group_peaks(self.probs)  # [R, G]
        top = self.peaks.amax(dim=-1)  # [R]
        if not bool(torch.isfinite(top).all()):
            first = start + int((~torch.isfinite(top)).nonzero()[0])
            raise ModelError(
                f"teacher logits: position {first} of the batch has a NaN, a +inf or nothing but "
                f"-inf where finite numbers were expected; try dump.teacher.dtype float32"
            )
        # One softmax serves all: its peak gives the log-sum-exp back.
        self.log_sum = self.logits.amax(dim=-1) - top.log()  # [R]
        mean = torch.mul(self.probs, self.logits, out=self.scratch).sum(dim=-1)
        if bool(mean.isnan().any()):  # 0 x -inf of an id that cannot come
            mean = torch.where(self.probs > 0, self.probs * self.logits, 0).sum(dim=-1)
        self.entropy = self.log_sum - mean  # [R] nats

    def exact(self, rows: Tensor, ids: Tensor) -> _Entries:
        """Entries with their log-probs."""
        return _Entries(rows, ids, self.logits[rows, ids] - self.log_sum[rows])


@dataclass
class _Encoded:
    """What is kept of one block."""

    block_start: int
    log_sum: Tensor  # [R]
    entropy: Tensor  # [R]
    tail: Tensor | None  # [R, n]
    exact: _Entries | None
    drawn: _Entries | None
    full_codes: Tensor | None  # [R x V]


def _encode_block(
    block: _Block,
    draw_hash: Tensor,
    round_hash: Tensor,
    codec: Codec,
    temperatures: Sequence[float],
) -> _Encoded:
    """Select and, for `full`, code the entries of a block."""
    encoded = _Encoded(block.start, block.log_sum, block.entropy, None, None, None, None)
    if isinstance(codec, ThresholdCodec):
        encoded.exact, encoded.drawn = _threshold(block, codec, draw_hash)
    elif isinstance(codec, TopKCodec):
        encoded.exact = _topk(block, codec)
    elif isinstance(codec, NucleusCodec):
        encoded.exact = _nucleus(block, codec)
    elif isinstance(codec, SampledCodec):
        encoded.drawn = _sampled(block, codec, draw_hash)
    else:
        log_probs = block.logits - block.log_sum[:, None]  # [R, V]
        ids = torch.arange(log_probs.shape[1], device=log_probs.device)
        encoded.full_codes = code_values(codec, log_probs, round_hash[:, None], ids).flatten()
    if codec.has_tail:
        assert encoded.exact is not None
        encoded.tail = _tail(block, encoded.exact, temperatures)
    return encoded


def _assemble(
    blocks: Sequence[_Encoded],
    logits: Tensor,
    gold: Tensor,
    round_hash: Tensor,
    codec: Codec,
    temperatures: Sequence[float],
) -> EncodedPositions:
    """All blocks as one, coded."""
    num_positions, vocab_size = logits.shape
    gold_logits = logits.gather(1, gold[:, None])[:, 0].to(torch.float32)
    tokens = {
        "gold": code_gold(gold_logits - torch.cat([block.log_sum for block in blocks])),
        "entropy": code_entropy(
            torch.cat([block.entropy for block in blocks]), vocab_size, round_hash
        ),
    }
    tails = [block.tail for block in blocks if block.tail is not None]
    if tails:
        knots = torch.cat(tails).to(torch.float16)  # [N, n]
        tokens |= {f"tail_{i}": knots[:, i] for i in range(len(temperatures))}
    exact = drawn = None
    num_exact = num_drawn = torch.zeros_like(gold)
    if codec.name == "full":
        codes = [block.full_codes for block in blocks if block.full_codes is not None]
        exact = {"code": torch.cat(codes)}
        num_exact = torch.full_like(gold, vocab_size)
    elif codec.has_exact:
        head = _concatenate([(block.block_start, block.exact) for block in blocks])
        code = code_values(codec, head.values, round_hash[head.rows], head.ids)
        exact = {"id": head.ids, "code": code}
        num_exact = torch.bincount(head.rows, minlength=num_positions)
    if codec.has_drawn:
        draws = _concatenate([(block.block_start, block.drawn) for block in blocks])
        drawn = {"id": draws.ids}
        if isinstance(codec, SampledCodec):
            drawn["code"] = draws.values
        num_drawn = torch.bincount(draws.rows, minlength=num_positions)
    return EncodedPositions(codec, vocab_size, tokens, exact, drawn, num_exact, num_drawn)


def _concatenate(pieces: Sequence[tuple[int, _Entries | None]]) -> _Entries:
    """Entries of all blocks, their rows counted from the first block's first."""
    entries = [(start, piece) for start, piece in pieces if piece is not None]
    return _Entries(
        torch.cat([piece.rows + start for start, piece in entries]),
        torch.cat([piece.ids for _, piece in entries]),
        torch.cat([piece.values for _, piece in entries]),
    )


def _threshold(
    block: _Block, codec: ThresholdCodec, draw_hash: Tensor
) -> tuple[_Entries, _Entries]:
    """Ids of probability c or more; of the others systematic draws of weight c."""
    # Sums stay below 2^52, so that float64 adds them exactly.
    bits = min(FIXED_BITS, 52 + math.floor(math.log2(codec.c)))
    one, unit = 1 << bits, codec.c / (1 << bits)
    torch.div(block.probs, unit, rounding_mode="trunc", out=block.scratch)
    peaks = torch.div(block.peaks, unit, rounding_mode="trunc")  # [R, G]
    groups = (peaks >= one).flatten().nonzero()[:, 0]
    hit, member = (block.grouped.view(-1, GROUP)[groups] >= one).nonzero(as_tuple=True)
    at = groups[hit] * GROUP + member
    rows = at // block.grouped.shape[1]
    head = block.exact(rows, at - rows * block.grouped.shape[1])
    block.grouped.view(-1)[at] = 0

    sums = _group_sums(block.grouped)  # [R, G]
    start = shift_right(draw_hash, 64 - bits)  # [R], u in [0, 1) as fixed point
    num_draws = (sums.sum(dim=-1) + start) >> bits
    rows = torch.arange(len(start), device=start.device).repeat_interleave(num_draws)
    first = num_draws.cumsum(0) - num_draws
    turn = torch.arange(len(rows), device=rows.device) - first[rows] + 1
    ids = _locate(block.grouped, sums, rows, (turn << bits) - start[rows])
    return head, _Entries(rows, ids, torch.ones_like(ids))


def _sampled(block: _Block, codec: SampledCodec, draw_hash: Tensor) -> _Entries:
    """Independent draws with replacement, as distinct ids with counts."""
    one = 1 << FIXED_BITS
    torch.div(block.probs, 1 / one, rounding_mode="trunc", out=block.scratch)
    sums = _group_sums(block.grouped)  # [R, G]
    device = draw_hash.device
    turn = torch.arange(1, codec.n + 1, device=device)
    hashed = mix64(draw_hash[:, None] + turn * signed64(GOLDEN))  # [R, n]
    point = shift_right(hashed, 64 - FIXED_BITS)
    # A row sums to 1 but for rounding; stretch [0, 1) to [0, sum) without leaving 64 bits.
    excess = sums.sum(dim=-1, keepdim=True) - one
    point += ((point >> FIXED_BITS // 2) * excess) >> FIXED_BITS // 2
    point = point.sort(dim=-1).values + 1
    rows = torch.arange(len(point), device=device).repeat_interleave(codec.n)
    ids = _locate(block.grouped, sums, rows, point.flatten())  # [R x n], ascending in a row
    new = torch.ones_like(ids, dtype=torch.bool)
    new[1:] = (ids[1:] != ids[:-1]) | (rows[1:] != rows[:-1])
    at = new.nonzero()[:, 0]
    counts = torch.diff(at, append=at.new_tensor([len(ids)]))
    return _Entries(rows[at], ids[at], counts)


def _topk(block: _Block, codec: TopKCodec) -> _Entries:
    """The k most probable ids."""
    k = codec.max_exact(block.probs.shape[1])
    ids = block.probs.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values  # [R, k]
    rows = torch.arange(len(ids), device=ids.device).repeat_interleave(k)
    return block.exact(rows, ids.flatten())


def _nucleus(block: _Block, codec: NucleusCodec) -> _Entries:
    """The fewest most probable ids that reach p."""
    vocab_size = block.probs.shape[1]
    probs, ids = block.probs.topk(codec.max_exact(vocab_size), dim=-1)  # [R, k_max]
    before = probs.cumsum(dim=-1) - probs
    ids = ids.masked_fill(before >= codec.p, vocab_size).sort(dim=-1).values
    rows, rank = (ids < vocab_size).nonzero(as_tuple=True)
    return block.exact(rows, ids[rows, rank])


def _tail(block: _Block, head: _Entries, temperatures: Sequence[float]) -> Tensor:
    """[R, n] log-sum-exp of the ids outside the head, in nats; writes over the block."""
    probs, at = block.probs, (head.rows, head.ids)
    probs[at] = 0
    sums, shifts = [], []
    for temperature in temperatures:
        if temperature == 1:
            sums.append(probs.sum(dim=-1))
        elif temperature == 0.5:
            sums.append(torch.linalg.vector_norm(probs, dim=-1).square())
        else:  # exp2 is the fastest exponential there is
            scaled = torch.mul(block.logits, 1 / (temperature * math.log(2)), out=block.scratch)
            scaled[at] = -torch.inf
            sums.append(scaled.exp2_().sum(dim=-1))
        shifts.append(0 if temperature in (1, 0.5) else 1 / temperature)
    total = torch.stack(sums, dim=1)  # [R, n]
    shift = torch.tensor(shifts, device=total.device) * block.log_sum[:, None]
    tail = total.log() - shift

    smallest, largest = SAFE_SUM
    unsafe = ((total < smallest) | (total > largest)).any(dim=1).nonzero()[:, 0]
    if len(unsafe):
        masked = block.logits.clone()
        masked[at] = -torch.inf
        for i, temperature in enumerate(temperatures):
            exact = torch.logsumexp(masked[unsafe] / temperature, dim=-1)
            tail[unsafe, i] = exact - block.log_sum[unsafe] / temperature
    return tail


def _group_peaks(x: Tensor) -> Tensor:
    """[R, G] largest of each group of [R, V]; the last group may be smaller."""
    whole = x.shape[1] // GROUP
    peaks = []
    if whole:
        groups = x[:, : whole * GROUP].view(len(x), whole, GROUP)
        peaks.append(groups.amax(dim=-1))
    if x.shape[1] % GROUP:
        peaks.append(x[:, whole * GROUP :].amax(dim=-1, keepdim=True))
    return peaks[0] if len(peaks) == 1 else torch.cat(peaks, dim=1)


def _group_sums(grouped: Tensor) -> Tensor:
    """[R, G] int64 sums of whole numbers in float32, exact in any order."""
    # float64 is the faster, and exact below 2^53; not every device has it.
    wide = torch.float64 if grouped.device.type == "cpu" else torch.int64
    members = grouped.view(len(grouped), grouped.shape[1] // GROUP, GROUP)
    return members.sum(dim=-1, dtype=wide).to(torch.int64)


def _locate(grouped: Tensor, sums: Tensor, rows: Tensor, points: Tensor) -> Tensor:
    """[D] ids at which the running sum of a row first reaches each point, which is at least 1.

    Few points are found in two steps, group and member, without a running sum over all ids.
    """
    totals = sums.sum(dim=-1)
    points = points + (totals.cumsum(0) - totals)[rows]
    if len(points) * GROUP > grouped.numel():  # so many that the whole running sum is less work
        running = grouped.to(torch.int64).flatten().cumsum(0)
        return torch.searchsorted(running, points) - rows * grouped.shape[1]
    sums = sums.flatten()  # [R x G]
    ends = sums.cumsum(0)  # on from row to row, so that one search serves all
    at = torch.searchsorted(ends, points)
    members = grouped.view(-1, GROUP)[at].to(torch.int64)  # [D, GROUP]
    running = members.cumsum(dim=-1)
    member = torch.searchsorted(running, (points - ends[at] + sums[at])[:, None])[:, 0]
    return at * GROUP + member - rows * grouped.shape[1]
