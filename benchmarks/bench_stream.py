"""How fast batches come from a cache: beside a copy of their bytes, and beside other loaders.

Caches of translation pairs are made without a teacher: `topk` with 32 entries at a token, and
`threshold` 1/16 with 5.7 on average. Every way delivers shuffled, batched, collated tensors of
both streams (padded ids and masks) and of the labels (counts, ids, codes and tails as a compressed
sparse row batch); `stream_peers/peer_samples.py` lists them all. Before the clock runs, some
batches of each are compared with those that kdcache makes of the same samples, bit for bit.

kdcache copies by compiled code, which an installation has where there is a C compiler (`compiled`
in the result; it is built here if it is missing), unless --numpy leaves it out.

kdcache fills batches to a token budget, from samples of similar length; its peers take as many
samples a batch as kdcache does on average, in the order of their own shuffling, and pad more. What
is counted are target tokens, not padding. Each way has a process of its own and one thread for
kernels. A peer has the faster of no and two worker processes, kdcache the fastest of no, one and
two threads that gather ahead, found out before the turns; none if --quick.
Ways take turns (A B C A B C ...); medians with the smallest and largest. `over_memcpy` is the rate
over that of a plain numpy copy of the same bytes into memory that is there, `over_clone` over that
of cloning the same tensors; `over_best_peer` over the fastest peer. `no_thread` has the same
ratios for batches that are made when they are asked for. `parts` says where the time goes then.

Peers are installed with pip, in virtual environments of their own under --venvs, on demand. One
that cannot be installed or fails is named as such in the result.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from scale_caches import DrawnCodec, make_cache
from setting import log, report
from stream_fresh import measure_cold, measure_growth, spread
from stream_parts import STREAMS, measure_parts
from stream_peers.kdcache_tensors import SIGNAL, tensors_of
from stream_peers.peer_loop import digest
from stream_ways import OURS, PEERS, Ways

from kdcache.formats import native
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.codec import ThresholdCodec, TopKCodec
from kdcache.formats.window import WindowReader
from kdcache.train.batches.gather import Gatherer
from kdcache.train.batches.stream import BatchStream

CODECS: dict[str, DrawnCodec] = {
    "topk 32": TopKCodec(k=32),
    "threshold 1/16": ThresholdCodec(c=1 / 16),
}
#: Tokens of a shard, both streams together, that make four shards a bit more than 200 MB.
SHARD_TOKENS = {"topk 32": 1_000_000, "threshold 1/16": 3_600_000}
SHARDS = 4
CHECKED_BATCHES = 6


def flat_fields(window: WindowReader) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every field of all samples of a window: values and offsets by sample."""
    every = np.arange(window.num_samples)
    found = {}
    for name in STREAMS:
        stream = window.take_stream(name, every)
        found[name] = (stream.fields["id"], stream.offsets)
    columns = window.take_signal(SIGNAL, every)
    tokens = columns["tokens"]
    for name, values in tokens.fields.items():
        if not name.startswith("tail_"):
            found[name] = (values, tokens.offsets)
    tails = [values for name, values in tokens.fields.items() if name.startswith("tail_")]
    found["tail"] = (np.stack(tails, axis=1).reshape(-1), tokens.offsets * len(tails))
    for name in set(columns) - {"tokens"}:
        entries = columns[name]
        for field, values in entries.fields.items():
            found[f"{name}_{field}"] = (values, entries.offsets)
    return found


def dump_samples(window: WindowReader, folder: Path) -> None:
    """The neutral folder that peers convert."""
    folder.mkdir()
    assert np.array_equal(window.row, np.arange(window.num_samples))
    for name, (values, offsets) in flat_fields(window).items():
        np.save(folder / f"{name}.npy", values)
        np.save(folder / f"{name}.offsets.npy", offsets)


def samples_per_batch(cache: Cache, batch_tokens: int) -> int:
    """Samples of a batch on average, over an epoch."""
    stream = BatchStream(cache, STREAMS, [SIGNAL], batch_tokens, 1, SHARDS)
    samples = sum(shard.stop - shard.start for shard in cache.manifest.shards)
    return round(samples / stream.count_batches(1, 1 << 40))


def convert(ways: Ways, codec: str, samples: Path) -> dict[str, Any]:
    """Every peer's own files."""

    def ask(name: str) -> tuple[str, dict[str, Any] | None]:
        return name, ways.ask(name, "convert", samples=samples, data=ways.data(name, codec))

    found = {}
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(ask, ways.peers))
    for name, answer in answers:
        if answer is not None:
            found[name] = answer
            log(
                f"{codec}: {name} wrote {answer['bytes'] / 1e6:.0f} MB in {answer['seconds']:.0f} s"
            )
    return found


