"""Loading a teacher: kinds, records, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, BertForPreTraining, T5Config, T5Model

from kdcache.dump.teachers.loading import load_teacher, teacher_positions
from kdcache.errors import ModelError
from kdcache.models import passes
from kdcache.recipe import TeacherSection
from tests.dump import zoo as zoo_models
from tests.dump.reading import batch_of, close, plain
from tests.dump.world import FAMILIES


def load(directory, needs_attention=False, **keys):
    section = TeacherSection(path=str(directory), device="cpu", **keys)
    return load_teacher(section, needs_attention)


def copied(directory, to, **config):
    """A copy of a model's directory whose config has other values; None takes a key away."""
    to.mkdir(exist_ok=True)
    for file in directory.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    tree = {**json.loads((to / "config.json").read_text()), **config}
    kept = {key: tree[key] for key in tree if config.get(key, "") is not None}
    (to / "config.json").write_text(json.dumps(kept))
    return to


KINDS = [
    *[(name, "lm", "encoder_decoder") for name in zoo_models.ENCODER_DECODERS],
    *[(name, "lm", "causal_lm") for name in zoo_models.CAUSAL],
    *[(name, "lm", "masked_lm") for name in zoo_models.MASKED],
    *[(name, "classifier", "classifier") for name in zoo_models.CLASSIFIERS],
    *[(name, "encoder", "encoder") for name in zoo_models.ENCODERS],
]


@pytest.mark.parametrize(("architecture", "head", "kind"), KINDS)
def test_the_architecture_says_the_kind(zoo, architecture, head, kind):
    teacher = load(zoo(architecture, head))
    assert teacher.kind == teacher.record.kind == kind
    assert teacher.record.model_type == architecture
    assert teacher.members == [teacher.model]
    assert not teacher.model.training


def test_a_kind_may_be_chosen(zoo, tmp_path):
    assert load(zoo("bert"), kind="encoder").kind == "encoder"  # its pooler is not there
    assert load(zoo("t5"), kind="encoder").sides == ("encoder",)
    unnamed = copied(zoo("bert"), tmp_path / "unnamed", architectures=None)
    with pytest.raises(ModelError, match=r"no architecture in its config.json.*set dump.teacher"):
        load(unnamed)
    assert load(unnamed, kind="masked_lm").kind == "masked_lm"
    other = copied(zoo("bert"), tmp_path / "other", architectures=["BertForTokenClassification"])
    with pytest.raises(ModelError, match="found the architecture BertForTokenClassification"):
        load(other)


def test_a_model_of_two_heads_is_a_masked_lm(tmp_path):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertForPreTraining(BertConfig(vocab_size=30, hidden_size=8, **sizes)).save_pretrained(tmp_path)
    assert load(tmp_path).kind == "masked_lm"


def test_a_bare_model_of_two_stacks_is_an_encoder(tmp_path):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5Model(T5Config(vocab_size=30, **sizes)).eval()
    model.save_pretrained(tmp_path)
    teacher = load(tmp_path)
    assert (teacher.kind, teacher.sides) == ("encoder", ("encoder",))
    with torch.no_grad():
        expected = model.encoder(torch.tensor([[5, 6, 7]])).last_hidden_state
    close(teacher.hidden(batch_of(teacher, [[5, 6, 7]]), "encoder", [1])[:, :, 0], expected)


@pytest.mark.parametrize(
    ("architecture", "head", "kind", "lacks"),
    [
        ("bert", "lm", "classifier", "bert.pooler.dense.bias"),
        ("distilbert", "lm", "classifier", "classifier.bias"),
        ("llama", "lm", "classifier", "score.weight"),
        ("bert", "encoder", "masked_lm", "cls.predictions.bias"),
        ("gpt2", "lm", "masked_lm", None),
        ("bert", "lm", "encoder_decoder", None),
    ],
)
def test_a_kind_that_the_model_is_not(zoo, architecture, head, kind, lacks):
    with pytest.raises(ModelError) as error:
        load(zoo(architecture, head), kind=kind)
    message = str(error.value)
    assert "\n" not in message
    assert (f"{lacks} among them" if lacks else "transformers cannot load it as") in message


