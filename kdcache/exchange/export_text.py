"""Hypotheses as line-aligned text, for Marian, fairseq and OpenNMT, and as Moses' n-best lists."""

# M samples of a part, H hypotheses

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
from tqdm import tqdm

from kdcache.compile.hypotheses import SentenceBleu, Texts, all_tokens
from kdcache.formats.cache import Cache
from kdcache.formats.signals import BeamsRecord

Choice = Literal["best", "reference", "all"]

#: Whatever ends a line for any of those who read such files, Python's splitlines among them.
_BREAKS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
#: What parts the columns of an n-best list.
_BAR = "|||"


def one_line(text: str) -> str:
    """A text on one line: what would end a line becomes one space, NUL letters too."""
    return _BREAKS.sub(" ", text).replace("\0", " ").strip()


class TextExport:
    """Writes source lines and target lines, and the n-best list.

    Attributes:
        mended: texts that had a line break within them.
        empty: pairs that were left out because a side had no text.
        low: pairs that were left out for their score.
        none: samples without any hypothesis.
    """

    def __init__(
        self,
        cache: Cache,
        record: BeamsRecord,
        choice: Choice,
        n_best: int | None,
        min_score: float | None,
        bleu_tokenizer: str,
    ) -> None:
        """Set up.

        Args:
            cache: the cache.
            record: of the hypotheses.
            choice: which become pairs.
            n_best: hypotheses of each source in the n-best list; None: no list.
            min_score: least length-penalised score of a pair; None: any.
            bleu_tokenizer: sacrebleu's, for the closest.
        """
        self._cache, self._record, self._choice = cache, record, choice
        self._n_best, self._min_score = n_best, min_score
        self._texts = Texts(cache, record.stream)
        self._bleu = SentenceBleu(bleu_tokenizer) if choice == "reference" else None
        self.mended = self.empty = self.low = self.none = 0
        self._line = 0

    def run(
        self,
        folder: Path,
        name: str,
        suffixes: tuple[str, str],
        zipped: bool,
        kept: np.ndarray,
        bar: tqdm[Any],
    ) -> int:
        """Write the files.

        Args:
            folder: where they go.
            name: stem of their names.
            suffixes: of the source's and of the target's.
            zipped: whether they are compressed.
            kept: [M] bool, which samples of the cache.
            bar: advanced by the samples.

        Returns:
            Pairs that were written.
        """
        ending = ".gz" if zipped else ""
        with ExitStack() as stack:
            names = [*suffixes, *(["nbest"] if self._n_best else [])]
            files = [
                stack.enter_context(_opened(folder / f"{name}.{one}{ending}", zipped))
                for one in names
            ]
            for shard in range(self._cache.num_shards):
                for source, hypotheses, chosen in self._samples(shard, kept, bar):
                    self._pairs(source, hypotheses, chosen, files)
        return self._line

    def _samples(
        self, shard: int, kept: np.ndarray, bar: tqdm[Any]
    ) -> Iterator[tuple[str, list[tuple[str, float, float]], list[int]]]:
        """Source, hypotheses (text, log-prob, score) and the chosen ones of every sample."""
        cache, record = self._cache, self._record
        samples = cache.samples(shard)
        sources = samples.text(cache.stream(record.source or record.stream).field)
        references = samples.text(cache.stream(record.stream).field)
        for start, stop, columns in cache.signal_shard(record.name, shard).parts:
            texts = self._texts.decode(all_tokens(columns))
            found = columns["hypotheses"]
            log_probs, scores = (found.fields[k].tolist() for k in ("log_prob", "score"))
            ends = found.offsets.tolist()
            here = slice(start - samples.start, stop - samples.start)
            both = zip(sources[here].to_pylist(), references[here].to_pylist(), strict=True)
            for number, (source, reference) in enumerate(both):
                a, b = ends[number], ends[number + 1]
                if kept[start + number]:
                    all_of = list(zip(texts[a:b], log_probs[a:b], scores[a:b], strict=True))
                    yield source, all_of, self._chosen(texts[a:b], reference)
                bar.update(1)

    def _chosen(self, texts: list[str], reference: str) -> list[int]:
        """Which hypotheses of a sample become pairs, the first of equally close ones."""
        if self._choice == "all" or not texts:
            return list(range(len(texts)))
        if self._bleu is None:
            return [0]
        scores = [self._bleu.score(text, reference) for text in texts]
        return [scores.index(max(scores))]

    def _pairs(
        self,
        source: str,
        hypotheses: list[tuple[str, float, float]],
        chosen: list[int],
        files: list[IO[str]],
    ) -> None:
        """Write the pairs of one sample."""
        self.none += not hypotheses
        for index in chosen:
            text, _, score = hypotheses[index]
            lines = one_line(source), one_line(text)
            if self._min_score is not None and score < self._min_score:
                self.low += 1
                continue
            if not all(lines):
                self.empty += 1
                continue
            self.mended += (lines[0] != source.strip()) + (lines[1] != text.strip())
            for line, file in zip(lines, files[:2], strict=True):
                file.write(line + "\n")
            if self._n_best:
                for listed, log_prob, its_score in hypotheses[: self._n_best]:
                    words = one_line(listed).replace(_BAR, "| | |")
                    files[2].write(
                        f"{self._line} {_BAR} {words} {_BAR} LogProb= {log_prob:.6g} {_BAR} "
                        f"{its_score:.6g}\n"
                    )
            self._line += 1


@contextmanager
def _opened(path: Path, zipped: bool) -> Iterator[IO[str]]:
    """A text file whose lines end in a line feed alone; the same lines give the same bytes."""
    with path.open("wb") as raw:
        # Neither name nor time goes into what is compressed.
        data = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if zipped else raw
        with data, io.TextIOWrapper(cast(IO[bytes], data), encoding="utf-8", newline="\n") as text:
            yield text
