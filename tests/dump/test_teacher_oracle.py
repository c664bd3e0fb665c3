"""Every number of a teacher against transformers, run by itself one sample at a time."""

import numpy as np
import pytest
import torch

from kdcache.dump.teachers.loading import load_teacher
from kdcache.errors import ModelError
from kdcache.models.loading import load_tokenizer
from kdcache.recipe import TeacherSection
from tests.dump import zoo as models
from tests.dump.reading import (
    ROWS,
    batch_of,
    close,
    encoded,
    left_padded,
    mask_of,
    masked_samples,
    plain,
)

LM = models.ARCHITECTURES
SIDES = [
    *[(name, "lm", side) for name in models.ENCODER_DECODERS for side in ("encoder", "decoder")],
    *[(name, "lm", "decoder") for name in models.CAUSAL],
    *[(name, "lm", "encoder") for name in models.MASKED],
    *[(name, "classifier", "encoder") for name in ("bart", "t5", *models.MASKED)],
    *[(name, "regressor", "decoder") for name in models.CAUSAL],
    *[(name, "encoder", "encoder") for name in ("t5", "bart", *models.MASKED)],
    ("llama", "encoder", "decoder"),
]


def load(directory, needs_attention=False, **keys):
    section = TeacherSection(path=str(directory), device="cpu", **keys)
    return load_teacher(section, needs_attention)


def told(world, directory, architecture):
    """Samples, their sources (or None), and which tokens are predicted."""
    if architecture in models.ENCODER_DECODERS:
        samples = encoded(directory, [world.tgt[row] for row in ROWS], target=True)
        sources = encoded(directory, [world.src[row] for row in ROWS])
        return samples, sources, [np.ones(len(ids), dtype=bool) for ids in samples]
    samples = encoded(directory, [world.src[row] for row in ROWS])
    if architecture in models.MASKED:
        samples, chosen = masked_samples(directory, samples)
        return samples, None, chosen
    return samples, None, [np.arange(len(ids)) > 0 for ids in samples]


def plain_logits(model, architecture, sample, source, chosen):
    """[N, V] of one sample, without padding."""
    ids = torch.tensor([sample])
    with torch.no_grad():
        if architecture in models.ENCODER_DECODERS:
            return model(input_ids=torch.tensor([source]), labels=ids).logits[0]
        logits = model(input_ids=ids).logits[0]
    if architecture in models.CAUSAL:
        return logits[:-1]
    return logits[torch.from_numpy(chosen)]


def expected_logits(model, architecture, samples, sources, chosen):
    sources = sources or [None] * len(samples)
    rows = zip(samples, sources, chosen, strict=True)
    return torch.cat([plain_logits(model, architecture, *row) for row in rows])


@pytest.mark.parametrize("architecture", LM)
@pytest.mark.parametrize("attention", [None, "eager"])
def test_logits(world, zoo, architecture, attention):
    directory = zoo(architecture)
    teacher = load(directory, attention=attention)
    samples, sources, chosen = told(world, directory, architecture)
    batch = batch_of(teacher, samples, sources)
    at = mask_of(chosen, batch.ids.shape[1])
    found = teacher.logits(batch, at)
    assert found.shape == (at.sum(), teacher.vocab_size)
    extra = models.EXTRA_ROWS.get(architecture, 0)  # rows beyond the tokenizer's ids
    assert teacher.vocab_size == len(load_tokenizer(directory)) + extra
    expected = expected_logits(
        plain(directory, architecture), architecture, samples, sources, chosen
    )
    close(found, expected)
    assert expected.std() > 0.5  # not flat, or nothing would be compared


@pytest.mark.parametrize("architecture", [*models.CAUSAL, *models.MASKED])
def test_logits_of_left_padding(world, zoo, architecture):
    directory = zoo(architecture)
    teacher, model = load(directory), plain(directory, architecture)
    samples, _, chosen = told(world, directory, architecture)
    batch = batch_of(teacher, samples)
    found = teacher.logits(batch, mask_of(chosen, batch.ids.shape[1]))
    ids, mask, positions = left_padded(samples, teacher.pad_id)
    options = {"position_ids": positions}
    if architecture == "roberta":
        options = {}  # reads its positions off the padding
    elif architecture == "distilbert":
        options = {"inputs_embeds": distilbert_embeddings(model, ids, positions)}
    with torch.no_grad():
        logits = model(
            **({} if "inputs_embeds" in options else {"input_ids": ids}),
            attention_mask=mask,
            **options,
        ).logits
    flat = [
        row[len(row) - len(hits) :][torch.from_numpy(np.roll(hits, -1 if is_causal else 0))]
        for is_causal in [architecture in models.CAUSAL]
        for row, hits in zip(logits, chosen, strict=True)
    ]
    close(found, torch.cat(flat))


