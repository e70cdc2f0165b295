"""scripts/study.py: a small study that is stopped twice and continued, and what is said of studies that cannot work."""

import csv
import json
import os
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import models
from common.devices import device_name
from study.archive import ARCHIVE, WEIGHTS_ARCHIVE, read_archive, read_files

import numpy as np
import pytest
import torch
import yaml
from conftest import ENVIRONMENT, SECONDS, TESTS
from filelock import FileLock
from safetensors.torch import load_file
from small_study import STUDY
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = TESTS.parent / "scripts" / "study.py"
RUNS = ["LeTs L1-H1 seed 0, 1 epoch", "LeTs L1-H1 seed 1, 1 epoch", "LeTs stage 1 seed 0, 2 epochs"]
RUNS += ["LeTs stage 1 seed 1, 2 epochs", "LeTs stage 1 seed 100, 1 epoch, tuning, lr 0.003"]
RUNS += ["LeTs stage 1 seed 100, 1 epoch, tuning, lr 1e-09", "scratch L1-H1 seed 0, 1 epoch"]
RUNS += ["scratch L2-H2 seed 0, 1 epoch", "teacher seed 0, 1 epoch", "weight selection L1-H1 seed 0, 0 epochs"]


class Piece(NamedTuple):
    """One call of the script."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Done:
    folder: Path
    pieces: list[Piece]

    @property
    def root(self) -> Path:
        return self.folder / "output" / "study" / "tiny"

    @property
    def results(self) -> Path:
        return self.folder / "results" / "tiny"

    @cached_property
    def kept(self) -> dict[str, str]:
        """The texts in the archive of logs and options, by their names."""
        return read_archive(self.results / ARCHIVE)

    def rows(self, name: str = "results") -> list[dict[str, str]]:
        with open(self.results / f"{name}.csv", newline="") as file:
            return list(csv.DictReader(file))


def run(
    folder: Path, *options: str, stop_after: str | None = None, environment: Mapping[str, str] = ENVIRONMENT
) -> Piece:
    """The script in a process of its own, which is asked to stop when it has printed ``stop_after``."""
    command = [sys.executable, SCRIPT, "study.yaml", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, cwd=folder, stdout=pipe, stderr=pipe, text=True) as process:
        printed = ""
        while stop_after is not None and stop_after not in printed:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            printed += line
        if stop_after is not None:
            process.terminate()
        stdout, stderr = process.communicate(timeout=SECONDS)
    return Piece(process.returncode, printed + stdout, stderr)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Done:
    """The study, done in three calls: one that fails, one that is stopped, and one that ends."""
    folder = tmp_path_factory.mktemp("study")
    grown = "  grown: {kind: vit, data: DIGITS, seeds: [0], epochs: [1], lr: 1.0e-3, sizes: [L2-H2], options: {model: "
    grown += '"{arch}", init: weight_selection, init-path: "{scratch/L1-H1/1}/model.safetensors"}}\nreport'
    (folder / "study.yaml").write_text(STUDY.replace("report", grown))
    failed = run(folder, "--only", "grown")
    (folder / "study.yaml").write_text(STUDY)
    return Done(folder, [failed, run(folder, stop_after="[3/10]"), run(folder, "--jobs", "2")])


@pytest.fixture
def copy(done, tmp_path) -> Done:
    """A copy of it, to change."""
    return Done(Path(shutil.copytree(done.folder, tmp_path / "copy")), [])


@pytest.fixture
def run_here(monkeypatch, capfd) -> Callable[..., Piece]:
    """The script in this process, for calls that run nothing."""

    def run_here(folder: Path, *options: str) -> Piece:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "study.yaml", *options])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return Piece(end.value.code, *capfd.readouterr())

    return run_here


def test_pieces_together_do_every_run_once(done, copy, run_here):
    assert [piece.code for piece in done.pieces] == [1, 128 + signal.SIGTERM, 0], done.pieces
    lines = [line for piece in done.pieces for line in piece.stdout.splitlines() if line.startswith("[")]
    matches = [re.match(r"\[(\d+)/\d+\] (.*): \d+\.\d\d %, \d+ s(; about \d+ min left)?$", line) for line in lines]
    assert all(matches), lines
    assert sorted(match[2] for match in matches) == RUNS
    assert [int(match[1]) for match in matches] == list(range(1, 11))
    for piece, count in zip(done.pieces[:2], ("1 of 2", r"\d of 10"), strict=True):
        assert re.search(rf"^{count} runs are done; the same command continues$", piece.stdout, re.MULTILINE)
    assert done.pieces[-1].stdout.endswith("all 10 runs are done: results/tiny\n")
    assert run_here(copy.folder, "--minutes", "1e-9") == Piece(0, "all 10 runs are done: results/tiny\n", "")


def test_results_name_no_folder_of_a_machine(done, copy, run_here):
    """Nor does the archive depend on the folder that the study was run in."""
    elsewhere = copy.folder / "else where"
    shutil.move(copy.root, elsewhere / "tiny")
    for path in elsewhere.rglob("args.yaml"):
        path.write_text(path.read_text().replace("output/study/tiny/", f"{elsewhere}/tiny/"))
    (copy.results / ARCHIVE).unlink()
    assert run_here(copy.folder, "--output", str(elsewhere)).code == 0
    assert copy.kept == done.kept
    assert "output/study/tiny/runs/" in "".join(copy.kept.values())


def test_a_run_that_fails(done):
    stderr = done.pieces[0].stderr
    assert "error: grown L2-H2 seed 0, 1 epoch has failed with status 2, see output/study/tiny/runs/" in stderr
    assert "weight selection needs a larger ViT" in stderr


@pytest.mark.parametrize(("removed", "rows"), [("L1-H1", 9), ("L2-H2", 8)])  # of which another was made
def test_no_time_left(copy, run_here, removed, rows):
    shutil.rmtree(copy.root / "runs/scratch" / removed)
    piece = run_here(copy.folder, "--minutes", "1e-9")
    assert piece == Piece(3, "9 of 10 runs are done; the same command continues\n", "")
    assert len([*csv.DictReader((copy.results / "results.csv").open())]) == rows


def test_runs_are_those_of_the_file(done):
    args = yaml.safe_load(done.kept["runs/LeTs/L1-H1/1/1/args.yaml"])
    assert args["load_gene"] == "output/study/tiny/runs/LeTs_stage_1/2/1/learngene.safetensors"
    assert (args["des_arch"], args["seed"], args["epochs"], args["lr"]) == ("deit_nano_patch8_16_L1_H1", 1, 1, 3e-3)
    assert (args["train_images"], args["cache_data"], args["repeated_aug"]) == (320, True, False)
    args = yaml.safe_load(done.kept["runs/LeTs_stage_1/2/1/args.yaml"])
    assert args["teacher_path"] == "output/study/tiny/runs/teacher/1/0/model.safetensors"
    assert "holdout" not in args
    args = yaml.safe_load((done.root / "tuning/LeTs_stage_1/1/0.003/args.yaml").read_text())
    assert (args["holdout"], args["seed"], args["epochs"], args["lr"]) == (200, 100, 1, 3e-3)
    printed = (done.root / "runs/teacher/1/0/output.txt").read_text()
    assert "python main.py --input-size=16 " in printed
    assert "plain: ResNet with " in printed


def test_learning_rates_are_chosen_on_images_held_out(done):
    tried = {float(row["lr"]): row for row in done.rows("tuning")}
    assert sorted(tried) == [1e-9, 3e-3]
    for lr, row in tried.items():
        log = (done.root / f"tuning/LeTs_stage_1/1/{lr:g}/log.txt").read_text()
        assert float(row["held_out_accuracy"]) == json.loads(log.splitlines()[-1])["test_acc1"]
        assert (row["group"], row["epochs"]) == ("LeTs stage 1", "2")
    best = max(tried, key=lambda lr: float(tried[lr]["held_out_accuracy"]))
    assert {lr: row["chosen"] for lr, row in tried.items() if row["chosen"]} == {best: "yes"}
    assert tried[best]["at_edge"] == "yes"  # of two
    assert {float(row["lr"]) for row in done.rows() if row["kind"] == "stage1"} == {best}


def test_table(done):
    rows = {(row["method"], row["kind"], row["size"], row["epochs"], row["seed"]): row for row in done.rows()}
    runs = [("LeTs", "vit", "L1-H1", epochs, seed) for seed in "01" for epochs in "01"]
    runs += [("LeTs", "stage1", "", "2", seed) for seed in "01"]
    runs += [("scratch", "vit", size, "1", "0") for size in ("L1-H1", "L2-H2")]
    runs += [("teacher", "teacher", "", "1", "0"), ("weight selection", "vit", "L1-H1", "0", "0")]
    assert sorted(rows) == sorted(runs)

    small, large, aux = (models.parse_arch(f"deit_nano_patch8_16_{name}") for name in ("L1_H1", "L2_H2", "L4_H2"))
    with FlopCounterMode(display=False) as counter:
        models.create_model("test_resnet", num_classes=10).eval()(torch.zeros(1, 3, 16, 16))
    teacher = counter.get_total_flops() // 2
    macs = {
        ("LeTs", "vit", "1"): 320 * 3 * small.macs(10),
        ("LeTs", "stage1", "2"): 640 * (3 * aux.macs(10) + teacher),
        ("teacher", "teacher", "1"): 320 * 3 * teacher,
    }
    gene = sum(t.numel() for t in load_file(done.root / "runs/LeTs_stage_1/2/0/learngene.safetensors").values())
    stored = {"LeTs": gene, "weight selection": large.num_params(10)}
    for (method, kind, size, epochs, seed), row in rows.items():
        folder = Path("runs", "LeTs_stage_1" if kind == "stage1" else method.replace(" ", "_"), size)
        log = folder / (epochs if method != "LeTs" or kind == "stage1" else "1") / seed / "log.txt"
        lines = [json.loads(line) for line in done.kept[str(log)].splitlines()]
        (line,) = (line for line in lines if line["epoch"] == int(epochs) - 1)
        assert float(row["accuracy"]) == line["test_acc1"]
        assert int(row["parameters"]) == line["n_parameters"]
        assert int(row["images_seen"]) == 320 * int(epochs)
        if method in stored:
            assert int(row["stored_parameters"]) == stored[method]
        if (method, kind, epochs) in macs:
            assert int(row["macs"]) == macs[method, kind, epochs]
        processor, _, threads = row["device"].rpartition(", ")
        assert (row["study"], row["data"], processor) == ("tiny", "DIGITS", device_name(torch.device("cpu")))
        assert re.fullmatch("1 thread|[2-9] threads", threads)
        assert (float(row["seconds"]) > 0) == (epochs != "0" or method != "LeTs")
    assert int(rows["scratch", "vit", "L2-H2", "1", "0"]["stored_parameters"]) == large.num_params(10)
    assert int(rows["weight selection", "vit", "L1-H1", "0", "0"]["macs"]) == 0


def test_what_is_kept(done):
    for name, text in done.kept.items():
        assert text == (done.root / name).read_text()
    assert {Path(name).name for name in done.kept} == {"log.txt", "args.yaml", "run.json"}
    assert len(done.kept) == 3 * 8 + 2  # of the runs that tune, the record alone
    kept = {path.name for path in done.results.iterdir()}
    assert {"results.csv", "tuning.csv", "progress.csv", "tables.md", "study.yaml", "runs.tar.gz"} <= kept
    assert WEIGHTS_ARCHIVE not in kept  # no run waits for any
    assert not any(path.is_dir() for path in done.results.iterdir())
    assert (done.results / "study.yaml").read_text() == STUDY
    assert not [*done.root.rglob("*checkpoint*")]


def test_another_machine_continues_from_the_results(done, copy, run_here):
    shutil.rmtree(copy.root / "runs/LeTs/L1-H1/1/1")
    assert run_here(copy.folder, "--minutes", "1e-9").code == 3
    assert read_files(copy.results / WEIGHTS_ARCHIVE).keys() == {"runs/LeTs_stage_1/2/1/learngene.safetensors"}
    shutil.rmtree(copy.folder / "output")
    listed = run_here(copy.folder, "--list").stdout
    assert "LeTs: 2 runs (1 done, 0 begun, 1 to do)" in listed
    assert "LeTs stage 1: 2 runs (2 done, 0 begun, 0 to do)" in listed
    weights = (copy.results / WEIGHTS_ARCHIVE).read_bytes()
    (copy.results / WEIGHTS_ARCHIVE).write_bytes(b"")
    assert "weights.tar.gz cannot be read" in run_here(copy.folder, "--list").stderr
    (copy.results / WEIGHTS_ARCHIVE).write_bytes(weights)
    piece = run(copy.folder)
    assert piece.code == 0, piece.stderr
    assert [line[:35] for line in piece.stdout.splitlines()[:2]] == [
        "9 runs are done already, as results",
        "[10/10] LeTs L1-H1 seed 1, 1 epoch:",
    ]
    same = [(found, row) for found, row in zip(copy.rows(), done.rows(), strict=True) if row["epochs"] != "1"]
    assert all(found == row for found, row in same)
    assert (copy.root / "runs/LeTs_stage_1/2/1/run.json").read_text() == done.kept["runs/LeTs_stage_1/2/1/run.json"]
    assert not (copy.results / WEIGHTS_ARCHIVE).exists()


def test_where_weights_are_lost_only_what_they_are_needed_from_is_done_again(done, copy, run_here):
    """With the learngene that is needed its teacher is; what was made from the first training of both stays."""
    shutil.rmtree(copy.root / "runs/LeTs/L1-H1/1/1")
    assert run_here(copy.folder, "--minutes", "1e-9").code == 3
    shutil.rmtree(copy.folder / "output")
    (copy.results / WEIGHTS_ARCHIVE).unlink()
    listed = run_here(copy.folder, "--list").stdout
    left = {"teacher": "0 done, 1 begun", "LeTs stage 1": "1 done, 1 begun", "LeTs": "1 done, 0 begun"}
    for name, state in (left | {"scratch": "2 done, 0 begun"}).items():
        assert re.search(rf"^{name}: \d runs \({state}", listed, re.MULTILINE), listed
    piece = run(copy.folder)
    assert piece.code == 0, piece.stderr
    assert piece.stdout.startswith("7 runs are done already")
    (lost,) = copy.root.glob("runs/teacher/*/*/run.json")
    record, first = (json.loads(text) for text in (lost.read_text(), done.kept[str(lost.relative_to(copy.root))]))
    assert record["former"] == [first["result"]["sha256"]]
    assert record["seconds"] != first["seconds"]
    again = json.loads((copy.root / "runs/LeTs_stage_1/2/1/run.json").read_text())
    assert [*again["made_from"].values()] == [record["result"]["sha256"]]
    untouched = "runs/LeTs/L1-H1/1/0/run.json"
    assert (copy.root / untouched).read_text() == done.kept[untouched]
    assert run(copy.folder).stdout.startswith("all 10 runs are done")


def test_what_a_changed_study_cannot_continue_from(copy, run_here):
    shutil.rmtree(copy.folder / "output")
    (copy.folder / "study.yaml").write_text(STUDY.replace("train-images: 320", "train-images: 640"))
    piece = run_here(copy.folder, "--list")
    message = (
        "error: results/tiny/runs.tar.gz holds LeTs stage 1 seed 0, 2 epochs with train-images 320, not 640: move "
    )
    assert (piece.code, piece.stdout) == (2, "")
    assert piece.stderr.startswith(message.replace("LeTs stage 1 seed 0, 2 epochs", "teacher seed 0, 1 epoch"))


def test_one_process_at_a_time(copy, run_here):
    with FileLock(copy.root / ".lock"):
        piece = run_here(copy.folder)
    message = "error: output/study/tiny is used by another process of this study: wait for it, or stop it\n"
    assert piece == Piece(2, "", message)


def test_list_and_some_runs_alone(done, copy, run_here):
    shutil.rmtree(copy.root / "runs/scratch")
    everything = run_here(copy.folder, "--list")
    assert everything.code == 0
    assert "scratch: 2 runs (0 done, 0 begun, 2 to do)" in everything.stdout
    assert "LeTs stage 1, tuning: 2 runs (2 done, 0 begun, 0 to do)" in everything.stdout
    only = run_here(copy.folder, "--list", "--only", "weight selection")
    assert [line.partition(":")[0] for line in only.stdout.splitlines()[:-1]] == ["scratch", "weight selection"]
    assert "scratch: 1 runs" in only.stdout
    wrong = run_here(copy.folder, "--only", "scrach")
    assert (wrong.code, wrong.stderr) == (2, "error: --only scrach is no group; the nearest names are scratch\n")
    one = run_here(copy.folder, "--list", "--seeds", "1").stdout
    assert "LeTs: 1 runs" in one
    assert "LeTs stage 1, tuning: 2 runs" in one  # chose its learning rate
    assert "teacher: 1 runs" in one  # of seed 0, the only one
    assert "scratch" not in one
    wrong = run_here(copy.folder, "--seeds", "0", "7")
    assert (wrong.code, wrong.stderr) == (2, "error: --seeds 7 is none of this study: expected 0, 1\n")
    none = run_here(copy.folder, "--seeds", "1", "--only", "teacher")
    message = "error: --only teacher --seeds 1: these groups have no such run\n"
    assert (none.code, none.stderr) == (2, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train-images: 320", "train-images: 640", "with train-images 320, not 640: remove this folder to run"),
        ("[1.0e-9, 3e-3]", "2.0e-3", "with lr 0.003, not 0.002: remove this folder to run it again"),
        ("num-workers: 0", "num-workers: 1", None),
    ],
)
def test_other_options_than_those_of_what_is_done(copy, run_here, old, new, message):
    (copy.folder / "study.yaml").write_text(STUDY.replace(old, new))
    piece = run_here(copy.folder, "--list")
    assert piece.code == (2 if message else 0)
    assert message is None or (message in piece.stderr and piece.stderr.count("\n") == 1)


def test_what_was_made_from_another_run(copy, run_here):
    path = copy.root / "runs/LeTs_stage_1/2/1/run.json"
    record = json.loads(path.read_text())
    record["result"]["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    piece = run_here(copy.folder)
    assert piece.code == 2
    assert "runs/LeTs/L1-H1/1/1 holds LeTs L1-H1 seed 1, 1 epoch, made from another run of LeTs stage 1" in piece.stderr


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [0, 1]\n", "", "the study has no seeds"),
        ("seeds: [0, 1]\n", "seeds: [0, 0]\n", "seeds are [0, 0]: expected different whole numbers"),
        ("seeds: [0, 1]\n", "seed: [0, 1]\n", "the study has an unknown key seed: expected some of study, "),
        ("study: tiny", "study: ti/ny", "study is 'ti/ny': expected a name that a folder can have"),
        ("L2-H2: deit_nano_patch8_16_L2_H2", "L2-H2: deit_nano_L2_H2", "sizes, L2-H2: unknown architecture"),
        ("kind: stage1", "kind: stage 1", "runs, LeTs stage 1: kind is stage 1: expected teacher, stage1, vit"),
        ("data: DIGITS\n    sizes", "data: FMNIST\n    sizes", "runs, LeTs: data is FMNIST: expected DIGITS"),
        (
            "sizes: [L1-H1]",
            "sizes: [L1-H2]",
            "runs, LeTs: size L1-H2 is not among sizes; the nearest names are",
        ),
        ("method: LeTs\n", "sizes: [L1-H1]\n", "runs, LeTs stage 1: sizes are those of ViTs: expected none"),
        ("epochs: [0, 1]", "epochs: [1, -1]", "runs, LeTs: epochs are [1, -1]: expected different whole numbers"),
        ("epochs: 2", "epochs: [2, 3]", "runs, LeTs stage 1: epochs are [2, 3]: expected one number above 0"),
        ("epochs: 2", "epochs: two", "runs, LeTs stage 1: the group: epochs is 'two', expected int or list"),
        ("lr: scratch\n    ", "", "runs, LeTs: lr is missing: expected a number, a list to choose from, or the name"),
        ("lr: scratch", "lr: scratsh", "runs, LeTs: lr is scratsh, which is no group; the nearest names are scratch"),
        ("lr: scratch", "lr: LeTs", "runs, LeTs: lr goes in a circle: LeTs → LeTs"),
        ("lr: scratch", "lr: LeTs stage 1", "runs, LeTs: lr is that of LeTs stage 1, which has none for 1 epochs"),
        ("lr: scratch", "lr: [1, a]", "runs, LeTs: lr is [1, 'a']: expected numbers"),
        ("tuning: {seed: 100, size: L2-H2, holdout: 200}", "", "for which tuning needs a seed and a holdout"),
        ("lr: scratch", "lr: [1, 2]", "runs, LeTs: lr is to be tuned at size L2-H2: expected one of its sizes, L1-H1"),
        ("holdout: 200", "holdout: 2000", "--holdout 2000 and --train-images 320: more than the 1437 training images"),
        ("{scratch/L2-H2/1}", "{scratch/L2-H2/3}", "scratch has no run of size L2-H2, 3 epochs and seed 0"),
        ("{scratch/L2-H2/1}", "{scratch/L2-H2}", "{scratch/L2-H2}: expected {scratch}, or {scratch/SIZE/EPOCHS}"),
        ("{teacher}/model.safe", "{teecher}/model.safe", "refers to teecher, which is no group; the nearest names"),
        ("{teacher}/model.safetensors", "{teacher}/checkpoint.pth", "expected model.safetensors or learngene.safet"),
        ("{teacher}/model.safe", "{LeTs/L1-H1/1}/model.safe", "runs refer to each other in a circle: LeTs"),
        ("  LeTs:\n", "  LeTs_stage 1:\n", "'LeTs_stage 1' and 'LeTs stage 1' would have the same folder"),
        ("  LeTs:\n", "  LeTs/2:\n", "'LeTs/2' cannot be the name of a group"),
        ("model: test_resnet", "model: test_resnets", "runs, teacher: --model test_resnets: unknown model"),
        ("{teacher}/model.safetensors", "nowhere.pth", "teacher-path is nowhere.pth, which is not there"),
        ("batch-size: 64", "batch-sice: 64", "unknown key batch-sice; the nearest names are --batch-size"),
        ("batch-size: 64", "batch-size: 640", "batch-size 640 is more than the 320 training images"),
        ("batch-size: 64", "lr: 0.1", "options: lr is not an option here: it is set for every run"),
        ("batch-size: 64", "group-size: 64", "runs, teacher: --group-size needs --src-arch and --tgt-arch"),
        (
            "tgt-arch: deit_nano_patch8_16_L4_H2",
            "tgt-arch: deit_nano_patch4_16_L4_H2",
            "runs, LeTs stage 1: --src-arch",
        ),
        ("first: DIGITS", "first: FMNIST", "report names the data set 'FMNIST'"),
    ],
)
def test_studies_that_cannot_work_are_refused_before_anything_runs(tmp_path, run_here, old, new, message):
    assert old in STUDY
    (tmp_path / "study.yaml").write_text(STUDY.replace(old, new, 1))
    piece = run_here(tmp_path)
    assert piece.code == 2
    assert message in piece.stderr
    assert piece.stderr.startswith("error: study.yaml: ")
    assert piece.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_a_run_has_all_processors_if_it_is_alone(tmp_path):
    lines = (
        STUDY.partition("runs:")[0] + "runs:\n  wide: {kind: vit, data: DIGITS, seeds: [0], sizes: [L1-H3], epochs: 1, "
    )
    lines = lines.replace(
        "L1-H1: deit_nano_patch8_16_L1_H1", "L1-H3: deit_tiny_patch8_16_L1_H3"
    )  # large enough to share
    (tmp_path / "study.yaml").write_text(f'{lines}lr: 1.0e-3, options: {{model: "{{arch}}"}}}}\n')
    piece = run(tmp_path, "--jobs", "1", environment=ENVIRONMENT | {"OMP_NUM_THREADS": ""})
    assert piece.code == 0, piece.stderr
    assert f"{len(os.sched_getaffinity(0))} thread" in (tmp_path / "results/tiny/results.csv").read_text()


@pytest.mark.parametrize("name", ["cpu", "gpu", "trials", "elastic", "family"])
def test_the_studies_of_this_project_are_ready(name, tmp_path, run_here):
    images = np.zeros((60_000, 28, 28), dtype=np.uint8)
    for part, count in (("train", 60_000), ("t10k", 10)):
        labels = np.arange(count) % 10
        for kind, content in (("images-idx3", images[:count]), ("labels-idx1", labels.astype(np.uint8))):
            magic = bytes([0, 0, 8, content.ndim]) + struct.pack(f">{content.ndim}I", *content.shape)
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(magic + content.tobytes())
    text = (TESTS.parent / "configs" / f"study_{name}.yaml").read_text()
    teacher = tmp_path / "output/study/cpu/runs/teacher/16/0/model.safetensors"  # which one study takes from another
    teacher.parent.mkdir(parents=True)
    teacher.touch()
    assert "data-path: /usr/share/datasets/fashion-mnist" in text
    (tmp_path / "study.yaml").write_text(text.replace("/usr/share/datasets/fashion-mnist", str(tmp_path)))
    piece = run_here(tmp_path, "--list")
    assert (piece.code, piece.stderr) == (0, "")
    assert re.search(r"^\d+ runs, \S+ MACs$", piece.stdout, re.MULTILINE)
