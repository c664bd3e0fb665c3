"""DistilBERT, regular KD, PKD and CKD: recipes against the papers' equations, maps and sizes.

# B samples, S source positions, N target positions, R source tokens, D width
"""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSeq2SeqLM, MarianConfig, MarianMTModel

from kdcache.dump.runner import dump
from kdcache.errors import RecipeError
from kdcache.formats.cache import open_cache
from kdcache.formats.signals import HiddenRecord
from kdcache.models.passes import shift_right
from kdcache.recipe import (
    HiddenCosineTerm,
    HiddenMSETerm,
    StudentSection,
    load_recipe,
    parse_recipe,
)
from kdcache.train.batches.batch import Batch, DenseRows, Tokens
from kdcache.train.evaluation.evaluate import count_parameters
from kdcache.train.losses.layer_terms import LayersLoss
from kdcache.train.runs.trainer import Trainer
from kdcache.train.students.student import build_student
from kdcache.train.students.student_outputs import StudentOutputs
from tests.train.conftest import make_lines, make_teacher

SYSTEMS = ["pkd", "ckd-regular", "ckd-overlap", "ckd-skip", "ckd-cross"]
#: The published maps, student layer to teacher layers (PKD's is this package's choice).
MAPS = {
    "pkd": {1: [3], 2: [6]},
    "ckd-regular": {1: [1, 2, 3], 2: [4, 5, 6]},
    "ckd-overlap": {1: [1, 2, 3, 4], 2: [3, 4, 5, 6]},
    "ckd-skip": {1: [1, 2], 2: [5, 6]},
    "ckd-cross": {1: [1, 3], 2: [4, 6]},
}


def layers_term(name):
    (term,) = [one for one in load_recipe(name).train.objective if isinstance(one, HiddenMSETerm)]
    return term


def layers_loss(term, width, student_width=2, have=range(1, 7)):
    """A term's module over a signal of some layers of a teacher."""
    record = HiddenRecord.model_construct(
        name="encoder", stream="src", side="encoder", layers=tuple(have), width=width, pool="none"
    )
    config = SimpleNamespace(encoder_layers=2, d_model=student_width)
    return LayersLoss("term", term, record, {"encoder": "src", "decoder": "tgt"}, config, 1)


def value(loss, student, teacher, mask):
    """Of student states by layer [B, S, D] and teacher's [R, layers, D] over all rows."""
    rows = len(teacher)
    states = DenseRows(teacher, None, mask.sum(1), tuple(range(1, 7)))
    stream = Tokens(torch.zeros_like(mask, dtype=torch.long), mask)
    batch = Batch(np.zeros(len(mask)), np.zeros((len(mask), 16)), {"src": stream}, {})
    batch = Batch(batch.rows, batch.sample_ids, batch.streams, {"encoder": states})
    outputs = StudentOutputs(None, None, {("encoder", "hidden"): student}, student[-1])
    return loss(outputs, batch, None, rows)


@pytest.mark.parametrize(
    ("name", "expected"),
    # S_i the sum of the numbers of the layers in M(i): 7 S_1^2 / 4 + (7 S_2^2 - 6 S_2 + 4) / 4.
    [
        ("pkd", 15.75 + 55.0),
        ("ckd-regular", 63.0 + 372.25),
        ("ckd-overlap", 175.0 + 541.0),
        ("ckd-skip", 15.75 + 196.25),
        ("ckd-cross", 28.0 + 161.0),
    ],
)
def test_maps_by_hand(name, expected):
    # Layer j says (j, -j) of the first token and (2 j, j) of the second; the student's first layer
    # says 0 everywhere, its second 1. Fusions add the layers up.
    teacher = torch.tensor([[[j, -j] for j in range(1, 7)], [[2 * j, j] for j in range(1, 7)]])
    mask = torch.tensor([[True, True, False]])
    padding = torch.full((1, 1, 2), 1e9)
    states = [torch.cat([torch.full((1, 2, 2), float(n)), padding], 1) for n in (7, 0, 1)]
    loss = layers_loss(layers_term(f"{name}-paper"), 2)
    for fusion in loss.fusions.values():
        count = fusion.in_features // 2
        fusion.weight.data = torch.eye(2).repeat(1, count)
    assert value(loss, tuple(states), teacher.float(), mask).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("fuse", ["teacher", "student"])