def distilbert_embeddings(model, ids, positions):
    """Its words, with the positions that padding on the left would move cancelled out."""
    table = model.distilbert.embeddings
    moved = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return (
            table.word_embeddings(ids)
            + table.position_embeddings(positions)
            - table.position_embeddings(moved)
        )


def test_logits_of_left_padded_sources(world, zoo):
    directory = zoo("t5")
    teacher, model = load(directory), plain(directory, "t5")
    samples, sources, _ = told(world, directory, "t5")
    batch = batch_of(teacher, samples, sources)
    found = teacher.logits(batch, batch.mask)
    ids, mask, _ = left_padded(sources, teacher.pad_id)
    labels = batch.ids.masked_fill(~batch.mask, -100)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    close(found, logits[batch.mask])


@pytest.mark.parametrize("architecture", LM)
def test_pieces_are_the_whole_and_no_larger(world, zoo, architecture):
    teacher = load(zoo(architecture))
    samples, sources, chosen = told(world, zoo(architecture), architecture)
    batch = batch_of(teacher, samples, sources)
    at = mask_of(chosen, batch.ids.shape[1])
    projected, bodies = [], []
    model = teacher.members[0]
    head = model.get_output_embeddings()
    head.register_forward_hook(
        lambda module, args, output: projected.append(output.numel() // output.shape[-1])
    )
    for module in model.modules():
        if module is not head and hasattr(module, "weight"):
            module.register_forward_hook(lambda module, args, output: bodies.append(1))
    whole = teacher.logits(batch, at)
    forwards = len(bodies)
    assert forwards > 0
    for num_rows in (1, 7, 1000):
        projected.clear()
        bodies.clear()
        pieces = list(teacher.logits_in_pieces(batch, at, num_rows * teacher.vocab_size))
        assert [len(piece) for piece in pieces[:-1]] == [num_rows] * (len(pieces) - 1)
        close(torch.cat(pieces), whole, atol=1e-5)
        assert max(projected) <= num_rows
        assert len(bodies) == forwards  # however many pieces


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "t5"])
def test_nothing_to_predict(zoo, architecture):
    teacher = load(zoo(architecture))
    batch = batch_of(teacher, [[5], [6]], [[5], [6]])
    at = torch.zeros_like(batch.mask)
    assert teacher.logits(batch, at).shape == (0, teacher.vocab_size)
    assert torch.cat(list(teacher.logits_in_pieces(batch, at, 10))).shape[0] == 0


def plain_stack(world, directory, architecture, head, side, wanted):
    """Samples, sources and, for each sample, all layers of one side (no batch dimension)."""
    model = plain(directory, architecture, head, attn_implementation="eager")
    samples, sources, _ = told(world, directory, architecture)
    if head != "lm" or side == "encoder":
        samples, sources = encoded(directory, [world.src[row] for row in ROWS]), None
    if head in ("classifier", "regressor") and architecture in models.ENCODER_DECODERS:
        samples[-1] = [model.config.eos_token_id]
    found = []
    for row, sample in enumerate(samples):
        ids = torch.tensor([sample])
        inputs = {"input_ids": ids}
        if architecture in models.ENCODER_DECODERS and head == "lm":
            inputs = {"input_ids": ids, "labels": ids}
            if sources is not None:
                inputs["input_ids"] = torch.tensor([sources[row]])
        with torch.no_grad():
            outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        name = wanted
        if hasattr(outputs, f"{side}_{wanted}"):
            name = f"{side}_{wanted}"
        found.append([layer[0] for layer in getattr(outputs, name)])
    return samples, sources, found


