"""What cannot be compiled is refused in one line, and leaves nothing behind."""

from __future__ import annotations

import shutil

import pytest

from kdcache.compile import CompileOptions, compile_caches
from kdcache.errors import FormatError, IdentityError, IntegrityError, KDCacheError, RecipeError
from kdcache.formats.cache import open_cache
from kdcache.formats.codec import ThresholdCodec, TopKCodec
from kdcache.formats.manifest import MANIFEST_NAME, Manifest
from kdcache.formats.record import encode_record
from tests.compile.universe import LOGITS, PAIRS
from tests.formats.labels import teacher_record


def refused(kind, sources, out, match, **options):
    with pytest.raises(kind, match=match) as caught:
        compile_caches(sources, out, CompileOptions(**options))
    assert isinstance(caught.value, KDCacheError)
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.fixture(scope="module")
def two(universe, tmp_path_factory):
    """Two caches that share the samples 2 and 4."""
    root = tmp_path_factory.mktemp("two")
    names = [LOGITS, "masks", "at_masked", "beams"]
    return (
        universe.write(root / "a", [0, 2, 4], names),
        universe.write(root / "b", [4, 2, 5], names),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signals": ["no"]}, r"signals: no cache has a signal 'no'; they have \['at_masked'"),
        ({"signals": ["at_masked"]}, "signals: 'at_masked' is made from 'masks', which is left"),
        ({"filters": ["no.loss < 1"]}, "filter 'no.loss < 1': no cache has a signal 'no'"),
        ({"filters": ["no.length < 1"]}, r"no stream 'no'; there are \['src', 'tgt'\]"),
        ({"filters": ["beams.loss < 1"]}, "'beams' is of kind beams, loss is of logits"),
        ({"filters": ["masks.bleu < 1"]}, "'masks' is of kind masks, bleu is of beams"),
        ({"filters": ["tgt.length < 1"]}, "no sample is left; left out: {'tgt.length < 1': 4}"),
        ({"codecs": {"no": {"name": "topk", "k": 1}}}, "codec: no signal 'no' in the output"),
        ({"codecs": {"masks": {"name": "topk", "k": 1}}}, "'masks': it is of kind masks, only"),
        ({"codecs": {LOGITS: {"name": "threshold", "c": 0.01}}}, "logits"),
        ({"rename": {"no": "yes"}}, "rename: no signal 'no' in the output"),
        ({"rename": {LOGITS: "beams"}}, "two signals would be called 'beams'"),
        ({"rename": {LOGITS: "samples"}}, "'samples' is a name of the format"),
        ({"targets": "no=best"}, "targets: no cache has a signal 'no'"),
        ({"targets": "masks=best"}, "targets: 'masks' is of kind masks, expected beams"),
    ],
)
def test_options_that_do_not_fit_the_caches(two, tmp_path, options, message):
    refused(RecipeError, two, tmp_path / "out", message, **options)


def test_lists_that_name_what_is_not_there(two, tmp_path):
    (tmp_path / "list").write_text("ab" * 16)
    refused(RecipeError, two, tmp_path / "o", "1 of 1 samples that it lists", ids=tmp_path / "list")
    (tmp_path / "list").write_text("0")
    refused(RecipeError, two, tmp_path / "o", "which of 2 caches", ids=tmp_path / "list")
    (tmp_path / "list").write_text("0\n1\n2")
    refused(RecipeError, two[:1], tmp_path / "o", "1 of 3 samples", ids=tmp_path / "list")


