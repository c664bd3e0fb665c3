"""A `full` cache trains as a teacher in the loop does: same order, same losses.

# N positions, V vocabulary
"""

import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from kdcache.formats.cache import open_cache
from kdcache.formats.keyed import text_key
from kdcache.models.passes import shift_right
from kdcache.train.batches.stream import BatchStream
from kdcache.train.losses.schedule import learning_rate
from kdcache.train.runs.loop import train
from kdcache.train.students.student import build_student

STEPS = 50


def online_losses(cache, recipe, teacher, temperature: float) -> list[float]:
    """Brute force: both models over all padded positions, torch's own losses and Adam."""
    section = recipe.train
    record = cache.tokenizer("teacher")
    student = build_student(section.student, record, teacher.config.vocab_size, section.seed)
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.9, 0.98), eps=1e-9)
    stream = BatchStream(
        cache, ["src", "tgt"], [], section.batch_tokens, section.seed, section.window_shards
    )
    batches, losses = iter(stream), []
    for number in range(1, STEPS + 1):
        torch.manual_seed(text_key(section.seed, "dropout", number) >> 1)
        (batch,) = next(batches).micro
        src, tgt = batch.streams["src"], batch.streams["tgt"]
        inputs = {
            "input_ids": src.ids,
            "attention_mask": src.mask.long(),
            "decoder_input_ids": shift_right(tgt.ids, 0, 0),
        }
        with torch.no_grad():
            soft = torch.softmax(teacher(**inputs).logits / temperature, -1)[tgt.mask]
        logits = student(**inputs).logits[tgt.mask]  # [N, V]
        nll = torch.nn.functional.cross_entropy(logits, tgt.flat)
        log_probs = torch.log_softmax(logits / temperature, -1)
        kl = torch.nn.functional.kl_div(log_probs, soft, reduction="batchmean")
        loss = 0.5 * nll + 0.5 * temperature**2 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), section.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(section.schedule, section.optimizer.lr, number, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    batches.close()
    return losses


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_full_cache_equals_the_teacher_in_the_loop(world, make_recipe, tmp_path, temperature):
    objective = [
        {"loss": "cross_entropy", "weight": 0.5},
        {"loss": "forward_kl", "weight": 0.5, "signal": "full", "temperature": temperature},
    ]
    recipe = make_recipe(
        objective=objective, max_steps=STEPS, dev=False, checkpoints={"average_last": 0}
    )
    train(recipe, world.cache, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    cached = [json.loads(line)["loss"] for line in lines]
    teacher = AutoModelForSeq2SeqLM.from_pretrained(world.teacher).eval()
    online = online_losses(open_cache(world.cache), recipe, teacher, temperature)
    assert cached == pytest.approx(online, abs=1e-4, rel=0)
    assert online[-1] < online[0] - 0.3