@pytest.mark.parametrize(("architecture", "head", "side"), SIDES)
def test_hidden_states(world, zoo, architecture, head, side):
    directory = zoo(architecture, head)
    teacher = load(directory)
    samples, sources, expected = plain_stack(
        world, directory, architecture, head, side, "hidden_states"
    )
    layers = list(range(len(expected[0])))
    assert teacher.num_layers(side) == len(layers) - 1
    batch = batch_of(teacher, samples, sources)
    found = teacher.hidden(batch, side, layers)  # [B, T, L, D]
    assert found.shape == (*batch.ids.shape, len(layers), teacher.width(side))
    for row, layers_of in enumerate(expected):
        close(found[row, : len(samples[row])], torch.stack(layers_of, dim=1))
    some = teacher.hidden(batch, side, [layers[-1], 0])
    assert torch.equal(some, found[:, :, [-1, 0]])
    with pytest.raises(ModelError, match=f"no layer {len(layers)}; expected 0 to {layers[-1]}"):
        teacher.hidden(batch, side, [len(layers)])
    with pytest.raises(ModelError, match="no layer -1"):
        teacher.hidden(batch, side, [-1])


@pytest.mark.parametrize(("architecture", "head", "side"), SIDES)
def test_attentions(world, zoo, architecture, head, side):
    directory = zoo(architecture, head)
    teacher = load(directory, needs_attention=True)
    samples, sources, expected = plain_stack(
        world, directory, architecture, head, side, "attentions"
    )
    batch = batch_of(teacher, samples, sources)
    count = teacher.num_layers(side)
    assert count == len(expected[0])
    assert teacher.heads(side) == expected[0][0].shape[0]
    found = teacher.attention(batch, side, list(range(1, count + 1)))  # [B, L, H, T, T]
    width = batch.ids.shape[1]
    assert found.shape == (len(samples), count, teacher.heads(side), width, width)
    for row, layers_of in enumerate(expected):
        length = len(samples[row])
        close(found[row, :, :, :length, :length], torch.stack(layers_of))
        assert not found[row, :, :, :length, length:].any()
    assert torch.equal(teacher.attention(batch, side, [count]), found[:, -1:])
    with pytest.raises(ModelError, match=f"no layer 0; expected 1 to {count}"):
        teacher.attention(batch, side, [0])


def test_attentions_must_be_asked_for(zoo):
    teacher = load(zoo("bert"))
    batch = batch_of(teacher, [[5, 6]])
    with pytest.raises(ModelError, match="loaded without attentions"):
        teacher.attention(batch, "encoder", [1])
    with pytest.raises(ModelError, match="'sdpa' and an attention signal needs eager"):
        load(zoo("bert"), needs_attention=True, attention="sdpa")


@pytest.mark.parametrize("head", ["classifier", "regressor"])
@pytest.mark.parametrize("architecture", models.CLASSIFIERS)
def test_scores(world, zoo, architecture, head):
    directory = zoo(architecture, head)
    teacher, model = load(directory), plain(directory, architecture, head)
    samples = encoded(directory, [world.src[row] for row in ROWS])
    if architecture in models.ENCODER_DECODERS:
        end = model.config.eos_token_id
        samples[-1] = [end]
        samples.append([*samples[0], *samples[1]])  # two ends
    batch = batch_of(teacher, samples)
    found = teacher.scores(batch)
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([ids])).logits for ids in samples])
    close(found, expected)
    assert expected.std(dim=0).min() > 0.05  # samples differ
    labels = ["no", "maybe", "yes"] if head == "classifier" else ["score"]
    assert teacher.labels == labels
    assert teacher.problem == ("classification" if head == "classifier" else "regression")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_scores_without_a_padding_id(zoo, architecture):
    directory = zoo(architecture, "classifier")
    teacher, model = load(directory), plain(directory, architecture, "classifier")
    assert model.config.pad_token_id is None
    everything = list(range(teacher.input_size))[:90]
    samples = [[0, 0], [7, 0, 0, 0], [5], everything]  # the id that batches are padded with
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([ids])).logits for ids in samples])
    close(teacher.scores(batch_of(teacher, samples)), expected)
    assert teacher.members[0].config.pad_token_id is None
    teacher.members[0].set_input_embeddings(torch.nn.Embedding(90, 24))  # no id is left
    with torch.no_grad():
        expected = torch.cat([teacher.members[0](torch.tensor([ids])).logits for ids in samples])
    close(teacher.scores(batch_of(teacher, samples)), expected)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma2"])
