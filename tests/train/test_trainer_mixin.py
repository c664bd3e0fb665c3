"""transformers' Trainer on batches of a cache: what it takes, refuses, and leaves alone."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import MarianConfig, MarianMTModel

import kdcache
from kdcache.errors import KDCacheError, ModelError, RecipeError, TrainingError
from kdcache.train.runs.trainer_mixin import STEP, DistillationCollator
from tests.formats.labels import SENTENCES, VOCAB, make_cache
from tests.report.kinds import make_kinds

pytest.importorskip("accelerate")

CROSS_ENTROPY = {"loss": "cross_entropy", "weight": 1.0}
FORWARD_KL = {"loss": "forward_kl", "weight": 0.5}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    texts = {side: lines * 3 for side, lines in SENTENCES.items()}
    return make_cache(tmp_path_factory.mktemp("mixin") / "cache", sentences=texts)


def make_batches(path, signals=("logits",), **options):
    return kdcache.batches(path, ["src", "tgt"], signals, **({"batch_tokens": 30} | options))


def make_student(**changed) -> MarianMTModel:
    torch.manual_seed(0)
    sides = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    layers = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in sides.items()}
    keys = {"vocab_size": VOCAB, "d_model": 8, "dropout": 0.0, "pad_token_id": 0} | layers
    special = {"eos_token_id": 2, "decoder_start_token_id": 0, "max_position_embeddings": 32}
    return MarianMTModel(MarianConfig(**(keys | special | changed)))


def make_trainer(out, dataset, objective=(CROSS_ENTROPY, FORWARD_KL), base=None, **options):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    class Distiller(kdcache.hf.DistillationMixin, base or Seq2SeqTrainer):
        pass

    keys = {"student", "eval_dataset", "data_collator"}
    given = {key: options.pop(key) for key in keys & options.keys()}
    arguments = {"max_steps": 3, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments |= {"logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant"}
    return Distiller(
        model=given.pop("student", None) or make_student(),
        args=Seq2SeqTrainingArguments(output_dir=str(out), **(arguments | options)),
        train_dataset=dataset,
        objective=objective,
        **given,
    )


def test_micro_batches_are_as_many_for_every_global_batch(path):
    batches = make_batches(path, accumulate=5, epochs=1)
    items = list(batches.micro_batches())
    whole = list(make_batches(path, accumulate=5, epochs=1))
    assert len(items) == 5 * len(whole)
    assert any(not item.micro for item in items)
    for number, step in enumerate(whole):
        mine = items[5 * number : 5 * number + 5]
        rows = [row for item in mine for batch in item.micro for row in batch.rows.tolist()]
        assert rows == [row for batch in step.micro for row in batch.rows.tolist()]
        assert all(item.counts == step.counts and item.state == step.state for item in mine)


def test_the_collator_gives_what_models_take(path):
    """The model's own loss over a whole global batch is the mean cross-entropy over its tokens."""
    step = next(iter(make_batches(path)))
    found = DistillationCollator("src", "tgt")(step)
    assert found.pop(STEP) is step
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    assert int((found["labels"] != -100).sum()) == step.num_tokens
    assert found["labels"][found["labels"] != -100].tolist() == (
        step.micro[0].streams["tgt"].flat.tolist()
    )
    model = make_student().eval()
    out = model(**found)
    log_probs = out.logits.double().log_softmax(-1)
    mask = step.micro[0].streams["tgt"].mask
    gold = log_probs[mask].gather(1, step.micro[0].streams["tgt"].flat[:, None])
    assert out.loss.item() == pytest.approx(-gold.mean().item(), rel=1e-6)


def logged(trainer) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("base", ["Trainer", "Seq2SeqTrainer"])
def test_cross_entropy_alone_is_transformers_own_loss(path, tmp_path, base):
    """transformers' Trainer without the mixin, fed by the collator alone, is the oracle."""
    import transformers

    kind = getattr(transformers, base)
    ours = make_trainer(tmp_path, make_batches(path), [CROSS_ENTROPY], kind, max_steps=6)
    loader = ours.get_train_dataloader()

    class Plain(kind):
        def get_train_dataloader(self):
            collate = DistillationCollator("src", "tgt")

            def without(item):
                return {key: value for key, value in collate(item).items() if key != STEP}

            return DataLoader(loader.dataset, batch_size=None, collate_fn=without)

    theirs = Plain(model=make_student(), args=ours.args, train_dataset=loader.dataset)
    expected = logged(theirs)
    ours.train_dataset.load_state_dict(make_batches(path).state_dict())
    assert len(expected) == 6
    assert logged(ours) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulate", [2, 5])