def test_the_output_must_not_be_an_input(two, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(two[0])
    before = sorted(path.name for path in two[0].rglob("*"))
    for out in (two[0], f"{two[0]}/", f"file://{two[0]}", link, two[0] / "." / "commits" / ".."):
        with pytest.raises(RecipeError, match="the output is one of the caches"):
            compile_caches(two, out)
    assert sorted(path.name for path in two[0].rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": ThresholdCodec(c=1 / 4)}, r"codec.c: 0.125 in .*/a, 0.25 in .*/b"),
        ({"codec": TopKCodec(k=2)}, r"codec.name: 'threshold' in .*/a, 'topk' in .*/b"),
        ({"teacher": teacher_record("00" * 16)}, r"teacher.digest: 'cdcd.* in .*/a, '0000"),
        ({"temperatures": (0.5, 1.0)}, r"temperatures.0: 1.0 in .*/a, 0.5 in .*/b"),
        ({"source": None, "source_digest": None}, r"source: 'src' in .*/a, None in .*/b"),
    ],
    ids=["codec", "kind of codec", "teacher", "temperatures", "source"],
)
def test_signals_of_one_name_must_be_the_same(universe, tmp_path, monkeypatch, change, message):
    a = universe.write(tmp_path / "a", [0, 1], [LOGITS])
    b = universe.write(tmp_path / "b", [2], signals=[])
    # Records alone are compared; the labels of the second are never reached.
    record = open_cache(a).signal(LOGITS)
    streams = open_cache(b).manifest.streams
    digests = {"stream_digest": streams["tgt"].digest, "source_digest": streams["src"].digest}
    (b / "signals").mkdir(exist_ok=True)
    other = record.model_copy(update={**digests, **change})
    (b / "signals" / f"{LOGITS}.json").write_bytes(encode_record(other))
    refused(IdentityError, [a, b], tmp_path / "out", message)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 7},
        {"recipe": {"other": 1}, "versions": {"kdcache": "9"}},
        {"teacher": teacher_record().model_copy(update={"path": "elsewhere", "revision": "x"})},
    ],
    ids=["seed", "recipe", "path"],
)
def test_where_and_when_a_signal_was_dumped_does_not_matter(universe, tmp_path, change):
    a = universe.write(tmp_path / "a", [0, 1], [LOGITS])
    b = universe.write(tmp_path / "b", [2], [LOGITS], change={LOGITS: change})
    assert compile_caches([a, b], tmp_path / "out")["samples"] == 3


def changed_manifest(path, **corpus) -> None:
    manifest = open_cache(path).manifest
    tree = manifest.model_dump()
    for key, value in corpus.items():
        where = tree
        *parents, last = key.split("__")
        for parent in parents:
            where = where[parent]
        where[last] = value
    (path / MANIFEST_NAME).write_bytes(encode_record(Manifest.model_validate(tree)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus__fields": ["tgt", "src"]}, "fields.corpus.0: 'src' in .*/a, 'tgt' in"),
        ({"corpus__label": "tgt"}, "fields.label: None in .*/a, 'tgt' in"),
        ({"corpus__tasks": ["one"]}, "has_tasks: False in .*/a, True in"),
        ({"streams__src__target": True}, "streams.src.target: False in .*/a, True in"),
        ({"tokenizers__teacher__digest": "12" * 16}, "tokenizers.teacher.digest: 'abab"),
    ],
)
def test_samples_must_be_made_alike(universe, tmp_path, change, message):
    a = universe.write(tmp_path / "a", [0, 1], [])
    b = universe.write(tmp_path / "b", [2], [])
    changed_manifest(b, **change)
    refused(IdentityError, [a, b], tmp_path / "out", f"b: its samples cannot stand .*: {message}")


def test_overlaps_must_agree(universe, tmp_path):
    """Labels of another sample: tokens agree, the log-probs of the targets do not."""
    a = universe.write(tmp_path / "a", [1, 2, 4], [LOGITS])
    b = universe.replaced(LOGITS, 2, 7).write(tmp_path / "b", [4, 2, 9], [LOGITS])
    message = (
        r"b: sample [0-9a-f]{32} \(sample 1; 1 of .*/a\): the teacher's log-probs of its targets "
        "in 'logits' differ from those of"
    )
    refused(IdentityError, [a, b], tmp_path / "out", message)
    # Without the signal, or without the sample, they fit.
    assert compile_caches([a, b], tmp_path / "o1", CompileOptions(signals=[]))["samples"] == 4


