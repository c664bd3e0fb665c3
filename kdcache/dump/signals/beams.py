"""The beams signal: hypotheses that a teacher writes for every sample."""

# F items, M samples, B rows of a batch, n hypotheses of a sample, H hypotheses in all,
# S source tokens, T tokens, V vocabulary, R rows of a piece

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from kdcache.dump.batches import Batch, pad, to_device
from kdcache.dump.signals.encoder import Columns, Request, SignalEncoder, common_fields
from kdcache.dump.signals.generate import Decoding, Written, generate
from kdcache.dump.signals.items import Items, sample_items
from kdcache.dump.signals.logits import PIECE_ENTRIES, PIECE_ENTRIES_CPU
from kdcache.dump.signals.processors import NEVER
from kdcache.dump.teacher import Teacher
from kdcache.errors import ModelError, RecipeError
from kdcache.formats.cache import Cache
from kdcache.formats.keyed import position_hash, sample_keys
from kdcache.formats.ragged import Ragged, concat, offsets_of, segment_indices
from kdcache.formats.schema import split_ids
from kdcache.formats.shard import SampleShard
from kdcache.formats.signals import BeamsRecord
from kdcache.formats.units import MAIN_COLUMN
from kdcache.recipe import BeamsSignal
from kdcache.recipe.signals import MAX_HYPOTHESIS

logger = logging.getLogger(__name__)


