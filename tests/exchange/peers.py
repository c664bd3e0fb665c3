"""What others dump, written by their own rules from distributions that are known."""

import gzip
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.dump.zoo import TOKENIZERS
from tests.train.conftest import make_lines


@dataclass
class Dumped:
    """Texts, and what a teacher said of every token of each but the first: [T - 1, V] nats."""

    root: Path
    tokenizer: object
    texts: list[str]
    chats: list[list[dict]]
    ids: list[list[int]]
    log_probs: list[np.ndarray]

    @property
    def vocab_size(self):
        return len(self.tokenizer)


def distributions(ids, vocab_size, generator):
    """Log-probs of the next tokens that favour them; one in six lies far down."""
    logits = generator.normal(size=(len(ids) - 1, vocab_size)) * 2
    for position, token in enumerate(ids[1:]):
        logits[position, token] += -6 if position % 6 == 5 else 6
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def dumped(root, count=30):
    lines = make_lines(count)[0]
    words = sorted({word for line in lines for word in line.split()})
    tokenizer = TOKENIZERS["qwen2"](words)
    tokenizer.save_pretrained(root / "tokenizer")
    generator = np.random.default_rng(3)
    chats = [
        [{"role": "user", "content": line}, {"role": "assistant", "content": lines[-n]}]
        for n, line in enumerate(lines)
    ]
    ids = [tokenizer(line)["input_ids"] for line in lines]
    log_probs = [distributions(one, len(tokenizer), generator) for one in ids]
    return Dumped(root, tokenizer, lines, chats, ids, log_probs)


def top(log_probs, k):
    """[N, k] ids and log-probs, the most probable first."""
    ids = np.argsort(-log_probs, axis=1)[:, :k]
    return ids, np.take_along_axis(log_probs, ids, axis=1)


def write_jsonl(path, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# vLLM: a dictionary a token, with the token itself though it be none of the k.


def vllm_row(text, ids, log_probs, k, shift=0):
    positions = [None]
    for position, token in enumerate(ids[1:]):
        said = log_probs[(position + shift) % len(log_probs)]
        order = np.argsort(-said)
        rank = {int(i): n + 1 for n, i in enumerate(order)}
        kept = [int(i) for i in order[:k]]
        kept = [*kept, token] if token not in kept and not shift else kept
        positions.append(
            {
                str(i): {"logprob": float(said[i]), "rank": rank[i], "decoded_token": "?"}
                for i in kept
            }
        )
    return {"prompt": text, "prompt_token_ids": ids, "prompt_logprobs": positions}


def write_vllm(data, name="vllm.jsonl", k=5, **keys):
    rows = [
        vllm_row(*row, k, **keys) for row in zip(data.texts, data.ids, data.log_probs, strict=True)
    ]
    return write_jsonl(data.root / name, rows)


# axolotl: one item for each of the last tokens; the second form has the ids in a list of their own.


def chat_tokens(data, number):
    """Tokens of a chat, and what is said of all but the first of them."""
    ids = data.tokenizer.apply_chat_template(data.chats[number])
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    generator = np.random.default_rng(100 + number)
    return ids, distributions(ids, data.vocab_size, generator)


def write_axolotl(data, name="axolotl.jsonl", k=5, second=False, shift=0):
    rows = []
    for number, chat in enumerate(data.chats):
        ids, values = top(chat_tokens(data, number)[1], k)
        ids, values = np.roll(ids, shift, axis=0), np.roll(values, shift, axis=0)
        row = {"messages": chat, "logprobs": values.tolist(), "target_token_ids": ids.tolist()}
        if not second:
            del row["target_token_ids"]
            row["llm_text_generation_vllm_logprobs"] = [
                [
                    {"token": f"token_id:{i}", "logprob": float(v)}
                    for i, v in zip(some, few, strict=True)
                ]
                for some, few in zip(ids, values, strict=True)
            ]
            del row["logprobs"]
        rows.append(row)
    return write_jsonl(data.root / name, rows)


# NeMo-Aligner: item t reads tokens[t] and predicts labels[t]; rows of a batch are padded alike.


def write_nemo(data, name="nemo.jsonl", k=5, log_sum=True, shift=0, prompt=2):
    longest = max(map(len, data.ids)) + 1
    rows = []
    for index, (ids, log_probs) in enumerate(zip(data.ids, data.log_probs, strict=True)):
        num = len(ids) - 1
        pad = longest - num
        logits = log_probs - log_probs.max(axis=1, keepdims=True)
        kept, values = top(logits, k)
        kept, values = np.roll(kept, shift, axis=0), np.roll(values, shift, axis=0)
        sums = np.roll(np.log(np.exp(logits).sum(axis=1)), shift)
        eos = data.tokenizer.eos_token_id
        row = {
            "tokens": ids[:-1] + [eos] * pad,
            "labels": ids[1:] + [eos] * pad,
            "loss_mask": [0.0] * prompt + [1.0] * (num - prompt) + [0.0] * pad,
            "topk_logits": values.tolist() + [[0.0] * k] * pad,
            "topk_token_ids": kept.tolist() + [list(range(k))] * pad,
            "index": index,
        }
        if log_sum:
            row["log_sum_exp_logits"] = sums.tolist() + [0.0] * pad
        rows.append(row)
    return write_jsonl(data.root / name, rows)


# DistillKit: bits of ids, highest first; bytes of log-probs: exact ones, a curve, bins of the rest.

COMPRESSED = {
    "exact": {"exact_k": 5, "exact_dtype": "float32"},
    "delta": {"exact_k": 5, "exact_dtype": "float32", "delta_encoding": True},
    "curve": {
        "exact_k": 2,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1, "sqrt"],
        "term_dtype": "float32",
    },
    "bins": {
        "exact_k": 1,
        "exact_dtype": "float16",
        "polynomial_terms": [0, 1],
        "normalize_t": True,
        "residual_bins": [
            {"scale_dtype": "float16", "element_bits": 5, "num_elements": 2},
            {"scale_dtype": "float32", "element_bits": 1, "num_elements": 1},
        ],
    },
}


