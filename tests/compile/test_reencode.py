"""Re-encoded labels against brute force, and against dumping at the smaller codec at once."""

import math

import numpy as np
import pytest
import torch

from kdcache.compile.reencode import reencode, reencoded_record
from kdcache.dump.codecs.select import encode_logits
from kdcache.errors import RecipeError
from kdcache.formats.codec import FullCodec, NucleusCodec, SampledCodec, ThresholdCodec, TopKCodec
from kdcache.formats.codes import code_log_probs
from kdcache.formats.keyed import GOLDEN, mix64
from kdcache.formats.ragged import Ragged, offsets_of
from tests.compile.coded import (
    TEMPERATURES,
    Coded,
    dense,
    entries,
    hashed_positions,
    labels_of,
    record_of,
    rows_of_all_kinds,
)

V = 60
FULL = FullCodec(values="float32")
WAYS = [
    pytest.param(FULL, ThresholdCodec(c=1 / 8), id="full-threshold"),
    pytest.param(FULL, ThresholdCodec(temperatures=(1, 2)), id="full-threshold-set"),
    pytest.param(FullCodec(), TopKCodec(k=5, values="float32"), id="full-topk"),
    pytest.param(FULL, NucleusCodec(p=0.9, k_max=9), id="full-nucleus"),
    pytest.param(FullCodec(), SampledCodec(n=20), id="full-sampled"),
    pytest.param(FULL, FullCodec(), id="full-narrower"),
    pytest.param(ThresholdCodec(c=1 / 32), ThresholdCodec(c=1 / 8), id="threshold"),
    pytest.param(
        ThresholdCodec(values="float32"), ThresholdCodec(values="uint8"), id="threshold-narrower"
    ),
    pytest.param(
        ThresholdCodec(temperatures=(1, 2, 5)),
        ThresholdCodec(c=1 / 5, temperatures=(1, 2, 5)),
        id="threshold-set",
    ),
    pytest.param(
        ThresholdCodec(temperatures=(1, 2, 5), values="float16"),
        ThresholdCodec(c=1 / 5),
        id="threshold-set-to-one",
    ),
    pytest.param(TopKCodec(k=12), TopKCodec(k=5), id="topk"),
    pytest.param(TopKCodec(k=70, values="float32"), TopKCodec(k=5), id="topk-of-all"),
    pytest.param(TopKCodec(k=12), NucleusCodec(p=0.8, k_max=12), id="topk-nucleus"),
    pytest.param(NucleusCodec(p=0.9), NucleusCodec(p=0.6, k_max=7), id="nucleus"),
    pytest.param(SampledCodec(n=300), SampledCodec(n=20), id="sampled"),
    pytest.param(SampledCodec(n=20), SampledCodec(n=20, values="float32"), id="sampled-all"),
]


def recoded(coded: Coded, codec, temperatures=None) -> Coded:
    new = reencoded_record(coded.record, codec, temperatures)
    identity = coded.sample_ids, coded.rows
    return Coded(new, reencode(coded.columns, coded.record, new, *identity), *identity)


def made_up(codec, num=40, vocab_size=V, lengths=(3, 0, 17, 1, 19), temperatures=TEMPERATURES):
    record = record_of(codec, vocab_size, temperatures)
    return Coded.dumped(rows_of_all_kinds(num, vocab_size), record, lengths)


def same_bytes(one, other) -> bool:
    assert one.keys() == other.keys()
    for name, column in one.items():
        assert column.offsets.tolist() == other[name].offsets.tolist()
        assert column.fields.keys() == other[name].fields.keys()
        for field, values in column.fields.items():
            same = other[name].fields[field]
            assert values.dtype == same.dtype
            if values.tobytes() != same.tobytes():
                return False
    return True


@pytest.mark.parametrize(("old", "new"), WAYS)
@pytest.mark.parametrize("vocab_size", [V, 66_000])
def test_every_way_is_sound(old, new, vocab_size):
    """Schema, counts, order of ids and all else that verify checks; gold and entropy stay."""
    num = 40 if vocab_size == V else 4
    lengths = (3, 0, 17, 1, 19) if vocab_size == V else (3, 0, 1)
    coded = made_up(old, num, vocab_size, lengths)
    result = recoded(coded, new)
    assert result.labels.spec.codec == new
    assert result.lengths().tolist() == list(lengths)
    for name in ("gold", "entropy"):
        before, after = (part.columns["tokens"].fields[name] for part in (coded, result))
        assert after.tolist() == before.tolist()
    assert float((dense(result.labels).sum(1) - 1).mean().abs()) < 0.1


