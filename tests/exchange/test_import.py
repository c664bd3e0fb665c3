"""Imports: labels against the distributions that the files were written from, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.cli import main
from kdcache.errors import CorpusError, IdentityError, RecipeError
from kdcache.exchange.importer import ImportOptions, import_files
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.codes import gold_log_probs
from kdcache.formats.schema import join_ids
from tests.exchange import peers

K = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return peers.dumped(tmp_path_factory.mktemp("peers"))


def bring(data, files, out, format_name, **keys):
    files = files if isinstance(files, list) else [files]
    keys = {"values": "float32", "shard_tokens": 120} | keys
    options = ImportOptions(format=format_name, tokenizer=str(data.root / "tokenizer"), **keys)
    return import_files(files, out, options)


def stored(path):
    """Of every sample its tokens, loss, and per label id to log-prob, tail and gold."""
    cache = open_cache(path)
    assert not verify_cache(path).faults
    found = []
    for shard in range(cache.num_shards):
        stream = cache.samples(shard).streams["text"]
        tokens, loss = join_ids(stream.fields), stream.fields.get("loss")
        [(_, _, columns)] = cache.signal_shard("logits", shard).parts
        ids, codes = join_ids(columns["exact"].fields), columns["exact"].fields["code"]
        fields = columns["tokens"].fields
        ends = np.concatenate([[0], np.cumsum(fields["num_exact"].astype(int))])
        for sample in range(len(stream)):
            a, b = columns["tokens"].offsets[sample : sample + 2]
            here = slice(*stream.offsets[sample : sample + 2])
            entries = [
                dict(zip(ids[s:e].tolist(), codes[s:e].tolist(), strict=True))
                for s, e in zip(ends[a:b], ends[a + 1 : b + 1], strict=True)
            ]
            gold = gold_log_probs(fields["gold"][a:b])
            marks = None if loss is None else loss[here].astype(bool)
            found.append((tokens[here].tolist(), marks, entries, fields["tail_0"][a:b], gold))
    return found


def expect(entries, tail, log_probs, k=K, tolerance=1e-6):
    """Entries and tail of one sample against [N, V] log-probs."""
    assert len(entries) == len(log_probs)
    for position, row in enumerate(entries):
        best = set(np.argsort(-log_probs[position])[:k].tolist())
        assert set(row) == best
        for token, value in row.items():
            assert value == pytest.approx(log_probs[position, token], abs=tolerance)
        rest = 1 - sum(np.exp(log_probs[position, i]) for i in best)
        assert float(tail[position]) == pytest.approx(np.log(rest), rel=2e-3, abs=2e-3)


def test_vllm_labels_are_the_teachers(data, tmp_path):
    path = peers.write_vllm(data, "vllm.jsonl.gz")
    summary = bring(data, path, tmp_path / "cache", "vllm", teacher="models/big")
    for n, (ids, loss, entries, tail, gold) in enumerate(stored(tmp_path / "cache")):
        assert (ids, loss) == (data.ids[n], None)
        expect(entries, tail, data.log_probs[n])
        # vLLM says the token's own log-prob wherever it ranks, so none of these is an estimate.
        own = [row[token] for row, token in zip(data.log_probs[n], ids[1:], strict=True)]
        assert np.allclose(np.sqrt(-gold), np.sqrt(-np.array(own)), atol=0.011)
    assert summary["gold"]["known_share"] == 1
    assert summary["gold"]["held"] < 0.9
    both = zip(data.log_probs, data.ids, strict=True)
    own = np.concatenate([np.exp(said[np.arange(len(said)), ids[1:]]) for said, ids in both])
    mean = own[own > 0.02].sum() / len(own)  # the others are none of the k
    assert summary["gold"]["probability"] == pytest.approx(mean, rel=0.02)
    record = open_cache(tmp_path / "cache").signal("logits")
    assert (record.teacher.path, record.imported) == ("models/big", True)
    assert any("no tail" in line for line in record.recipe["import"]["limits"])
    assert summary["shards_written"] == open_cache(tmp_path / "cache").num_shards > 1


@pytest.mark.parametrize("second", [False, True], ids=["objects", "two lists"])
def test_axolotl_labels_belong_to_the_last_tokens(data, tmp_path, second):
    path = peers.write_axolotl(data, f"axolotl{second}.jsonl", second=second)
    bring(data, path, tmp_path / "cache", "axolotl")
    for n, (ids, loss, entries, tail, _) in enumerate(stored(tmp_path / "cache")):
        expected, log_probs = peers.chat_tokens(data, n)
        assert ids == expected
        assert 0 < loss.sum() < len(ids)
        expect(entries, tail, log_probs[loss[1:]])


@pytest.mark.parametrize("log_sum", [True, False], ids=["log-sum-exp", "up to a constant"])
def test_nemo_labels_follow_the_loss_mask(data, tmp_path, log_sum):
    path = peers.write_nemo(data, f"nemo{log_sum}.jsonl", log_sum=log_sum)
    bring(data, path, tmp_path / "cache", "nemo")
    for n, (ids, loss, entries, tail, _) in enumerate(stored(tmp_path / "cache")):
        assert ids == data.ids[n]
        assert loss.tolist() == [False] * 3 + [True] * (len(ids) - 3)
        if log_sum:
            expect(entries, tail, data.log_probs[n][2:])
            continue
        assert np.isneginf(tail).all()
        for row, said in zip(entries, data.log_probs[n][2:], strict=True):
            total = sum(np.exp(said[i]) for i in row)
            for token, value in row.items():
                assert np.exp(value) == pytest.approx(np.exp(said[token]) / total, rel=1e-4)


@pytest.mark.parametrize("kind", [*peers.COMPRESSED, "plain", "padded", "one more label"])
def test_distillkit_bytes_are_decoded(data, tmp_path, kind):
    extra, plain = int(kind == "one more label"), kind == "plain"
    files, meant = peers.write_distillkit(
        data,
        tmp_path / "capture",
        kind=kind if kind in peers.COMPRESSED else "exact",
        extra=extra,
        plain=plain,
        pad=data.tokenizer.pad_token_id if kind == "padded" else None,
    )
    vocab_size = data.vocab_size + 1
    summary = bring(data, files, tmp_path / "cache", "distillkit", vocab_size=vocab_size)
    assert summary["rows_compared"] == len(data.ids)
    for n, (ids, _, entries, tail, _) in enumerate(stored(tmp_path / "cache")):
        assert ids == data.ids[n]
        order = np.argsort(-data.log_probs[n], axis=1)[:, :K]
        for position, row in enumerate(entries):
            said = meant[n][position] - max(0, np.log(np.exp(meant[n][position]).sum()))
            expected = dict(zip(order[position].tolist(), said, strict=True))
            assert row == pytest.approx(expected, abs=2e-5)
            rest = 1 - np.exp(said).sum()
            if rest > 1e-5:
                assert float(tail[position]) == pytest.approx(np.log(rest), rel=0.01, abs=0.01)


def test_packed_rows_are_texts_of_their_own(data, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    files, _ = peers.write_distillkit(data, tmp_path / "capture", plain=True, extra=1)
    table = pa.concat_tables(pq.read_table(path) for path in files).to_pydict()
    packed = {name: [rows[0] + rows[1], rows[2]] for name, rows in table.items()}
    sizes = [len(table["input_ids"][n]) for n in range(3)]
    packed["attention_mask"] = [[1] * sizes[0] + [2] * sizes[1], [1] * (sizes[2] - 2) + [0, 0]]
    pq.write_table(pa.table(packed), tmp_path / "packed.parquet")
    bring(data, tmp_path / "packed.parquet", tmp_path / "cache", "distillkit", trust_ids=True)
    found = stored(tmp_path / "cache")
    assert [ids for ids, *_ in found] == [data.ids[0], data.ids[1], data.ids[2][:-2]]
    for n, (ids, _, entries, tail, _) in enumerate(found):
        expect(entries, tail, data.log_probs[n][: len(ids) - 1], tolerance=1e-5)


def test_labels_are_coded_without_bias(data, tmp_path):
    files = peers.write_vllm(data)
    bring(data, files, tmp_path / "exact", "vllm")
    bring(data, files, tmp_path / "coded", "vllm", values="uint8", top_k=3, shard_tokens=1 << 20)
    exact, coded = stored(tmp_path / "exact"), stored(tmp_path / "coded")
    table = -((np.arange(256) / 255) ** 2) * 25.0
    errors = []
    for (_, _, many, *_), (_, _, few, *_) in zip(exact, coded, strict=True):
        for row, other in zip(many, few, strict=True):
            assert set(other) == set(sorted(row, key=row.get)[-3:])
            errors += [np.exp(table[int(code)]) - np.exp(row[i]) for i, code in other.items()]
    assert abs(np.mean(errors)) < 4 * np.std(errors) / len(errors) ** 0.5
    assert 0 < np.std(errors) < 0.01


WRITERS = {
    "vllm": lambda data, tmp, **keys: peers.write_vllm(data, "bad.jsonl", **keys),
    "axolotl": lambda data, tmp, **keys: peers.write_axolotl(data, "bad.jsonl", **keys),
    "nemo": lambda data, tmp, **keys: peers.write_nemo(data, "bad.jsonl", prompt=0, **keys),
    "distillkit": lambda data, tmp, **keys: peers.write_distillkit(data, tmp / "bad", **keys)[0],
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("shift", [1, -1])
def test_shifted_labels_are_refused(data, tmp_path, name, shift):
    files = WRITERS[name](data, tmp_path, shift=shift)
    with pytest.raises((IdentityError, CorpusError), match="shifted against the tokens"):
        bring(data, files, tmp_path / "cache", name)
    assert not (tmp_path / "cache").exists()


def test_labels_of_other_texts_are_refused(data, tmp_path):
    others = [
        peers.distributions(ids[::-1], data.vocab_size, np.random.default_rng(n))
        for n, ids in enumerate(data.ids)
    ]
    mixed = replace(data, log_probs=others)
    files = peers.write_distillkit(mixed, tmp_path / "bad")[0]
    with pytest.raises(IdentityError, match="or of other texts: the mean probability"):
        bring(data, files, tmp_path / "cache", "distillkit")


def test_labels_that_shift_half_way_are_refused(data, tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    many = replace(data, ids=data.ids * 3, log_probs=data.log_probs * 3)
    files = peers.write_distillkit(many, good)[0]
    files += peers.write_distillkit(many, bad, shift=1)[0] * 6
    with pytest.raises(IdentityError, match=r"logits, up to corpus row \d+: the labels are shift"):
        bring(data, files, tmp_path / "cache", "distillkit")


def edited(path, out, number, change):
    """A JSONL file with one row changed."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[number])
    return peers.write_jsonl(out, rows)