def bits_of(numbers, bits):
    """Bytes of whole numbers, by text: slow, and plain."""
    text = "".join(format(int(number), f"0{bits}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return [int(text[at : at + 8], 2) for at in range(0, len(text), 8)]


def bytes_of(values, dtype):
    """Bytes of floats, and the floats that they are."""
    if dtype == "bfloat16":
        high = (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return list(high.tobytes()), (high.astype(np.uint32) << 16).view(np.float32)
    kept = np.asarray(values, dtype)
    return list(kept.tobytes()), kept


def compress(values, config):
    """Bytes of one position's descending log-probs, and the values that they stand for."""
    values = np.asarray(values, np.float64)
    if config.get("delta_encoding"):
        values = np.diff(values, prepend=0.0)
    exact = config["exact_k"]
    data, kept = bytes_of(values[:exact], config["exact_dtype"])
    rest = values[exact:]
    fit = np.zeros(len(rest))
    if config.get("polynomial_terms"):
        at = np.linspace(0, 1, len(rest)) if config.get("normalize_t") else np.arange(len(rest))
        x = np.stack(
            [np.sqrt(at) if t == "sqrt" else at**t for t in config["polynomial_terms"]], axis=1
        )
        coefficients = np.linalg.lstsq(x, rest, rcond=None)[0]
        more, coefficients = bytes_of(coefficients, config.get("term_dtype", "float32"))
        data += more
        fit = x @ coefficients.astype(np.float64)
    start = 0
    for one in config.get("residual_bins", []):
        bits, num = one["element_bits"], one["num_elements"]
        some = rest[start : start + num] - fit[start : start + num]
        most = np.abs(some).max() or 1.0
        more, scale = bytes_of([most / max(1, 2 ** (bits - 1))], one["scale_dtype"])
        low, high = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        steps = np.clip(np.round(some / float(scale[0])), low, high) - low
        data += more + bits_of(steps, bits)
        meant = 2 * steps - 1 if bits == 1 else steps + low
        fit[start : start + num] += meant * float(scale[0])
        start += num
    found = np.concatenate([kept.astype(np.float64), fit])
    return data, np.cumsum(found) if config.get("delta_encoding") else found


def write_distillkit(data, folder, k=5, kind="exact", shift=0, extra=0, plain=False, pad=None):
    """Files of a capture; what each label means is returned beside their path."""
    folder.mkdir()
    config = {"d": data.vocab_size + 1, "k": k, "delta_encoding": False} | COMPRESSED[kind]
    bits = math.ceil(math.log2(config["d"]))
    columns = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": []}
    if plain:
        columns = {"input_ids": [], "token_ids": [], "top_values": []}
    meant = []
    for tokens, log_probs in zip(data.ids, data.log_probs, strict=True):
        kept, values = top(np.roll(log_probs, shift, axis=0), k)
        kept = np.concatenate([kept, kept[:1].repeat(extra, axis=0)])
        values = np.concatenate([values, values[:1].repeat(extra, axis=0)])
        if pad is not None:  # a capture adds one, so that the last token has a label before it
            tokens = [*tokens, pad]
            kept, values = (np.concatenate([a, a[-1:]]) for a in (kept, values))
        packed = [compress(some, config) for some in values]
        columns["input_ids"].append(tokens)
        if plain:
            columns["token_ids"].append(kept.tolist())
            columns["top_values"].append(values.tolist())
        else:
            columns["compressed_logprobs"].append([one for one, _ in packed])
            columns["bytepacked_indices"].append([bits_of(some, bits) for some in kept])
        meant.append(values if plain else np.array([found for _, found in packed]))
    types = {
        "input_ids": pa.list_(pa.uint64()),
        "token_ids": pa.list_(pa.list_(pa.uint64())),
        "top_values": pa.list_(pa.list_(pa.float32())),
    }
    bytes_type = pa.list_(pa.list_(pa.uint8()))
    table = pa.table(
        {name: pa.array(rows, types.get(name, bytes_type)) for name, rows in columns.items()}
    )
    half = len(table) // 2
    pq.write_table(table.slice(0, half), folder / "data_0.parquet", row_group_size=7)
    pq.write_table(table.slice(half), folder / "data_1.parquet", row_group_size=7)
    if not plain:
        (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    return [folder / "data_0.parquet", folder / "data_1.parquet"], meant
