"""Beams read from a cache, and the same by transformers called directly, sample by sample."""

import json
import shutil
from collections import Counter

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from kdcache.formats.schema import join_ids
from kdcache.recipe import parse_recipe
from tests.dump.zoo import CAUSAL


def load(directory):
    """The transformers model of a zoo directory."""
    causal = directory.name.split("-")[0] in CAUSAL
    auto = AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM
    return auto.from_pretrained(directory).eval()


def encode(directory, texts):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [tokenizer(text)["input_ids"] for text in texts]


def often_ending(directory, out, texts):
    """A copy of a model whose end token is one that it likes to write."""
    shutil.copytree(directory, out)
    model, counts = load(directory), Counter()
    for ids in encode(directory, texts):
        model.generation_config.eos_token_id = None
        found = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=12,
            num_beams=3,
            num_return_sequences=3,
            forced_eos_token_id=None,
            pad_token_id=0,
        )
        written = found[:, (1 if model.config.is_encoder_decoder else len(ids)) :]
        counts.update({token for row in written.tolist() for token in row[2:]})
    chosen = sorted(counts, key=lambda token: (abs(counts[token] - len(texts) / 3), token))
    _set(out, eos_token_id=chosen[0])
    if model.generation_config.forced_eos_token_id is not None:
        _set(out, forced_eos_token_id=chosen[0])
    return out


def with_settings(directory, root, **settings):
    """A copy of a model with other values in its generation config."""
    out = root / f"{directory.name}-other"
    shutil.copytree(directory, out)
    _set(out, **settings)
    return out


def _set(directory, **settings):
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def recipe(world, directory, signals, causal=False, texts=6, **dump):
    """A recipe that dumps signals over the first texts of the world."""
    streams = {"src": {"field": "src"}}
    if not causal:
        streams["tgt"] = {"field": "tgt", "target": True}
    fields = {name: str(world.root / name) for name in streams}
    given = {"shard_tokens": 40, "batch_tokens": 700, "streams": streams, "signals": signals}
    paths = [str(path) for path in directory] if isinstance(directory, list) else str(directory)
    given["teacher"] = {"path": paths, "device": "cpu"}
    corpus = {"fields": fields, "limit": texts}
    return parse_recipe({"name": "test", "corpus": corpus, "dump": given | dump})


def hypotheses(cache, name="beams"):
    """Per sample: a list of (tokens, log_prob, score)."""
    for shard in range(cache.num_shards):
        for start, stop, columns in cache.signal_shard(name, shard).parts:
            rows, tokens = columns["hypotheses"], columns["tokens"]
            for m in range(stop - start):
                ids = join_ids(tokens.fields)[tokens.offsets[m] : tokens.offsets[m + 1]].tolist()
                found, fields = [], {k: v.tolist() for k, v in rows.fields.items()}
                for h in range(rows.offsets[m], rows.offsets[m + 1]):
                    count = fields["num_tokens"][h]
                    found.append((ids[:count], fields["log_prob"][h], fields["score"][h]))
                    ids = ids[count:]
                assert ids == []
                yield found


def limit_of(model, ids, max_length=None):
    """Most tokens of a hypothesis, from the docs."""
    positions = getattr(model.config, "max_position_embeddings", None)
    most = 2 * len(ids) + 10 if max_length is None else max_length
    if positions is None:
        return most
    return min(most, positions - (0 if model.config.is_encoder_decoder else len(ids)))


def generated(model, ids, limit, **settings):
    """transformers' hypotheses of one sample, alone: tokens, and its own scores."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    skip = 1 if model.config.is_encoder_decoder else len(ids)
    found = []
    for row in out.sequences[:, skip:].tolist():
        cut = next((i + 1 for i, token in enumerate(row) if token in ends), limit)
        found.append(row[: min(cut, limit)])
    return found, out.get("sequences_scores")


def forced(model, ids, tokens):
    """[T, V] float64 log-probs of one hypothesis by a plain forward."""
    start = model.generation_config.decoder_start_token_id
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            before = torch.tensor([[start, *tokens[:-1]]])
            logits = model(torch.tensor([ids]), decoder_input_ids=before).logits[0]
        else:
            logits = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1]
    return torch.log_softmax(logits.double(), dim=-1)


def forced_sum(model, ids, tokens):
    return float(forced(model, ids, tokens)[torch.arange(len(tokens)), tokens].sum())


def alike(one, other, tolerance=1e-4):
    """Whether two lists of hypotheses are the same, but for the order of equal scores."""
    if len(one) != len(other):
        return False
    return all(
        a[0] == b[0] or abs(a[2] - b[2]) < tolerance for a, b in zip(one, other, strict=True)
    )