@pytest.mark.parametrize(("old", "new"), WAYS)
def test_samples_do_not_depend_on_each_other(old, new):
    coded = made_up(old)
    whole = recoded(coded, new).columns
    for m in range(len(coded.rows)):
        one = np.array([m])
        columns = {name: column.take(one) for name, column in coded.columns.items()}
        alone = recoded(Coded(coded.record, columns, coded.sample_ids[one], coded.rows[one]), new)
        assert same_bytes(alone.columns, {name: column.take(one) for name, column in whole.items()})


@pytest.mark.parametrize(("old", "new"), WAYS)
def test_no_samples_and_no_positions(old, new):
    for lengths in ((), (0, 0)):
        coded = made_up(old, 0, lengths=np.array(lengths, dtype=np.int64))
        assert recoded(coded, new).lengths().tolist() == list(lengths)


def test_columns_may_be_a_part_of_longer_arrays():
    coded = made_up(ThresholdCodec(c=1 / 32))
    middle = {
        name: Ragged(column.offsets[2:], column.fields) for name, column in coded.columns.items()
    }
    result = recoded(
        Coded(coded.record, middle, coded.sample_ids[2:], coded.rows[2:]), ThresholdCodec(c=1 / 8)
    )
    whole = recoded(coded, ThresholdCodec(c=1 / 8)).columns
    expected = {name: column.take(np.array([2, 3, 4])) for name, column in whole.items()}
    assert same_bytes(result.columns, expected)


REFUSED = [
    pytest.param(
        ThresholdCodec(c=1 / 8),
        ThresholdCodec(c=1 / 16),
        None,
        r"logits: threshold\(c 0.125, values uint8\) cannot become threshold\(c 0.0625, values "
        r"uint8\) without the teacher: ask for threshold with c of 0.125 or more",
        id="finer-threshold",
    ),
    pytest.param(
        ThresholdCodec(), TopKCodec(k=2), None, "threshold with c of 0.0625", id="to-topk"
    ),
    pytest.param(ThresholdCodec(), FullCodec(), None, "threshold with c of 0.0625", id="to-full"),
    pytest.param(
        ThresholdCodec(), ThresholdCodec(temperatures=(1, 2)), None, "temperatures 1 only", id="set"
    ),
    pytest.param(TopKCodec(k=4), TopKCodec(k=5), None, "topk with k, .* of 4 or less", id="more"),
    pytest.param(
        TopKCodec(k=4), NucleusCodec(p=0.5), None, "nucleus with k_max, of 4 or less", id="k_max"
    ),
    pytest.param(
        NucleusCodec(p=0.5, k_max=9), TopKCodec(k=1), None, "p of 0.5 or less and k_max", id="fixed"
    ),
    pytest.param(
        NucleusCodec(p=0.5), NucleusCodec(p=0.6), None, "ask for nucleus with p of 0.5", id="p"
    ),
    pytest.param(SampledCodec(n=9), SampledCodec(n=10), None, "sampled with n of 9", id="draws"),
    pytest.param(SampledCodec(n=9), ThresholdCodec(), None, "sampled with n of 9", id="other"),
    pytest.param(
        TopKCodec(k=4), TopKCodec(k=4, values="float16"), None, "values are uint8", id="values"
    ),
    pytest.param(TopKCodec(k=4), TopKCodec(k=4), (1, 3), "0.5/1/2/5, 1/3 was asked", id="knots"),
    pytest.param(TopKCodec(k=4), TopKCodec(k=4), (2, 1), "2/1 must .* ascend", id="order"),
    pytest.param(FULL, TopKCodec(k=4), (0, 1), "must be above 0", id="zero"),
    pytest.param(
        FULL, ThresholdCodec(temperatures=(1, 3)), None, "for 1/3 the tail is needed", id="no-knot"
    ),
]


