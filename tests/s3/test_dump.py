"""Dumps to a real S3 server: the bytes of a local dump, whatever happens on the way."""

import itertools
import signal
import threading
from pathlib import Path

import pytest

from kdcache.dump.runner import dump
from kdcache.formats.checks.verify import verify_cache
from tests.s3.conftest import local_copy_variables, remote_tree
from tests.s3.proxy import Proxy, seeded


def start(forks, world, url: str, **variables: str):
    """A dump in a process of its own, with the local copy of this test."""
    argv = ["dump", str(world.file), "--out", url]
    return forks.start(argv, Path("none"), environment=local_copy_variables() | variables)


def same_bytes(url: str, world) -> None:
    """The cache at a URL is the local one, byte for byte."""
    found, expected = remote_tree(url), {k: v for k, v in world.tree.items() if k[0] != "."}
    assert sorted(found) == sorted(expected)
    assert [path for path in found if found[path] != expected[path]] == []


def test_a_dump_to_s3_has_the_bytes_of_a_local_one(url, world):
    summary = dump(world.recipe, url)
    same_bytes(url, world)
    assert summary["cache"] == url
    assert summary["shards"] > 3
    report = verify_cache(url)
    assert not report.faults
    again = dump(world.recipe, url)  # nothing is left to do
    assert all(not signal["shards_written"] for signal in again["signals"].values())
    same_bytes(url, world)


def test_a_dump_under_faults_loses_nothing(url, world, server, monkeypatch):
    """5% of the requests are answered 500 or 503, 5% of the connections break."""
    with Proxy(server.port, seeded(3, 0.05, 0.05)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        dump(world.recipe, url)
        assert not verify_cache(url).faults
        assert sum(proxy.seen.values()) - proxy.seen["passed"] >= 10
        assert {"error before", "error after"} < set(proxy.seen)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    same_bytes(url, world)


def killed(forks, world, url: str, server, moment: int, when: str) -> bool:
    """Whether a dump was killed at its n-th request that changes something; it may have fewer."""
    changes, started = itertools.count(), threading.Event()

    def fault(request):
        changing = request.method in ("PUT", "POST", "DELETE")
        return when if changing and next(changes) == moment else None

    def kill():
        started.wait()
        process.send(signal.SIGKILL)

    with Proxy(server.port, fault, kill) as proxy:
        process = start(forks, world, url, AWS_ENDPOINT_URL_S3=proxy.url)
        started.set()
        ended = process.wait()
    assert ended.code in (0, -signal.SIGKILL), ended.err
    return ended.code != 0


def resume_and_compare(forks, world, url: str, server) -> None:
    ended = start(forks, world, url).wait()
    assert ended.code == 0, ended.err
    same_bytes(url, world)


@pytest.mark.parametrize(("moment", "when"), [(14, "drop after"), (25, "cut in")])
def test_a_killed_dump_resumes_to_the_same_bytes(forks, world, url, server, moment, when):
    assert killed(forks, world, url, server, moment, when)
    resume_and_compare(forks, world, url, server)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "when"), list(enumerate(["drop before", "drop after", "cut in"]))
)
def test_a_dump_killed_at_many_changes_resumes_to_the_same_bytes(
    forks, world, url, server, first, when
):
    """At every sixth request that changes something: before it, after it, or within its body."""
    for moment in range(2 * first, 200, 6):
        place = f"{url}/{moment}"
        if not killed(forks, world, place, server, moment, when):
            break
        resume_and_compare(forks, world, place, server)
    assert 30 < moment < 190


def test_two_dumps_at_once_make_one_cache(forks, world, url):
    first = start(forks, world, url)
    second = start(forks, world, url)
    for ended in (first.wait(), second.wait()):
        assert ended.code == 0, ended.err
    same_bytes(url, world)


def test_ranks_write_one_cache(forks, world, url):
    """Each writes its own shards; the second waits for the samples of the first."""
    running = [start(forks, world, url, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for ended in [process.wait() for process in running]:
        assert ended.code == 0, ended.err
    same_bytes(url, world)