class BeamsEncoder(SignalEncoder):
    """The n best hypotheses of a beam, the greedy one, or n draws.

    A hypothesis has neither the decoder's start token nor padding. It has the forced first
    token (a language), which is the first that the decoder predicts, and the end token where one
    was written; without it, it was as long as it may be. Of a causal model it is what follows
    the prompt.

    `log_prob` is what the teacher, reading the hypothesis, says of all of its tokens, in nats at
    temperature 1: not the sum that the search went by, in which a forced token counts nothing.
    `score` is log_prob / num_tokens ** length_penalty, transformers' own length. A beam's
    hypotheses stand best score first; draws as they were drawn, repeats too.
    """

    main = MAIN_COLUMN["beams"]
    record: BeamsRecord
    teacher: Teacher
    _rows: np.ndarray
    _keys: np.ndarray

    def __init__(self, cache: Cache, request: Request) -> None:
        super().__init__(cache, request)
        signal, name, teacher = request.signal, request.name, request.teacher
        assert isinstance(signal, BeamsSignal), "the runner chooses by kind"
        assert teacher is not None, "beams were checked to have a teacher"
        assert teacher.vocab_size is not None, "a teacher that writes has a vocabulary"
        tokenizer = cache.stream(signal.stream).tokenizer
        self.decoding = _decoding(name, signal, teacher, lambda: cache.tokens(tokenizer))
        if self.decoding.ignored:
            logger.warning(
                "%s: of the teacher's generation config these are not used: %s",
                name,
                self.decoding.ignored,
            )
        self.record = BeamsRecord(
            **common_fields(cache, request),
            vocab_size=teacher.vocab_size,
            num_hypotheses=signal.num_hypotheses,
            decoding={**self.decoding.record(), "max_positions": teacher.max_positions},
        )

    @classmethod
    def check(cls, request: Request) -> None:
        """The teacher must write, and its tokenizer must have the forced token."""
        signal, name, teacher = request.signal, request.name, request.teacher
        assert isinstance(signal, BeamsSignal), "the runner chooses by kind"
        assert teacher is not None, "beams were checked to have a teacher"
        if "beams" not in teacher.signals or teacher.vocab_size is None or not teacher.members:
            raise ModelError(
                f"signals.{name}: hypotheses come from a teacher of kind encoder_decoder or "
                f"causal_lm, {teacher.record.path} is of kind {teacher.kind}; choose another "
                "teacher"
            )
        tokenizer = request.tokenizers.get(request.section.streams[signal.stream].tokenizer)
        if tokenizer is not None:  # one that is still to be trained is refused with its stream
            _decoding(name, signal, teacher, tokenizer.tokens)

    def items(self, samples: SampleShard, inputs: Mapping[str, Columns]) -> Items:
        """The sources or prompts, one item for every sample."""
        record = self.record
        assert record.source is not None, "beams have a source"
        items = sample_items(samples, record.source)
        read = Ragged(items.tokens.offsets, {"id": items.tokens.fields["id"]})
        items = Items(items.sample, items.variant, read)
        self._rows = samples.row
        full = np.flatnonzero(self._limits(items.tokens.lengths) < 1)
        if len(full):
            raise ModelError(
                f"signal {record.name!r}, corpus row {samples.row[full[0]]}: its prompt has "
                f"{items.tokens.lengths[full[0]]} tokens and {self.teacher.record.path} takes "
                f"{self.teacher.max_positions}, which leaves none to write; dump with a smaller "
                "dump.max_tokens to another output"
            )
        keys = [
            sample_keys(
                record.seed, "sample", record.name, samples.sample_id, samples.row, hypothesis=h
            )
            for h in range(self.decoding.num_hypotheses if self.decoding.mode == "sample" else 0)
        ]
        self._keys = np.array(keys, dtype=np.uint64).T  # [M, n]
        return items

    def counts(self, items: Items) -> np.ndarray:
        """[F] int64 tokens of all hypotheses, if all are as long as they may be."""
        return self._limits(items.tokens.lengths) * self.decoding.num_hypotheses

    def plan_lengths(self, items: Items) -> tuple[np.ndarray, np.ndarray]:
        """[F] source and [F] hypothesis tokens, at most, of all rows of a sample's beam."""
        lengths = items.tokens.lengths
        return lengths * self.decoding.rows, self._limits(lengths) * self.decoding.rows

    def encode(self, items: Items, rows: np.ndarray) -> Callable[[], Columns]:
        """Write, then read what was written."""
        groups = list(self._groups(items.tokens.lengths[rows]))
        found = [self._write(items, rows[group]) for group in groups]
        num = len(found[0].real) // len(groups[0])  # the same of every sample
        place = np.argsort(np.concatenate(groups))
        index = segment_indices(place * num, np.full(len(place), num))
        index = index[np.concatenate([some.real for some in found])[index]]
        hypotheses = concat([some.tokens for some in found]).take(index)  # [H]
        sample = np.concatenate(groups)[index // num]  # [H]
        log_probs = self._read(items, rows[sample], hypotheses)
        lengths = hypotheses.lengths
        scores = log_probs / lengths.astype(np.float64) ** self.decoding.length_penalty
        order = np.arange(len(sample))
        if self.decoding.mode == "beam":
            order = np.lexsort((-scores, sample))
        vocab_size = self.record.vocab_size

        def columns() -> Columns:
            tokens = hypotheses.take(order)
            ends = offsets_of(np.bincount(sample, minlength=len(rows)))
            fields: dict[str, np.ndarray] = {
                "num_tokens": tokens.lengths.astype(np.uint16),
                "log_prob": log_probs[order].astype(np.float32),
                "score": scores[order].astype(np.float32),
            }
            return {
                "hypotheses": Ragged(ends, fields),
                "tokens": Ragged(tokens.offsets[ends], split_ids(tokens.fields["id"], vocab_size)),
            }

        return columns

    @property
    def _causal(self) -> bool:
        """Whether the source is a prompt that the hypothesis goes on from."""
        return self.decoding.decoder_start_token_id is None

    def _limits(self, lengths: np.ndarray) -> np.ndarray:
        """[F] int64 most tokens of each item's hypotheses; lengths: [F] of its source."""
        most = self.decoding.max_length
        wanted = 2 * lengths + 10 if most is None else np.full_like(lengths, most)
        room = np.full_like(lengths, MAX_HYPOTHESIS)
        if self.teacher.max_positions is not None:
            positions = self.teacher.max_positions
            room = np.minimum(room, positions - (lengths if self._causal else 0))
        return np.minimum(wanted, room)

    def _groups(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Samples of a batch that may be decoded together, as indices.

        A causal model goes on reading behind a long prompt, whose own hypothesis has ended,
        until the last of the batch ends. That must not be beyond its positions.

        Args:
            lengths: [B] source tokens.
        """
        positions = self.teacher.max_positions
        order = np.argsort(-lengths, kind="stable")
        if not self._causal or positions is None:
            yield order
            return
        limits = self._limits(lengths)
        begin, longest = 0, 0
        for at, row in enumerate(order):
            longest = max(longest, int(limits[row]))
            if lengths[order[begin]] + longest > positions:
                yield order[begin:at]
                begin, longest = at, int(limits[row])
        yield order[begin:]

    def _write(self, items: Items, rows: np.ndarray) -> Written:
        """The hypotheses of some items, as they were found."""
        teacher, lengths = self.teacher, items.tokens.lengths[rows]
        limits = self._limits(lengths)
        ids, mask = pad(items.tokens, rows, teacher.pad_id)
        if self._causal:
            ids, mask = _to_the_right(ids, lengths, teacher.pad_id)
        hashes = None
        if self.decoding.mode == "sample":
            hashes = position_hash(self._keys[rows][:, :, None], np.arange(limits.max()))
        written = generate(
            teacher.members,
            self.decoding,
            to_device(ids, teacher.device),
            to_device(mask, teacher.device),
            limits,
            hashes,
        )
        for at in np.flatnonzero(written.wrong < NEVER)[:1]:
            item = rows[at * len(rows) // len(written.wrong)]
            raise self._not_finite(items, item, f"token {written.wrong[at]} of a hypothesis")
        return written

    def _not_finite(self, items: Items, item: int, where: str) -> ModelError:
        """The error of logits that nothing can be found by."""
        return ModelError(
            f"corpus row {self._rows[items.sample[item]]}, {where}: the teacher's logits have a "
            "NaN, a +inf or nothing but -inf where finite numbers were expected; try "
            "dump.teacher.dtype float32"
        )

    def _read(self, items: Items, rows: np.ndarray, hypotheses: Ragged) -> np.ndarray:
        """[H] float64 summed log-probs of hypotheses; rows: [H] the item of each."""
        teacher, sources = self.teacher, items.tokens.take(rows)
        every = np.arange(len(rows))
        if self._causal:
            written, skipped = Items(every, every, _joined(sources, hypotheses)), sources.lengths
        else:
            written = Items(every, every, hypotheses, sources, from_start=True)
            skipped = np.zeros_like(rows)
        batch = written.batch(every, teacher.pad_id, teacher.device)
        steps = torch.arange(batch.ids.shape[1], device=teacher.device)
        at = batch.mask & (steps >= to_device(skipped, teacher.device)[:, None])  # [H, T]
        log_probs = np.add.reduceat(_log_probs(teacher, batch, at), hypotheses.offsets[:-1])
        for h in np.flatnonzero(np.isnan(log_probs))[:1]:
            raise self._not_finite(items, rows[h], "reading a hypothesis")
        return log_probs


def _decoding(
    name: str, signal: BeamsSignal, teacher: Teacher, read_tokens: Callable[[], list[str]]
) -> Decoding:
    """What the signal's hypotheses are found with; tokens are read where one is forced.

    Raises:
        RecipeError: the tokenizer has no token of that name.
        ModelError: see `Decoding.of`.
    """
    first_id = None
    if signal.forced_bos is not None:
        tokens = read_tokens()
        if signal.forced_bos not in tokens:
            raise RecipeError(
                f"signals.{name}.forced_bos is {signal.forced_bos!r}, which is no token of the "
                "teacher's tokenizer; expected one such as mBART's de_DE or NLLB's deu_Latn"
            )
        first_id = tokens.index(signal.forced_bos)
    return Decoding.of(signal, teacher.members, teacher.pad_id, first_id)


def _log_probs(teacher: Teacher, batch: Batch, at: Tensor) -> np.ndarray:
    """[N] float64 log-probs of the tokens at `at`, [H, T] bool, N of them true."""
    entries = PIECE_ENTRIES_CPU if teacher.device.type == "cpu" else PIECE_ENTRIES
    gold, found, done = batch.ids[at], [], 0
    for logits in teacher.logits_in_pieces(batch, at, entries):  # [R, V]
        here = gold[done : done + len(logits), None]
        log_probs = torch.log_softmax(logits.float(), dim=-1).gather(1, here)[:, 0]
        found.append(log_probs.cpu())
        done += len(logits)
    return torch.cat(found).double().numpy()


def _to_the_right(
    ids: np.ndarray, lengths: np.ndarray, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """[B, S] ids that were padded on the right, and their mask, padded on the left."""
    width = ids.shape[1]
    mask = np.arange(width) >= width - lengths[:, None]
    moved = np.full_like(ids, pad_id)
    moved[mask] = ids[mask[:, ::-1]]
    return moved, mask


def _joined(prompts: Ragged, hypotheses: Ragged) -> Ragged:
    """Every prompt with its hypothesis after it."""
    both = concat([prompts, hypotheses])
    turns = np.arange(len(both)).reshape(2, -1).T.reshape(-1)  # prompt, hypothesis, prompt, ...
    pairs = both.take(turns)
    return Ragged(pairs.offsets[::2], pairs.fields)