def changed_token(row):
    row["prompt_token_ids"][2] += 1
    row["prompt_logprobs"][2] = {str(row["prompt_token_ids"][2]): {"logprob": -0.1, "rank": 1}}


BAD_ROWS = {
    "another token": (
        changed_token,
        {},
        r"line 4: token 2 \(from 0\) is id \d+ in the file, the text is tokenised to id \d+ by .*"
        "--trust-ids",
    ),
    "a label too few": (
        lambda row: row["prompt_logprobs"].pop(),
        {},
        r"line 4: \d+ prompt_logprobs for \d+ tokens",
    ),
    "no label": (
        lambda row: row["prompt_logprobs"].__setitem__(3, None),
        {},
        "line 4, token 3: no log-probs",
    ),
    "not a number": (
        lambda row: next(iter(row["prompt_logprobs"][3].values())).update(logprob=float("nan")),
        {},
        "line 4: label 2 .* no number",
    ),
    "more than one": (
        lambda row: [e.update(logprob=-0.1) for e in row["prompt_logprobs"][3].values()],
        {},
        "line 4: label 2 .* sum to more than 1",
    ),
    "an id too large": (
        lambda row: row["prompt_logprobs"][3].update({"9999": {"logprob": -1e-3, "rank": 1}}),
        {},
        "line 4: label 2 .* an id outside 0 to",
    ),
    "a field too few": (
        lambda row: row.pop("prompt_logprobs"),
        {},
        "line 4: no log-probs: expected the key 'prompt_logprobs'",
    ),
    "another vocabulary": (lambda row: None, {"vocab_size": 50}, "line 1: token 0 is id .* has 50"),
    "another's option": (lambda row: None, {"messages_field": "m"}, "--messages is of axolotl"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(data, tmp_path, name):
    change, keys, message = BAD_ROWS[name]
    path = edited(peers.write_vllm(data), tmp_path / "bad.jsonl", 3, change)
    with pytest.raises((IdentityError, CorpusError, RecipeError), match=message):
        bring(data, path, tmp_path / "cache", "vllm", **keys)
    assert not (tmp_path / "cache").exists()


def test_a_text_of_another_length_is_refused(data, tmp_path):
    path = edited(
        peers.write_axolotl(data),
        tmp_path / "bad.jsonl",
        2,
        lambda row: row["messages"][1].update(content="a"),
    )
    with pytest.raises(CorpusError, match=r"line 3: \d+ labels for the \d+ tokens of its text"):
        bring(data, path, tmp_path / "cache", "axolotl")


def test_a_row_without_messages_is_said_once(data, tmp_path):
    path = peers.write_vllm(data, tmp_path / "bad.jsonl")
    with pytest.raises(CorpusError) as caught:
        bring(data, path, tmp_path / "cache", "axolotl")
    assert str(caught.value).startswith(f"{path}: line 1: no messages: expected the key 'messages'")


def test_bytes_of_another_config_are_refused(data, tmp_path):
    files, _ = peers.write_distillkit(data, tmp_path / "capture")
    with pytest.raises(RecipeError, match=r"nothing\.yaml: cannot be read"):
        bring(data, files, tmp_path / "c", "distillkit", compression_config="nothing.yaml")
    config = tmp_path / "capture" / "compression_config.yaml"
    config.write_text(config.read_text().replace("exact_k: 5", "exact_k: 4"))
    with pytest.raises(CorpusError, match=r"row 0 \(from 0\): \d+ bytes of ids and 20 of"):
        bring(data, files, tmp_path / "c", "distillkit")
    config.unlink()
    with pytest.raises(RecipeError, match=r"compression_config\.yaml: no such file"):
        bring(data, files, tmp_path / "c", "distillkit")


def test_the_command_tells_what_it_did(data, tmp_path, capsys):
    short = data.tokenizer("a")["input_ids"]
    assert len(short) == 1
    bare = {"prompt": "a", "prompt_token_ids": short, "prompt_logprobs": [None]}
    none = {"prompt": "", "prompt_token_ids": [], "prompt_logprobs": []}
    rows = [peers.vllm_row(data.texts[n], data.ids[n], data.log_probs[n], K) for n in range(9)]
    path = peers.write_jsonl(tmp_path / "few.jsonl", [rows[0], none, bare, *rows[1:]])
    tokenizer, out = str(data.root / "tokenizer"), str(tmp_path / "cache")
    words = ["import", "vllm", str(path), "--tokenizer", tokenizer, "--out", out]
    most = max(map(len, data.ids[:9])) - 1
    assert main([*words, "--max-tokens", str(most), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    long = [n for n in range(9) if len(data.ids[n]) > most]
    kept = [*data.ids[:1], short, *data.ids[1:9]]
    assert summary["dropped"] == {"empty": 0, "no_tokens": 1, "too_long": len(long)}
    assert [ids for ids, *_ in _tokens(out)] == [ids for ids in kept if len(ids) <= most]
    assert len(long) > 0
    [broken] = Path(out, "samples").iterdir()
    raw = broken.read_bytes()
    broken.write_bytes(raw[:600] + b"?" + raw[601:])
    assert main(["verify", out, "--repair"]) == 1
    assert "it was imported; name a copy of it by --mirror" in capsys.readouterr().out
    broken.write_bytes(raw)
    assert main(["audit", out]) == 1
    assert "'logits' was imported, and its teacher is not at hand" in capsys.readouterr().err
    assert main(words) == 0  # what stands stays, whatever else is asked for
    shown = capsys.readouterr().out
    assert "shards skipped                  1" in shown
    assert "limit: no tail" in shown
    with pytest.raises(SystemExit):
        main([*words, "--top-k", "0"])
    assert "argument --top-k: '0' is given" in capsys.readouterr().err


def _tokens(path):
    """Tokens of every sample, with the labels left alone."""
    cache = open_cache(path)
    for shard in range(cache.num_shards):
        stream = cache.samples(shard).streams["text"]
        ids = join_ids(stream.fields).tolist()
        for a, b in zip(stream.offsets, stream.offsets[1:], strict=False):
            yield (ids[a:b],)


def test_an_imported_cache_is_compiled_as_any_other(data, tmp_path):
    from kdcache.compile import CompileOptions, compile_caches

    bring(data, peers.write_vllm(data), tmp_path / "cache", "vllm", shard_tokens=1 << 20)
    codec = {"name": "topk", "k": 2, "values": "float32"}
    options = CompileOptions(codecs={"logits": codec}, filters=["text.length <= 14"])
    compile_caches([tmp_path / "cache"], tmp_path / "small", options)
    few = [n for n, ids in enumerate(data.ids) if len(ids) <= 14]
    found = stored(tmp_path / "small")
    assert len(found) == len(few) > 3
    for (ids, _, entries, tail, _), n in zip(found, few, strict=True):
        assert ids == data.ids[n]
        expect(entries, tail, data.log_probs[n], k=2)
    assert open_cache(tmp_path / "small").signal("logits").imported


def test_an_interrupted_import_goes_on(data, tmp_path, monkeypatch):
    from kdcache.exchange import import_labels

    path = peers.write_vllm(data)
    whole = bring(data, path, tmp_path / "whole", "vllm")
    real, calls = import_labels.LabelWriter._write, []

    def stopped(self, shard, *rest):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(shard)
        return real(self, shard, *rest)

    monkeypatch.setattr(import_labels.LabelWriter, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        bring(data, path, tmp_path / "parts", "vllm")
    monkeypatch.undo()
    other = edited(path, tmp_path / "other.jsonl", 3, lambda row: row.update(more=1))
    with pytest.raises(IdentityError, match=r"teacher\.digest"):
        bring(data, other, tmp_path / "parts", "vllm")
    summary = bring(data, path, tmp_path / "parts", "vllm")
    assert (summary["shards_skipped"], summary["samples"]) == (2, whole["samples"])
    names = lambda root: sorted(str(p.relative_to(root)) for p in root.rglob("*.arrow"))  # noqa: E731
    assert names(tmp_path / "parts") == names(tmp_path / "whole")  # which carry their digests


def test_a_student_learns_from_an_imported_cache(data, tmp_path):
    from kdcache.errors import TrainingError
    from kdcache.recipe import parse_recipe
    from kdcache.train.runs.loop import train

    recipe = parse_recipe(
        {
            "name": "test",
            "train": {
                "student": {
                    "kind": "causal_lm",
                    "init": "transformers",
                    "config": {
                        "model_type": "gpt2",
                        "n_embd": 16,
                        "n_layer": 1,
                        "n_head": 2,
                        "n_positions": 96,
                    },
                },
                "source": "text",
                "target": "text",
                "objective": [{"loss": "forward_kl", "signal": "logits"}],
                "device": "cpu",
                "max_steps": 24,
                "log_every": 4,
                "batch_tokens": 300,
                "optimizer": {"lr": 0.02},
                "schedule": {"warmup_steps": 2},
            },
        }
    )
    bring(data, peers.write_vllm(data), tmp_path / "cache", "vllm")
    train(recipe, tmp_path / "cache", tmp_path / "run")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [found["loss"] for found in map(json.loads, metrics) if "loss" in found]
    assert losses[-1] < losses[0]
    # Labels that slid get in when the check is off; the student's own check then finds them.
    # So many entries that they hold a third of the tokens by chance, with values that agree.
    files, _ = peers.write_distillkit(data, tmp_path / "bad", shift=1, k=100, plain=True)
    bring(data, files, tmp_path / "shifted", "distillkit", gold_check=False)
    with pytest.raises(TrainingError, match="labels are shifted against their targets"):
        train(recipe, tmp_path / "shifted", tmp_path / "other")
    assert torch.get_default_dtype() == torch.float32
