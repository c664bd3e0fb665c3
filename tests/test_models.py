import pytest
import torch
from torch import nn

from kdcache.errors import ModelError
from kdcache.models import loading
from kdcache.models.loading import resolve_device
from kdcache.models.passes import recorded, replayed, shift_right


def test_shift_right():
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    assert shift_right(labels, pad=1, start=2).tolist() == [[2, 5, 6], [2, 8, 1]]


@pytest.mark.parametrize(
    ("path", "message"),
    [("./none", "no such directory"), ("a/b/c", "no such directory"), ("who/what", "the hub")],
)
def test_no_such_model(path, message, monkeypatch):
    def refuse(*args, **keys):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError, match=message) as error:
        loading.model_directory(path)
    assert "\n" not in str(error.value)


def test_a_hub_id_is_resolved_to_its_commit(tmp_path, monkeypatch):
    snapshot = tmp_path / "0123abc"
    snapshot.mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(snapshot))
    assert loading.model_directory("who/what", "main") == (snapshot, "0123abc")
    with pytest.raises(ModelError, match="no revision"):
        loading.model_directory(str(tmp_path), "main")


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ModelError, match="device 'warp'"):
        resolve_device("warp")
    with pytest.raises(ModelError, match=r"found . cuda devices"):
        resolve_device("cuda:99")


def test_a_body_that_is_replayed_does_not_run():
    body = nn.Linear(2, 2)
    with recorded(body) as outputs:
        expected = body(torch.ones(1, 2))
    assert outputs == [expected]
    with replayed(body, "what was said"):
        assert body(torch.zeros(1, 2)) == "what was said"
    assert len(outputs) == 1
    assert torch.equal(body(torch.ones(1, 2)), expected)

    own = lambda inputs: "own"  # noqa: E731
    body.forward = own
    with pytest.raises(KeyError), replayed(body, "what was said"):
        raise KeyError
    assert body.forward is own
