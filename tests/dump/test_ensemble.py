"""Ensembles against means worked out from their members, each loaded by transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcache.dump.teachers.ensemble import Ensemble
from kdcache.dump.teachers.loading import load_teacher, teacher_positions
from kdcache.errors import ModelError
from kdcache.recipe import TeacherSection
from tests.dump import zoo as models
from tests.dump.reading import ROWS, batch_of, close, encoded, plain
from tests.dump.test_teacher import copied


def load(*directories, needs_attention=False, **keys):
    section = TeacherSection(path=[str(path) for path in directories], device="cpu", **keys)
    return load_teacher(section, needs_attention)


def sibling(directory, to, seed, **config):
    """A model of the same shape with other weights."""
    copied(directory, to, **config)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(to / "model.safetensors")
    changed = {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in weights.items()
    }
    save_file(changed, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.fixture
def trio(zoo, tmp_path):
    """Directories of three models that differ in their weights."""

    def make(architecture, head="lm"):
        first = zoo(architecture, head)
        return [first, *(sibling(first, tmp_path / str(seed), seed) for seed in (1, 2))]

    return make


def test_probabilities_are_averaged(world, trio):
    paths = trio("gpt2")
    teacher = load(*paths)
    samples = encoded(paths[0], [world.src[row] for row in ROWS])
    batch = batch_of(teacher, samples)
    at = batch.mask.clone()
    at[:, 0] = False
    with torch.no_grad():
        each = [
            torch.cat([plain(path, "gpt2")(torch.tensor([ids])).logits[0, :-1] for ids in samples])
            for path in paths
        ]
    expected = torch.stack([logits.softmax(-1) for logits in each]).mean(0)
    found = teacher.logits(batch, at)
    close(found.exp(), expected)
    close(found.logsumexp(-1), torch.zeros(len(found)))  # they are log-probs
    assert (expected - each[0].softmax(-1)).abs().max() > 0.05  # no member is the mean
    for num_rows in (1, 7):
        pieces = list(teacher.logits_in_pieces(batch, at, num_rows * teacher.vocab_size))
        assert len(pieces[0]) == num_rows
        close(torch.cat(pieces), found)
    assert len(teacher.members) == 3


def test_a_zero_stays_a_zero_and_a_nan_a_nan(zoo):
    teacher = load(zoo("gpt2"), zoo("gpt2"))
    for member in teacher.members:
        member.lm_head.bias = torch.nn.Parameter(torch.zeros(teacher.vocab_size))
        member.lm_head.bias.data[5] = -torch.inf
    batch = batch_of(teacher, [[7, 8]])
    at = torch.tensor([[False, True]])
    found = teacher.logits(batch, at)
    assert found.isneginf().nonzero().tolist() == [[0, 5]]
    assert not found.isnan().any()
    teacher.members[1].lm_head.bias.data[6] = torch.nan
    assert teacher.logits(batch, at).isnan().all()


def test_class_probabilities_are_averaged(world, trio):
    paths = trio("bert", "classifier")
    teacher = load(*paths)
    batch, each = scores_of(world, teacher, paths, "classifier")
    expected = torch.stack([scores.softmax(-1) for scores in each]).mean(0)
    close(teacher.scores(batch).softmax(-1), expected)
    assert teacher.labels == ["no", "maybe", "yes"]
    with pytest.raises(ModelError, match="has no hidden states; it has classes"):
        teacher.hidden(batch, "encoder", [0])
    with pytest.raises(ModelError, match="has no attentions"):
        teacher.attention(batch, "encoder", [1])


def test_scores_of_a_regressor_are_averaged(world, trio):
    paths = trio("roberta", "regressor")
    teacher = load(*paths)
    batch, each = scores_of(world, teacher, paths, "regressor")
    close(teacher.scores(batch), torch.stack(each).mean(0))


def test_probabilities_of_many_labels_are_averaged_one_by_one(world, zoo, tmp_path):
    paths = [
        sibling(
            zoo("bert", "classifier"),
            tmp_path / str(seed),
            seed,
            problem_type="multi_label_classification",
        )
        for seed in (1, 2)
    ]
    teacher = load(*paths)
    assert teacher.problem == "multi_label"
    batch, each = scores_of(world, teacher, paths, "classifier")
    close(teacher.scores(batch).sigmoid(), torch.stack([s.sigmoid() for s in each]).mean(0))
    for member in teacher.members:  # so sure that a probability rounds to 1
        member.classifier.bias.data += 60
    close(teacher.scores(batch), torch.stack(each).add(60).mean(0), atol=1, rtol=0)


def scores_of(world, teacher, paths, head):
    """A batch, and the scores that each model gives by itself."""
    samples = encoded(paths[0], [world.src[row] for row in ROWS])
    architecture = teacher.record.model_type
    with torch.no_grad():
        each = [
            torch.cat([plain(path, architecture, head)(torch.tensor([s])).logits for s in samples])
            for path in paths
        ]
    return batch_of(teacher, samples), each


@pytest.mark.parametrize("architecture", ["marian", "t5", "llama", "bert"])
def test_parameters_are_averaged(trio, architecture):
    paths = trio(architecture)
    teacher = load(*paths, average="parameters", needs_attention=True)
    model = teacher.members[0]
    several = [plain(path, architecture).state_dict() for path in paths]
    found = model.state_dict()
    assert set(found) == set(several[0])
    for name, tensor in found.items():
        close(tensor, torch.stack([state[name] for state in several]).mean(0), atol=1e-6)
    changed = [name for name in found if not torch.equal(found[name], several[0][name])]
    assert "final_logits_bias" in changed or architecture != "marian"
    assert len(teacher.members) == 1
    assert teacher.num_layers(teacher.sides[0]) == 2 + (architecture == "bert")
    # Tied weights are still one, and were not averaged twice.
    assert model.get_output_embeddings().weight.shape[0] == teacher.vocab_size


def test_parameters_of_bfloat16_are_summed_in_float32(zoo, tmp_path):
    paths = [sibling(zoo("gpt2"), tmp_path / str(seed), seed) for seed in range(5)]
    teacher = load(*paths, average="parameters", dtype="bfloat16")
    name = "transformer.wte.weight"
    several = [plain(p, "gpt2", dtype=torch.bfloat16).state_dict()[name].float() for p in paths]
    assert torch.equal(
        teacher.members[0].state_dict()[name], torch.stack(several).mean(0).to(torch.bfloat16)
    )


def test_records(trio, zoo):
    paths = trio("gpt2")
    teacher = load(*paths)
    record = teacher.record
    assert record.path == " + ".join(map(str, paths))
    assert (record.kind, record.model_type, record.dtype) == ("causal_lm", "gpt2", "float32")
    assert record.average == "probabilities"
    assert [member.path for member in record.members] == list(map(str, paths))
    assert record.members[0] == load(paths[0]).record
    assert load(paths[0]).record.average is None  # one member is no ensemble
    others = {
        "order": load(*reversed(paths)),
        "members": load(*paths[:2]),
        "average": load(*paths, average="parameters"),
    }
    digests = {name: other.record.digest for name, other in others.items()}
    assert len({record.digest, *digests.values()}) == 4
    assert others["average"].record.average == "parameters"
    assert others["average"].record.members == record.members
    assert type(record).model_validate_json(record.model_dump_json()) == record


def test_limits_are_those_of_the_least(zoo, tmp_path):
    short = tmp_path / "short"
    models_config = json.loads((zoo("llama") / "config.json").read_text())
    assert models_config["max_position_embeddings"] == 96
    copied(zoo("llama"), short, max_position_embeddings=40)
    assert load(zoo("llama"), short).max_positions == 40
    section = TeacherSection(path=[str(zoo("llama")), str(short)])
    assert teacher_positions(section) == 40
    assert load(zoo("t5"), zoo("t5")).max_positions is None


@pytest.mark.parametrize(
    ("one", "two", "keys", "message"),
    [
        (("gpt2",), ("bert",), {}, "the same kind: .* 'causal_lm', .* 'masked_lm'"),
        (("gpt2",), ("llama",), {}, "the same vocab_size"),
        (("bert", "classifier"), ("bert", "regressor"), {}, "the same labels"),
        (("bert", "encoder"), ("bert", "encoder"), {}, "of kind encoder has neither"),
        (("gpt2",), ("llama",), {"average": "parameters"}, "built alike: .* config_digest"),
    ],
)
def test_members_that_do_not_fit(zoo, one, two, keys, message):
    with pytest.raises(ModelError, match=message) as error:
        load(zoo(*one), zoo(*two), **keys)
    assert "\n" not in str(error.value)
    assert str(zoo(*one)) in str(error.value)


def test_an_ensemble_of_encoders_may_average_parameters(zoo):
    teacher = load(zoo("bert", "encoder"), zoo("bert", "encoder"), average="parameters")
    assert not isinstance(teacher, Ensemble)
    assert teacher.num_layers("encoder") == models.SIZES["bert"]["num_hidden_layers"]
