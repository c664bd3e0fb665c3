"""Soft labels do not depend on which samples share a forward."""

# N labels, V vocabulary

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from kdcache.dump.runner import dump
from kdcache.dump.signals import logits as logits_module
from kdcache.formats.schema import join_ids
from kdcache.recipe import parse_recipe
from tests.dump.logits_oracle import (
    SIGNALS,
    Model,
    columns_of,
    label_hashes,
    maskings_of,
    streams_of,
)
from tests.dump.test_select import threshold_oracle
from tests.dump.world import make_lines

SRC, TGT = make_lines(64)
C = 1 / 8
#: `at` to a teacher, and how many of 64 lines are 64 rows of a forward.
KINDS = {
    "targets": ("marian", 64),
    "positions": ("llama", 64),
    "masked": ("bert", 32),
    "segment": ("bart", 32),
}


class Spy:
    """What a dump gave to the codecs, label by label, and how large its batches were."""

    def __init__(self, monkeypatch):
        self.logits: dict[int, torch.Tensor] = {}
        self.batches: set[int] = set()
        code, batch = logits_module.encode_logits, logits_module.Items.batch

        def encode_logits(logits, gold, draw, *rest):
            if rest[1].name == "threshold":
                self.logits |= dict(zip(draw.tolist(), logits.clone(), strict=True))
            return code(logits, gold, draw, *rest)

        def items_batch(items, rows, *rest):
            self.batches.add(len(rows))
            return batch(items, rows, *rest)

        monkeypatch.setattr(logits_module, "encode_logits", encode_logits)
        monkeypatch.setattr(logits_module.Items, "batch", items_batch)


@pytest.fixture(scope="module", params=KINDS)
def dumps(request, zoo, tmp_path_factory):
    """One corpus in batches of 1 and of 64: the model, two caches and two spies."""
    at = request.param
    architecture, limit = KINDS[at]
    tmp_path = tmp_path_factory.mktemp(at)
    for name, lines in (("src", SRC), ("tgt", TGT)):
        (tmp_path / name).write_text("".join(line + "\n" for line in lines[:limit]))
    signals, more = {}, {"stream": "tgt"} if at == "targets" else {"stream": "src"}
    if at in ("masked", "segment"):
        scheme = "bert" if at == "masked" else "segment"
        signals["masks"] = {"kind": "masks", "stream": "src", "scheme": scheme, "replicas": 2}
        signals["masks"]["probability"], more["masks"] = 0.5, "masks"
    signals |= {name: {"kind": "logits", "at": at, **more, **s} for name, s in SIGNALS.items()}
    spies, paths = [], []
    for batch_tokens in (1, 100_000):
        section = {
            "teacher": {"path": str(zoo(architecture)), "device": "cpu"},
            "batch_tokens": batch_tokens,
            "signals": signals,
        }
        fields = {name: str(tmp_path / name) for name in ("src", "tgt")}
        recipe = {"name": "t", "corpus": {"fields": fields}, "dump": section}
        with pytest.MonkeyPatch.context() as patch:
            spies.append(Spy(patch))
            paths.append(tmp_path / f"cache{batch_tokens}")
            dump(parse_recipe(recipe), paths[-1])
    assert [spy.batches for spy in spies] == [{1}, {64}]
    return at, Model(architecture, zoo(architecture)), paths, spies


def readings(at, path, model) -> list[tuple[dict[str, list[int]], list[int]]]:
    """For each row of a forward, inputs of transformers and the logits' rows that are labels."""
    found = []
    if at == "masked":
        for every in maskings_of(path, "masks").values():
            found += [({"input_ids": m.reading}, m.positions) for m in every]
        return found
    start = getattr(model.model.config, "decoder_start_token_id", None)
    if at == "segment":
        pairs = [(m.reading, m.segment) for e in maskings_of(path, "masks").values() for m in e]
    else:
        src, tgt = (streams_of(path, name) for name in ("src", "tgt"))
        pairs = [(src[row], tgt[row]) for row in src]
    for ids, written in pairs:
        if at == "positions":
            found.append(({"input_ids": ids}, range(len(ids) - 1)))
        else:
            one = {"input_ids": ids, "decoder_input_ids": [start, *written[:-1]]}
            found.append((one, range(len(written))))
    return found