def check(ways: Ways, codec: str, window: WindowReader, cache: Cache, batch: int) -> None:
    """Leave out who delivers other tensors than kdcache of the same samples, or no shuffle."""
    gatherer = Gatherer(cache, STREAMS, [SIGNAL], pin=False)
    for name in ways.peers:
        order = {"data": ways.data(name, codec), "batch": batch, "workers": 0}
        answer = ways.ask(name, "check", **order, batches=CHECKED_BATCHES)
        if answer is None:
            continue
        for one in answer["batches"]:
            rows = np.array(one["rows"])
            (made,) = gatherer.batches(window, rows, np.array([0, len(rows)]))
            mine = digest(tensors_of(made))
            if mine != one["digest"] or (np.diff(rows) == 1).mean() > 0.5:
                ways.fail(name, "it delivers other tensors, or does not shuffle")
                break
        else:
            log(f"{codec}: {name} delivers the same tensors")


def calibrate(ways: Ways, codec: str, budget: int, seconds: float, quick: bool) -> None:
    """The fastest number of workers for every peer, and of threads for kdcache."""
    for name in ["kdcache", *ways.peers]:
        rates = {}
        for workers in (0,) if quick else (0, 1, 2) if name == "kdcache" else (0, 2):
            ways.workers[name, codec, budget] = workers
            answer = ways.stream(name, codec, budget, seconds, 1)
            if answer is None:
                break
            rates[workers] = answer["tokens_per_second"]
        else:
            ways.workers[name, codec, budget] = max(rates, key=lambda workers: rates[workers])
            log(f"{codec}, {budget}: {name}: tokens/s by workers {rates}")


def turn(ways: Ways, codec: str, budget: int, seconds: float, seed: int) -> dict[str, Any]:
    """What every way delivers, one after the other."""
    found = {name: ways.stream(name, codec, budget, seconds, seed) for name in list(ways.servers)}
    return {name: answer for name, answer in found.items() if answer is not None}


def measure(ways: Ways, codec: str, args: argparse.Namespace) -> dict[str, Any]:
    """Conversion, check and all turns of one codec."""
    path = ways.data("kdcache", codec)
    make_cache(path, SHARDS, args.shard_tokens or SHARD_TOKENS[codec], codec=CODECS[codec])
    cache = open_cache(path)
    window = WindowReader(cache, range(SHARDS), STREAMS, [SIGNAL])
    samples = ways.root / f"samples-{codec.split()[0]}"
    dump_samples(window, samples)
    found: dict[str, Any] = {
        "samples": window.num_samples,
        "target_tokens": int(window.lengths("tgt").sum()),
        "cache_bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "converted": convert(ways, codec, samples),
        "budgets": {},
    }
    for budget in args.batch_tokens:
        batch = ways.batch[codec, budget] = samples_per_batch(cache, budget)
        check(ways, codec, window, cache, batch)
        ways.stream("kdcache", codec, budget, 2 * args.seconds, 1)  # the files are warm
        calibrate(ways, codec, budget, args.seconds, args.quick)
        mine = ways.servers["kdcache"].ask("check", data=path, batch=budget, workers=0, batches=50)
        turns = []
        for number in range(args.turns):
            turns.append(turn(ways, codec, budget, args.seconds, 2 + number))
            log(f"{codec}, {budget}: turn {number}: {rates_of(turns[-1])}")
        found["budgets"][str(budget)] = {
            "samples_per_batch": batch,
            "bytes_per_token": mine["bytes"] / mine["tokens"],
            "parts": measure_parts(cache, budget, args.turns),
            **summary(ways, turns, codec, budget),
        }
    return found