@pytest.mark.parametrize(
    ("architecture", "head", "ask", "message"),
    [
        ("bert", "lm", "scores", "kind masked_lm has no class scores; it has logits, hidden"),
        ("bert", "classifier", "logits", "kind classifier has no logits; it has classes, hidden"),
        ("bert", "encoder", "logits", "kind encoder has no logits; it has hidden, attention"),
        ("bert", "lm", "decoder", "kind masked_lm has no decoder side; expected side encoder"),
        ("gpt2", "lm", "encoder", "kind causal_lm has no encoder side; expected side decoder"),
        ("gpt2", "lm", "first", "a causal model predicts no first token"),
        ("bart", "lm", "decoder", "decoder side needs a source; the batch has none"),
        ("bart", "lm", "logits", "decoder side needs a source; the batch has none"),
    ],
)
def test_questions_without_an_answer(zoo, architecture, head, ask, message):
    teacher = load(zoo(architecture, head))
    batch = batch_of(teacher, [[5, 6, 7]])
    at = torch.tensor([[False, True, True]])
    questions = {
        "scores": lambda: teacher.scores(batch),
        "first": lambda: teacher.logits(batch, ~at),
        "logits": lambda: teacher.logits(batch, at),
        "encoder": lambda: teacher.hidden(batch, "encoder", [0]),
        "decoder": lambda: teacher.hidden(batch, "decoder", [0]),
    }
    with pytest.raises(ModelError, match=message) as error:
        questions[ask]()
    assert str(error.value).startswith(str(zoo(architecture, head)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hook_is_gone_afterwards(world, family):
    teacher = load(world.root / family)
    ids = torch.tensor([[5, 6, 1]])
    two = torch.tensor([[True, True, False]])
    with torch.no_grad():
        with passes.project_only(teacher.model, two):
            assert len(teacher.model(input_ids=ids, decoder_input_ids=ids).logits) == 2
        with pytest.raises(IndexError), passes.project_only(teacher.model, two[:, :2]):
            teacher.model(input_ids=ids, decoder_input_ids=ids)
        assert teacher.model(input_ids=ids, decoder_input_ids=ids).logits.dim() == 3


def test_a_consumer_of_pieces_is_not_in_inference_mode(zoo):
    teacher = load(zoo("gpt2"))
    batch = batch_of(teacher, [[5, 6, 7]])
    at = torch.tensor([[False, True, True]])
    for _ in teacher.logits_in_pieces(batch, at, 1):
        assert not torch.is_inference_mode_enabled()


def test_record_is_the_weights_and_the_config(world, tmp_path):
    first = load(world.root / "marian")
    assert first.max_positions == 64
    assert first.record.model_type == "marian"
    assert first.record.dtype == "float32"
    assert load(world.root / "marian", dtype="bfloat16").record.dtype == "bfloat16"

    moved = load(copied(world.root / "marian", tmp_path / "a", transformers_version="0.0")).record
    assert moved.model_copy(update={"path": first.record.path}) == first.record
    weights = load_file(tmp_path / "a" / "model.safetensors")
    weights["model.shared.weight"][5, 3] += 1e-3
    save_file(weights, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    changed = load(tmp_path / "a").record
    assert changed.digest != first.record.digest
    assert changed.config_digest == first.record.config_digest
    scaled = load(copied(world.root / "marian", tmp_path / "b", scale_embedding=True)).record
    assert scaled.digest == first.record.digest
    assert scaled.config_digest != first.record.config_digest


def test_pickled_weights_are_not_read(world, tmp_path):
    (tmp_path / "config.json").write_bytes((world.root / "t5" / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"found no model.safetensors"):
        load(tmp_path)


def test_a_directory_without_a_model(zoo, tmp_path):
    with pytest.raises(ModelError, match=r"found no model.safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"cannot read its config.json .*No such file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config.json is no JSON object"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot read its config.json"):
        teacher_positions(TeacherSection(path=str(tmp_path)))
    broken = copied(zoo("bert"), tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="cannot load it as a masked LM") as error:
        load(broken)
    assert "\n" not in str(error.value)


def test_remote_code_is_never_run(zoo, tmp_path):
    marker = tmp_path / "was-run"
    remote = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    own = copied(zoo("gpt2"), tmp_path / "own", model_type="own", auto_map=remote)
    (own / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for ask in (load, lambda path: teacher_positions(TeacherSection(path=str(path)))):
        with pytest.raises(ModelError, match="remote code is never run") as error:
            ask(own)
        assert "\n" not in str(error.value)
        assert "kind: custom" in str(error.value)
    headless = copied(
        zoo("marian"),
        tmp_path / "head",
        auto_map={"AutoModelForSequenceClassification": "modeling_own.Own"},
    )
    (headless / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ModelError, match="remote code is never run"):
        load(headless, kind="classifier")
    assert load(headless).kind == "encoder_decoder"  # transformers has this one itself
    assert not marker.exists()


def test_a_device_that_is_full(zoo, monkeypatch):
    def refuse(*args, **keys):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("transformers.PreTrainedModel.to", refuse)
    with pytest.raises(ModelError, match=r"cannot be moved to cpu .*memory.*device_map") as error:
        load(zoo("gpt2"))
    assert "\n" not in str(error.value)


def test_device_map_needs_accelerate(zoo, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="device_map 'auto' needs the accelerate package"):
        load(zoo("gpt2"), device_map="auto")


def test_device_map_is_handed_on(zoo, monkeypatch):
    from transformers import AutoModelForCausalLM

    asked = {}
    load_plain = AutoModelForCausalLM.from_pretrained

    def spread(*args, device_map, **keys):
        asked["device_map"] = device_map
        return load_plain(*args, **keys)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spread)
    teacher = load(zoo("gpt2"), device_map="auto")
    assert asked == {"device_map": "auto"}
    assert teacher.device.type == "cpu"


POSITIONS = [
    ("marian", "lm", 64),
    ("t5", "lm", None),
    ("bart", "lm", 64),
    ("mbart", "lm", 64),
    ("gpt2", "lm", 96),
    ("llama", "lm", 96),
    ("bert", "lm", 64),
    ("roberta", "lm", 62),
    ("modernbert", "lm", 64),
    ("distilbert", "classifier", 64),
    ("roberta", "encoder", 62),
]


@pytest.mark.parametrize(("architecture", "head", "limit"), POSITIONS)
def test_positions(zoo, architecture, head, limit):
    section = TeacherSection(path=str(zoo(architecture, head)), device="cpu")
    assert teacher_positions(section) == load_teacher(section).max_positions == limit
    if architecture in ("marian", "bart", "gpt2", "bert", "roberta", "distilbert"):
        model = plain(zoo(architecture, head), architecture, head)
        words = torch.full((1, limit), 6)
        more = {"decoder_input_ids": words} if architecture in ("marian", "bart") else {}
        with torch.no_grad():
            model(words, **more)
            with pytest.raises((IndexError, RuntimeError)):  # a token more has no position
                model(torch.full((1, limit + 1), 6), **more)


def test_positions_of_other_models():
    from kdcache.models.positions import max_positions

    def of(model_type, **keys):
        return max_positions(AutoConfig.for_model(model_type, **keys))

    assert of("xlm-roberta", max_position_embeddings=514, pad_token_id=1) == 512
    assert of("mpnet", max_position_embeddings=514) == 512
    assert of("bloom") is None
    assert of("gemma3") == AutoConfig.for_model("gemma3").text_config.max_position_embeddings
    assert of("xlnet") is None
