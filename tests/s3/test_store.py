"""The store against a real S3 server: conditions, sizes, errors, faults of the network."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kdcache.errors import StorageError
from kdcache.formats.integrity import digest_bytes
from kdcache.formats.stores import remote, retry
from kdcache.formats.stores.remote import RemoteStore
from tests.s3.conftest import remote_tree
from tests.s3.proxy import FAULTS, Proxy, seeded


def put(store, path, data):
    def write(stream):
        stream.write(data)
        return path

    return store.put_file("logits/hint", write)


def test_the_store_does_what_it_says(url):
    store = RemoteStore(url)
    assert not store.exists()
    store.create("commits/a.json", b"one")
    with pytest.raises(FileExistsError):
        store.create("commits/a.json", b"two")
    store.replace("b", b"1")
    store.replace("b", b"22")
    put(store, "logits/c", b"333")
    assert store.exists()
    assert store.names("") == ["b", "commits", "logits"]
    assert store.names("logits") == ["c"]
    assert store.names("nothing") == store.walk("nothing") == []
    assert store.walk("") == ["b", "commits/a.json", "logits/c"]
    assert [store.size(path) for path in store.walk("")] == [2, 3, 3]
    assert remote_tree(url) == {"b": b"22", "commits/a.json": b"one", "logits/c": b"333"}
    for path in ("nothing", "commits"):
        with pytest.raises(FileNotFoundError):
            store.size(path)
        with pytest.raises(FileNotFoundError):
            store.read(path)
    store.remove("commits")
    store.remove("b")
    store.remove("nothing")
    assert store.walk("") == ["logits/c"]


def test_what_another_client_wrote_is_seen_at_once(url):
    one, two = RemoteStore(url), RemoteStore(url)
    for number in range(3):
        two.create(f"commits/{number}", b"x")
        assert one.names("commits") == [str(n) for n in range(number + 1)]
        assert one.size(f"commits/{number}") == 1
    two.remove("commits/1")
    assert one.walk("commits") == ["commits/0", "commits/2"]


def test_of_writers_that_race_one_wins(url):
    ready = threading.Barrier(8)

    def create(number):
        store = RemoteStore(url)
        store.exists()
        ready.wait()
        try:
            store.create("commits/x", b"%d" % number)
        except FileExistsError:
            return None
        return number

    with ThreadPoolExecutor(8) as threads:
        winners = [number for number in threads.map(create, range(8)) if number is not None]
    assert len(winners) == 1
    assert RemoteStore(url).read("commits/x") == b"%d" % winners[0]


def test_large_files_go_up_in_parts_and_come_down_in_ranges(url, monkeypatch):
    monkeypatch.setattr(remote, "_S3_UPLOAD", {"chunksize": 5 << 20, "max_concurrency": 2})
    monkeypatch.setattr(remote, "RANGE_BYTES", 3 << 20)
    data = random.Random(1).randbytes(12 << 20)
    store = RemoteStore(url)
    put(store, "logits/big", data)
    assert store.size("logits/big") == len(data)
    assert b"".join(store.pieces("logits/big")) == data
    with store.open(digest_bytes(data, "logits/big")) as handle:
        assert handle.read() == data


@pytest.mark.parametrize("call", ["read", "names", "walk", "create"])
def test_a_bucket_that_is_not_there_is_said_at_once(call, monkeypatch):
    monkeypatch.setattr(retry, "sleep", None)  # would fail
    store = RemoteStore("s3://nobucket/cache")
    with pytest.raises(StorageError) as caught:
        getattr(store, call)(*["x", b"1"][: 2 if call == "create" else 1])
    assert str(caught.value).startswith("s3://nobucket/cache/x: cannot be ")
    assert str(caught.value).endswith(": no such bucket; make it, or correct the URL")


def test_credentials_that_are_missing_are_said_at_once(url, monkeypatch, tmp_path):
    monkeypatch.setattr(retry, "sleep", None)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StorageError, match="check the credentials and what they allow"):
        RemoteStore(url).read("x")


def test_a_right_that_is_missing_is_said_at_once(url, server, monkeypatch):
    monkeypatch.setattr(retry, "sleep", None)
    with Proxy(server.port, lambda request: "forbidden") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        with pytest.raises(StorageError) as caught:
            RemoteStore(url).read("x")
        assert proxy.seen == {"forbidden": 1}
    assert str(caught.value) == (
        f"{url}/x: cannot be read: 403 AccessDenied: a fault; check the credentials and what they "
        "allow (docs/stores.md)"
    )


def test_a_server_that_is_gone_is_given_up(url, monkeypatch):
    waits = []
    monkeypatch.setattr(retry, "sleep", waits.append)
    with Proxy(1) as proxy:
        gone = proxy.url
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", gone)
    with pytest.raises(StorageError, match=r"cannot be read: .* gave up after 10 tries") as caught:
        RemoteStore(url).read("x")
    assert "\n" not in str(caught.value)
    assert len(waits) == 9


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_the_network_passes(url, server, monkeypatch, fault):
    """Each request meets it the first time; what is done twice is done once."""
    monkeypatch.setattr(remote, "RANGE_BYTES", 1000)
    data = random.Random(2).randbytes(3500)

    def first(request):
        return fault if request.turn == 0 else None

    with Proxy(server.port, first) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        store = RemoteStore(url)
        made = True
        try:
            store.create("commits/x", b"record")
        except FileExistsError:  # by the try whose answer was lost
            made = False
        put(store, "logits/y", data)
        store.replace("z", b"1")
        assert store.read("commits/x") == b"record"
        assert b"".join(store.pieces("logits/y")) == data
        assert store.walk("") == ["commits/x", "logits/y", "z"]
        assert store.names("") == ["commits", "logits", "z"]
        store.remove("z")
        assert proxy.seen[fault] >= 10
    assert made == (fault not in ("error after", "drop after"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    assert remote_tree(url) == {"commits/x": b"record", "logits/y": data}


def test_random_faults_are_as_many_as_asked_for(url, server, monkeypatch):
    with Proxy(server.port, seeded(1, 0.05, 0.05)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        store = RemoteStore(url)
        for number in range(120):
            store.replace(f"status/{number}", b"%d" % number)
        assert store.names("status") == sorted(map(str, range(120)))
        faults = sum(proxy.seen.values()) - proxy.seen["passed"]
        assert 5 <= faults <= 25
        assert len(proxy.seen) > 3
