"""A corpus that several processes tokenise becomes the same cache."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import Future

import pytest

from kdcache.dump import encode, samples
from kdcache.dump.runner import dump
from kdcache.errors import CorpusError, ModelError
from kdcache.text.corpus import RowBatch
from tests.dump.test_samples import CHATS, WORDS, recipe
from tests.dump.zoo import TOKENIZERS


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A corpus of 21 batches of rows, large enough for others to be asked."""
    monkeypatch.setattr(samples, "FEW_ROWS", 0)
    monkeypatch.setattr("kdcache.text.corpus.BATCH_ROWS", 20)
    TOKENIZERS["bert"](WORDS).save_pretrained(tmp_path / "bert")
    lines = [" ".join(WORDS[n % 7 : n % 11 + 1]) or "x" for n in range(420)]
    (tmp_path / "text").write_text("".join(line + "\n" for line in lines))
    return tmp_path


def of_text(root):
    corpus = {"fields": {"text": str(root / "text")}}
    streams = {"one": {"field": "text"}, "two": {"field": "text", "target": True}}
    return recipe(root, corpus, streams, shard_tokens=900)


def files_of(cache):
    found = (path for path in cache.rglob("*") if path.is_file() and ".status" not in path.parts)
    return {str(path.relative_to(cache)): path.read_bytes() for path in found}


def test_the_bytes_are_those_of_one_process(root):
    pids = set()
    original = encode._encode

    def noted(*arguments):
        pids.add(os.getpid())
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_encode", noted)
        dump(of_text(root), root / "alone")
        assert pids == {os.getpid()}
        pids.clear()
        dump(of_text(root), root / "together", processes=2)
        assert not pids
    files = files_of(root / "alone")
    assert len(files) > 6
    assert files_of(root / "together") == files


def test_what_is_wrong_with_a_row_is_said_as_by_one_process(root):
    lines = [f'{{"messages": {chat!r}}}'.replace("'", '"') for chat in CHATS] * 3
    lines[29] = '{"messages": "no list"}'
    (root / "chats").write_text("\n".join(lines) + "\n")
    TOKENIZERS["qwen2"](WORDS).save_pretrained(root / "qwen2")
    corpus = {"format": "jsonl", "path": str(root / "chats"), "fields": {"talk": "messages"}}
    streams = {"chat": {"field": "talk", "template": "chat"}}
    said = []
    for processes in (1, 2):
        made, out = recipe(root, corpus, streams, tokenizer="qwen2"), root / f"cache{processes}"
        with pytest.raises(CorpusError) as caught:
            dump(made, out, processes=processes)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "29" in said[0]


def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_one_line(root, monkeypatch):
    monkeypatch.setattr(encode, "_encode_here", die)
    with pytest.raises(ModelError, match="was killed, out of memory perhaps; use --processes 1"):
        dump(of_text(root), root / "cache", processes=2)


def test_batches_are_read_no_further_ahead_than_said(monkeypatch):
    read = []

    def batches():
        for n in range(40):
            read.append(n)
            yield RowBatch([n], {"text": ["a"]}, 1, 0)

    class Pool:
        def __init__(self, *arguments):
            self.futures = []

        def submit(self, call, batch):
            future = Future()
            future.set_result({})
            return future

        def shutdown(self, cancel_futures):
            assert cancel_futures

    monkeypatch.setattr(encode, "worker_pool", Pool)
    for taken, _ in enumerate(encode.encoded(batches(), {}, {}, 2)):
        assert len(read) <= taken + 2 * encode.AHEAD + 1
    assert taken == 39


PARENT = """
import os, signal, sys, time
from kdcache.processes import worker_pool

def begin(): pass

if __name__ == "__main__":
    pool = worker_pool(1, begin, ())
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


def test_processes_end_with_the_one_that_started_them(tmp_path):
    (tmp_path / "parent.py").write_text(textwrap.dedent(PARENT))
    command = [sys.executable, tmp_path / "parent.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            child = int(parent.stdout.readline())
            os.kill(child, 0)
        finally:
            parent.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("it outlived its parent")