@pytest.mark.parametrize(("old", "new", "temperatures", "message"), REFUSED)
def test_what_does_not_follow_is_refused(old, new, temperatures, message):
    with pytest.raises(RecipeError, match=message) as error:
        reencoded_record(record_of(old, V), new, temperatures)
    assert "\n" not in str(error.value)


def test_the_record_keeps_the_rest():
    record = record_of(FULL, V)
    new = reencoded_record(record, TopKCodec(k=3), (1, 2))
    assert (new.codec, new.temperatures) == (TopKCodec(k=3), (1.0, 2.0))
    assert new.model_dump(exclude={"codec", "temperatures"}) == record.model_dump(
        exclude={"codec", "temperatures"}
    )
    # A codec that has no tail may leave those temperatures to one that has.
    assert reencoded_record(record, SampledCodec(n=3)).temperatures == TEMPERATURES


# ---- from full ----


@pytest.mark.parametrize("values", ["uint8", "float16", "float32"])
@pytest.mark.parametrize(
    "codec",
    [
        TopKCodec(k=7, values="float32"),
        NucleusCodec(p=0.9, k_max=20, values="float32"),
        ThresholdCodec(c=1 / 8, temperatures=(1, 5)),
        SampledCodec(n=30),
        TopKCodec(k=5),
    ],
    ids=lambda codec: codec.name,
)
def test_full_gives_what_a_dump_of_the_decoded_gives(values, codec):
    coded = made_up(FullCodec(values=values))
    result = recoded(coded, codec)
    codes = coded.columns["exact"].fields["code"]
    log_probs = code_log_probs(25)[codes] if values == "uint8" else codes
    log_probs = torch.from_numpy(log_probs.astype(np.float32).reshape(-1, V))
    hashes = [
        hashed_positions(
            coded.record,
            f"{purpose} {codec.model_dump_json()}",
            coded.sample_ids,
            coded.rows,
            coded.lengths(),
        )
        for purpose in ("redraw", "reround")
    ]
    gold = torch.zeros(len(log_probs), dtype=torch.int64)
    hashes = map(torch.from_numpy, hashes)
    direct = encode_logits(log_probs, gold, *hashes, codec, TEMPERATURES)
    for name, fields in direct.to_host().items():
        for field, expected in fields.items():
            if field not in ("gold", "entropy"):
                assert result.columns[name].fields[field].tobytes() == expected.tobytes(), field


def test_full_in_blocks_is_the_same(monkeypatch):
    coded = made_up(FullCodec())
    whole = recoded(coded, ThresholdCodec()).columns
    monkeypatch.setattr("kdcache.compile.reencode._BLOCK_ENTRIES", 7 * V)
    assert same_bytes(recoded(coded, ThresholdCodec()).columns, whole)


# ---- threshold to a larger c ----


def test_threshold_equals_brute_force():
    """One running sum of Python's integers for each position."""
    c, new_c, bits = 1 / 32, 1 / 8, 40
    coded = made_up(ThresholdCodec(c=c, values="float32"))
    result = recoded(coded, ThresholdCodec(c=new_c, values="float32"))
    purpose = "redraw " + result.record.codec.model_dump_json()
    hashes = hashed_positions(coded.record, purpose, coded.sample_ids, coded.rows, coded.lengths())
    heads, drawn = entries(coded.columns, "exact"), entries(coded.columns, "drawn")
    new_heads, new_drawn = entries(result.columns, "exact"), entries(result.columns, "drawn")
    tails = [coded.columns["tokens"].fields[f"tail_{i}"] for i in range(4)]
    for n, hashed in enumerate(hashes.tolist()):
        stay = [(i, log_prob) for i, log_prob in heads[n] if math.exp(log_prob) >= new_c]
        leave = [(i, log_prob) for i, log_prob in heads[n] if math.exp(log_prob) < new_c]
        weights = {i: math.exp(log_prob) for i, log_prob in leave} | {i: c for i, _ in drawn[n]}
        running, chosen = (hashed % 2**64) >> (64 - bits), []
        for i in sorted(weights):
            fixed = int(weights[i] / new_c * 2**bits)
            if (running + fixed) >> bits > running >> bits:
                chosen.append(i)
            running += fixed
        assert new_heads[n] == stay
        assert [i for i, _ in new_drawn[n]] == chosen
        for i, temperature in enumerate(TEMPERATURES):
            total = math.exp(tails[i][n]) + sum(math.exp(p / temperature) for _, p in leave)
            found = result.columns["tokens"].fields[f"tail_{i}"][n]
            assert found == pytest.approx(math.log(total), abs=2e-3 * max(1, abs(math.log(total))))


