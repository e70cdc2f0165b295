"""--download: what is fetched, what is left alone, and downloads that fail."""

import hashlib
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common.errors import InputError
from datasets import build_dataset
from pipeline import folders
from pipeline.folders import find_folder
from training.command_line import parse_options
from training.launch import fetch_data
from training.loop import train

import pytest
from conftest import set_up_run
from data_layouts import make_cifar, make_inat19, make_tiny_imagenet
from torchvision import datasets as tv

VIT = "deit_nano_patch8_16_L2_H1"


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a folder, and what is asked for there."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *args):
            asked.append(self.path)

        def log_error(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Iterator[list[str]]:
    """CIFAR-10 on a server of this machine; what was asked for."""
    (tmp_path / "served").mkdir()
    make_cifar(tmp_path / "served", monkeypatch, tv.CIFAR10, 10)
    archive = tmp_path / "served" / tv.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "served" / tv.CIFAR10.base_folder, tv.CIFAR10.base_folder)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with served(tmp_path / "served") as (address, asked):
        monkeypatch.setattr(tv.CIFAR10, "url", f"{address}/{archive.name}")
        monkeypatch.setattr(tv.CIFAR10, "tgz_md5", folders.tv.utils.calculate_md5(archive))
        yield asked


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


# ---------------------------------------------------------------------------------------------------------------------
# Archives that torchvision does not unpack
# ---------------------------------------------------------------------------------------------------------------------


def pack_tiny_imagenet(folder: Path) -> list[Path]:
    make_tiny_imagenet(folder / "content" / "tiny-imagenet-200")
    return [Path(shutil.make_archive(str(folder / "tiny-imagenet-200"), "zip", folder / "content"))]


def pack_inat19(folder: Path) -> list[Path]:
    content = folder / "content"
    content.mkdir()
    make_inat19(content)
    archives = [folder / f"{entry.name}.tar.gz" for entry in content.iterdir()]
    for archive in archives:
        with tarfile.open(archive, "w:gz") as tar:
            name = archive.name.removesuffix(".tar.gz")
            tar.add(content / name, name)
    return archives


@pytest.mark.parametrize(("name", "pack"), [("TINYIMNET", pack_tiny_imagenet), ("INAT19", pack_inat19)])
def test_archives_are_fetched_checked_and_unpacked(name, pack: Callable, tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    archives, root = pack(tmp_path / "served"), tmp_path / "data"
    assert {archive.name for archive in archives} == {a.rpartition("/")[2] for a in folders.ARCHIVES[name]}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with served(tmp_path / "served") as (address, asked):
        digests = {f"{address}/{a.name}": hashlib.md5(a.read_bytes()).hexdigest() for a in archives}
        monkeypatch.setitem(folders.ARCHIVES, name, {**digests, f"{address}/{archives[-1].name}": 32 * "0"})
        with pytest.raises(InputError, match=rf"{archives[-1].name} is another file"):
            folders.download(name, str(root))
        assert find_folder(name, root) is None
        monkeypatch.setitem(folders.ARCHIVES, name, digests)
        folders.download(name, str(root))  # those that were right are not fetched again
        folders.download(name, str(root))
        assert sorted(asked) == sorted([f"/{a.name}" for a in archives] + [f"/{archives[-1].name}"])
    assert sorted(p.name for p in root.iterdir() if p.name != ".download.lock") == sorted(
        p.name for p in (tmp_path / "served" / "content").iterdir()
    )
    for is_train in (True, False):
        there, fetched = (
            build_dataset(name, str(at), is_train, None)[0] for at in (tmp_path / "served" / "content", root)
        )
        assert [(Path(path).name, label) for path, label in there.samples] == [
            (Path(path).name, label) for path, label in fetched.samples
        ]
        assert all(Path(path).is_file() for path, _ in fetched.samples)


def test_part_of_a_data_set_without_folder_is_left_alone(tmp_path):
    (tmp_path / "train2019.json").write_text("mine")
    with pytest.raises(InputError, match=r"train2019\.json is there, but not all of INAT19"):
        folders.download("INAT19", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["train2019.json"]