@pytest.mark.parametrize(
    ("step", "dtype", "fits"),
    [
        (1, "float32", True),
        (2, "float32", False),
        (4, "bfloat16", True),
        (5, "bfloat16", False),
    ],
)
def test_log_probs_may_differ_by_rounding(universe, tmp_path, step, dtype, fits):
    teacher = teacher_record().model_copy(update={"dtype": dtype})
    change = {LOGITS: {"teacher": teacher}}
    a = universe.write(tmp_path / "a", [1, 2], [LOGITS], change=change)
    tokens = universe.columns[LOGITS]["tokens"]
    gold = tokens.fields["gold"].copy()
    gold[int(tokens.offsets[2])] += step
    moved = type(tokens)(tokens.offsets, {**tokens.fields, "gold": gold})
    other = type(universe)({LOGITS: {**universe.columns[LOGITS], "tokens": moved}})
    b = other.write(tmp_path / "b", [2, 4], [LOGITS], change=change)
    if fits:
        assert compile_caches([a, b], tmp_path / "out")["samples"] == 3
    else:
        refused(IdentityError, [a, b], tmp_path / "out", "log-probs of its targets")


def test_overlaps_must_have_the_same_tokens(universe, tmp_path, monkeypatch):
    """A tokenizer that gives other ids under the same digest."""
    a = universe.write(tmp_path / "a", [1, 2], [])
    from tests.compile import universe as module

    real = module.encode
    monkeypatch.setattr("tests.formats.labels.encode", lambda text, t: [*real(text, t)[::-1]])
    b = universe.write(tmp_path / "b", [9, 2], [])
    refused(IdentityError, [a, b], tmp_path / "out", r"its tokens of stream 'src' differ")


def test_labels_need_the_masks_that_they_were_made_from(universe, tmp_path):
    """Masked hidden states of one cache, and the masks of another, must be of the same masking."""
    a = universe.write(tmp_path / "a", [1, 2], ["masks", "at_masked"])
    other = universe.replaced("masks", 2, 7)
    b = other.write(tmp_path / "b", [2, 1], ["masks", "masked_classes"])
    message = "its 'masks', which 'masked_classes' was made from, differ"
    refused(IdentityError, [a, b], tmp_path / "out", message)
    # Taken together from one cache they fit.
    options = CompileOptions(signals=["masks", "masked_classes"])
    assert compile_caches([b], tmp_path / "o1", options)["samples"] == 2


def test_unfinished_and_damaged_caches(universe, tmp_path):
    whole = universe.write(tmp_path / "whole", range(len(PAIRS)), [LOGITS, "hidden"])
    out = tmp_path / "out"
    refused(FormatError, [tmp_path / "nothing"], out, "nothing")
    cut = shutil.copytree(whole, tmp_path / "cut")
    (cut / "commits" / f"{LOGITS}.00001.json").unlink()
    refused(FormatError, [cut], out, "'logits' are committed")
    assert compile_caches([cut], out, CompileOptions(signals=["hidden"]))["samples"] == 12
    shutil.rmtree(out)
    begun = shutil.copytree(whole, tmp_path / "begun")
    (begun / MANIFEST_NAME).unlink()
    refused(FormatError, [begun], out, "unfinished")


@pytest.mark.parametrize("signal", ["samples", LOGITS, "hidden"])
def test_damaged_files_are_noticed_before_they_are_copied(universe, tmp_path, signal):
    broken = universe.write(tmp_path / "broken", range(len(PAIRS)), [LOGITS, "hidden"])
    record = open_cache(broken).commit_record(signal, 0)
    files = [file for file in record.parts[0].files if not file.path.endswith(".json")]
    file = broken / files[0].path
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=files[0].path.split("/")[0]) as caught:
        compile_caches([broken], tmp_path / "out")
    assert "\n" not in str(caught.value)
    committed = sorted(path.name for path in (tmp_path / "out").rglob(f"{signal}.00000.json"))
    assert committed == []


def test_labels_that_do_not_lie_on_their_tokens_are_noticed(universe, tmp_path):
    wrong = universe.replaced(LOGITS, 1, 2)  # of two tokens and of four
    a = wrong.write(tmp_path / "a", [0, 1, 2], [LOGITS])
    message = r"signal 'logits' shard 0: sample 1 has 4 labels, expected 2"
    with pytest.raises(IntegrityError, match=message):
        compile_caches([a], tmp_path / "out")
