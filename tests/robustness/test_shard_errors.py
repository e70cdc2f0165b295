"""Training from WebDataset shards: resuming elsewhere, and shards, servers and commands that fail."""

import json
import shutil
import threading
from pathlib import Path

import main
import models
from common.errors import InputError
from common.files import read_checkpoint
from datasets import build_dataset
from pipeline import shard_cache
from pipeline.loader import CheckedLoader, SeededDataset, collate
from pipeline.shard_cache import ShardCache
from pipeline.shards import open_cached
from samplers import TrainSampler
from training.command_line import parse_options

import pytest
import torch
from conftest import COMPARABLE, Outcome, Run, assert_same_result, run_many
from shard_fixtures import (  # noqa: F401
    COUNTS,
    SCRIPT,
    SUFFIXES,
    Server,
    change,
    copy,
    folder,
    images_of,
    index_of,
    server,
    sharded,
    shards_of,
)
from torch.utils.data import DataLoader

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
        (
            lambda p: change(p, classes=["a", "b"]),
            r"train-0000\d\d.tar has the label \d of .* index.json says 2 c",
        ),
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
    monkeypatch.setattr(shard_cache, "RETRY_SECONDS", (0,))
    cache, shard = ShardCache(tmp_path, 10**9), shards_of(sharded, "train")[0]
    with pytest.raises(InputError, match=message):
        open_cached(cache, shard, "pipe:" + command.format(folder=sharded))
    assert not [*tmp_path.glob("*.tar")]
    counted = f"pipe:echo >> {tmp_path}/count; test $(wc -l < {tmp_path}/count) = 2 && cat {sharded}/{{}}"
    with open_cached(cache, shard, counted) as file:  # the second attempt succeeds
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
    assert parse_options(["--config", str(config), "--data-path", "pipe:cat {}"]).data.data_path == "pipe:cat {}"


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
        torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=1e-3)


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
