"""Training from a data set of the Hugging Face Hub, and from shards there: exact resume, processes, what fails."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import models
from common.files import read_checkpoint

import pytest
import torch
import yaml
from conftest import COMPARABLE, ENVIRONMENT, Outcome, Run, assert_same_result, epochs_of, run_many
from hub_stand_in import HubStandIn
from parquet_fixtures import CLASSES, as_files, digits, features, write_digits, write_parquet
from shard_writers import write_shards

LETS = "--src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2 --device cpu --warmup-epochs 0"
TRAIN = f"--data-set HF {LETS} --epochs 2 --lr 5e-3 --mixup 0 --cutmix 0 --drop-path 0 --clip-grad 1 {COMPARABLE}"
TRAIN = [*TRAIN.split(), "--batch-size", "64"]
EVALUATED = [*LETS.split(), "--eval", "--num-workers", "0"]
PROBED = ["--model", "deit_nano_patch8_16_L2_H1", "--device", "cpu", "--epochs", "0", "--linear-probe"]
SAVED = ["--save-every-steps", "1", "--keep-checkpoints", "8"]


class Done:
    """What the runs left: outcomes, their folder, and what the Hub was asked for."""

    def __init__(self, outcomes: dict[str, Outcome], folder: Path, asked: dict[str, list[str]]):
        self.outcomes, self.folder, self.asked = outcomes, folder, asked


def add_in_git(hub: HubStandIn, folder: Path) -> None:
    """Shards that lie in git itself, for which the Hub lists no SHA-256, with an index of wids."""
    files = {f"git/{name}": content for name, content in as_files(folder).items() if name.endswith(".tar")}
    hub.in_git.update(files)
    shards = [{"url": f"https://host/{name}", "nsamples": 20} for name in files]
    index = json.dumps({"wids_version": 1, "shardlist": shards}).encode()
    hub.add("datasets/owner/git", {**files, "index.json": index})


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(3000) + content[3004:])


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Done:
    """Runs in the environment of one stand-in, of which the later ones go on where the first one was."""
    root = tmp_path_factory.mktemp("hub")
    local = write_digits(root / "local")
    with pytest.MonkeyPatch.context() as patch:
        with HubStandIn() as hub:
            commit = hub.add("datasets/owner/digits", as_files(local))
            hub.add("datasets/owner/pictures", {"a.zip": b"x"})
            hub.add("datasets/owner/shards", as_files(write_shards(root / "shards", *digits(0, 60))))
            add_in_git(hub, root / "shards")
            for name, value in hub.environment(root / "home").items():
                patch.setitem(ENVIRONMENT, name, value)
            cache = ["--shard-cache", str(root / "cache"), "--data-path", f"owner/digits@{commit}"]
            branch = [*cache[:3], "owner/digits"]
            first = {"whole": Run([*TRAIN, *branch, *SAVED, "--num-workers", "0", "--output-dir", str(root / "whole")])}
            asked, outcomes = {}, run_many(first, root / "first")
            asked["whole"] = [*hub.requests]
            hub.add("datasets/owner/digits", {"data/test-00000-of-00001.parquet": b"PAR1 replaced"})
            resume = [*TRAIN, "--resume", str(root / "whole" / "checkpoint.2.pth")]
            new_cache = ["--shard-cache", str(root / "new"), "--data-path", f"hf-hub:datasets/owner/digits@{commit}"]
            wrong = ["--num-workers", "1", "--shard-cache", str(root / "cache")]
            broken = shutil.copytree(local, root / "broken")
            damage(broken / "data" / "train-00001-of-00003.parquet")
            other = root / "other"
            write_parquet(other / "train.parquet", *digits(0, 64), features(), label="label")
            shards = ["--data-set", "WDS", "--shard-cache", str(root / "cache"), "--data-path"]
            later = {
                "local": Run(
                    [*resume, "--data-path", str(local), "--num-workers", "2", "--output-dir", str(root / "a")]
                ),
                "again": Run([*resume, *cache, "--num-workers", "1", "--output-dir", str(root / "b")]),
                "branch": Run([*resume, *branch, "--num-workers", "1", "--output-dir", str(root / "d")]),
                "other commit": Run([*resume, *cache[:3], "owner/digits@main", "--output-dir", str(root / "e")], 2),
                "two": Run(
                    [*resume, *new_cache, "--batch-size", "32", "--num-workers", "1", "--output-dir", str(root / "c")],
                    2,
                ),
                "evaluation": Run([*EVALUATED, "--data-set", "HF", *cache]),
                "probe": Run(
                    [*PROBED, "--data-set", "HF", "--data-path", str(local), "--output-dir", str(root / "probe")]
                ),
                "shards": Run([*EVALUATED, *shards, "hf-hub:datasets/owner/shards", "--nb-classes", "10"]),
                "shards in git": Run([*EVALUATED, *shards, "hf-hub:datasets/owner/git", "--nb-classes", "10"]),
                "shards without classes": Run([*EVALUATED, *shards, "hf-hub:datasets/owner/shards"]),
                "damaged": Run([*TRAIN, "--num-workers", "1", "--data-path", str(broken)]),
                "damaged on the hub": Run([*TRAIN, *wrong, "--data-path", "owner/digits"]),
                "no data set": Run([*TRAIN, *wrong, "--data-path", "owner/nothing"], 2),
                "no revision": Run([*TRAIN, *wrong, "--data-path", "owner/digits@other"]),
                "no parquet": Run([*TRAIN, *wrong, "--data-path", "owner/pictures"]),
                "no split": Run([*TRAIN, "--data-path", str(other)]),
                "wrong column": Run([*TRAIN, *wrong, *cache[2:], "--hf-label-column", "labels"], 2),
                "holdout": Run([*TRAIN, *cache, "--holdout", "9"]),
                "cache data": Run([*TRAIN, *cache, "--cache-data"]),
                "column of folders": Run([*TRAIN, "--data-set", "FOLDER", "--hf-image-column", "x"]),
            }
            hub.requests.clear()
            outcomes |= run_many(later, root / "later")
            asked["later"] = [*hub.requests]
        outcomes |= run_many({"without the hub": Run([*EVALUATED, "--data-set", "HF", *cache])}, root / "last")
    return Done(outcomes, root, {**asked, "commit": [commit]})


def fetched(requests: list[str]) -> Counter:
    """How often each Parquet file was asked for after its footer."""
    return Counter(path for path in requests if path.startswith("GET") and path.endswith(".parquet"))


def test_a_data_set_of_the_hub_is_trained_on(done):
    outcome = done.outcomes["whole"]
    assert outcome.codes == [0], outcome.stderr
    assert re.search(
        r"train: 320 images of 10 classes in owner/digits@\w{40} \(split train, columns img and label, f",
        outcome.stdout,
    )
    gene = models.load_learngene(done.folder / "whole" / "learngene.safetensors")
    assert gene.classes == CLASSES
    assert read_checkpoint(done.folder / "whole" / "checkpoint.2.pth")["position"]["images"] == 256
    # for each file its footer, and once the whole of it
    assert set(fetched(done.asked["whole"]).values()) == {2}
    assert len(fetched(done.asked["whole"])) == 4


def test_a_branch_is_looked_up_once_and_its_commit_recorded(done):
    (commit,) = done.asked["commit"]
    assert len([path for path in done.asked["whole"] if commit not in path]) == 1
    recorded = yaml.safe_load((done.folder / "whole" / "args.yaml").read_text())["data_path"]
    assert recorded == read_checkpoint(done.folder / "whole" / "checkpoint.pth")["args"]["data_path"]
    assert recorded == f"owner/digits@{commit}"
    assert f"--data-path owner/digits: goes on with its commit {commit}, as in" in done.outcomes["branch"].stdout
    wanted = rf"owner/digits@main, now \w{{40}}, is not what --resume .* was trained on: expected owner/digits@{commit}"
    assert re.search(wanted, done.outcomes["other commit"].stderr)


@pytest.mark.parametrize(("name", "folder"), [("local", "a"), ("again", "b"), ("branch", "d")])
def test_training_goes_on_bit_for_bit(done, name, folder):
    """From a local folder without a cache with two workers, from the cache, and from a branch that has moved on."""
    assert done.outcomes[name].codes == [0], done.outcomes[name].stderr
    assert_same_result(done.folder / folder, done.folder / "whole")


def test_two_processes_go_on_where_one_was(done):
    outcome = done.outcomes["two"]
    assert outcome.codes == [0, 0], outcome.stderr
    assert "begun by 1 processes and is continued by 2" in outcome.stdout
    paths = (done.folder / name / "learngene.safetensors" for name in ("c", "whole"))
    a, b = (models.load_learngene(path).tensors for path in paths)
    for key in b:
        torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=1e-3)


def test_files_are_fetched_once_for_all_processes_and_runs(done):
    """Into the new cache; of the newest commit only the footer of the test images is not yet in the old one."""
    found = Counter(fetched(done.asked["later"]).values())
    assert found == {2: 4, 1: 1}
    suffixes = {path.suffix for path in (done.folder / "new").iterdir()}
    assert suffixes == {".arrow", ".footer", ".json", ".lock", ".md"}  # nothing that is needed only meanwhile


def test_evaluation(done):
    for name, images in (("evaluation", 60), ("without the hub", 60), ("shards", 20), ("shards in git", 20)):
        outcome = done.outcomes[name]
        assert outcome.codes == [0], outcome.stderr
        assert json.loads(outcome.stdout.splitlines()[-1])["test_acc1"] * images / 100 == pytest.approx(
            round(json.loads(outcome.stdout.splitlines()[-1])["test_acc1"] * images / 100), abs=1e-3
        )


def test_a_linear_probe(done):
    outcome = done.outcomes["probe"]
    assert outcome.codes == [0], outcome.stderr
    assert epochs_of(done.folder / "probe")[0]["test_acc1"] > 30


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shards without classes", "--nb-classes is missing: owner/shards@"),
        ("damaged", "train-00001-of-00003.parquet is damaged or no Parquet file"),
        ("damaged on the hub", "data/test-00000-of-00001.parquet is damaged or no Parquet file"),
        ("no data set", "--data-path owner/nothing could not be read from the Hub: 404"),
        ("no revision", "--data-path owner/digits@other could not be read from the Hub: 404"),
        ("other commit", "--data-path owner/digits@main, now "),
        ("no parquet", "does not hold HF: it has no Parquet files"),
        ("no split", "has no split validation or test, its splits are train: --hf-val-split names one of them"),
        ("wrong column", "--hf-label-column labels: --data-path owner/digits@"),
        ("holdout", "--holdout takes single images, which --data-set HF cannot"),
        ("cache data", "--cache-data cannot hold --data-set HF, which is read from files"),
        ("column of folders", "--hf-image-column is of --data-set HF: found --data-set FOLDER"),
    ],
)
def test_what_is_wrong_is_said_once(done, name, message):
    outcome = done.outcomes[name]
    assert set(outcome.codes) == {2}, outcome
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
