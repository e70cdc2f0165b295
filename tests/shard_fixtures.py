"""Shards of handwritten digits, and servers of their files; test modules import the fixtures by name."""

import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from datasets import build_dataset
from pipeline.shard_cache import ShardCache
from pipeline.shard_index import Shard

import numpy as np
import pytest
from conftest import ENVIRONMENT, MAIN
from PIL import Image
from sklearn.datasets import load_digits

SUFFIXES = ("JPEG", "png", "jpg", "bmp")
COUNTS = {"train": 320, "val": 60}
SCRIPT = MAIN.parent / "scripts" / "make_shards.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Handwritten digits as files of several kinds in train/ and val/, with names that need care."""
    root, digits = tmp_path_factory.mktemp("folder"), load_digits()
    for i, split in enumerate(split for split, count in COUNTS.items() for _ in range(count)):
        path = root / split / f"c.{digits.target[i]}" / f"digit.{i // 2}.{SUFFIXES[i % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 255 / 16).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def sharded(folder, tmp_path_factory) -> Path:
    """The same images in shards of about 16."""
    path = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, SCRIPT, "--data-path", folder, "--output-dir", path, "--shard-mb", "0.04"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "320 images of 10 classes in " in done.stdout
    assert "380 images written, 0 existed" in done.stdout
    return path


@pytest.fixture
def copy(sharded, tmp_path) -> Path:
    return shutil.copytree(sharded, tmp_path / "copy")


class Server(ThreadingHTTPServer):
    """The files of a folder; ``asked`` are the names that were asked for."""

    def __init__(self, folder: Path):
        self.asked: list[str] = []

        class Handler(SimpleHTTPRequestHandler):
            def log_request(handler, *args):  # noqa: N805
                self.asked.append(handler.path.rpartition("/")[2])

            def log_message(handler, *args):  # noqa: N805
                pass

        super().__init__(("127.0.0.1", 0), partial(Handler, directory=folder))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture(scope="module")
def server(sharded) -> Iterator[Server]:
    with Server(sharded) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def index_of(path: Path) -> dict:
    return json.loads((path / "index.json").read_text())


def shards_of(path: Path, split: str) -> list[Shard]:
    return [Shard(**entry) for entry in index_of(path)[split]]


def change(path: Path, **changes: object) -> None:
    """Other values in the index."""
    (path / "index.json").write_text(json.dumps({**index_of(path), **changes}))


def images_of(name: str, path: object, is_train: bool, cache: ShardCache | None = None) -> Counter:
    dataset, _ = build_dataset(name, str(path), is_train, None, shard_cache=cache)
    return Counter((image.tobytes(), label) for image, label in (dataset[i] for i in range(len(dataset))))