@pytest.mark.parametrize("widths", [(3, 3), (5, 3)], ids=["equal", "unequal"])
def test_maps_against_a_few_lines(name, widths, fuse):
    wide, narrow = widths
    term = layers_term(name).model_copy(update={"fuse": fuse})
    loss = layers_loss(term, wide, narrow).double()
    generator = torch.Generator().manual_seed(5)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    teacher = torch.randn(9, 6, wide, generator=generator)
    student = [torch.randn(3, 4, narrow, generator=generator).double() for _ in range(3)]
    student = [one.requires_grad_() for one in student]
    learned = [*loss.parameters(), *student[1:]]
    expected = 0.0
    for n, (mine, theirs) in enumerate(MAPS[name].items()):
        own, fused = student[mine][mask], teacher[:, [j - 1 for j in theirs]].flatten(1).double()
        if len(theirs) > 1 and fuse == "student":
            own = own @ loss.projections[str(n)].weight.T + loss.projections[str(n)].bias
        elif len(theirs) > 1:
            fused = fused @ loss.fusions[str(n)].weight.T + loss.fusions[str(n)].bias
        elif wide != narrow:
            own = own @ loss.projections[str(n)].weight.T
        expected = expected + F.mse_loss(own, fused)
    found = value(loss, tuple(student), teacher, mask)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    pairs = zip(*(torch.autograd.grad(one, learned) for one in (found, expected)), strict=True)
    for one, other in pairs:
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SYSTEMS)
def test_released_code(name):
    """Wu et al.'s own loss: both sides to length 1, squares summed over features and layers."""
    released = {"fuse": "student", "over_layers": "sum", "weight": 1.4}
    term = HiddenCosineTerm.model_validate(
        layers_term(name).model_dump() | released | {"loss": "hidden_cosine"}
    )
    loss = layers_loss(term, 3, 3).double()
    generator = torch.Generator().manual_seed(6)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    teacher = torch.randn(9, 6, 3, generator=generator)
    student = [torch.randn(3, 4, 3, generator=generator).double() for _ in range(3)]
    expected = 0.0
    for n, (mine, theirs) in enumerate(MAPS[name].items()):
        own, all_ = student[mine][mask], teacher[:, [j - 1 for j in theirs]].flatten(1).double()
        if len(theirs) > 1:
            own = F.linear(own, loss.projections[str(n)].weight, loss.projections[str(n)].bias)
        squares = (F.normalize(own, dim=-1) - F.normalize(all_, dim=-1)) ** 2
        expected = expected + 0.7 * squares.sum() / len(own)
    found = term.weight * value(loss, tuple(student), teacher, mask)
    torch.testing.assert_close(found, expected)


def test_a_map_of_layers_that_the_cache_lacks_says_what_to_dump():
    message = r"teacher layer 1; signal 'encoder' has \[3, 6\]; .*dump\.signals\.encoder\.layers"
    with pytest.raises(RecipeError, match=message):
        layers_loss(layers_term("ckd-cross"), 2, have=[3, 6])


# Parameters as published, in millions, beside what the recipe's student has of them. Vocabulary:
# 32,000 ids but where a name says otherwise; of the talk's models one table for each side.
SIZES = [
    ("no-kd-paper", (6, 6), 32000, 61, 60.5),  # CKD paper, Table 2: teachers
    ("no-kd-paper", (6, 6), 15000, 52, 51.8),
    ("no-kd-paper", (6, 6), 37000, 63, 63.1),
    ("ckd-overlap-paper", (2, 2), 32000, 31, 31.1),  # and students
    ("ckd-overlap-paper", (2, 2), 15000, 22, 22.4),
    ("ckd-overlap-paper", (2, 2), 37000, 34, 33.7),
    ("distilbert-paper", (24, 6), 32000, 468, 468.6),  # NeMo talk: teacher
    ("distilbert-paper", (1, 1), 32000, 95, 94.9),  # wide
    ("distilbert-paper", (3, 3), 32000, 153.0, 153.7),
    ("distilbert-slim-paper", (1, 1), 32000, 18.9, 18.2),  # slim
    ("distilbert-slim-paper", (3, 3), 32000, 21.9, 21.9),
]


