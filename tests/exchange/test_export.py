"""Exports: read again by other readers, and compared with what the cache says."""

import gzip
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from sacrebleu.metrics import BLEU

from kdcache.cli import main
from kdcache.compile.options import parse_condition
from kdcache.dump.runner import dump
from kdcache.errors import RecipeError, StorageError
from kdcache.exchange.export_text import one_line
from kdcache.exchange.exporter import ExportOptions, export_cache
from kdcache.exchange.importer import ImportOptions, import_files
from kdcache.formats.cache import open_cache
from kdcache.formats.schema import join_ids
from kdcache.models.loading import load_tokenizer
from kdcache.recipe import parse_recipe
from kdcache.report.inspect import inspect_cache
from tests.exchange import peers
from tests.exchange.test_import import stored
from tests.train.conftest import make_lines, make_teacher


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Pairs with hypotheses and labels of two codecs; some texts have line breaks in them."""
    root = tmp_path_factory.mktemp("pairs")
    src, tgt = make_lines(24)
    make_teacher(root / "teacher", src + tgt)
    src[3], src[5] = src[3].replace(" ", "\n", 1), src[5].replace(" ", "\r\n\u2028", 1)
    rows = [json.dumps({"src": a, "tgt": b}) + "\n" for a, b in zip(src, tgt, strict=True)]
    (root / "train.jsonl").write_text("".join(rows))
    tree = {
        "name": "test",
        "corpus": {
            "format": "jsonl",
            "path": str(root / "train.jsonl"),
            "fields": {"src": "src", "tgt": "tgt"},
        },
        "dump": {
            "teacher": {"path": str(root / "teacher"), "device": "cpu"},
            "shard_tokens": 300,
            "signals": {
                "logits": {"codec": {"name": "threshold", "c": "1/8"}},
                "all": {"codec": {"name": "full", "values": "float32"}},
                "beams": {"kind": "beams", "num_beams": 3, "num_hypotheses": 3, "max_length": 12},
            },
        },
    }
    dump(parse_recipe(tree), root / "cache")
    return root / "cache"


def hypotheses(path):
    """(source, reference, [(text, log-prob, score)]) of every sample, one at a time."""
    cache = open_cache(path)
    tokenizer = load_tokenizer(cache.tokenizer_dir(cache.stream("tgt").tokenizer))
    found = []
    for shard in range(cache.num_shards):
        samples = cache.samples(shard)
        texts = zip(samples.text("src").to_pylist(), samples.text("tgt").to_pylist(), strict=True)
        for _, _, columns in cache.signal_shard("beams", shard).parts:
            ids, at = join_ids(columns["tokens"].fields).tolist(), 0
            said = columns["hypotheses"]
            for sample in range(len(said)):
                some = []
                for n in range(*said.offsets[sample : sample + 2].tolist()):
                    length = int(said.fields["num_tokens"][n])
                    text = tokenizer.decode(ids[at : at + length], skip_special_tokens=True)
                    at += length
                    scores = [float(said.fields[key][n]) for key in ("log_prob", "score")]
                    some.append((text, *scores))
                found.append((*next(texts), some))
    return found


def read_lines(path):
    """As fairseq and OpenNMT read, and as Marian does: the same lines."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = raw.decode().splitlines()
    assert raw == "".join(line + "\n" for line in lines).encode()
    return lines


def plain(text):
    return " ".join(re.split(r"[\r\n\u2028]+", text))


@pytest.mark.parametrize("choice", ["best", "reference", "all"])
def test_pairs_stay_line_aligned(cache, tmp_path, choice):
    options = ExportOptions(format="text", choice=choice, n_best=2, zipped=choice == "all")
    summary = export_cache(cache, tmp_path / "out", options)
    bleu = BLEU(effective_order=True)
    expected, listed = [], []
    for source, reference, some in hypotheses(cache):
        chosen = some[:1] if choice == "best" else some
        if choice == "reference":
            scores = [bleu.sentence_score(text, [reference]).score for text, *_ in some]
            chosen = [some[scores.index(max(scores))]]
        for text, _, _ in chosen:
            if not text.strip():
                continue
            expected.append((plain(source), text.strip()))
            listed.append(some[:2])
    ending = ".gz" if choice == "all" else ""
    sides = [read_lines(tmp_path / "out" / f"train.{side}{ending}") for side in ("src", "tgt")]
    assert list(zip(*sides, strict=True)) == expected
    assert summary["written"] == len(expected) > 20
    assert summary["mended"] == sum(n in (3, 5) for n, *_ in _numbered(cache, choice))
    rows = [line.split(" ||| ") for line in read_lines(tmp_path / "out" / f"train.nbest{ending}")]
    flat = [(n, *one) for n, some in enumerate(listed) for one in some]
    for (number, text, features, score), (n, said, log_prob, its_score) in zip(
        rows, flat, strict=True
    ):
        assert (int(number), text) == (n, said.strip())
        assert features.startswith("LogProb= ")
        assert float(features.split()[1]) == pytest.approx(log_prob, rel=1e-5)
        assert float(score) == pytest.approx(its_score, rel=1e-5)


