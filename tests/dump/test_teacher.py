import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from kdcache import models
from kdcache.dump.batches import pad, plan_batches
from kdcache.dump.teacher import Teacher, teacher_positions
from kdcache.dump.tokenize import Tokenizer
from kdcache.errors import ModelError
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.models import resolve_device, shift_right
from kdcache.recipe import TeacherSection
from tests.dump.world import FAMILIES


def load(world, family, **keys):
    return Teacher.load(TeacherSection(path=str(world.root / family), device="cpu", **keys))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", [None, "eager"])
def test_logits_are_those_of_the_plain_forward(world, family, attention):
    teacher = load(world, family, attention=attention)
    tokenizer = Tokenizer.load(str(world.root / family))
    rows = np.array([5, 0, 3, 11])
    src_ids, src_mask = pad(tokenizer.encode_ragged(world.src, False), rows, teacher.pad_id)
    labels, mask = pad(tokenizer.encode_ragged(world.tgt, True), rows, teacher.pad_id)
    logits = teacher.logits(*map(torch.from_numpy, (src_ids, src_mask, labels, mask)))
    assert logits.shape == (mask.sum(), teacher.vocab_size)

    model = AutoModelForSeq2SeqLM.from_pretrained(world.root / family).eval()
    found = []
    for row in rows:  # one by one: no padding at all
        ids = torch.tensor([tokenizer.encode([world.src[row]], False)[0]])
        target = torch.tensor([tokenizer.encode([world.tgt[row]], True)[0]])
        with torch.no_grad():
            found.append(model(input_ids=ids, labels=target).logits[0])
    torch.testing.assert_close(logits, torch.cat(found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("known", [True, False])
def test_pieces_are_the_whole(world, family, known, monkeypatch):
    teacher = load(world, family)
    bias = getattr(teacher.model, "final_logits_bias", None)
    if bias is not None:
        bias.copy_(torch.linspace(-1, 1, teacher.vocab_size))
    if not known:  # a model that does more to its logits than kdcache knows of
        forward = Teacher._forward
        monkeypatch.setattr(Teacher, "_forward", lambda *args: forward(*args).tanh())
    tokenizer = Tokenizer.load(str(world.root / family))
    rows = np.array([5, 0, 3, 11])
    src = pad(tokenizer.encode_ragged(world.src, False), rows, teacher.pad_id)
    tgt = pad(tokenizer.encode_ragged(world.tgt, True), rows, teacher.pad_id)
    batch = [torch.from_numpy(array) for array in (*src, *tgt)]
    whole = teacher.logits(*batch)
    for num_rows in (1, 7, 1000):
        pieces = list(teacher.logits_in_pieces(*batch, num_rows * teacher.vocab_size))
        assert [len(piece) for piece in pieces[:-1]] == [num_rows] * (len(pieces) - 1)
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hook_is_gone_afterwards(world, family):
    teacher = load(world, family)
    ids = torch.tensor([[5, 6, 1]])
    two = torch.tensor([[True, True, False]])
    with torch.no_grad():
        with models.project_only(teacher.model, two):
            assert len(teacher.model(input_ids=ids, decoder_input_ids=ids).logits) == 2
        with pytest.raises(IndexError), models.project_only(teacher.model, two[:, :2]):
            teacher.model(input_ids=ids, decoder_input_ids=ids)
        assert teacher.model(input_ids=ids, decoder_input_ids=ids).logits.dim() == 3


def test_shift_right():
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    assert shift_right(labels, pad=1, start=2).tolist() == [[2, 5, 6], [2, 8, 1]]


def test_record_is_the_weights_and_the_config(world, tmp_path):
    first = load(world, "marian")
    assert first.max_positions == 64
    assert first.record.model_type == "marian"
    assert first.record.dtype == "float32"
    assert load(world, "marian", dtype="bfloat16").record.dtype == "bfloat16"
    assert load(world, "t5").max_positions is None
    assert teacher_positions(TeacherSection(path=str(world.root / "bart"))) == 48

    for file in (world.root / "marian").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["transformers_version"] = "0.0"
    (tmp_path / "config.json").write_text(json.dumps(config))
    moved = Teacher.load(TeacherSection(path=str(tmp_path), device="cpu")).record
    assert moved.model_copy(update={"path": first.record.path}) == first.record
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.shared.weight"][5, 3] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    changed = Teacher.load(TeacherSection(path=str(tmp_path), device="cpu")).record
    assert changed.digest != first.record.digest
    assert changed.config_digest == first.record.config_digest


def test_pickled_weights_are_not_read(world, tmp_path):
    (tmp_path / "config.json").write_bytes((world.root / "t5" / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"found no model.safetensors"):
        Teacher.load(TeacherSection(path=str(tmp_path), device="cpu"))


def test_a_decoder_is_no_teacher(world, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(
        (world.root / "t5" / "model.safetensors").read_bytes()
    )
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="cannot load it as an encoder-decoder") as error:
        Teacher.load(TeacherSection(path=str(tmp_path), device="cpu"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [("./none", "no such directory"), ("a/b/c", "no such directory"), ("who/what", "the hub")],
)
def test_no_such_teacher(path, message, monkeypatch):
    def refuse(*args, **keys):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError, match=message) as error:
        models.model_directory(path)
    assert "\n" not in str(error.value)


def test_a_hub_id_is_resolved_to_its_commit(tmp_path, monkeypatch):
    snapshot = tmp_path / "0123abc"
    snapshot.mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(snapshot))
    assert models.model_directory("who/what", "main") == (snapshot, "0123abc")
    with pytest.raises(ModelError, match="no revision"):
        models.model_directory(str(tmp_path), "main")


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ModelError, match="device 'warp'"):
        resolve_device("warp")
    with pytest.raises(ModelError, match=r"found . cuda devices"):
        resolve_device("cuda:99")


def test_batches_hold_every_sample_once_within_the_budget():
    generator = np.random.Generator(np.random.PCG64(1))
    src, tgt = generator.integers(1, 40, (2, 500))
    plan = plan_batches(src, tgt, 300)
    assert sorted(np.concatenate(plan).tolist()) == list(range(500))
    sizes = [len(rows) * (src[rows].max() + tgt[rows].max()) for rows in plan]
    assert max(sizes) <= 300
    padded, real = sum(sizes), src.sum() + tgt.sum()
    assert padded / real < 1.5
    assert plan_batches(src, tgt, 300)[7].tolist() == plan[7].tolist()
    assert [rows.tolist() for rows in plan_batches(src[:2], tgt[:2], 1)] in ([[0], [1]], [[1], [0]])
    assert plan_batches(src[:0], tgt[:0], 300) == []


def test_pad():
    column = Ragged(offsets_of(np.array([2, 0, 3])), {"id": np.array([5, 6, 7, 8, 9], "u2")})
    ids, mask = pad(column, np.array([2, 0, 1]), 1)
    assert ids.tolist() == [[7, 8, 9], [5, 6, 1], [1, 1, 1]]
    assert mask.tolist() == [[True] * 3, [True, True, False], [False] * 3]