REPEATS, KINDS = 6000, 8


def repeated(codec, seed=3) -> tuple[Coded, torch.Tensor]:
    """A few distributions, each dumped under as many random numbers as there are repeats."""
    logits = rows_of_all_kinds(KINDS, V, seed=5)
    record = record_of(codec, V, seed=seed)
    return Coded.dumped(logits.repeat(REPEATS, 1), record), logits


def scores(labels: torch.Tensor, logits: torch.Tensor, weight: float, temperature=1.0, slack=0.0):
    """[S] standard scores of the mean labels of all ids, of the rare ones together, of the mass.

    Rare ids are drawn with `weight` fewer than 20 times in all, so that they are not normal.
    slack: how far the mean may be off besides.
    """
    probs = torch.softmax(logits.double() / temperature, -1)
    errors = labels.view(REPEATS, KINDS, V).double() - probs
    rare = probs < 20 * weight / REPEATS
    together = [torch.where(rare, errors, 0).sum(2), errors.sum(2)]  # [REPEATS, KINDS] each
    samples = torch.cat([errors[:, ~rare], *together], dim=1)
    off = (samples.mean(dim=0).abs() - slack).clamp(min=0)
    return off / (samples.std(dim=0) / math.sqrt(REPEATS) + 1e-6)


def test_threshold_to_a_larger_c_is_unbiased_and_as_good_as_dumping_there():
    coded, logits = repeated(ThresholdCodec(c=1 / 32))
    again = dense(recoded(coded, ThresholdCodec(c=1 / 8)).labels)
    found = scores(again, logits, 1 / 8)
    assert float(found.max()) < 4  # every id, and the mass
    assert 0.8 < float(found.square().mean()) < 1.25  # all of them together
    at_once = dense(repeated(ThresholdCodec(c=1 / 8))[0].labels)
    probs = torch.softmax(logits, -1).repeat(REPEATS, 1)
    noise = [float((label - probs).square().sum(1).mean().sqrt()) for label in (again, at_once)]
    assert noise[0] / noise[1] == pytest.approx(1, abs=0.02)


def test_numbers_of_the_dump_would_bias_it(monkeypatch):
    """The same purpose as the dump's: ids that were drawn by low numbers stay too often."""
    monkeypatch.setattr("kdcache.compile.reencode._purpose", lambda purpose, codec: "draw")
    coded, logits = repeated(ThresholdCodec(c=1 / 32))
    found = scores(dense(recoded(coded, ThresholdCodec(c=1 / 8)).labels), logits, 1 / 8)
    assert float(found.max()) > 20


def chain(coded: Coded) -> torch.Tensor:
    for c in (1 / 24, 1 / 16, 1 / 8):
        coded = recoded(coded, ThresholdCodec(c=c))
    return dense(coded.labels)


def test_a_chain_of_them_is_unbiased():
    coded, logits = repeated(ThresholdCodec(c=1 / 32))
    found = scores(chain(coded), logits, 1 / 8)
    assert float(found.max()) < 4
    assert 0.8 < float(found.square().mean()) < 1.25


def test_a_chain_under_one_purpose_would_be_biased(monkeypatch):
    monkeypatch.setattr("kdcache.compile.reencode._purpose", lambda purpose, codec: purpose)
    coded, logits = repeated(ThresholdCodec(c=1 / 32))
    assert float(scores(chain(coded), logits, 1 / 8).max()) > 20


@pytest.mark.parametrize(
    "temperatures", [(1.0, 2.0, 5.0), (1.0, 2.0), (2.0,), (1.0,)], ids=lambda t: f"to-{t}"
)
def test_a_threshold_for_a_set_is_unbiased_at_each_that_is_kept(temperatures):
    old = ThresholdCodec(c=1 / 16, temperatures=(1, 2, 5), values="float32")
    coded, logits = repeated(old)
    codec = ThresholdCodec(c=1 / 6, temperatures=temperatures, values="float32")
    labels = recoded(coded, codec).labels
    for temperature in temperatures:
        # Tail sums are float16; what they lost moves all ids of a row alike.
        found = scores(dense(labels, temperature), logits, 1 / 6, temperature, slack=5e-4)
        assert float(found.max()) < 4


