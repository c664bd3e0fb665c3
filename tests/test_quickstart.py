"""The quickstart runs and reports; who wins is not its test's business."""

import json
import re

import pytest

from kdcache.cli import main
from kdcache.errors import StorageError
from kdcache.formats.cache import open_cache
from kdcache.quickstart import grammar
from kdcache.quickstart.outcome import summary_text
from kdcache.quickstart.plan import FULL, QUICK, Paths, student_recipe, teacher_recipe
from kdcache.quickstart.story import run
from kdcache.recipe import load_recipe


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A shrunken quickstart: its directory and its result."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    return out, run(out, quick=True)


def test_it_runs_and_reports(story):
    out, result = story
    assert list(result["models"]) == ["teacher", "student without cache", "student with cache"]
    for row in result["models"].values():
        assert 0 <= row["bleu"] <= 100
        assert row["dev_loss_nats"] > 0
        assert row["sentences_per_second"] > 0
    small, large = (
        result["models"][name]["parameters"] for name in ("student with cache", "teacher")
    )
    assert small < large
    assert set(result["paired_test"]) == {"bleu", "chrf"}
    rates = result["learning_rates"]
    assert rates[f"{result['learning_rate']:g}"] == min(rates.values())
    text = summary_text(result)
    for name in result["models"]:
        assert name in text
    assert str(out / "report.html") in text


def test_the_page_shows_everything(story):
    out, result = story
    shown = (out / "report.html").read_text(encoding="utf-8")
    assert shown.count("<svg") == 3
    assert shown.count("<polyline") == 2
    assert shown.count('class="token"') >= 1
    for name in result["models"]:
        assert name in shown
    assert not re.search(r"<script|<link|src=|url\(", shown)


def test_students_share_everything_but_the_objective(story):
    out, result = story
    names = [f"no-kd-lr-{result['learning_rate']:g}", "word-level"]
    without, distilled = (load_recipe(str(out / "recipes" / f"{name}.yaml")) for name in names)
    assert without.train.objective != distilled.train.objective
    same = {"objective": []}
    assert without.train.model_copy(update=same) == distilled.train.model_copy(update=same)
    for section in ("corpus", "dump", "evaluate"):
        assert getattr(without, section) == getattr(distilled, section)


def test_the_cache_holds_the_first_of_the_pairs_that_the_teacher_learned_from(story):
    out, _ = story
    lines = (out / "corpus" / "train.src").read_text(encoding="utf-8").splitlines()
    assert open_cache(out / "tokens").num_samples == len(lines) == QUICK.pairs["train"]
    cache = open_cache(out / "cache")
    assert cache.complete("logits")
    assert cache.num_samples == QUICK.student_pairs < len(lines)
    assert (out / "report.html").read_text(encoding="utf-8").count(f"{len(lines)} sentence") == 1


def test_what_is_finished_is_not_done_again(story):
    out, first = story
    watched = [
        path
        for path in out.rglob("*")
        if path.suffix in (".arrow", ".safetensors", ".src", ".yaml", ".jsonl")
        or path.name == "evaluation.json"
    ]
    before = {path: path.stat().st_mtime_ns for path in watched}
    (out / "report.html").unlink()
    again = run(out, quick=True)
    assert {path: path.stat().st_mtime_ns for path in watched} == before
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert (out / "report.html").is_file()


def test_what_it_leaves_serves_the_readmes_commands(story, tmp_path, monkeypatch):
    """The README says so: teacher and text under these names."""
    monkeypatch.chdir(story[0].parent)
    left = story[0].name
    words = ["--dump.teacher.path", f"{left}/runs/teacher/best", "--corpus.limit", "8"]
    words += ["--corpus.fields.src", f"{left}/corpus/train.src"]
    words += ["--corpus.fields.tgt", f"{left}/corpus/train.tgt"]
    assert main(["dump", "word-level", "--out", str(tmp_path / "cache"), *words]) == 0
    for split in ("dev", "test"):
        assert (story[0] / "corpus" / f"{split}.src").is_file()


