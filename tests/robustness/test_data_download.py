"""--download: what is fetched, what is left alone, and downloads that fail."""

import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from common.errors import InputError
from pipeline import folders
from pipeline.folders import find_folder
from training.command_line import parse_options
from training.launch import fetch_data
from training.loop import train

import pytest
from conftest import set_up_run
from data_layouts import make_cifar
from torchvision import datasets as tv

VIT = "deit_nano_patch8_16_L2_H1"


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Iterator[list[str]]:
    """CIFAR-10 on a server of this machine; what was asked for."""
    (tmp_path / "served").mkdir()
    make_cifar(tmp_path / "served", monkeypatch, tv.CIFAR10, 10)
    archive = tmp_path / "served" / tv.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "served" / tv.CIFAR10.base_folder, tv.CIFAR10.base_folder)
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *args):
            asked.append(self.path)

        def log_error(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "served")) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(tv.CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        monkeypatch.setattr(tv.CIFAR10, "tgz_md5", folders.tv.utils.calculate_md5(archive))
        yield asked
        server.shutdown()


def test_download_fetches_what_is_not_there(cifar, tmp_path):
    options = f"--device cpu --num-workers 0 --data-set CIFAR10 --download --data-path {tmp_path}/new/data --epochs 1"
    command = [*options.split(), *f"--model {VIT} --input-size 16 --batch-size 8".split()]
    unfinished = tmp_path / "new" / "data" / ".download-CIFAR10" / "cifar-10-batches-py"
    unfinished.mkdir(parents=True)
    (unfinished / "data_batch_1").write_bytes(b"of a download that was killed")
    fetch_data(parse_options(command))
    asked = len(cifar)
    assert asked > 0
    assert [path.name for path in (tmp_path / "new" / "data").iterdir() if path.is_dir()] == ["cifar-10-batches-py"]
    assert train(set_up_run(command)) == 0
    fetch_data(parse_options(command))
    assert len(cifar) == asked  # it is there


def test_a_download_that_fails_is_one_line_and_leaves_nothing_that_looks_whole(cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(tv.CIFAR10, "url", tv.CIFAR10.url + ".no")
    for _ in range(2):
        with pytest.raises(InputError, match=r"--download: CIFAR10 could not be fetched .*404") as raised:
            folders.download("CIFAR10", str(tmp_path / "new"))
        assert "\n" not in str(raised.value)
    assert find_folder("CIFAR10", tmp_path / "new") is None


def test_download_does_not_touch_what_is_there_in_part(cifar, tmp_path):
    part = tmp_path / "new" / "cifar-10-batches-py"
    part.mkdir(parents=True)
    (part / "batches.meta").write_bytes(b"mine")
    with pytest.raises(InputError, match="cifar-10-batches-py is there, but not all of CIFAR10"):
        folders.download("CIFAR10", str(tmp_path / "new"))
    assert (cifar, [path.name for path in part.iterdir()]) == ([], ["batches.meta"])