@pytest.mark.parametrize("values", ["uint8", "float32"])
def test_the_same_threshold_with_fewer_tails_changes_no_entry(values):
    old = ThresholdCodec(temperatures=(1, 2), values=values)
    coded = made_up(old)
    result = recoded(coded, old, (1, 2))
    for name in ("exact", "drawn"):
        assert same_bytes({name: result.columns[name]}, {name: coded.columns[name]})
    for i, t in enumerate(result.record.temperatures):
        before = coded.columns["tokens"].fields[f"tail_{TEMPERATURES.index(t)}"]
        assert result.columns["tokens"].fields[f"tail_{i}"].tobytes() == before.tobytes()


@pytest.mark.parametrize("one_in", [3, 4, 5, 6, 7, 9])
def test_ids_at_the_threshold_itself_stay_when_only_values_change(one_in):
    record = record_of(ThresholdCodec(c=1 / one_in, values="float32"), one_in)
    coded = Coded.dumped(torch.zeros(20, one_in), record)
    result = recoded(recoded(coded, ThresholdCodec(c=1 / one_in)), ThresholdCodec(c=1 / one_in))
    counts = [part.columns["tokens"].fields["num_exact"].tolist() for part in (coded, result)]
    assert counts[0] == counts[1]


def test_heads_and_draws_stay_within_what_a_position_can_have():
    """More mass than 1, as damaged or many times redrawn labels might have."""
    coded = made_up(ThresholdCodec(c=1 / 32, values="float32"), 1, lengths=(1,))
    ids = np.arange(33, dtype=np.uint16)
    fields = dict(coded.columns["tokens"].fields)
    fields |= {"num_exact": np.array([33], np.uint8), "num_drawn": np.array([27], np.uint8)}
    columns = {
        "tokens": Ragged(coded.columns["tokens"].offsets, fields),
        "exact": Ragged(
            np.array([0, 33]), {"id": ids, "code": np.full(33, math.log(0.3), np.float32)}
        ),
        "drawn": Ragged(np.array([0, 27]), {"id": 33 + np.arange(27, dtype=np.uint16)}),
    }
    result = recoded(
        Coded(coded.record, columns, coded.sample_ids, coded.rows),
        ThresholdCodec(c=1 / 4, values="float32"),
    )
    tokens = labels_of(result.columns, result.record)
    assert (int(tokens.num_exact[0]), int(tokens.num_drawn[0])) == (5, 5)


# ---- heads ----


def test_topk_equals_dumping_fewer():
    coded = made_up(TopKCodec(k=12, values="float32"))
    direct = made_up(TopKCodec(k=5, values="float32"))
    assert_same_head(recoded(coded, direct.record.codec), direct)


def test_topk_to_nucleus_and_nucleus_to_less_equal_dumping_that():
    for old in (TopKCodec(k=20, values="float32"), NucleusCodec(p=0.9, k_max=20, values="float32")):
        direct = made_up(NucleusCodec(p=0.7, k_max=9, values="float32"))
        counts = direct.columns["tokens"].fields["num_exact"]
        assert len(set(counts.tolist())) > 5
        assert_same_head(recoded(made_up(old), direct.record.codec), direct)


def assert_same_head(result: Coded, direct: Coded) -> None:
    """Entries bit for bit; tails but for the rounding of float16, which comes in twice."""
    assert same_bytes({"exact": result.columns["exact"]}, {"exact": direct.columns["exact"]})
    found, expected = (part.columns["tokens"].fields for part in (result, direct))
    assert found["num_exact"].tobytes() == expected["num_exact"].tobytes()
    for i in range(len(TEMPERATURES)):
        np.testing.assert_allclose(found[f"tail_{i}"], expected[f"tail_{i}"], rtol=2e-3, atol=2e-3)


