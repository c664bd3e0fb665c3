"""The bi-attentive BiLSTM against a few lines for one example, and its sizes."""

import pytest
import torch
from transformers import AutoModel

from kdcache.models.bi_attentive import BiAttentive, BiAttentiveConfig
from kdcache.models.multi_task import MultiTaskConfig, MultiTaskModel
from kdcache.models.tasks import Task
from kdcache.recipe import load_recipe

SIZES = {
    "vocab_size": 40,
    "embedding_size": 6,
    "feed_forward_size": 5,
    "lstm_size": 4,
    "hidden_size": 7,
    "pad_token_id": None,
}


def make(**keys):
    torch.manual_seed(3)
    model = BiAttentive(BiAttentiveConfig(**SIZES | keys)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return model


def lstm(module, inputs):
    """[S, 2H] states of one sequence, gate by gate."""

    def direction(one, rows):
        into, over = one.weight_ih_l0, one.weight_hh_l0
        bias = one.bias_ih_l0 + one.bias_hh_l0
        state = cell = torch.zeros(over.shape[1], dtype=inputs.dtype)
        found = []
        for row in rows:
            gate_in, forget, new, out = (into @ row + over @ state + bias).chunk(4)
            cell = forget.sigmoid() * cell + gate_in.sigmoid() * new.tanh()
            state = out.sigmoid() * cell.tanh()
            found.append(state)
        return torch.stack(found)

    back = direction(module.back, inputs.flip(0)).flip(0)
    return torch.cat([direction(module.ahead, inputs), back], 1)


def reference(model, x, y, bi_attention):
    """[D] of one example: two lists of ids."""
    sides = []
    for ids in (x, y):
        embedded = model.embeddings.weight[torch.tensor(ids)]
        read = (embedded @ model.feed_forward.weight.T + model.feed_forward.bias).clamp(min=0)
        sides.append(lstm(model.encoder, read))
    x, y = sides
    if bi_attention:
        affinity = x @ y.T
        context_x = affinity.softmax(0).T @ x  # every column of A adds up to 1
        context_y = affinity.T.softmax(0).T @ y  # every column of A^T
        x, y = (
            torch.cat([own, own - other, own * other], 1)
            for own, other in ((x, context_y), (y, context_x))
        )
    pooled = []
    for side in (x, y):
        states = lstm(model.integrator, side)
        score = (states @ model.pool_score.weight[0] + model.pool_score.bias).softmax(0)
        pooled += [states.max(0).values, states.mean(0), score @ states]
    return model.output.weight @ torch.cat(pooled) + model.output.bias


#: First text, and the second, empty where there is none.
PAIRS = [([5, 9, 2, 7], [3, 8]), ([4], [6, 6, 1, 30, 2]), ([11, 12, 13], []), ([39], [])]


def batch_of(pairs):
    length = max(len(x) + len(y) for x, y in pairs) + 2  # padding behind the longest too
    ids, mask, types = torch.full((len(pairs), length), 17), *torch.zeros(2, len(pairs), length)
    for row, (x, y) in enumerate(pairs):
        both = len(x) + len(y)
        ids[row, :both] = torch.tensor(x + y)
        mask[row, :both], types[row, len(x) : both] = 1, 1
    return ids, mask, types.long()


@pytest.mark.parametrize("bi_attention", [True, False])
def test_it_is_the_papers_equations_example_by_example(bi_attention):
    model = make(bi_attention=bi_attention)
    ids, mask, types = batch_of(PAIRS)
    found = model(ids, mask, types)
    expected = torch.stack([reference(model, x, y or x, bi_attention) for x, y in PAIRS])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    own = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    other = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)
    # The two sides are told apart, and which of them comes first counts.
    turned = model(*batch_of([(y, x) for x, y in PAIRS[:1]]))
    assert (turned - found[:1]).abs().max() > 1e-3
    # A text alone needs neither mask nor types.
    alone = model(torch.tensor([PAIRS[2][0]]))
    torch.testing.assert_close(alone, expected[2:3])


def test_padding_and_what_stands_there_change_nothing():
    model = make()
    ids, mask, types = batch_of(PAIRS)
    found = model(ids, mask, types)
    others = ids.masked_fill(mask == 0, 23)
    torch.testing.assert_close(model(others, mask, types), found, rtol=0, atol=0)
    for row in range(len(PAIRS)):
        own = [part[row][mask[row].bool()][None] for part in (ids, mask, types)]
        alone = model(*own)[0]
        torch.testing.assert_close(alone, found[row], rtol=1e-12, atol=1e-12)
    # Types without a second text, or without a first, are a text alone.
    ids, mask = ids[:1], mask[:1]
    for types in (torch.zeros_like(ids), torch.ones_like(ids)):
        once = model(ids, mask, types)
        torch.testing.assert_close(once, model(ids, mask))


def test_it_is_saved_and_loaded_as_transformers_models_are(tmp_path):
    model = BiAttentive(BiAttentiveConfig(**SIZES | {"pad_token_id": 0, "dropout": 0.5}))
    assert model.embeddings.weight[0].abs().sum() == 0
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if "bias" not in n)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, BiAttentive)
    assert all(getattr(again.config, name) == size for name, size in SIZES.items() if size)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(again(ids), model.eval()(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    # In half precision masks are those of its own range.
    half = model.eval().to(torch.bfloat16)
    assert half(*batch_of(PAIRS)).isfinite().all()


@pytest.mark.parametrize(("name", "millions"), [("mkd-bilstm", 10.2), ("mkd-bilstm-plain", 8.1)])
def test_its_size_is_near_the_papers(name, millions):
    student = load_recipe(f"{name}-paper").train.student
    assert len(student.tasks) == 7
    # Two classes each, but of MNLI; the ranking and the similarity say a number.
    scores = dict.fromkeys(student.tasks, 2) | {"mnli": 3, "qnli": 1, "stsb": 1}
    heads = {
        task: {"kind": "similarity"} if count == 1 else {"labels": [str(n) for n in range(count)]}
        for task, count in scores.items()
    }
    config = MultiTaskConfig(
        text_config=student.config | {"vocab_size": 30522},
        tasks={task: Task.of(tree).to_dict() for task, tree in heads.items()},
        head_size=student.head_size,
    )
    with torch.device("meta"):
        model = MultiTaskModel(config)
    beside = model.num_parameters() - model.get_input_embeddings().weight.numel()
    assert beside / 1e6 == pytest.approx(millions, abs=0.05)
    defaults = BiAttentiveConfig(vocab_size=30522, bi_attention=name == "mkd-bilstm")
    for key in student.config:
        if key != "model_type":
            assert getattr(defaults, key) == student.config[key]
