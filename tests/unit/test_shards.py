"""WebDataset shards: written from folders, read from this machine, a server and a command, trained on and resumed."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby, pairwise
from pathlib import Path

import main
import models
from common.errors import InputError
from common.files import read_checkpoint, sha256
from datasets import build_dataset
from pipeline import shards
from pipeline.loader import CheckedLoader, SeededDataset, collate
from pipeline.shards import Shard, ShardCache
from samplers import LANES, ExactSampler, TrainSampler, derived_seed, shuffled
from scripts import make_shards
from training.config import parse_options

import numpy as np
import pytest
import torch
from conftest import COMPARABLE, ENVIRONMENT, MAIN, Outcome, Run, assert_same_result, run_many
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

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


# ---------------------------------------------------------------------------------------------------------------------
# Written
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_have_the_files_of_the_folder(folder, sharded, split):
    """Byte for byte, each before its label, under names that begin with a key of its own."""
    found, keys, classes = Counter(), [], index_of(sharded)["classes"]
    assert classes == [f"c.{label}" for label in range(10)]
    for shard in shards_of(sharded, split):
        path = sharded / shard.file
        assert (path.stat().st_size, sha256(path)) == (shard.bytes, shard.sha256)
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            assert len(members) == 2 * shard.samples
            assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
            for image, label in zip(members[::2], members[1::2], strict=True):
                keys.append(label.name.removesuffix(".cls"))
                assert "." not in keys[-1].rpartition("/")[2]
                assert image.name.removeprefix(keys[-1]) in (".jpeg", ".png", ".jpg", ".bmp")
                number = int(tar.extractfile(label).read())
                assert image.name.startswith(classes[number] + "/digit-")
                found[tar.extractfile(image).read(), number] += 1
    files = (path for path in (folder / split).rglob("*.*") if path.is_file())
    assert found == Counter((path.read_bytes(), int(path.parent.name[2:])) for path in files)
    assert len(set(keys)) == len(keys) == COUNTS[split]


def test_classes_are_mixed(sharded):
    for shard in shards_of(sharded, "train"):
        with tarfile.open(sharded / shard.file) as tar:
            assert shard.samples < 12 or len({name.partition("/")[0] for name in tar.getnames()}) > 3


def test_writing_goes_on_where_it_was_ended(folder, sharded, tmp_path, capsys):
    options = ["--data-path", str(folder), "--shard-mb", "0.04", "--output-dir"]
    shutil.copytree(sharded, tmp_path / "again")
    (tmp_path / "again" / "index.json").unlink()
    (tmp_path / "again" / "train-000003.tar").unlink()
    changed = tmp_path / "again" / "val-000001.tar"
    changed.write_bytes(changed.read_bytes()[:3000])
    assert make_shards.main([*options, str(tmp_path / "again")]) == 0
    count = shards_of(sharded, "train")[3].samples + shards_of(sharded, "val")[1].samples
    assert f"{count} images written, {380 - count} existed" in capsys.readouterr().out
    for path in sharded.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert make_shards.main([*options, str(tmp_path / "other"), "--seed", "1"]) == 0
    assert shards_of(tmp_path / "other", "train") != shards_of(sharded, "train")
    assert images_of("WDS", tmp_path / "other", True) == images_of("WDS", sharded, True)
    fewer = ["--data-path", str(folder), "--output-dir", str(tmp_path / "again")]
    capsys.readouterr()
    assert make_shards.main(fewer) == 2
    assert "train-000001.tar, which is not one of these shards" in capsys.readouterr().err


@pytest.mark.parametrize("classes", [None, "classes.txt"])
def test_index_of_shards_of_others(copy, sharded, classes):
    """Their names differ, there are other files in the samples, and nobody has counted."""
    (copy / "index.json").unlink()
    with pytest.raises(InputError, match=r"no index.json: scripts/make_shards.py --index .*copy writes it"):
        build_dataset("WDS", str(copy), True, None)
    for path in [*copy.glob("*.tar")]:
        path.rename(path.with_name(f"imagenet-{path.name.replace('val', 'validation')}"))
    with tarfile.open(copy / "imagenet-train-000000.tar", "a") as tar:
        for name, content in (
            ("a/more.json", b"{}"),
            ("a/more.PNG", png()),
            ("a/more.seg.png", b"x"),
            ("a/more.cls", b"7\n"),
        ):
            add(tar, name, content)
    if classes:
        (copy / classes).write_text("".join(f"c.{label}\n" for label in range(10)))
    assert make_shards.main(["--index", str(copy)]) == 0
    assert index_of(copy)["classes"] == [f"c.{label}" if classes else str(label) for label in range(10)]
    more = images_of("WDS", copy, True) - images_of("WDS", sharded, True)
    assert [label for _, label in more.elements()] == [7]
    assert images_of("WDS", copy, False) == images_of("WDS", sharded, False)


def png(size: int = 2) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, "PNG")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def write(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add(tar, name, content)
    return path


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "no shards named train"),
        (
            lambda path: write(path / "train-0.tar", ("a.png", png()), ("a.cls", b"0")),
            "no shards named val",
        ),
        (lambda path: write(path / "x.tar"), "x.tar has neither train nor val in its name"),
        (lambda path: write(path / "val-0.tar", ("a.png", png())), r"1 image\(s\) and 0 label\(s\) of a"),
        (lambda path: write(path / "val-0.tar", ("a.cls", b"0")), r"0 image\(s\) and 1 label\(s\) of a"),
        (lambda path: write(path / "val-0.tar", ("a.png", b""), ("a.cls", b"-1")), r"label b'-1' in a.cls"),
        (lambda path: (path / "val-0.tar").write_bytes(bytes(range(256)) * 4), "val-0.tar is damaged"),
        (lambda path: (path / "classes.txt").write_text("a\n") and make_two(path, 0, 1), "names 1 classes, but"),
        (lambda path: make_two(path, 0, 1), "1 classes in train and 1 in val; the first that is in one alone is 0"),
        (lambda path: make_two(path, 1, 1), "no images of 1 of 2 classes, such as 0"),
    ],
)
def test_shards_of_others_that_cannot_be_used(tmp_path, capsys, prepare, message):
    prepare(tmp_path)
    assert make_shards.main(["--index", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    with pytest.raises(InputError, match=message):
        raise InputError(error)
    assert not (tmp_path / "index.json").exists()


def make_two(path: Path, *labels: int) -> None:
    for split, label in zip(("train", "val"), labels, strict=True):
        write(path / f"{split}-0.tar", ("a.png", png()), ("a.cls", b"%d" % label))


# ---------------------------------------------------------------------------------------------------------------------
# Read
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_are_those_of_the_folder(folder, sharded, server, tmp_path, split):
    expected, cache = images_of("FOLDER", folder, split == "train"), ShardCache(tmp_path / "cache", 10**9)
    assert images_of("WDS", sharded, split == "train") == expected
    server.asked.clear()
    assert images_of("WDS", server.address, split == "train", cache) == expected
    assert sorted(server.asked) == sorted(["index.json", *(shard.file for shard in shards_of(sharded, split))])
    # what the server gave serves the command, too
    shutil.copy(sharded / "index.json", tmp_path)
    assert images_of("WDS", f"pipe:cat {tmp_path}/{{}}", split == "train", cache) == expected
    other = ShardCache(tmp_path / "other", 10**9)
    assert images_of("WDS", f"pipe:cat {sharded}/{{}}", split == "train", other) == expected


def test_room_is_made_by_the_shard_that_was_used_the_longest_ago(sharded, server, tmp_path):
    """One that is open stays readable, and is fetched again by the next who needs it."""
    first, second, third = shards_of(sharded, "train")[:3]
    cache = ShardCache(tmp_path, first.bytes + second.bytes + third.bytes - 1)
    content = (sharded / first.file).read_bytes()
    server.asked.clear()

    def read(shard: Shard) -> bytes:
        with cache.open(shard, server.address) as file:
            return file.read()

    with cache.open(first, server.address) as file:
        read(second)
        read(first)
        read(third)
        assert [path.name[17:] for path in sorted(tmp_path.glob("*.tar"))] == sorted([first.file, third.file])
        read(second)
        assert [path.name[17:] for path in sorted(tmp_path.glob("*.tar"))] == sorted([third.file, second.file])
        assert file.read() == content
    assert read(first) == content
    assert server.asked == [shard.file for shard in (first, second, third, second, first)]


def test_a_process_closes_shards_that_it_leaves(sharded, monkeypatch):
    monkeypatch.setattr(shards, "KEEP_OPEN_READS", 4)
    dataset, _ = build_dataset("WDS", str(sharded), True, None)
    first, others = dataset.shard_sizes[0], len(dataset.shard_sizes) - 1
    begins = np.cumsum([0, *dataset.shard_sizes])
    for number in range(others):
        assert dataset[0][0].size == (8, 8)  # comes back every time
        dataset[int(begins[number + 1])]
        assert len(dataset.opened) <= 4
    assert first == dataset.ends[0]
    assert 0 in dataset.opened


def test_unreadable_images_are_named_and_can_be_passed_over(copy, capsys):
    names = [shard.file for shard in shards_of(copy, "train")]
    content = bytearray((copy / names[1]).read_bytes())
    with tarfile.open(copy / names[1]) as tar:
        member = tar.getmembers()[2]
    content[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    (copy / names[1]).write_bytes(content)
    dataset, _ = build_dataset("WDS", str(copy), True, lambda image: torch.zeros(1))
    bad = f"{names[1]}: {member.name}"
    for skipped in (0, 1):
        seeded = SeededDataset(dataset, skipped)
        loader = DataLoader(seeded, 20, sampler=TrainSampler(320, 20), num_workers=2, collate_fn=collate)
        batches = CheckedLoader(loader, bool(skipped), torch.device("cpu"))
        if skipped:
            assert sum(len(labels) for _, labels in batches) == 320
            assert batches.skipped == 1
            assert f"warning: {bad} (" in capsys.readouterr().err
        else:
            with pytest.raises(InputError, match=f"^{bad} .* cannot be read as an image: --skip-bad-images goes on"):
                list(batches)


# ---------------------------------------------------------------------------------------------------------------------
# The order
# ---------------------------------------------------------------------------------------------------------------------

SIZES = [[1], [7], [1, 1], [5, 1, 9], [10] * 7, [3, 50, 2, 2, 41], [16] * 100, [13] * 200 + [5]]


@pytest.mark.parametrize("lanes", [1, 2, 3, 8, LANES])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)} shards")
def test_each_lane_reads_shard_after_shard(sizes, lanes):
    order, number = shuffled(sizes, 3, lanes).tolist(), min(lanes, len(sizes))
    assert sorted(order) == list(range(sum(sizes)))
    assert order == shuffled(sizes, 3, lanes).tolist()
    assert sum(sizes) < 10 or order != shuffled(sizes, 4, lanes).tolist()
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    visits = 0
    for lane in range(number):
        visited = [shard for shard, _ in groupby(shard_of[order[lane::number]])]
        assert len(set(visited)) == len(visited)  # no way back
        visits += len(visited)
    assert visits <= len(sizes) + number - 1  # only where two lanes meet a shard is read by both
    if len(set(sizes)) == 1 and number > 1:
        assert all(a != b for a, b in pairwise(shard_of[order]))


def test_a_data_set_in_one_piece_is_permuted_as_before():
    sampler = TrainSampler(100, 1, seed=7)
    sampler.set_position(2)
    generator = torch.Generator().manual_seed(derived_seed(7, 2))
    assert [index for index, _ in sampler] == torch.randperm(100, generator=generator).tolist()


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_processes_need_few_shards_of_each_other(world_size, repeats):
    sizes = [30] * 192
    samplers = [TrainSampler(sum(sizes), 24, repeats, 1, rank, world_size, sizes) for rank in range(world_size)]
    needed = [{index // 30 for index, _ in sampler} for sampler in samplers]
    every = set.union(*needed)
    assert sum(map(len, needed)) <= (1.5 if repeats == 1 else 2.5) * len(every)
    tested = [{index // 30 for index in ExactSampler(sum(sizes), rank, world_size)} for rank in range(world_size)]
    assert sum(map(len, tested)) < 192 + world_size


# ---------------------------------------------------------------------------------------------------------------------
# Trained on
# ---------------------------------------------------------------------------------------------------------------------

LETS = "--src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2 --device cpu --warmup-epochs 0"
TRAIN = f"--data-set WDS {LETS} --epochs 2 --lr 5e-3 --mixup 0 --cutmix 0 --drop-path 0 --clip-grad 1 {COMPARABLE}"


@pytest.fixture(scope="module")
def undisturbed(sharded, tmp_path_factory) -> Path:
    """Two epochs of 5 steps, with a checkpoint after each step."""
    path = tmp_path_factory.mktemp("undisturbed")
    options = [*TRAIN.split(), "--data-path", str(sharded), "--batch-size", "64", "--num-workers", "0"]
    saved = ["--save-every-steps", "1", "--keep-checkpoints", "8", "--output-dir", str(path)]
    assert main.main([*options, *saved]) == 0
    return path


def test_training_goes_on_bit_for_bit_from_elsewhere_with_other_workers(undisturbed, sharded, tmp_path):
    cache = ["--shard-cache", str(tmp_path / "cache"), "--data-path", f"pipe:cat {sharded}/{{}}"]
    resume = ["--resume", str(undisturbed / "checkpoint.2.pth")]
    assert read_checkpoint(resume[1])["position"]["images"] == 256
    options = [*TRAIN.split(), *cache, *resume, "--batch-size", "64", "--num-workers", "2"]
    assert main.main([*options, "--output-dir", str(tmp_path / "run")]) == 0
    assert_same_result(tmp_path / "run", undisturbed)


def test_evaluation_is_that_of_the_folder(folder, sharded, capsys):
    found = []
    for name, path in (("FOLDER", folder), ("WDS", sharded)):
        options = [*LETS.split(), "--data-set", name, "--data-path", str(path), "--eval", "--num-workers", "0"]
        assert main.main(options) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    one_image = 100 / COUNTS["val"]  # which may lie on the border of two classes
    assert found[0]["test_acc1"] == pytest.approx(found[1]["test_acc1"], abs=1.01 * one_image)
    assert found[0]["test_loss"] == pytest.approx(found[1]["test_loss"], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong
# ---------------------------------------------------------------------------------------------------------------------


def entries(path: Path, **changes: object) -> dict:
    """The index with other values of its first training shard."""
    train = index_of(path)["train"]
    return {"train": [{**train[0], **changes}, *train[1:]]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "index.json").write_text("{"), "index.json is not JSON"),
        (lambda p: (p / "index.json").write_text("[]"), "is not an index of shards"),
        (lambda p: change(p, version=2), "of version 2, expected 1"),
        (lambda p: change(p, train=5), "is not an index of shards"),
        (lambda p: change(p, train=[{"file": "a.tar"}]), r"is not an index of shards \('samples'\)"),
        (lambda p: change(p, val=[]), "no shards of val"),
        (lambda p: change(p, val=index_of(p)["train"]), "names train-000000.tar twice"),
        (lambda p: change(p, classes="abc"), "names no classes"),
        (lambda p: change(p, classes=["a", "a"]), "names no classes, or one twice"),
        (lambda p: change(p, **entries(p, file="../a.tar")), "names the shard '../a.tar'"),
        (lambda p: change(p, **entries(p, file="/etc/a.tar")), "names the shard '/etc/a.tar'"),
        (lambda p: change(p, **entries(p, file="-f;a.tar")), "names the shard '-f;a.tar'"),
        (lambda p: change(p, **entries(p, file=3)), "names the shard '3'"),
        (lambda p: change(p, **entries(p, samples=True)), "True samples in .* which is impossible"),
        (lambda p: change(p, **entries(p, samples=10**9)), "1000000000 samples in .* which is impossible"),
        (lambda p: change(p, **entries(p, sha256="x")), "no SHA-256 of train-000000.tar"),
        (lambda p: (p / "val-000000.tar").unlink(), "val-000000.tar cannot be read: No such file"),
        (lambda p: (p / "val-000000.tar").write_bytes(b"x" * 512), "has 512 bytes, index.json says"),
        (lambda p: shutil.rmtree(p), "is not a folder, an address .* or a command"),
        (lambda p: [path.unlink() for path in p.iterdir()], "has no index.json: expected a folder that"),
    ],
)
def test_an_index_that_cannot_be_used(copy, damage, message):
    damage(copy)
    with pytest.raises(InputError, match=message):
        build_dataset("WDS", str(copy), True, None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: change(p, **entries(p, samples=5)), "train-000000.tar has .* samples, index.json says 5"),
        (lambda p: change(p, classes=["a", "b"]), r"train-0000\d\d.tar has the label \d of .* index.json 2 classes"),
        (
            lambda p: rewrite(p / "train-000000.tar", b"\xff" * 512),
            "train-000000.tar is damaged or no uncompressed tar",
        ),
        (lambda p: rewrite(p / "train-000000.tar", b""), r"train-000000.tar has 0 samples"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_used_ends_the_run(copy, damage, message, workers):
    """Whatever --skip-bad-images says, and out of a data worker, too."""
    damage(copy)
    dataset, _ = build_dataset("WDS", str(copy), True, lambda image: torch.zeros(1))
    sampler = TrainSampler(len(dataset), 8, shard_sizes=dataset.shard_sizes)
    loader = DataLoader(SeededDataset(dataset, 10), 8, sampler=sampler, num_workers=workers, collate_fn=collate)
    with pytest.raises(InputError, match=f"^{message}"):
        list(CheckedLoader(loader, True, torch.device("cpu")))


def rewrite(path: Path, content: bytes) -> None:
    """Other content of the same size."""
    path.write_bytes(content.ljust(path.stat().st_size, b"\0"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat {folder}/{{}} && exit 3", r"the command for train-000000.tar exited with status 3: cat .*no output"),
        ("head -c 1024 {folder}/{{}}", r"head .* gave 1,024 bytes of train-000000.tar than the [\d,]+ of index.json"),
        ("tr a b < {folder}/{{}}", "gave other bytes of train-000000.tar"),
        ("cat {folder}/train-1.tar {{}} >&2", "No such file"),
    ],
)
def test_a_command_that_fails(sharded, tmp_path, monkeypatch, command, message):
    monkeypatch.setattr(shards, "RETRY_SECONDS", (0,))
    cache, shard = ShardCache(tmp_path, 10**9), shards_of(sharded, "train")[0]
    with pytest.raises(InputError, match=message):
        cache.open(shard, "pipe:" + command.format(folder=sharded))
    assert not [*tmp_path.glob("*.tar")]
    counted = f"pipe:echo >> {tmp_path}/count; test $(wc -l < {tmp_path}/count) = 2 && cat {sharded}/{{}}"
    with cache.open(shard, counted) as file:  # the second attempt succeeds
        assert file.read() == (sharded / shard.file).read_bytes()


def test_room_is_checked_before_the_work(sharded, tmp_path):
    def built(limit: int, folder: Path = tmp_path) -> None:
        build_dataset("WDS", f"pipe:cat {sharded}/{{}}", True, None, shard_cache=ShardCache(folder, limit))

    with pytest.raises(InputError, match=r"--shard-cache-gb 1e-06 is too little: shards of up to .* need 0.00"):
        built(1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--shard-cache .*file cannot be written"):
        built(10**9, tmp_path / "file")
    with pytest.raises(InputError, match="--shard-cache is missing"):
        build_dataset("WDS", "https://host/path", True, None)
    with pytest.raises(InputError, match=r"has no {}, the placeholder"):
        build_dataset("WDS", "pipe:cat", True, None, shard_cache=ShardCache(tmp_path, 1))


def test_a_command_is_taken_from_the_command_line_alone(tmp_path):
    config = tmp_path / "args.yaml"
    config.write_text("data_set: WDS\ndata_path: 'pipe:touch {}'\n")
    with pytest.raises(InputError, match=f"--config {config}: data_path is a command, which only the command line may"):
        parse_options(["--config", str(config)])
    assert parse_options(["--config", str(config), "--data-path", "pipe:cat {}"]).data_path == "pipe:cat {}"


@pytest.fixture(scope="module")
def runs(sharded, undisturbed, server, tmp_path_factory) -> tuple[dict[str, Outcome], Path]:
    """What ends with an error, and two processes that go on where one was."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*TRAIN.split(), "--batch-size", "32", "--num-workers", "1", "--shard-cache", str(folder / "cache")]
    resume = ["--resume", str(undisturbed / "checkpoint.4.pth"), "--output-dir", str(folder / "two")]
    fewer = shutil.copytree(sharded, folder / "fewer")
    (fewer / "train-000004.tar").unlink()
    server.asked.clear()
    with Server(fewer) as lacking:
        threading.Thread(target=lacking.serve_forever, args=(0.01,), daemon=True).start()
        runs = {
            "two": Run([*common, *resume, "--data-path", server.address], 2),
            "no index": Run([*common, "--data-path", f"{lacking.address}/nowhere"], 2),
            "no shard": Run([*common, "--shard-cache", str(folder / "other"), "--data-path", lacking.address]),
            "command": Run([*common, "--data-path", "pipe:echo sorry >&2; false {}"]),
        }
        outcomes = run_many(runs, folder / "out")
        lacking.shutdown()
    return outcomes, folder


def test_two_processes_go_on_where_one_was(runs, undisturbed, server):
    """The images of every step are the same; what the processes need is fetched once for both."""
    outcomes, folder = runs
    assert outcomes["two"].codes == [0, 0], outcomes["two"].stderr
    assert "begun by 1 processes and is continued by 2" in outcomes["two"].stdout
    tars = [name for name in server.asked if name.endswith(".tar")]
    assert len(set(tars)) == len(tars) > 0
    a, b = (models.load_learngene(path / "learngene.safetensors").tensors for path in (folder / "two", undisturbed))
    for key in b:
        torch.testing.assert_close(a[key], b[key], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no index", "/nowhere/index.json could not be downloaded: HTTP Error 404"),
        ("no shard", "/train-000004.tar could not be downloaded: HTTP Error 404"),
        ("command", "the command for index.json exited with status 1: echo sorry >&2; false index.json (sorry)"),
    ],
)
def test_what_is_wrong_elsewhere_is_said_once(runs, name, message):
    outcome = runs[0][name]
    assert set(outcome.codes) == {2}
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert message in outcome.stderr