def test_equal_codes_leave_the_lower_ids():
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 0.0, 1.0]])
    coded = Coded.dumped(logits, record_of(TopKCodec(k=5, values="float32"), 6))
    result = recoded(coded, TopKCodec(k=3, values="float32"))
    assert [i for i, _ in entries(result.columns, "exact")[0]] == [0, 1, 3]


@pytest.mark.parametrize("new", [TopKCodec(k=5), NucleusCodec(p=0.7, k_max=9)])
def test_codes_are_carried_over_where_they_mean_the_same(new):
    coded = made_up(TopKCodec(k=12))
    before, after = (entries(part.columns, "exact") for part in (coded, recoded(coded, new)))
    assert sum(map(len, after)) < sum(map(len, before))
    assert all(set(some) <= set(every) for some, every in zip(after, before, strict=True))


@pytest.mark.parametrize("codec", [TopKCodec(k=9), ThresholdCodec(c=1 / 32)])
def test_narrower_values_are_right_in_the_mean(codec):
    coded, _ = repeated(codec.model_copy(update={"values": "float32"}))
    result = recoded(coded, codec)
    pairs = zip(entries(coded.columns, "exact"), entries(result.columns, "exact"), strict=True)
    told = code_log_probs(codec.range_nats)
    errors = {}
    for n, (before, after) in enumerate(pairs):
        assert [i for i, _ in before] == [i for i, _ in after]
        for (i, log_prob), (_, code) in zip(before, after, strict=True):
            error = math.exp(told[int(code)]) - math.exp(log_prob)
            errors.setdefault((n % KINDS, i), []).append(error)
    assert len(errors) > 10
    for each in errors.values():
        assert abs(np.mean(each)) < 4 * np.std(each) / math.sqrt(REPEATS) + 1e-7
    assert max(np.std(each) for each in errors.values()) > 1e-3  # rounded indeed


def test_float16_is_the_nearest():
    coded = made_up(TopKCodec(k=9, values="float32"))
    found = recoded(coded, TopKCodec(k=9, values="float16")).columns["exact"].fields["code"]
    assert found.tolist() == coded.columns["exact"].fields["code"].astype(np.float16).tolist()


# ---- sampled ----


def test_fewer_draws_equal_brute_force():
    coded = made_up(SampledCodec(n=300))
    result = recoded(coded, SampledCodec(n=20))
    purpose = "redraw " + result.record.codec.model_dump_json()
    hashes = hashed_positions(coded.record, purpose, coded.sample_ids, coded.rows, coded.lengths())
    before, after = (entries(part.columns, "drawn") for part in (coded, result))
    turns = np.arange(1, 301, dtype=np.uint64)
    for n, hashed in enumerate(hashes.view(np.uint64)):
        draws = [i for i, count in before[n] for _ in range(int(count))]
        order = np.argsort(mix64(hashed + turns * np.uint64(GOLDEN)))[:20]
        ids, counts = np.unique([draws[at] for at in order], return_counts=True)
        assert after[n] == list(zip(ids.tolist(), counts.tolist(), strict=True))


def test_fewer_draws_are_unbiased_and_as_good_as_dumping_them(monkeypatch):
    monkeypatch.setattr("kdcache.compile.redraw._BLOCK_DRAWS", 10_000)
    coded, logits = repeated(SampledCodec(n=50))
    again = dense(recoded(coded, SampledCodec(n=10)).labels)
    found = scores(again, logits, 1 / 10)
    assert float(found.max()) < 4
    assert 0.8 < float(found.square().mean()) < 1.25
    probs = torch.softmax(logits.double(), -1)
    variance = (again.view(REPEATS, KINDS, V).double() - probs).square().sum(2).mean(0)
    expected = (1 - probs.square().sum(1)) / 10  # of ten independent draws
    assert torch.allclose(variance, expected, rtol=0.05)


def test_offsets_of_entries_follow_the_samples():
    coded = made_up(ThresholdCodec(c=1 / 32))
    result = recoded(coded, ThresholdCodec(c=1 / 8)).columns
    for name in ("exact", "drawn"):
        counts = result["tokens"].fields[f"num_{name}"].astype(int)
        ends = offsets_of(counts)[result["tokens"].offsets]
        assert result[name].offsets.tolist() == ends.tolist()
