"""What a batch holds of every kind of signal, against the numbers that the caches were made of."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from kdcache.errors import FormatError, IdentityError
from kdcache.formats import joined, rows
from kdcache.formats.cache import open_cache
from kdcache.formats.dense import SCALE, VALUES
from kdcache.formats.mapped_array import MappedArray
from kdcache.formats.ragged import offsets_of
from kdcache.formats.window import WindowReader
from kdcache.labels.decoding import decode
from kdcache.labels.sparse_target import densify
from kdcache.train.batches.batch import Batch, CodedLabels, DenseRows, Hypotheses, Masked, Scores
from kdcache.train.batches.stream import BatchStream
from tests.formats import kinds as plain
from tests.formats.labels import VOCAB, teacher_log_probs
from tests.report import kinds as varied

pytestmark = pytest.mark.usefixtures("copying")  # everything by numpy, and by compiled code


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache whose corpus row is twice the number of the sample."""
    return plain.make_kinds(tmp_path_factory.mktemp("gather") / "cache")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A cache with pairs, a chat, tasks and scores; its corpus row is thrice the number."""
    return varied.make_kinds(tmp_path_factory.mktemp("varied") / "cache")


def batches_of(path, streams, signals, **options) -> list[Batch]:
    """All micro-batches of two epochs, shuffled over shards."""
    settings = {"accumulate": 2, "max_epochs": 2, "threads": 0, "batch_tokens": 14}
    settings |= {"replicas": "all"} | options
    stream = BatchStream(open_cache(path), streams, signals, seed=3, window_shards=2, **settings)
    found = [micro for batch in stream for micro in batch.micro]
    assert any(len(micro) > 1 for micro in found)
    return found


def pieces(values, counts) -> list:
    """A flat array cut by the counts of its samples."""
    ends = offsets_of(np.asarray(counts)).tolist()
    assert ends[-1] == len(values)
    return [values[a:b] for a, b in pairwise(ends)]


def truth(column, layers) -> torch.Tensor:
    """[R, L, W] float32 by torch of what was written."""
    stored = torch.from_numpy(column.fields[VALUES].copy())[:, layers]
    if stored.dtype == torch.uint16:
        stored = stored.view(torch.bfloat16)
    scale = column.fields.get(SCALE)
    factor = 1 if scale is None else torch.from_numpy(scale.copy())[:, layers, None]
    return stored.float() * factor


def test_tokens_and_their_masks(made):
    cache = open_cache(made.root)
    shards = [cache.samples(shard) for shard in range(cache.num_shards)]
    ids = {
        row: sample_id.tobytes()
        for shard in shards
        for row, sample_id in zip(shard.row.tolist(), shard.sample_id, strict=True)
    }
    for micro in batches_of(made.root, ["src", "tgt"], []):
        assert micro.signals == {}
        assert [one.tobytes() for one in micro.sample_ids] == [ids[row] for row in micro.rows]
        tokens = micro.streams["tgt"]
        assert tokens.segments is None
        assert tokens.loss is None
        for b, row in enumerate(micro.rows.tolist()):
            wanted = made.targets[row // 2]
            assert tokens.ids[b].tolist() == wanted + [0] * (tokens.ids.shape[1] - len(wanted))
            assert tokens.mask[b].tolist() == (tokens.ids[b] != 0).tolist()
        assert tokens.flat.tolist() == [i for row in micro.rows for i in made.targets[row // 2]]
        assert tokens.ids.shape[1] == int(tokens.mask.sum(1).max())


@pytest.mark.parametrize("name", plain.DENSE)
def test_dense_rows(made, name):
    record = open_cache(made.root).signal(name)
    column = made.columns[name][VALUES]
    whole = truth(column, list(range(len(record.layers))))
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
    for micro in batches_of(made.root, ["tgt"], [name]):
        rows = micro.signals[name]
        assert isinstance(rows, DenseRows)
        assert rows.layers == record.layers
        assert rows.values.dtype == dtypes[record.values]
        assert (rows.scale is None) == (record.values != "int8")
        numbers = micro.rows // 2
        assert rows.counts.tolist() == [made.rows(name)[m] for m in numbers]
        wanted = torch.cat([whole[column.offsets[m] : column.offsets[m + 1]] for m in numbers])
        found = rows.decode()
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


def test_only_the_layers_asked_for_are_read(made, monkeypatch):
    read, real = set(), MappedArray._chunk
    monkeypatch.setattr(
        MappedArray, "_chunk", lambda self, n, layer: (read.add(layer), real(self, n, layer))[1]
    )
    names = ["hidden_int8", "attention"]
    layers = {"hidden_int8": (3, 0)}
    whole = truth(made.columns["hidden_int8"][VALUES], [2, 0])
    offsets = made.columns["hidden_int8"][VALUES].offsets
    for micro in batches_of(made.root, ["tgt"], names, layers=layers):
        rows = micro.signals["hidden_int8"]
        assert rows.layers == (3, 0)
        wanted = [whole[offsets[m] : offsets[m + 1]] for m in micro.rows // 2]
        assert torch.equal(rows.decode(), torch.cat(wanted))
        assert micro.signals["attention"].layers == (1, 2)
    assert read == {0, 1, 2}
    read.clear()
    batches_of(made.root, ["tgt"], ["hidden_int8"], layers=layers)
    assert read == {0, 2}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"hidden": (0, 1)}, r"'hidden' is asked for the layers \[0, 1\]; it has \[0, 2, 3\]"),
        ({"hidden": ()}, r"'hidden' is asked for the layers \[\]"),
        ({"classes": (0,)}, r"layers are asked of signal 'classes'; .* are \['hidden'\]"),
        ({"pooled": (2,)}, "layers are asked of signal 'pooled'"),
    ],
    ids=["other", "none", "not dense", "not read"],
)
def test_layers_that_are_not_there_are_refused(made, layers, message):
    with pytest.raises(FormatError, match=message) as caught:
        batches_of(made.root, ["tgt"], ["hidden", "classes"], layers=layers)
    assert "\n" not in str(caught.value)


def test_classes(made):
    for micro in batches_of(made.root, ["tgt"], ["classes", "masked_classes"]):
        for name in ("classes", "masked_classes"):
            scores = micro.signals[name]
            assert isinstance(scores, Scores)
            assert scores.labels == tuple(plain.LABELS)
            assert scores.values.dtype == torch.float32
            column = made.columns[name]["scores"]
            flat = column.fields["value"].astype(np.float32)
            found = pieces(scores.values.numpy(), scores.counts)
            for m, mine in zip(micro.rows // 2, found, strict=True):
                wanted = flat[column.offsets[m] : column.offsets[m + 1]]
                np.testing.assert_array_equal(mine, wanted)


def test_masks(made):
    for micro in batches_of(made.root, ["tgt"], ["masks"]):
        masked = micro.signals["masks"]
        assert isinstance(masked, Masked)
        assert masked.counts.shape == (len(micro), plain.REPLICAS)
        pairs = list(zip(masked.positions.tolist(), masked.ids.tolist(), strict=True))
        found = pieces(pairs, masked.counts.flatten())
        wanted = [replica for m in micro.rows // 2 for replica in made.masked[m]]
        assert found == wanted


def of_replica(values, counts, replica):
    """Rows of one of several replicas, from those of all.

    values: [K, ...] of all, sample after sample; counts: [B, R] of them.
    """
    number = torch.arange(counts.shape[1]).repeat(len(counts))
    return values[number.repeat_interleave(counts.flatten()) == replica]


def test_every_epoch_reads_the_next_masking_of_a_sample(made):
    cache = open_cache(made.root)
    names = ["masks", *(name for name, one in cache.signals.items() if one.masks == "masks")]
    assert len(names) == 5
    args = (cache, ["tgt"], names, 14, 3, 2)
    pairs = zip(
        BatchStream(*args, max_epochs=3, replicas="all"),
        BatchStream(*args, max_epochs=3),
        strict=True,
    )
    for every, one in pairs:
        turn, both = one.epoch % plain.REPLICAS, (every.micro[0].signals, one.micro[0].signals)
        assert one.rows.tolist() == every.rows.tolist()
        masked, mine = (signals["masks"] for signals in both)
        assert mine.counts.tolist() == masked.counts[:, [turn]].tolist()
        assert one.counts["masks.masked"] == int(mine.counts.sum())
        for field in ("positions", "ids"):
            wanted = of_replica(getattr(masked, field), masked.counts, turn)
            assert torch.equal(getattr(mine, field), wanted)
        for name in ("at_masked", "at_segment"):
            rows, found = (densify(decode(signals[name]), VOCAB) for signals in both)
            assert torch.equal(found, of_replica(rows, masked.counts, turn))
            assert one.counts[name] == len(found)
        for name, field in (("masked_classes", "values"), ("masked_hidden", "decode")):
            whole, part = (signals[name] for signals in both)
            counts = (whole.counts // plain.REPLICAS)[:, None].repeat(1, plain.REPLICAS)
            rows, found = (getattr(signal, field) for signal in (whole, part))
            if field == "decode":
                rows, found = rows(), found()
            assert torch.equal(found, of_replica(rows, counts, turn))
            assert part.counts.tolist() == counts[:, 0].tolist()
            assert one.counts[name] == int(part.counts.sum())


def test_hypotheses(made):
    for micro in batches_of(made.root, ["tgt"], ["beams"]):
        beams = micro.signals["beams"]
        assert isinstance(beams, Hypotheses)
        ids = pieces(beams.ids.tolist(), beams.lengths)
        found = pieces(list(zip(ids, beams.log_probs.tolist(), strict=True)), beams.counts)
        for m, mine in zip(micro.rows // 2, found, strict=True):
            assert mine == [(list(ids), log_prob) for ids, log_prob, _ in made.beams[m]]


def test_tokens_of_hypotheses_count_as_those_of_a_stream(made):
    cache, budget = open_cache(made.root), 14
    longest = [
        max(len(ids), *(len(beam[0]) for n, beam in enumerate(beams) if n in (0, 2)))
        for ids, beams in zip(made.targets, made.beams, strict=True)
    ]
    assert any(most > len(ids) for most, ids in zip(longest, made.targets, strict=True)), (
        "some hypotheses are longer than their targets"
    )
    args = (cache, ["tgt"], ["beams"], budget, 3, 2)
    stream = BatchStream(*args, max_epochs=1, hypotheses=[("beams", 2), ("beams", 0)])
    batches = [batch.rows // 2 for batch in stream]
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(made.targets)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(longest[m] for m in batch) <= budget
    plainly = BatchStream(*args, max_epochs=1)
    assert len(batches) == stream.count_batches(1, 99) > len(list(plainly))
    with pytest.raises(IdentityError, match="order state: digest is"):
        BatchStream(*args, state=stream.state)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (("beams", 3), "hypothesis 3 of signal 'beams' is asked for; it has 3, from 0 on"),
        (("beams", -1), "hypothesis -1 of signal 'beams'"),
        (("masks", 0), r"of signal 'masks' .* no beams signal among .* \['beams', 'masks'\]"),
        (("x", 0), "no signal 'x'"),
    ],
    ids=["too many", "negative", "another kind", "unknown"],
)
def test_hypotheses_that_are_not_there_are_refused(made, wanted, message):
    with pytest.raises(FormatError, match=message):
        batches_of(made.root, ["tgt"], ["beams", "masks"], hypotheses=[wanted])


@pytest.mark.parametrize("name", plain.LOGITS)
def test_labels(made, name):
    """The three most probable ids of a made-up teacher, and all that its tail leaves."""
    counts = made.rows(name)
    log_probs = teacher_log_probs(sum(counts), VOCAB)
    starts = offsets_of(np.array(counts))
    for micro in batches_of(made.root, ["tgt"], [name]):
        coded = micro.signals[name]
        assert isinstance(coded, CodedLabels)
        mine = [np.arange(starts[m], starts[m + 1]) for m in micro.rows // 2]
        wanted = log_probs[np.concatenate(mine)]
        assert len(coded.gold) == len(wanted)
        if coded.spec.codec.name == "full":
            found = densify(decode(coded), VOCAB).numpy()
            np.testing.assert_allclose(found, np.exp(wanted), atol=0.03)
            continue
        ids = coded.exact_id.view(len(wanted), 3).numpy()
        np.testing.assert_array_equal(ids, np.sort(np.argsort(-wanted)[:, :3]))
        if not len(wanted):  # samples without a second hypothesis
            continue
        head = decode(coded, tail="bucket")
        values = head.values.view(len(wanted), 3).numpy()
        exact = np.exp(np.take_along_axis(wanted, ids.astype(np.int64), 1))
        # Codes have 8 bits.
        np.testing.assert_allclose(values, exact, atol=0.03)
        np.testing.assert_allclose(head.bucket.numpy(), 1 - exact.sum(1), atol=0.03)


def test_pairs_and_chats(others):
    sides = list(zip(others.ids["src"], others.ids["tgt"], strict=True))
    second = [[0] * len(a) + [1] * len(b) for a, b in sides]
    cache = open_cache(others.path)
    stream = BatchStream(cache, ["pair", "chat"], ["causal"], 24, 1, 2, max_epochs=1, threads=0)
    for micro in (micro for batch in stream for micro in batch.micro):
        pair, chat = micro.streams["pair"], micro.streams["chat"]
        assert pair.loss is None
        assert chat.segments is None
        assert pair.segments.dtype == torch.int64
        assert chat.loss.dtype == torch.bool
        for b, row in enumerate(micro.rows.tolist()):
            wanted = second[row // 3]
            padding = [0] * (pair.ids.shape[1] - len(wanted))
            assert pair.segments[b].tolist() == wanted + padding
            assert chat.loss[b].tolist() == [bool(one) for one in wanted + padding]
        # What the assistant wrote is labelled, but never a first token.
        assert len(micro.signals["causal"].gold) == int(chat.loss.sum())


def test_samples_of_other_tasks_have_no_scores(others):
    column = others.columns["nli"]["scores"]
    for micro in batches_of(others.path, ["pair"], ["nli", "score"], batch_tokens=40):
        nli, score = micro.signals["nli"], micro.signals["score"]
        tasks = [varied.TASKS[varied.TASK[row // 3]] for row in micro.rows]
        assert nli.counts.tolist() == [3 * (task == "nli") for task in tasks]
        assert score.counts.tolist() == [int(task == "sent") for task in tasks]
        assert score.labels == ("similarity",)
        wanted = [
            column.fields["value"][column.offsets[m] : column.offsets[m + 1]]
            for m in micro.rows // 3
        ]
        np.testing.assert_array_equal(nli.values.numpy(), np.concatenate(wanted))


def test_counts_are_those_of_all_ranks(made):
    names = ["masks", "beams", "at_masked", "hidden", "classes"]
    cache = open_cache(made.root)
    mine = 0
    for rank in (0, 2):
        options = {"max_epochs": 1, "threads": 0, "rank": rank, "world": 3, "replicas": "all"}
        for batch in BatchStream(cache, ["src", "tgt"], names, 30, 3, 2, **options):
            numbers = batch.rows // 2
            wanted = {name: sum(made.rows(name)[m] for m in numbers) for name in names[2:]}
            wanted["masks"] = plain.REPLICAS * len(numbers)
            wanted["beams"] = sum(len(h[0]) for m in numbers for h in made.beams[m])
            wanted["tgt"] = sum(len(made.targets[m]) for m in numbers)
            wanted[""] = len(numbers)
            assert {name: batch.counts[name] for name in wanted} == wanted
            assert batch.num_tokens == wanted["tgt"]
            mine += sum(len(micro.streams["tgt"].flat) for micro in batch.micro)
    assert 0 < mine < cache.stream("tgt").num_tokens


@pytest.mark.parametrize("name", ["hidden", "hidden_int8"])
def test_dense_rows_count_in_the_bytes_of_a_sample(made, name):
    """Blocks are cut by them: a sample's hidden states are a thousand times its ids."""
    window = WindowReader(open_cache(made.root), [0, 1], ["tgt"], [name])
    every = np.arange(window.num_samples)
    for layers in ((0,), (0, 1)):
        values, scale, _ = window.take_dense(name, every, layers)
        wanted = values.nbytes + (0 if scale is None else scale.nbytes)
        found = window.sample_bytes({name: layers}) - window.sample_bytes({})
        assert found * len(every) == pytest.approx(wanted)