@pytest.mark.parametrize(("name", "depth", "vocab_size", "published", "ours"), SIZES)
def test_parameters_are_those_of_the_papers(name, depth, vocab_size, published, ours):
    student = load_recipe(name).train.student
    sides = {"encoder_layers": depth[0], "decoder_layers": depth[1]}
    section = StudentSection(config=student.config | sides)
    tokenizer = SimpleNamespace(pad_id=0, eos_id=3, bos_id=2)
    with torch.device("meta"):
        model = build_student(section, tokenizer, vocab_size, 1)
    found = count_parameters(model)["total"] / 1e6
    assert round(found, 1) == ours
    # The talk's slim student of 1 + 1 layers is the one that comes out 3.6% apart.
    assert found == pytest.approx(published, rel=0.037 if published == 18.9 else 0.02)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory):
    """One cache of a teacher of 6 + 6 layers with what all of these systems need."""
    root = tmp_path_factory.mktemp("layers")
    src, tgt = make_lines(24)
    for name, lines in (("src", src), ("tgt", tgt)):
        (root / name).write_text("".join(line + "\n" for line in lines))
    make_teacher(root / "teacher", [*src, *tgt])
    config = MarianConfig.from_pretrained(root / "teacher", encoder_layers=6, decoder_layers=6)
    torch.manual_seed(2)
    teacher = MarianMTModel(config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    teacher.save_pretrained(root / "teacher")
    signals = {}
    for name in ("pkd-attention", "ckd-cross", "distilbert"):
        found = load_recipe(name).model_dump(mode="json")["dump"]["signals"]
        signals |= {key: one for key, one in found.items() if key != "encoder" or "ckd" in name}
    signals["logits"]["codec"] = {"name": "full", "values": "float32"}
    tree = {
        "name": "test",
        "corpus": {"fields": {side: str(root / side) for side in ("src", "tgt")}},
        "dump": {
            "teacher": {"path": str(root / "teacher"), "device": "cpu"},
            "signals": signals,
        },
    }
    dump(parse_recipe(tree), root / "cache")
    return SimpleNamespace(root=root, cache=open_cache(root / "cache"), teacher=teacher)


def trainer(dumped, name, *overrides, width=16):
    small = {"d_model": width, "max_position_embeddings": 64, "dropout": 0.0}
    small |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    small |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
    if "init" in name:
        chosen = [("train.student.path", str(dumped.root / "teacher"))]
    else:
        chosen = [(f"train.student.config.{key}", str(item)) for key, item in small.items()]
    chosen += [("train.device", "cpu"), ("train.batch_tokens", "150"), *overrides]
    return Trainer(load_recipe(name, chosen).train, dumped.cache)


def run(model, micro):
    model.set_attn_implementation("eager")
    src, tgt = micro.streams["src"], micro.streams["tgt"]
    return model.eval()(
        input_ids=src.ids,
        attention_mask=src.mask.long(),
        decoder_input_ids=shift_right(tgt.ids, 0, 0),
        output_hidden_states=True,
        output_attentions=True,
        use_cache=False,
    )


class Oracle:
    """The papers' terms for a batch, from a teacher that runs here and now."""

    def __init__(self, dumped, made, micro):
        with torch.no_grad():
            self.teacher = run(dumped.teacher, micro)
        self.student, self.beside = run(made.model, micro), made.distillation.beside
        self.src, self.tgt = (micro.streams[side].mask for side in ("src", "tgt"))
        self.labels = micro.streams["tgt"].flat

    def nll(self, smoothing=0.0):
        logits = self.student.logits[self.tgt]
        return F.cross_entropy(logits, self.labels, label_smoothing=smoothing)

    def kd(self):
        """Eq. 2 of Wu et al. less the teacher's entropy."""
        sides = (one.logits[self.tgt].log_softmax(1) for one in (self.student, self.teacher))
        return F.kl_div(*sides, reduction="batchmean", log_target=True)

    def layers(self, pairs, number):
        total = 0.0
        for n, (mine, theirs) in enumerate(pairs.items()):
            states = [self.teacher.encoder_hidden_states[j][self.src] for j in theirs]
            fused = torch.cat(states, 1)
            if len(theirs) > 1:
                fused = self.beside[number].fusions[str(n)](fused)
            total = total + F.mse_loss(self.student.encoder_hidden_states[mine][self.src], fused)
        return total

    def attention(self, pairs):
        total, pad = 0.0, self.src[:, None, :, None] & self.src[:, None, None, :]
        for mine, (theirs,) in pairs.items():
            own = self.student.encoder_attentions[mine - 1]
            squares = (own - self.teacher.encoder_attentions[theirs - 1]) ** 2
            total = total + (squares * pad).sum() / (pad.sum() * own.shape[1])
        return total

    def cosine(self, side, number, depth=2):
        mask = self.src if side == "encoder" else self.tgt
        own = self.student[f"{side}_hidden_states"][depth][mask]
        if projections := self.beside[number].projections:
            own = projections["0"](own)
        theirs = self.teacher[f"{side}_hidden_states"][6][mask]
        return (1 - F.cosine_similarity(own, theirs)).mean()


def compared(dumped, made, expected):
    """Hold a trainer's loss and its gradients against an oracle's."""
    batch = next(iter(made.stream))
    (micro,) = batch.micro
    made.distillation.eval()
    total, _ = made.distillation(micro, batch.counts, made.objective.at(1, 10))
    wanted = expected(Oracle(dumped, made, micro))
    torch.testing.assert_close(total, wanted, rtol=2e-4, atol=1e-5)  # float16 states
    pairs = zip(
        *(torch.autograd.grad(one, made.parameters) for one in (total, wanted)), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["regular-kd", "pkd-attention", *SYSTEMS])
def test_objectives_are_the_papers(dumped, name):
    def expected(oracle):
        if name == "regular-kd":
            return 0.9 * oracle.nll(0.1) + 0.1 * oracle.kd()
        if name == "pkd-attention":
            layers = oracle.layers(MAPS["pkd"], "2") + oracle.attention(MAPS["pkd"])
        else:
            layers = oracle.layers(MAPS[name], "2")
        return 0.2 * oracle.nll(0.1) + 0.1 * oracle.kd() + 0.7 * layers

    made = trainer(dumped, name)
    compared(dumped, made, expected)
    assert made.objective.terms == load_recipe(f"{name}-paper").train.objective


@pytest.mark.parametrize("on", [on for on in product([True, False], repeat=3) if any(on)])
def test_every_combination_of_the_triple_loss(dumped, on):
    kl, nll, cosine = on
    places = [["0"], ["1"], ["2", "3"]]
    off = [n for those, kept in zip(places, on, strict=True) if not kept for n in those]
    made = trainer(dumped, "distilbert", *((f"train.objective.{n}.weight", "0") for n in off))
    assert len(made.objective.terms) == 4 - len(off)

    def expected(oracle):
        total = kl * oracle.kd() + nll * oracle.nll()
        if cosine:
            first = kl + nll
            sides = zip(("encoder", "decoder"), (str(first), str(first + 1)), strict=True)
            total = total + sum(oracle.cosine(*side) for side in sides) / 2
        return total

    compared(dumped, made, expected)


def test_a_slim_student_is_projected_and_saved_without_the_projection(dumped, tmp_path):
    made = trainer(dumped, "distilbert-slim", width=8)
    sides = [("encoder", "2"), ("decoder", "3")]
    beside = [made.distillation.beside[number] for _, number in sides]
    assert [one.projections["0"].weight.shape for one in beside] == [(16, 8)] * 2

    def expected(oracle):
        return oracle.kd() + oracle.nll() + sum(oracle.cosine(*side) for side in sides) / 2

    compared(dumped, made, expected)
    made.save_model(tmp_path / "student")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student")
    assert count_parameters(again) == count_parameters(made.model)
    assert not [name for name in again.state_dict() if "projection" in name]


def test_a_student_begins_as_one_of_every_n_layers(dumped):
    made = trainer(dumped, "distilbert-init")
    fixed = [name for name, one in made.model.named_parameters() if not one.requires_grad]
    assert fixed == [f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")]
    theirs, own = dumped.teacher.state_dict(), made.model.state_dict()
    for side, (mine, kept) in product(("encoder", "decoder"), ((0, 2), (1, 5))):
        name = f"model.{side}.layers.{{}}.fc1.weight"
        assert torch.equal(own[name.format(mine)], theirs[name.format(kept)])
    assert (made.model.config.encoder_layers, made.model.config.decoder_layers) == (2, 2)
    paper = load_recipe("distilbert-init-paper").train.student.layers
    assert (paper.encoder, paper.decoder) == ([8, 16, 24], [2, 4, 6])  # 24 + 6: every 8, every 2


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("ckd-cross", (100_000, 25_000, 6.9877e-4, 4000, None, 0.1)),
        ("distilbert", (150_000, 32_768, 4e-4, 15_000, 1.0, 0.0)),
    ],
)
def test_schedules_are_the_papers(name, numbers):
    train = load_recipe(f"{name}-paper").train
    (hard,) = [term for term in train.objective if term.loss == "cross_entropy"]
    found = (train.max_steps, train.batch_tokens, train.optimizer.lr, train.schedule.warmup_steps)
    assert (*found, train.clip_norm, hard.label_smoothing) == numbers
    assert (train.optimizer.name, train.optimizer.betas) == ("adam", (0.9, 0.98))
    assert train.schedule.name == "inverse_sqrt"
    assert pytest.approx(6.9877e-4, rel=1e-4) == 512**-0.5 * 4000**-0.5
