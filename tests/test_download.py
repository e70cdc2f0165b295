"""Files from an address, against a real HTTP server on this machine."""

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import models

import pytest
import torch

FIXTURES = Path(__file__).parent / "fixtures"


class Handler(SimpleHTTPRequestHandler):
    requests: list[str] = []  # noqa: RUF012  one list for the one server

    def log_message(self, format, *args):
        self.requests.append(self.path)


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    shutil.copy(FIXTURES / "tleg_learngene.pth", tmp_path / "gene.pth")
    Handler.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "home" / "hub" / "checkpoints"


def test_learngene_from_an_address_is_downloaded_once(server, hub):
    file = models.load_learngene(FIXTURES / "tleg_learngene.pth", head_dim=4)
    for _ in range(2):
        gene = models.load_learngene(f"{server}/gene.pth", head_dim=4)
        assert all(torch.equal(gene.tensors[name], tensor) for name, tensor in file.tensors.items())
    assert Handler.requests == ["/gene.pth"]
    assert len(list(hub.iterdir())) == 1


@pytest.mark.parametrize("path", ["/missing.pth", "/gene.pth"])
def test_address_without_a_file_is_one_sentence(server, hub, path):
    address = server if path == "/missing.pth" else "http://127.0.0.1:9"  # no such file, no such server
    with pytest.raises(models.InputError, match=f"{address}{path} could not be downloaded"):
        models.load_learngene(address + path)
    assert list(hub.iterdir()) == []
