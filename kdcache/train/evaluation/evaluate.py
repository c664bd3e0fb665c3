"""Scoring a run or a model: translation quality, loss, size, speed, and a paired test."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import nn

from kdcache.errors import CorpusError, IdentityError, ModelError, RecipeError
from kdcache.formats.identity import sample_id
from kdcache.formats.stores.commit import storage_errors
from kdcache.models.loading import quiet_transformers, resolve_device
from kdcache.recipe import CorpusSection, EvaluateSection, Recipe, load_recipe
from kdcache.text.corpus import read_corpus
from kdcache.train.evaluation.baseline import (
    PREDICTIONS,
    RESULT,
    Baseline,
    check_kind,
    read_evaluation,
)
from kdcache.train.evaluation.causal import evaluate_causal
from kdcache.train.evaluation.labelled import evaluate_classifier
from kdcache.train.evaluation.latency import text_latency, timed
from kdcache.train.evaluation.masked import evaluate_masked
from kdcache.train.evaluation.paired import Said, compare, paired_test
from kdcache.train.evaluation.perturb import robustness
from kdcache.train.evaluation.tasks import evaluate_tasks
from kdcache.train.evaluation.translate import translate
from kdcache.train.runs.run import last_stage, write_text
from kdcache.train.runs.validate import score, score_shuffled
from kdcache.train.students.student import fixed_tables, model_class
from kdcache.train.students.two_tokenizers import load_tokenizers

HYPOTHESES = "hypotheses.txt"
#: Takes a loaded model; returns the result, and by task what was said of each sample.
Scorer = Callable[..., tuple[dict[str, Any], Mapping[str, Said]]]
#: Kinds of students that translate nothing, to what scores them.
SCORERS: dict[str, Scorer] = {
    "masked_lm": evaluate_masked,
    "masked_seq2seq": evaluate_masked,
    "causal_lm": evaluate_causal,
    "classifier": evaluate_classifier,
    "multi_task": evaluate_tasks,
}


def evaluate(
    path: str | Path,
    section: EvaluateSection | None = None,
    against: str | Path | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Score a run directory, or any transformers encoder-decoder directory.

    Args:
        path: a run of `kdcache train` (of several stages the last is scored), or a transformers
            model directory.
        section: how to score; a run's own recipe without it.
        against: an evaluated run to compare with by a paired bootstrap test.
        out: where `evaluation.json` and `hypotheses.txt` go (or `predictions.jsonl`); the run
            itself without it. The results of a plain model directory are not written unless this
            is given.

    Returns:
        bleu, chrf (`score`, `signature`), `loss_nats` per token, `perplexity`, `accuracy`,
        the same under `shuffled` with every target beside another target's source,
        `parameters`, `latency_seconds` of one sentence at a time, `sentences_per_second` of
        the batched search, `perturbed` where that is asked for, and `against` with the paired
        test. Of a run whose student is a masked
        LM what `masked.evaluate_masked` returns, of a causal LM `causal.evaluate_causal`, of a
        classifier `labelled.evaluate_classifier`, of a model of several tasks
        `tasks.evaluate_tasks`, with `parameters`, `latency_seconds` of one text and `perturbed`.

    Raises:
        RecipeError: no corpus to score on.
        ModelError: nothing at `path` that could be scored, or `against` was not evaluated.
        IdentityError: `against` was scored on other references, or says something else.
        StorageError: the results could not be written.
    """
    path = last_stage(Path(path))
    against = None if against is None else last_stage(Path(against))
    recipe = _recipe_of(path)
    if recipe is None and not (path / "config.json").is_file():
        raise ModelError(f"{path}: neither a run of `kdcache train` nor a transformers model")
    if section is None:
        section = recipe.evaluate if recipe is not None else EvaluateSection()
    if section.corpus is None:
        raise RecipeError(
            f"{path}: no text to score on; give a recipe with evaluate.corpus, or "
            "--evaluate.corpus.fields.src FILE --evaluate.corpus.fields.tgt FILE (of a student "
            "that does not translate, the one field that it reads)"
        )
    if recipe is not None and _kind_of(recipe) in SCORERS:
        return _evaluate_other(path, section, recipe, against, out)
    src, tgt = _read_pairs(section.corpus, recipe)
    digest = sample_id([*src, *tgt]).hex()
    # Read before the long search: a comparison that cannot be made is refused at once.
    baseline = None if against is None else _read_baseline(Path(against), path, digest)
    model, tokenizer, directory = load_model(path, section)
    result, hypotheses = score_model(model, tokenizer, src, tgt, section, path.name)
    result |= {"model": str(directory), "references_digest": digest}
    if baseline is not None:
        test = paired_test(hypotheses, baseline, tgt, section.bootstrap_samples)
        result["against"] = {"run": str(against), **test}
    target = Path(out) if out is not None else (path if recipe is not None else None)
    if target is not None:
        write_evaluation(target, result, HYPOTHESES, hypotheses)
    return result