def forward(model, inputs: list[dict[str, list[int]]]) -> torch.Tensor:
    """[B, T, V] log-probs of some texts in one forward of transformers, padded on the right."""
    tensors = {
        name: pad_sequence([torch.tensor(one[name]) for one in inputs], batch_first=True)
        for name in inputs[0]
    }
    lengths = torch.tensor([len(one["input_ids"]) for one in inputs])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    with torch.no_grad():
        logits = model.model(**tensors, attention_mask=mask.long()).logits
    return torch.log_softmax(logits, -1)


def own_noise(at, path, model) -> tuple[float, int]:
    """Largest difference of two plain forwards, with and without padding; number of labels."""
    every = readings(at, path, model)
    together = forward(model, [one for one, _ in every])
    largest, count = 0.0, 0
    for padded, (one, rows) in zip(together, every, strict=True):
        alone = forward(model, [one])[0, list(rows)]
        apart = (padded[list(rows)] - alone).abs()
        largest, count = max(largest, float(apart.max())), count + len(rows)
    return largest, count


def test_labels_are_the_same_to_the_teachers_own_noise(dumps):
    at, model, paths, _ = dumps
    noise, count = own_noise(at, paths[0], model)
    assert noise < 1e-4
    # A dump's forward has other shapes again: it projects the labelled positions alone.
    bound = 4 * max(noise, 1e-6)
    seen = 0
    every = [columns_of(path, "whole") for path in paths]
    for row, one in every[0].items():
        pair = [columns["exact"]["code"] for columns in (one, every[1][row])]
        np.testing.assert_allclose(*pair, rtol=0, atol=bound)
        seen += len(one["tokens"]["gold"])
        for name in ("gold", "entropy"):
            pair = [c["tokens"][name].astype(int) for c in (one, every[1][row])]
            assert np.abs(np.subtract(*pair)).max(initial=0) <= 1
    assert seen == count


def drawn_ids(path, places) -> dict[int, list[int]]:
    """Draw hash of each label of `soft` to the ids that are stored as drawn."""
    found = {}
    hashes = label_hashes(path, "soft", "draw", places)
    for row, columns in columns_of(path, "soft").items():
        ids, ends = join_ids(columns["drawn"]), np.cumsum(columns["tokens"]["num_drawn"])
        pieces = np.split(ids, ends[:-1]) if len(ends) else []
        keys = hashes[row].view(np.int64).tolist()
        found |= dict(zip(keys, map(np.ndarray.tolist, pieces), strict=True))
    return found


def label_places(at, path) -> dict[int, list[list[int]]]:
    """Corpus row to the labelled positions of each replica."""
    if at in ("masked", "segment"):
        return {
            row: [m.positions if at == "masked" else list(range(len(m.positions))) for m in every]
            for row, every in maskings_of(path, "masks").items()
        }
    ids = streams_of(path, "tgt" if at == "targets" else "src")
    return {row: [list(range(at == "positions", len(one)))] for row, one in ids.items()}


def fixed_point(logits: torch.Tensor) -> list[int]:
    """[V] probabilities over C with 40 fractional bits, from float32."""
    unit = np.float32(C / 2**40)
    return [int(np.float32(p) / unit) for p in torch.softmax(logits, -1).numpy()]


def test_drawn_ids_are_the_same_wherever_the_fixed_point_probabilities_are(dumps):
    at, _, paths, spies = dumps
    assert SIGNALS["soft"]["codec"] == {"name": "threshold", "c": "1/8"}
    places = label_places(at, paths[0])
    drawn = [drawn_ids(path, places) for path in paths]
    assert drawn[0].keys() == drawn[1].keys() == spies[0].logits.keys() == spies[1].logits.keys()
    assert sum(map(len, drawn[0].values())) > 100
    moved = 0
    for key in drawn[0]:
        logits = [spy.logits[key] for spy in spies]
        for ids, one in zip(drawn, logits, strict=True):
            assert ids[key] == threshold_oracle(torch.softmax(one, -1).tolist(), C, key)[1]
        same = drawn[0][key] == drawn[1][key]
        assert same or fixed_point(logits[0]) != fixed_point(logits[1])
        moved += not same
    assert moved <= 0.01 * len(drawn[0])
