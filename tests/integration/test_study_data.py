"""Studies on images that they rotate themselves, and options that name the seed of a run."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import models
from datasets import build_dataset
from study.command_line import main

import numpy as np
import pytest
import yaml
from conftest import ENVIRONMENT, SECONDS, TESTS
from data_layouts import make_fmnist
from parquet_fixtures import digits
from shard_writers import write_shards

STUDY = """
study: other
sizes: {L1-H1: deit_nano_patch7_28_L1_H1}
seeds: [0, 1]
options: {input-size: 28, batch-size: 10, num-workers: 0, cache-data: true, warmup-epochs: 0, repeated-aug: false,
  aa: none, mixup: 0, cutmix: 0, model-ema: false, smoothing: 0}
data:
  FMNIST: {data-set: FMNIST, data-path: images}
  ROTATED: {data-set: FMNIST, data-path: images, rotated: 90, train-images: 15}
runs:
  scratch: {kind: vit, data: FMNIST, seeds: [0], epochs: 1, lr: 1.0e-3, options: {model: "{arch}"}}
  taught: {kind: vit, data: FMNIST, seeds: [0], epochs: 1, lr: 1.0e-3,
    options: {model: "{arch}", distillation-type: soft, teacher-model: deit_nano_patch7_28_L1_H1,
      teacher-path: "{scratch}/model.safetensors", teacher-cache: "{study}/teachers/{seed}"}}
  probe: {kind: vit, data: ROTATED, seeds: [0], epochs: 0,
    options: {model: "{arch}", finetune: "{scratch}/model.safetensors", linear-probe: true}}
"""
SEED = STUDY.replace("seeds: [0], epochs: 0", "epochs: 0").replace("{scratch}/model.safetensors", "{seed}.pth")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder that a study has run in."""
    folder = tmp_path_factory.mktemp("other")
    make_fmnist(folder / "images")
    (folder / "study.yaml").write_text(STUDY)
    command = [sys.executable, TESTS.parent / "scripts" / "study.py", "study.yaml", "--jobs", "1"]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=folder, timeout=SECONDS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def listed(tmp_path, monkeypatch, capsys) -> Callable[[str], tuple[int, str, str]]:
    """Exit status, output and message of --list, for the text of a study."""
    monkeypatch.chdir(tmp_path)

    def listed(text: str, *options: str) -> tuple[int, str, str]:
        (tmp_path / "study.yaml").write_text(text)
        return main(["study.yaml", "--list", *options]), *capsys.readouterr()

    return listed


def test_a_study_rotates_images_before_it_uses_them(done):
    (folder,) = (done / "output/study/other/data").iterdir()
    assert len([*folder.iterdir()]) == 4
    for is_train in (True, False):
        found, before = (build_dataset("FMNIST", str(path), is_train, None)[0] for path in (folder, done / "images"))
        assert found.targets == before.targets
        assert all(np.array_equal(a, np.rot90(b)) for a, b in zip(found.images, before.images, strict=True))
    args = yaml.safe_load((done / "output/study/other/runs/probe/L1-H1/0/0/args.yaml").read_text())
    assert (args["data_path"], args["train_images"]) == (str(folder.relative_to(done)), 15)
    args = yaml.safe_load((done / "output/study/other/runs/scratch/L1-H1/1/0/args.yaml").read_text())
    assert args["data_path"] == "images"
    identity = json.loads((done / "output/study/other/runs/probe/L1-H1/0/0/run.json").read_text())["identity"]
    assert identity["rotated"] == 90
    assert "data-path" not in identity
    rows = {row["group"]: row for row in csv.DictReader((done / "results/other/results.csv").open())}
    forward = models.parse_arch("deit_nano_patch7_28_L1_H1").macs(10)
    expected = {"scratch": 60 * forward, "taught": 80 * forward, "probe": 15 * forward}
    assert {name: int(row["macs"]) for name, row in rows.items()} == expected
    assert (done / "output/study/other/teachers/0/teacher_cache.json").exists()


def test_what_is_done_depends_on_the_rotation_and_not_on_the_folder(done, tmp_path, listed):
    for name in ("output", "results"):
        shutil.copytree(done / name, tmp_path / name)
    shutil.copytree(done / "images", tmp_path / "elsewhere")
    code, found, _ = listed(STUDY, "--data-path", "elsewhere")
    assert (code, found.count("(1 done, 0 begun, 0 to do)")) == (0, 3)
    code, _, message = listed(STUDY.replace("rotated: 90", "rotated: 180"), "--data-path", "elsewhere")
    assert code == 2
    assert "with rotated 90, not 180: remove this folder to run it again" in message


def test_a_study_of_shards_counts_their_images(tmp_path, listed):
    write_shards(tmp_path / "shards", *digits(0, 60))
    scratch = "{kind: vit, data: SHARDS, seeds: [0], epochs: 1, lr: 1.0e-3, options: {model: '{arch}'}}"
    data = "{data-set: WDS, data-path: shards, cache-data: false, nb-classes: 10}"
    options = STUDY.partition("\ndata:")[0]
    study = f"{options}\ndata:\n  SHARDS: {data}\nruns:\n  scratch: {scratch}\n"
    code, found, message = listed(study)
    assert (code, message) == (0, "")
    macs = 40 * 3 * models.parse_arch("deit_nano_patch7_28_L1_H1").macs(10)
    assert f"scratch: 1 runs (0 done, 0 begun, 1 to do), {macs:.2e} MACs" in found
    code, _, message = listed(study.replace(", nb-classes: 10", ""))
    assert (code, message.count("\n")) == (2, 1)
    assert "--nb-classes is missing" in message


def test_list_writes_nothing(tmp_path, listed):
    make_fmnist(tmp_path / "images")
    assert listed(STUDY)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"images", "study.yaml"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rotated: 90", "rotated: 45", "data, ROTATED: rotated is 45, expected 90, 180, 270 degrees"),
        ("rotated: 90", "rotated: left", "data, ROTATED: rotated is 'left', expected 90, 180, 270 degrees"),
        ("data-path: images, rotated", "rotated", "data, ROTATED: rotated is for images of data-set FMNIST, in the"),
        ("FMNIST, data-path: images, rotated", "DIGITS, rotated", "data, ROTATED: rotated is for images of data-set"),
        ("data-path: images, rotated", "data-path: empty, rotated", "runs, probe: --data-path empty does not hold"),
        ("[0], epochs: 0,", "[0], epochs: 1, lr: 1,", "runs, probe: --linear-probe fits a head to frozen features"),
        ("smoothing: 0", "rotated: 90", "options: rotated is not an option: it belongs to an entry under data"),
    ],
)
def test_what_cannot_be_rotated_is_one_line(tmp_path, listed, old, new, message):
    make_fmnist(tmp_path / "images")
    (tmp_path / "empty").mkdir()
    assert old in STUDY
    code, _, found = listed(STUDY.replace(old, new))
    assert (code, found.count("\n")) == (2, 1)
    assert found.startswith(f"error: study.yaml: {message}"), found


def test_options_name_the_seed_of_each_run(tmp_path, listed):
    make_fmnist(tmp_path / "images")
    (tmp_path / "0.pth").touch()
    code, _, message = listed(SEED)
    assert (code, message.count("\n")) == (2, 1)
    assert "finetune is 1.pth, which is not there" in message
    (tmp_path / "1.pth").touch()
    assert listed(SEED)[0] == 0
    code, _, message = listed(STUDY.replace("  scratch:", "  seed:"))
    assert "'seed' cannot be the name of a group" in message