def _evaluate_other(
    path: Path,
    section: EvaluateSection,
    recipe: Recipe,
    against: str | Path | None,
    out: str | Path | None,
) -> dict[str, Any]:
    """Score a run whose student does not translate."""
    kind = _kind_of(recipe)
    baseline = None if against is None else Baseline.open(Path(against), path, kind)
    model, tokenizer, directory = load_model(path, section, kind)
    scorer = partial(SCORERS[kind], model, tokenizer, section, recipe)
    scores, said = scorer(baseline)
    result = scores | {
        "model": str(directory),
        "parameters": count_parameters(model),
        "device": str(model.device),
        # What a masked_seq2seq will do one sentence at a time, another stage teaches it.
        **(text_latency(model, section, kind) if kind != "masked_seq2seq" else {}),
        **robustness(model, section.perturb, lambda: scorer()[0]),
    }
    if baseline is not None:
        tests = compare(said, baseline, section.bootstrap_samples)
        result["against"] = {"run": str(against), **tests}
    lines = [line for name, one in said.items() for line in one.lines(name)]
    write_evaluation(Path(out) if out is not None else path, result, PREDICTIONS, lines)
    return result


def score_model(
    model: Any,
    tokenizer: Any,
    src: Sequence[str],
    tgt: Sequence[str],
    section: EvaluateSection,
    name: str = "model",
) -> tuple[dict[str, Any], list[str]]:
    """Scores of a loaded model on sentence pairs, as `evaluate` returns them, and hypotheses."""
    began = time.perf_counter()
    hypotheses = _search(model, tokenizer, src, section, f"translate with {name}")
    seconds = time.perf_counter() - began
    plain = score(model, tokenizer, src, tgt, model.device, section.batch_tokens)
    shuffled = score_shuffled(model, tokenizer, src, tgt, model.device, section.batch_tokens)
    result = {
        "num_sentences": len(src),
        "num_beams": section.num_beams,
        "length_penalty": section.length_penalty,
        **corpus_scores(hypotheses, tgt),
        "num_tokens": plain.num_tokens,
        "loss_nats": plain.loss_nats,
        "perplexity": plain.perplexity,
        "accuracy": plain.accuracy,
        "shuffled": {"loss_nats": shuffled.loss_nats, "perplexity": shuffled.perplexity},
        "parameters": count_parameters(model),
        "device": str(model.device),
        "sentences_per_second": len(src) / seconds,
        **_latency(model, tokenizer, src, section),
    }

    def again() -> dict[str, float]:
        found = _search(model, tokenizer, src, section, None)
        plain = score(model, tokenizer, src, tgt, model.device, section.batch_tokens)
        scores = {name: one["score"] for name, one in corpus_scores(found, tgt).items()}
        return scores | {"loss_nats": plain.loss_nats, "accuracy": plain.accuracy}

    result |= robustness(model, section.perturb, again)
    return result, hypotheses


def corpus_scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """BLEU and chrF of sacreBLEU with its default settings, each with its signature."""
    found = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        value = metric.corpus_score(list(hypotheses), [list(references)]).score
        found[name] = {"score": value, "signature": str(metric.get_signature())}
    return found