def test_tensors_of_all_kinds_move(made):
    """`to` and `pinned` map every tensor of a batch and nothing else."""
    names = ["hidden_int8", "masks", "beams", "classes", "at_masked"]
    micro = batches_of(made.root, ["tgt"], names)[0]
    moved = micro.to("meta")
    for name in names:
        here, there = vars(micro.signals[name]), vars(moved.signals[name])
        for field, value in here.items():
            if isinstance(value, torch.Tensor):
                assert there[field].device.type == "meta"
                assert there[field].shape == value.shape
            else:
                assert there[field] is value
    for field in ("ids", "mask", "flat"):
        here, there = (getattr(one.streams["tgt"], field) for one in (micro, moved))
        assert there.device.type == "meta"
        assert there.shape == here.shape
    assert moved.rows is micro.rows
    assert micro.to("cpu") is micro


@pytest.mark.parametrize("corpus", ["made", "others"])
def test_compiled_code_changes_no_bit(request, compiled, monkeypatch, corpus):
    """Batches of all streams and signals: the same by numpy and by compiled code."""
    fixture = request.getfixturevalue(corpus)
    cache = open_cache(fixture.root if corpus == "made" else fixture.path)
    found = []
    for library in (None, compiled):
        for module in (joined, rows):
            monkeypatch.setattr(module, "library", lambda library=library: library)
        options = {"accumulate": 2, "max_epochs": 1, "threads": 2}
        names = list(cache.manifest.streams), sorted(cache.signals)
        stream = BatchStream(cache, *names, 60, 3, 2, **options)
        tensors = [
            (name, field, value)
            for batch in stream
            for micro in batch.micro
            for name, record in {**micro.streams, **micro.signals}.items()
            for field, value in vars(record).items()
            if isinstance(value, torch.Tensor)
        ]
        found.append(tensors)
    assert len(found[0]) > 100
    for (*name, one), (*other_name, other) in zip(*found, strict=True):
        assert name == other_name
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name