def _numbered(cache, choice):
    """Number of the sample of every pair."""
    for number, (_, _, some) in enumerate(hypotheses(cache)):
        for text, *_ in some if choice == "all" else some[:1]:
            if text.strip():
                yield number, text


def test_filters_are_those_of_compile(cache, tmp_path):
    everything = hypotheses(cache)
    middle = float(np.median([some[0][2] for *_, some in everything]))
    options = ExportOptions(
        format="text",
        filters=[parse_condition("src.length <= 14"), parse_condition("logits.loss < 4.1")],
        min_score=middle,
        name="dev",
        suffixes=("de", "en"),
    )
    summary = export_cache(cache, tmp_path / "out", options)
    rows = inspect_rows(cache)
    kept = [n for n, (length, loss) in enumerate(rows) if length <= 14 and loss < 4.1]
    chosen = [n for n in kept if everything[n][2][0][2] >= middle]
    assert 0 < len(chosen) < len(kept) < len(rows)
    assert read_lines(tmp_path / "out" / "dev.de") == [plain(everything[n][0]) for n in chosen]
    assert (summary["filtered"], summary["low_score"]) == (
        len(rows) - len(kept),
        len(kept) - len(chosen),
    )


def inspect_rows(path):
    """Source tokens and mean loss of every sample, from the full labels' neighbour."""
    cache = open_cache(path)
    found = []
    for shard in range(cache.num_shards):
        lengths = cache.samples(shard).streams["src"].lengths
        for start, stop, columns in cache.signal_shard("logits", shard).parts:
            tokens = columns["tokens"]
            for m in range(stop - start):
                codes = tokens.fields["gold"][tokens.offsets[m] : tokens.offsets[m + 1]]
                loss = float(((codes / 255.0) ** 2 * 25).mean())
                found.append((int(lengths[start - cache.manifest.shards[shard].start + m]), loss))
    return found


def test_a_line_break_of_any_kind_is_a_space():
    breaks = ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
    for mark in breaks:
        assert one_line(f"a{mark}b") == "a b"
        assert one_line(f"{mark}a{mark}{mark}\0b{mark}") == "a  b"
    assert one_line("a\tb\u00a0c") == "a\tb\u00a0c"


def test_parquet_holds_what_the_cache_says(cache, tmp_path):
    summary = export_cache(cache, tmp_path / "out", ExportOptions(format="parquet", top_k=4))
    opened = open_cache(cache)
    names = [f"train-{n:05d}-of-{opened.num_shards:05d}.parquet" for n in range(opened.num_shards)]
    assert summary["files"] == names
    assert len(names) > 1
    rows = [row for name in names for row in pq.read_table(tmp_path / "out" / name).to_pylist()]
    shown = inspect_cache(cache, num_samples=len(rows))["samples"]
    said = hypotheses(cache)
    sizes = {"all": opened.signal("all").vocab_size}
    for row, sample, (source, reference, some) in zip(rows, shown, said, strict=True):
        assert (row["row"], row["sample_id"]) == (sample["row"], sample["sample_id"])
        assert (row["src"], row["tgt"]) == (source, reference)
        assert row["tgt.tokens"] == sample["tokens"]["tgt"]
        assert [(h["text"], h["log_prob"], h["score"]) for h in row["beams"]] == some
        assert row["all.position"] == list(range(len(row["tgt.ids"])))
        assert row["logits.position"] == row["all.position"]
    full = {}
    for shard in range(opened.num_shards):
        samples = opened.samples(shard)
        for start, _, columns in opened.signal_shard("all", shard).parts:
            codes = columns["exact"].fields["code"].reshape(-1, sizes["all"])
            for m, (a, b) in enumerate(
                zip(columns["tokens"].offsets, columns["tokens"].offsets[1:], strict=False)
            ):
                full[int(samples.row[start - samples.start + m])] = codes[a:b]
    for row in rows:
        for n, log_probs in enumerate(full[row["row"]]):
            best = np.argsort(-log_probs)[:4]
            assert row["all.ids"][n] == best.tolist()
            assert row["all.log_probs"][n] == log_probs[best].tolist()
            # What a threshold keeps exactly is at least 1/8, and what it draws weighs that.
            assert all(log_probs[i] >= np.log(1 / 8) - 1e-3 for i in row["logits.ids"][n])
            assert set(row["logits.drawn_weights"][n]) <= {0.125}
            own = log_probs[row["tgt.ids"][n]]
            assert abs(row["all.gold_log_prob"][n] - max(own, -25)) < 0.2