def test_accumulated_steps_are_those_of_whole_batches(path, tmp_path, accumulate):
    """transformers' Marian does worse: it adds up the means of the micro-batches."""
    whole = logged(make_trainer(tmp_path, make_batches(path), max_steps=6))
    batches = make_batches(path, accumulate=accumulate)
    options = {"gradient_accumulation_steps": accumulate, "max_steps": 6}
    assert logged(make_trainer(tmp_path, batches, **options)) == pytest.approx(whole, rel=1e-5)


def test_schedules_of_the_terms_move_with_the_steps(path, tmp_path):
    faded = {
        **CROSS_ENTROPY,
        "weight_schedule": {"shape": "steps", "jumps": [{"step": 3, "value": 0}]},
    }
    trainer = make_trainer(tmp_path, make_batches(path), [faded, {**FORWARD_KL, "weight": 1e-9}])
    trainer.train()
    found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert min(found[:2]) > 1
    assert found[2] < 1e-6


def test_what_is_logged_counts_epochs_of_the_cache(path, tmp_path):
    trainer = make_trainer(tmp_path, make_batches(path), max_steps=12)
    trainer.train()
    found = [line["epoch"] for line in trainer.state.log_history if "loss" in line]
    expected = [float(step.epoch) for step, _ in zip(make_batches(path), range(12), strict=False)]
    assert found == expected
    assert found[-1] > 0


def test_training_ends_with_the_batches(path, tmp_path):
    trainer = make_trainer(tmp_path, make_batches(path, epochs=1), max_steps=100)
    trainer.train()
    assert trainer.state.global_step == len(list(make_batches(path, epochs=1)))


def test_bfloat16_is_near_float32(path, tmp_path):
    found = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, make_batches(path), bf16=bf16, max_steps=1)
        trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=2e-2)


def test_evaluation_is_transformers_own(path, tmp_path):
    def collate(rows):
        return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}

    rows = [{"input_ids": [4, 5, 2], "labels": [5, 2]}, {"input_ids": [6, 5, 2], "labels": [4, 2]}]
    student = make_student()
    data = {"eval_dataset": rows, "data_collator": collate}
    trainer = make_trainer(tmp_path, make_batches(path), student=student, **data)
    with torch.no_grad():
        expected = student.eval()(**collate(rows)).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