def count_parameters(model: Any) -> dict[str, int]:
    """Learned parameters, shared ones once, and those of them in no embedding or output matrix.

    Fixed tables, such as Marian's sinusoidal positions, are not counted: papers do not.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    output = model.get_output_embeddings()
    if output is not None:
        embeddings.add(id(output.weight))
    fixed = {id(table) for table in fixed_tables(model)}
    sizes = {id(one): one.numel() for one in model.parameters() if id(one) not in fixed}
    rest = sum(size for key, size in sizes.items() if key not in embeddings)
    return {"total": sum(sizes.values()), "without_embeddings": rest}


def load_model(
    path: Path, section: EvaluateSection, kind: str = "encoder_decoder"
) -> tuple[Any, Any, Path]:
    """Model on its device in float32, its tokenizer (or both), and the directory they came from.

    Args:
        path: a run, or a transformers directory.
        section: which checkpoint of a run, and the device.
        kind: of the student.

    Raises:
        ModelError: the directory holds no model, or the run no such checkpoint.
    """
    quiet_transformers()
    directory = path
    if _is_run(path):
        directory = path / section.checkpoint
        if not (directory / "config.json").is_file():
            there = [name for name in ("best", "averaged", "last") if (path / name).is_dir()]
            raise ModelError(
                f"{path}: no checkpoint {section.checkpoint!r}; it has "
                f"{', '.join(there) or 'none yet'}: finish `kdcache train`, or set "
                "evaluate.checkpoint"
            )
    try:
        model, info = model_class(kind).from_pretrained(
            directory,
            dtype="float32",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory}: {str(error).splitlines()[0]}") from None
    # They would be random numbers. A pooler is not run where none was trained.
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
        raise ModelError(
            f"{directory}: it lacks {len(missing)} weights, {missing[0]} among them; expected what "
            "this kdcache trains: train it again"
        )
    tokenizer = load_tokenizers(directory)
    return model.to(resolve_device(section.device)).eval(), tokenizer, directory


def write_evaluation(out: Path, result: dict[str, Any], name: str, lines: Sequence[str]) -> None:
    """Write both files of an evaluation, the result last: it stands for the whole.

    Args:
        out: the directory.
        result: of the evaluation.
        name: of the file of what was said of each sample.
        lines: of that file.

    Raises:
        StorageError: the disk refused.
    """
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / name, "".join(line + "\n" for line in lines))
    write_text(out / RESULT, json.dumps(result, indent=1, sort_keys=True) + "\n")


def _kind_of(recipe: Recipe) -> str:
    """What a recipe's student is."""
    student = recipe.train.student
    return "encoder_decoder" if student is None else student.kind


def _is_run(path: Path) -> bool:
    """A run holds its resolved recipe."""
    return (path / "recipe.yaml").is_file()


def _recipe_of(path: Path) -> Recipe | None:
    """The resolved recipe of a run; None for a plain model directory."""
    return load_recipe(str(path / "recipe.yaml")) if _is_run(path) else None


def _read_pairs(corpus: CorpusSection, recipe: Recipe | None) -> tuple[list[str], list[str]]:
    """Sources and references, under the names of fields that the run trained on."""
    names = ["src", "tgt"]
    if recipe is not None:
        streams = recipe.dump.streams
        for side, stream in enumerate((recipe.train.source, recipe.train.target)):
            if stream in streams:
                names[side] = streams[stream].field
    missing = [name for name in names if name not in corpus.fields]
    if missing:
        raise RecipeError(
            f"evaluate.corpus.fields has {sorted(corpus.fields)}; scoring needs {names}"
        )
    batches = list(read_corpus(corpus))
    src, tgt = ([text for batch in batches for text in batch.fields[name]] for name in names)
    if not src:
        raise CorpusError("evaluate.corpus has no row to score; check its files and limit")
    return src, tgt


def _search(
    model: Any,
    tokenizer: Any,
    src: Sequence[str],
    section: EvaluateSection,
    description: str | None,
) -> list[str]:
    """Hypotheses as single lines: a line break inside one would shift all that follow."""
    found = translate(
        model,
        tokenizer,
        src,
        num_beams=section.num_beams,
        length_penalty=section.length_penalty,
        max_length_ratio=section.max_length_ratio,
        batch_tokens=section.batch_tokens,
        description=description,
    )
    return [" ".join(text.split("\n")) for text in found]


def _latency(
    model: Any, tokenizer: Any, src: Sequence[str], section: EvaluateSection
) -> dict[str, Any]:
    """Seconds of one sentence at a time, tokens to text, over spread sentences."""
    count = min(section.latency_sentences, len(src))

    def run(number: int) -> object:
        return _search(model, tokenizer, [src[len(src) * number // count]], section, None)

    return timed(model, run, count, {})


def _read_baseline(against: Path, path: Path, digest: str) -> list[str]:
    """Hypotheses of an evaluated run, once its references are known to be these."""
    other = read_evaluation(against)
    check_kind(against, path, other, "encoder_decoder")
    if other["references_digest"] != digest:
        raise IdentityError(
            f"{against} was scored on other text than {path} "
            f"({other['num_sentences']} sentences, digest {other['references_digest'][:8]}; "
            f"here {digest[:8]}): evaluate both on one corpus"
        )
    text = (against / HYPOTHESES).read_text(encoding="utf-8")
    lines = text.split("\n")[:-1]
    if len(lines) != other["num_sentences"]:
        raise IdentityError(
            f"{against / HYPOTHESES} has {len(lines)} lines, its evaluation "
            f"{other['num_sentences']}: evaluate {against} again"
        )
    return lines