def test_a_directory_of_something_else_is_refused(story, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"holds other files \(notes.txt\); choose"):
        run(tmp_path, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    out, _ = story
    with pytest.raises(StorageError, match=r"quickstart of another version or size"):
        run(out)
    assert json.loads((out / "quickstart.json").read_text())["quick"] is True


def test_full_size_recipes_are_valid(tmp_path):
    paths = Paths(tmp_path)
    assert teacher_recipe(paths, FULL).dump.signals == {}
    for distil in (True, False):
        assert list(student_recipe(paths, FULL, 1e-3, distil).dump.signals) == ["logits"]
    assert len(FULL.student_lrs) == 3


def test_splits_are_disjoint_and_the_same_every_time():
    sizes = {"test": 40, "dev": 30, "train": 300}
    splits = grammar.corpus(sizes)
    assert {name: len(pairs) for name, pairs in splits.items()} == sizes
    sources = [src for pairs in splits.values() for src, _ in pairs]
    assert len(set(sources)) == len(sources)
    assert grammar.corpus(sizes) == splits
    assert grammar.corpus(sizes, seed=2)["train"] != splits["train"]
    # Nothing but the seed enters, so the first sentence is the same for ever.
    assert splits["test"][0] == GOLDEN


GOLDEN = (
    "loft noftai leiri ni gistulunt.",
    "na nihaine hu nori naaru nniho chitairai.",
)


def phrase(noun, plural=False, adjectives=(), modifier=None, number=None):
    return grammar.Phrase(noun, plural, adjectives, modifier, number)


def clause(subject, verb, **more):
    empty = dict.fromkeys(("object", "receiver", "place", "time", "because"))
    return grammar.Clause(subject, verb, **{**empty, "tense": "past", "negative": False, **more})


def olua(said):
    return grammar.Olua(grammar.Dice("test")).clause(said)


def test_both_languages_say_a_sentence_by_their_own_rules():
    brask, words = grammar.lexicon()
    bee = phrase("bee", adjectives=("quiet",))
    said = clause(bee, "see", object=phrase("miller", plural=True), negative=True)
    # Adjective before the noun in its gender (1: o), verb second, object in the accusative.
    assert grammar.brask(said) == [
        brask["quiet"] + "o", brask["bee"], "ni", brask["see"] + "dit", brask["miller"] + "ien",
    ]  # fmt: skip
    # Verb first, in class c of a subject yet to come, negation around it; adjective after.
    found = olua(said)
    assert found[0] == "na"
    assert found[1] in {"ya" + word + "mo" for word in words["see"]}
    assert found[2:] == [
        "hu", "e", words["bee"][0], "y" + words["quiet"][0], "ka", "tari", words["miller"][0],
    ]  # fmt: skip


def test_compounds_turn_round():
    brask, words = grammar.lexicon()
    said = clause(phrase("goat", modifier="iron"), "run", tense="present")
    assert grammar.brask(said)[0] == f"{brask['iron']}s{brask['goat']}"
    assert olua(said)[1:] == ["no", words["goat"][0], "o", words["iron"][0]]


def test_the_verb_of_a_reason_comes_last_in_brask():
    brask, _ = grammar.lexicon()
    reason = clause(phrase("goat"), "hold", object=phrase("rope"))
    said = grammar.brask(clause(phrase("wolf"), "run", because=reason))
    assert said[-4:] == ["dan", brask["goat"], brask["rope"] + "en", brask["hold"] + "dit"]


def test_synonyms_follow_their_context_mostly():
    _, words = grammar.lexicon()
    counts = {}
    for tense in ("past", "present"):
        said = clause(phrase("goat"), "fall", tense=tense)
        found = [grammar.Olua(grammar.Dice("test", n)).clause(said)[0] for n in range(400)]
        counts[tense] = sum(words["fall"][1] in verb for verb in found) / 400
    assert counts["past"] == pytest.approx(grammar.SYNONYM_IF, abs=0.08)
    assert counts["present"] == pytest.approx(grammar.SYNONYM_ELSE, abs=0.08)


def test_homographs_share_a_word_in_brask_alone():
    brask, words = grammar.lexicon()
    for meaning, other in grammar.HOMOGRAPHS.items():
        assert brask[meaning] == brask[other]
        assert words[meaning] != words[other]