def rates_of(once: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Million tokens a second."""
    return {name: round(one["tokens_per_second"] / 1e6, 2) for name, one in once.items()}


def summary(
    ways: Ways, turns: list[dict[str, dict[str, Any]]], codec: str, budget: int
) -> dict[str, Any]:
    """Rates of all ways that went through all turns, and kdcache's over theirs."""
    names = [name for name in turns[-1] if all(name in once for once in turns)]
    rates = {name: [once[name]["tokens_per_second"] for once in turns] for name in names}
    peers = [name for name in names if name not in OURS]
    best = max(peers, key=lambda name: statistics.median(rates[name]), default=None)

    def over(mine: str) -> dict[str, dict[str, float]]:
        return {
            name: spread([a / b for a, b in zip(rates[mine], rates[name], strict=True)])
            for name in names
            if name != mine
        }

    def ratios(mine: str) -> dict[str, Any]:
        found = over(mine)
        return {
            "over_memcpy": found["copy"]["median"],
            "over_clone": found["clone"]["median"],
            "over_best_peer": found[best]["median"] if best else None,
        }

    return {
        "tokens_per_second": {name: spread(each) for name, each in rates.items()},
        "first_batch_seconds": {
            name: spread([once[name]["first_batch_seconds"] for once in turns])
            for name in names
            if name not in ("copy", "clone")
        },
        "workers": {name: ways.workers[name, codec, budget] for name in ["kdcache", *peers]},
        "kdcache_over": over("kdcache"),
        "best_peer": best,
        **ratios("kdcache"),
        "no_thread": ratios("kdcache, no thread"),
    }


def table(result: dict[str, Any]) -> str:
    """Million target tokens a second, and kdcache over each."""
    lines = []
    for codec, found in result["codecs"].items():
        for budget, cell in found["budgets"].items():
            lines.append(
                f"{codec}, {budget} tokens or {cell['samples_per_batch']} samples a batch, "
                f"{cell['bytes_per_token']:.0f} bytes/token: over_memcpy "
                f"{cell['over_memcpy']:.3f}, over_clone {cell['over_clone']:.3f}, "
                f"over_best_peer {cell['over_best_peer']}; with no thread {cell['no_thread']}"
            )
            shares = {name: share["median"] for name, share in cell["parts"].items()}
            lines.append(f"  shares of an epoch on one thread: {shares}")
            for name, rate in cell["tokens_per_second"].items():
                over = cell["kdcache_over"].get(name, {"median": 1})["median"]
                line = (
                    f"  {name:<28}{rate['median'] / 1e6:>9.2f} ({rate['min'] / 1e6:.2f} to "
                    f"{rate['max'] / 1e6:.2f}){over:>9.1f}"
                )
                if name in cell["first_batch_seconds"]:
                    seconds = cell["first_batch_seconds"][name]["median"]
                    line += f"  first batch {seconds:.3f} s"
                if name in cell["workers"]:
                    kind = "threads" if name == "kdcache" else "workers"
                    line += f", {cell['workers'][name]} {kind}"
                lines.append(line)
    lines.extend(f"left out: {name}: {why[:200]}" for name, why in result["failed"].items())
    for codec, found in result["cold"].items():
        rates = {name: one["tokens_per_second"]["median"] for name, one in found.items()}
        lines.append(f"{codec}, cold: " + str({n: round(r / 1e6, 2) for n, r in rates.items()}))
    lines.append(
        f"memory, large over small: {result['rss_growth']} resident, "
        f"{result['anonymous_growth']} anonymous"
    )
    return "\n".join(lines)


def prepare(numpy_alone: bool) -> bool:
    """Whether kdcache has compiled code, here and in the processes that are started."""
    if numpy_alone:
        os.environ[native.OFF] = "1"
        return False
    if native.library() is None:
        native.library.cache_clear()
        try:
            native.build()
        except (native.NotBuilt, OSError) as error:
            log(f"kdcache has no compiled code: {error}")
    return native.library() is not None


def main() -> None:
    """Print one JSON object on the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="some MB, one budget, one turn")
    parser.add_argument("--venvs", metavar="DIR", help="environments of the peers (kept)")
    parser.add_argument("--out", metavar="DIR", help="folder for the data; a temporary one else")
    parser.add_argument("--peers", help="names, separated by ';' (default all)")
    parser.add_argument("--batch-tokens", type=_numbers, help="default 4096,16384; quick 16384")
    parser.add_argument("--shard-tokens", type=int, help="of each of the four shards")
    parser.add_argument("--seconds", type=float, help="of a turn (default 1, quick 0.5)")
    parser.add_argument("--turns", type=int, help="default 5, quick 1")
    parser.add_argument("--growth-shards", type=_numbers, help="default 4,66; quick 2,8")
    parser.add_argument("--numpy", action="store_true", help="leave compiled code out")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    quick = args.quick
    args.batch_tokens = args.batch_tokens or ([16384] if quick else [4096, 16384])
    args.shard_tokens = args.shard_tokens or (120_000 if quick else None)
    args.seconds = args.seconds or (0.5 if quick else 1)
    args.turns = args.turns or (1 if quick else 5)
    args.cold_turns = 1
    args.growth_shards = args.growth_shards or ([2, 8] if quick else [4, 66])
    args.growth_tokens = 200_000 if quick else 3_000_000
    args.growth_batches = 100 if quick else 7_000
    wanted = list(PEERS) if args.peers is None else args.peers.split(";") if args.peers else []
    compiled = prepare(args.numpy)
    venvs = Path(args.venvs or Path.home() / ".cache/kdcache-bench/peers").resolve()
    venvs.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-", dir=args.out) as directory:
        root = Path(directory)
        ways = Ways(root, venvs, wanted)
        try:
            codecs = {codec: measure(ways, codec, args) for codec in CODECS}
            cold = measure_cold(ways, list(CODECS), args)
        finally:
            ways.end()
        result = {
            "benchmark": "bench_stream",
            "generated_data": True,
            "quick": quick,
            "compiled": compiled,
            "turns": args.turns,
            "seconds_a_turn": args.seconds,
            "load": os.getloadavg()[0],
            "peer_versions": ways.versions,
            "failed": ways.failed,
            "codecs": codecs,
            "cold": cold,
            **measure_growth(root, args),
        }
    result["wall_seconds"] = round(time.perf_counter() - began)
    print(table(result))
    report(result, "bench_stream", save=args.save)


def _numbers(text: str) -> list[int]:
    return sorted(int(number) for number in text.split(","))


if __name__ == "__main__":
    main()