class Wrapper(torch.nn.Module):
    """Stands where DDP stands, and counts what passes through it."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def test_losses_are_made_within_a_wrappers_forward_pass(path, tmp_path):
    trainer = make_trainer(tmp_path, make_batches(path))
    inputs = next(iter(trainer.get_train_dataloader()))
    student = trainer.model
    plain = trainer.compute_loss(student, inputs)
    trainer.accelerator.unwrap_model = lambda model: getattr(model, "module", model)
    wrapped = Wrapper(student)
    found = trainer.compute_loss(wrapped, inputs)
    assert wrapped.calls == 1
    assert torch.equal(found, plain)
    assert "forward" not in student.__dict__  # and the student's own is back
    inputs["input_ids"] = None

    def broken(**_):
        raise ValueError("no memory")

    student.forward = broken
    with pytest.raises(ValueError, match="no memory"):
        trainer.compute_loss(wrapped, inputs)
    assert student.forward is broken


def test_an_item_of_no_samples_gives_every_parameter_a_gradient_of_zero(path, tmp_path):
    batches = make_batches(path, accumulate=5)
    trainer = make_trainer(tmp_path, batches, gradient_accumulation_steps=5)
    items = iter(trainer.get_train_dataloader())
    empty = next(item for item in items if not item[STEP].micro)
    trainer.compute_loss(trainer.model, empty).backward()
    wanted = [one for one in trainer.model.parameters() if one.requires_grad]
    assert all(one.grad is not None and not one.grad.any() for one in wanted)


def one_line(error: type[KDCacheError], message: str):
    return pytest.raises(error, match=rf"\A[^\n]*{re.escape(message)}[^\n]*\Z")


@pytest.mark.parametrize(
    ("batches", "arguments", "message"),
    [
        ({"accumulate": 2}, {}, "gradient_accumulation_steps is 1, the batches were made with"),
        ({}, {"gradient_accumulation_steps": 2}, "give kdcache.batches accumulate=2"),
        ({"world": 2, "rank": 1}, {}, "rank is 0, the batches were made with rank 1"),
        ({"world": 2}, {}, "world is 1, the batches were made with world 2"),
        ({}, {"torch_compile": True}, "torch_compile cannot go with DistillationMixin"),
        ({"signals": []}, {}, "give kdcache.batches signals=['logits']"),
    ],
)
def test_batches_that_do_not_fit_the_arguments_are_refused(
    path, tmp_path, batches, arguments, message
):
    with one_line(TrainingError, message):
        make_trainer(tmp_path, make_batches(path, **batches), **arguments)


def test_other_data_sets_are_refused(path, tmp_path):
    with one_line(TrainingError, "train_dataset: is list; expected kdcache.batches"):
        make_trainer(tmp_path, [{"input_ids": [1]}])
    with one_line(TrainingError, "train_dataset: is ['tgt']; expected"):
        make_trainer(tmp_path, kdcache.batches(path, ["tgt"]))
    trainer = make_trainer(tmp_path, make_batches(path), eval_dataset=make_batches(path))
    with one_line(TrainingError, "eval_dataset: batches of a cache are for training"):
        trainer.evaluate()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ([], "has no term with a weight"),
        ([{"loss": "forward_kl", "signal": "nothing"}], "cache has no signal 'nothing'"),
        ([{"loss": "forward_kl", "wieght": 1}], "train.objective.0"),
    ],
)
def test_terms_that_are_wrong_are_refused(path, tmp_path, objective, message):
    with one_line(RecipeError, message):
        make_trainer(tmp_path, make_batches(path), objective)


def test_terms_with_parameters_of_their_own_are_refused(tmp_path):
    cache = make_kinds(tmp_path / "cache").path
    batches = kdcache.batches(cache, ["src", "tgt"], ["hidden"])
    with one_line(RecipeError, "hidden_mse learns parameters beside the student"):
        make_trainer(tmp_path / "run", batches, [{"loss": "hidden_mse", "signal": "hidden"}])


def test_a_student_with_too_few_positions_is_refused(path, tmp_path):
    student = make_student(max_position_embeddings=4)
    with one_line(ModelError, "takes 4 positions, a sample of the cache has 6 tokens"):
        make_trainer(tmp_path, make_batches(path), student=student, max_steps=100).train()


def test_a_checkpoint_that_knows_no_order_is_refused(path, tmp_path):
    trainer = make_trainer(tmp_path, make_batches(path), save_strategy="steps", save_steps=3)
    trainer.train()
    file = Path(tmp_path) / "checkpoint-3" / "trainer_state.json"
    tree = json.loads(file.read_text("utf-8"))
    assert tree["stateful_callbacks"].pop("OrderCallback")["attributes"]["order"]["batch"] >= 0
    file.write_text(json.dumps(tree), "utf-8")
    again = make_trainer(tmp_path, make_batches(path), max_steps=5)
    with one_line(TrainingError, "step 3 says nothing of where the batches stood"):
        again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("restore", [False, True])
def test_a_run_goes_on_also_where_transformers_rebuilds_its_callbacks(path, tmp_path, restore):
    whole = make_trainer(tmp_path / "whole", make_batches(path), max_steps=7)
    whole.train()
    arguments = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "run", make_batches(path), max_steps=4, **arguments).train()
    arguments["restore_callback_states_from_checkpoint"] = restore
    again = make_trainer(tmp_path / "run", make_batches(path), max_steps=7, **arguments)
    again.train(resume_from_checkpoint=True)
    found, expected = (
        [(line["epoch"], line["loss"]) for line in one.state.log_history if "loss" in line]
        for one in (again, whole)
    )
    assert found == expected
