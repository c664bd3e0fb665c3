"""Recipes: what is refused and how it is said, overrides, and the round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kdcache.errors import RecipeError
from kdcache.recipe import Recipe, builtin_names, dump_recipe, load_recipe, parse_recipe
from kdcache.recipe.tree import override, read_yaml, write_yaml

CODEC = "dump.signals.logits.codec"


def edited(*overrides: tuple[str, str]) -> Recipe:
    return load_recipe("word-level", overrides)


@pytest.mark.parametrize("name", builtin_names())
def test_resolved_recipe_reads_back_the_same(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(path)) == recipe
    assert recipe.description


@pytest.mark.parametrize("name", builtin_names())
def test_a_recipe_dumps_what_it_trains_on(name: str) -> None:
    recipe = load_recipe(name)
    needed = set()
    for term in recipe.train.objective:
        signal = getattr(term, "signal", None) or getattr(term, "hypotheses", None)
        needed |= set([signal] if isinstance(signal, str) else signal or [])
    student = recipe.train.student
    if student is not None and student.kind == "multi_task":
        needed = {f"{signal}_{task}" for signal in needed for task in student.tasks}
    assert needed <= set(recipe.dump.signals)


def test_resolved_recipe_with_every_kind_of_value_reads_back() -> None:
    recipe = edited(
        ("train.optimizer.lr", "1e-4"),
        (CODEC, "{name: nucleus, p: 99/100}"),
        ("corpus.fields", "{src: 'no', tgt: '1e-4', other: '12:30'}"),
        ("dump.tokenizers.piece", "{kind: sentencepiece, vocab_size: 1_000}"),
        ("train.max_epochs", "3"),
    )
    assert parse_recipe(read_yaml(dump_recipe(recipe))) == recipe
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert recipe.dump.tokenizers["piece"].vocab_size == 1000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("-7", -7),
        ("1_000", 1000),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2026-11-01", "2026-11-01"),
        ("1/16", "1/16"),
        ("010", "010"),
        ("~", None),
        ("", None),
        ("{a: [1, b]}", {"a": [1, "b"]}),
        ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
    ],
)
def test_plain_words_are_what_they_look_like(text: str, value: object) -> None:
    read = read_yaml(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["no", "12:30", "1e-4", "true", "1/16", "010", "0x1", "~", ""])
def test_strings_survive_both_yaml_versions(text: str) -> None:
    written = write_yaml({"key": text})
    assert read_yaml(written) == {"key": text}
    assert yaml.safe_load(written) == {"key": text}


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("train.objective.1.temprature", "2", "train.objective.1.temprature: unknown key; did you"),
        ("train.objective.1.temprature", "2", "did you mean temperature?"),
        ("train.max_stepz", "2", "did you mean max_steps?"),
        ("trian.max_steps", "2", "trian: unknown key; did you mean train?"),
        ("other", "2", "known here: name, description, corpus, dump, train, evaluate"),
        ("train.max_steps", "true", "train.max_steps: should be a valid integer (found True)"),
        ("train.max_steps", "1.5", "train.max_steps: should be a valid integer (found 1.5)"),
        ("train.max_steps", "'3'", "train.max_steps: should be a valid integer (found '3')"),
        ("train.max_steps", "", "train.max_steps: should be a valid integer (found nothing)"),
        ("train.max_steps", "0", "train.max_steps: should be greater than or equal to 1"),
        ("train.optimizer.lr", "true", "train.optimizer.lr: should be a number"),
        ("train.optimizer.lr", ".inf", "train.optimizer.lr: should be a finite number"),
        ("train.optimizer.betas", "[0.9, 2]", "train.optimizer.betas.1: should be less than 1"),
        ("train.objective.1.weight", "true", "train.objective.1.weight: should be a number"),
        ("train.objective.1.weight", "-1", "train.objective.1.weight: should be greater"),
        ("train.objective.1.temperature_squared", "1", "should be a valid boolean"),
        ("train.objective.1.loss", "forward_lk", "there is no 'forward_lk'; did you mean forward_"),
        ("train.objective.1", "{weight: 1}", "train.objective.1: loss is missing; one of cross_"),
        ("train.objective.1", "3", "train.objective.1: should be a section of keys"),
        ("train.student.path", "model", "train.student: give exactly one of path and config"),
        ("corpus.fields", "{Src: a}", "corpus.fields.Src: 'Src' is no name"),
        ("corpus", "{format: tsv, fields: {src: a}}", "corpus: a tsv corpus needs path"),
        ("dump.signals.logits.stream", "trg", "signals.logits.stream is 'trg'; streams has"),
        (f"{CODEC}.c", "1/0", f"{CODEC}.c: should be a number or a fraction"),
        (f"{CODEC}.c", "a/b", f"{CODEC}.c: should be a number or a fraction"),
        (f"{CODEC}.c", "2", f"{CODEC}.c: should be less than 1"),
        (f"{CODEC}.c", "true", f"{CODEC}.c: should be a number"),
        (f"{CODEC}.temperatures", "[2, 1]", f"{CODEC}: temperatures of the codec are 2, 1; they"),
        (f"{CODEC}.temperatures", "[1, 3]", "codec.temperatures 3 must be among the signal's"),
        (f"{CODEC}.name", "topkk", f"{CODEC}.name: there is no 'topkk'; did you mean topk?"),
        (f"{CODEC}.name", "topk", f"{CODEC}.k: missing; topk needs it"),
        ("dump.signals.h", "{kind: hiden}", "h.kind: there is no 'hiden'; did you mean hidden?"),
        ("dump.signals.h", "{kind: x}", "'x'; it is one of logits, hidden, attention, beams, cla"),
        ("dump.signals.h", "{kind: hidden, layer: 1}", "h.layer: unknown key; did you mean layers"),
        ("dump.signals.h", "{kind: hidden, num_beams: 1}", "signals.h '{kind: hidden}'"),
        ("dump.signals.samples", "{}", "'samples' is a name of the format and cannot name"),
        (f"{CODEC}.name", "topk", f"give the whole, as in --{CODEC} '{{name: topk, k: ...}}'"),
    ],
)
def test_faults_name_the_path_in_the_file(path: str, value: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        edited((path, value))
    message = str(caught.value)
    assert expected in message
    assert message.startswith("word-level: ")
    assert "\n" not in message
    for tag in (".forward_kl.", ".cross_entropy.", ".threshold.", ".topk."):
        assert tag not in message


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(RecipeError, match=r"train\.max_steps.*; train\.seed.*"):
        edited(("train.max_steps", "-1"), ("train.seed", "x"))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("train.objective.2.weight", "1", "no item train.objective.2; items there: 0 to 1"),
        ("train.objective.4", "{}", "no item train.objective.4; items there: 0 to 1 (2 appends"),
        ("train.objective.-1", "{}", "no item train.objective.-1"),
        ("train.objective.temperature", "2", "no item train.objective.temperature"),
        ("train.objective.0.weight.more", "2", "train.objective.0.weight is 0.5, which has no"),
        ("train.layers.0.size", "2", "the recipe has no train.layers; give the list whole"),
        ("train.max_steps", "[1", "not YAML"),
        ("train.max_steps", "{a: 1, a: 2}", "key 'a' stands twice"),
    ],
)
def test_overrides_that_lead_nowhere(path: str, value: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        edited((path, value))
    assert str(caught.value).startswith(f"--{path}")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_reach_one_term_and_leave_the_others() -> None:
    before = load_recipe("word-level").train.objective
    after = edited(
        ("train.objective.1.temperature", "2"), ("train.objective.0.weight", "0.3")
    ).train.objective
    assert after[1].temperature == 2
    assert after[1].weight == before[1].weight
    assert after[0].weight == 0.3
    assert len(after) == 2


def test_the_number_after_the_last_item_appends() -> None:
    term = "{loss: forward_kl, weight: 0.1, temperature: 4}"
    objective = edited(("train.objective.2", term), ("train.objective.2.weight", "0.2"))
    assert [t.loss for t in objective.train.objective] == [
        "cross_entropy",
        "forward_kl",
        "forward_kl",
    ]
    assert objective.train.objective[2].weight == 0.2


def test_an_item_is_replaced_whole() -> None:
    tree = {"a": [1, 2, 3]}
    override(tree, "a.1", "[x, y]")
    assert tree == {"a": [1, ["x", "y"], 3]}


def test_fractions_and_small_numbers() -> None:
    recipe = edited((f"{CODEC}.c", "1/24"), ("train.optimizer.lr", "1e-4"))
    assert recipe.dump.signals["logits"].codec.c == 1 / 24
    assert recipe.train.optimizer.lr == 1e-4


def test_a_codec_is_replaced_whole() -> None:
    codec = edited((CODEC, "{name: topk, k: 12}")).dump.signals["logits"].codec
    assert (codec.name, codec.k) == ("topk", 12)


def test_sections_that_are_not_there_are_made() -> None:
    recipe = edited(("corpus.fields.src", "a.txt"), ("corpus.fields.tgt", "b.txt"))
    assert recipe.corpus is not None
    assert recipe.corpus.fields == {"src": "a.txt", "tgt": "b.txt"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"name: a\ntrain:\n  seed: 1\n  seed: 2\n", "line 4: key 'seed' stands twice"),
        (b"name: a\nname: b\n", "line 2: key 'name' stands twice"),
        (b"name: [1\n", "line 2: not YAML"),
        (b"name: a: b\n", "line 1: not YAML"),
        (b"? [a]\n: b\n", "line 1: a key is a word"),
        (b"- name\n", "a recipe is a mapping, found list"),
        (b"", "a recipe is a mapping, found NoneType"),
        (b"name: \xff\n", "not UTF-8 at byte 6"),
        (b"name: a\nname2: b\n", "name2: unknown key; did you mean name?"),
        (b"description: b\n", "name: missing"),
        (b"name: a\n1: 2\n", "1: "),
        (b"name: !!python/object:os.system a\n", "not YAML"),
        (b"name: train\ntrain: {seed: x}\n", "train.seed: should be a valid integer"),
    ],
)
def test_bad_files_name_file_and_line(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_says_where_there_are_some(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such file .* `kdcache recipes` lists them"):
        load_recipe(str(tmp_path / "word-level"))


def test_a_name_without_a_scale_is_the_small_one() -> None:
    assert load_recipe("word-level") == load_recipe("word-level-small")


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    written(tmp_path / "base.yaml", "extends: no-kd\nname: base\ntrain: {seed: 7, max_steps: 5}\n")
    own = written(
        tmp_path / "deeper" / "own.yaml",
        "extends: ../base.yaml\nname: own\ntrain:\n  max_steps: 9\n  student:\n"
        "    config: {d_model: 64}\n  objective: [{loss: cross_entropy, weight: 0.5}]\n",
    )
    found, base = load_recipe(str(own)), load_recipe("no-kd-small")
    assert (found.name, found.description) == ("own", base.description)
    assert (found.train.seed, found.train.max_steps) == (7, 9)
    assert [term.weight for term in found.train.objective] == [0.5]
    assert found.train.student is not None
    assert base.train.student is not None
    assert found.train.student.config == base.train.student.config | {"d_model": 64}
    assert found.dump == base.dump


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: there.yaml\n", r"own.yaml: extends there.yaml: no such file .* lists them"),
        ("extends: [no-kd]\n", r"extends is \['no-kd'\]; expected a built-in recipe or a path"),
        ("extends: own.yaml\n", r"own.yaml: extends itself"),
        ("extends: list.yaml\n", r"own.yaml: extends list.yaml: a recipe is a mapping"),
    ],
)
def test_what_cannot_be_extended(text: str, expected: str, tmp_path: Path) -> None:
    written(tmp_path / "list.yaml", "[1]\n")
    with pytest.raises(RecipeError, match=expected):
        load_recipe(str(written(tmp_path / "own.yaml", text)))


def test_a_file_wins_over_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no-kd").write_text("name: mine\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("no-kd").name == "mine"