@pytest.mark.parametrize("name", ["vllm", "distillkit"])
def test_labels_survive_a_round_trip(tmp_path, name):
    data = peers.dumped(tmp_path, count=12)

    def bring(files, out, kind):
        tokenizer = str(tmp_path / "tokenizer")
        options = ImportOptions(format=kind, tokenizer=tokenizer, values="float32", top_k=4)
        return import_files(files, out, options)

    files, _ = peers.write_distillkit(data, tmp_path / "capture", plain=True)
    bring(files, tmp_path / "cache", "distillkit")
    export_cache(tmp_path / "cache", tmp_path / "out", ExportOptions(format=name))
    files = [p for p in sorted((tmp_path / "out").iterdir()) if p.suffix != ".yaml"]
    bring(files, tmp_path / "again", name)
    for first, second in zip(stored(tmp_path / "cache"), stored(tmp_path / "again"), strict=True):
        assert first[0] == second[0]
        assert first[2] == second[2]
        assert np.array_equal(first[3], second[3])


def test_an_output_is_whole_or_not_there(cache, tmp_path, monkeypatch, capsys):
    from kdcache.exchange import export_text

    def broken(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_text, "one_line", broken)
    assert main(["export", "text", str(cache), "--out", str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    words = ["export", "text", str(cache), "--out", str(tmp_path / "out"), "--json", "--gzip"]
    assert main(words) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["files"] == ["train.src.gz", "train.tgt.gz"]
    first = [p.read_bytes() for p in sorted((tmp_path / "out").iterdir())]
    assert main(words) == 1
    assert "there is something already" in capsys.readouterr().err
    assert main([*words[:4], "s3://bucket/out"]) == 1
    assert "a folder of this machine" in capsys.readouterr().err
    words[4] = str(tmp_path / "again")
    assert main(words) == 0
    assert [p.read_bytes() for p in sorted((tmp_path / "again").iterdir())] == first


REFUSED = {
    "not at every token": (
        {"format": "distillkit", "signals": ["all"]},
        "has labels at targets; these formats want them at every token",
    ),
    "several signals": ({"format": "vllm"}, "is made of one signal of soft labels"),
    "no hypotheses": (
        {"format": "text", "signals": ["logits"]},
        r"'logits' is of kind logits, which text cannot hold; those that it can are \['beams'\]",
    ),
    "no such measure": (
        {"format": "text", "filters": [parse_condition("nothing.length < 3")]},
        "has no 'nothing'",
    ),
    "nothing left": (
        {"format": "text", "filters": [parse_condition("src.length < 1")]},
        "the filters leave no sample",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_refused(cache, tmp_path, name):
    keys, message = REFUSED[name]
    with pytest.raises(RecipeError, match=message):
        export_cache(cache, tmp_path / "out", ExportOptions(**keys))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("")
    with pytest.raises(StorageError, match="something already"):
        export_cache(cache, tmp_path / "out", ExportOptions(format="text"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parquet", "--gzip"], "argument --gzip: goes with the format text"),
        (["text", "--n-best", "0"], "argument --n-best: '0' is given"),
        (["text", "--suffixes", "a", "a"], "give no two names"),
        (["text", "--filter", "x"], "argument --filter: filter 'x': expected one such as"),
        (["words"], "invalid choice: 'words'"),
    ],
)
def test_bad_usage_is_told_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["export", words[0], "cache", "--out", "out", *words[1:]])
    assert left.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