def test_scores_of_left_padding(world, zoo, architecture):
    directory = zoo(architecture, "classifier")
    teacher, model = load(directory), plain(directory, architecture, "classifier")
    samples = encoded(directory, [world.src[row] for row in ROWS])
    ids, mask, positions = left_padded(samples, model.config.pad_token_id)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    close(teacher.scores(batch_of(teacher, samples)), expected)


def test_a_text_without_an_end_has_no_class(zoo):
    teacher = load(zoo("bart", "classifier"))
    with pytest.raises(ModelError, match=r"a text has no end token \(id 2\)"):
        teacher.scores(batch_of(teacher, [[0, 5, 2], [0, 5]]))


@pytest.mark.parametrize("architecture", models.MASKED)
def test_pairs(world, zoo, architecture):
    directory = zoo(architecture, "classifier")
    teacher, model = load(directory), plain(directory, architecture, "classifier")
    tokenizer = load_tokenizer(directory)
    pairs = [(world.src[row], world.tgt[row]) for row in ROWS]
    encodings = [tokenizer(*pair) for pair in pairs]
    samples = [encoding["input_ids"] for encoding in encodings]
    segments = None
    if architecture == "bert":
        segments = [encoding["token_type_ids"] for encoding in encodings]
    with torch.no_grad():
        each = [tokenizer(*pair, return_tensors="pt") for pair in pairs]
        expected = torch.cat([model(**inputs).logits for inputs in each])
    close(teacher.scores(batch_of(teacher, samples, segments=segments)), expected)
    if architecture == "bert":
        assert (teacher.scores(batch_of(teacher, samples)) - expected).abs().max() > 0.01
        states = teacher.hidden(batch_of(teacher, samples, segments=segments), "encoder", [3])
        with torch.no_grad():
            last = model(**each[0], output_hidden_states=True).hidden_states[-1][0]
        close(states[0, : len(samples[0]), 0], last)


def test_token_types_that_are_not_there(zoo):
    teacher = load(zoo("bert", "classifier"))
    with pytest.raises(ModelError, match="has 2 token types, the stream has type 2"):
        teacher.scores(batch_of(teacher, [[5, 6]], segments=[[0, 2]]))
    one = load(zoo("distilbert", "classifier"))  # knows none, reads none
    plain_scores = one.scores(batch_of(one, [[5, 6]]))
    assert torch.equal(one.scores(batch_of(one, [[5, 6]], segments=[[0, 2]])), plain_scores)


@pytest.mark.parametrize("architecture", LM)
def test_bfloat16(world, zoo, architecture):
    directory = zoo(architecture)
    teacher = load(directory, dtype="bfloat16")
    assert teacher.record.dtype == "bfloat16"
    samples, sources, chosen = told(world, directory, architecture)
    batch = batch_of(teacher, samples, sources)
    at = mask_of(chosen, batch.ids.shape[1])
    found = torch.cat(list(teacher.logits_in_pieces(batch, at, 5 * teacher.vocab_size)))
    assert found.dtype == torch.bfloat16
    model = plain(directory, architecture, dtype=torch.bfloat16)
    expected = expected_logits(model, architecture, samples, sources, chosen)
    error = (found.float() - expected.float()).abs()
    assert error.mean() < 0.01 * expected.float().std()


def test_a_vocabulary_of_more_than_two_bytes(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=151_936, hidden_size=8, **sizes)).eval()
    models.sharpen(model)
    model.save_pretrained(tmp_path)
    teacher = load(tmp_path)
    assert teacher.vocab_size == teacher.input_size == 151_936
    ids = torch.tensor([[1, 151_935, 70_000, 151_643]])
    batch = batch_of(teacher, ids.tolist())
    at = mask_of([[False, True, False, True]], 4)
    with torch.no_grad():
        expected = model(ids).logits[0, [0, 2]]
    close(teacher.logits(batch, at), expected)
    pieces = list(teacher.logits_in_pieces(batch, at, 4))
    assert [len(piece) for piece in pieces] == [1, 1]


def test_nan_passes_through(zoo):
    teacher = load(zoo("gpt2"))
    batch = batch_of(teacher, [[5, 6, 7], [8, 9]])
    at = mask_of([[False, True, True], [False, True]], 3)
    with torch.no_grad():
        teacher.members[0].lm_head.weight[20] = float("nan")
    found = torch.cat(list(teacher.logits_in_pieces(batch, at, teacher.vocab_size)))
    assert found.isnan().nonzero()[:, 1].tolist() == [20, 20, 20]
