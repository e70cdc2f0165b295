"""scripts/make_family.py: its models and the numbers in its tables are made again here, from the learngene."""

import csv
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import models
from datasets import build_dataset, build_transform
from models.formats.timm_folder import read_model

import numpy as np
import pytest
import timm
import torch
from conftest import ENVIRONMENT, SECONDS, TESTS
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = TESTS.parent / "scripts" / "make_family.py"
DIGITS = ["--data-set", "DIGITS"]
DEPTHS, HEADS = (1, 2, 4), (1, 3)  # of the family that most tests look at
FOLDERS = {f"L{depth}-H{heads}": (depth, heads) for depth in DEPTHS for heads in HEADS}
MAIN_OPTIONS = ["--", "--num-workers", "0", "--device", "cpu"]
EPOCHS = 3  # recorded in the learngene


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


def run(*args: object) -> Outcome:
    """The script in a process of its own."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, args), *MAIN_OPTIONS],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run_here(monkeypatch, capfd, forking_python) -> Callable[..., Outcome]:
    """The script in this process, and main.py in forks."""
    monkeypatch.setattr(sys, "executable", forking_python)

    def run_here(*args: object) -> Outcome:
        options = list(map(str, args))
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, *(MAIN_OPTIONS if "--" not in options else ())])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return Outcome(end.value.code, *capfd.readouterr())

    return run_here


def arch_of(depth: int, heads: int) -> models.ViTArch:
    return models.parse_arch(f"deit_nano_patch8_16_L{depth}_H{heads}")


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "family.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def said_in_one_sentence(outcome: Outcome, *parts: str) -> bool:
    assert (outcome.code, outcome.stderr.count("\n")) == (2, 1), outcome
    assert outcome.stderr.startswith("error: ")
    assert [part for part in parts if part not in outcome.stderr] == [], outcome.stderr
    return True


@pytest.fixture(scope="module")
def gene(tmp_path_factory) -> Path:
    """A LeTs learngene of ten classes with random weights, up to 3 heads."""
    torch.manual_seed(0)
    aux_net = models.create_aux_net("deit_nano_patch8_16_L2_H1", "deit_nano_patch8_16_L4_H3", num_classes=10)
    path = tmp_path_factory.mktemp("gene") / "learngene.safetensors"
    models.Learngene.of(aux_net, {"epochs": EPOCHS, "data_set": "DIGITS"}).save(path)
    return path


@pytest.fixture(scope="module")
def family(gene, tmp_path_factory) -> tuple[Path, Outcome]:
    """The family that most tests look at, and what was said when it was made. Five heads are too many."""
    out = tmp_path_factory.mktemp("family") / "new" / "folder"
    outcome = run("--load-gene", gene, "--depths", "1-2,4", "--heads", "5,3,1", *DIGITS, "--output-dir", out)
    assert outcome.code == 0, outcome
    return out, outcome


@pytest.fixture
def copy(family, tmp_path) -> Path:
    """A copy of the family, to change."""
    return Path(shutil.copytree(family[0], tmp_path / "copy"))


def test_every_model_of_the_grid_is_that_of_the_learngene(gene, family):
    out, outcome = family
    learngene = models.load_learngene(gene)
    assert {path.name for path in out.iterdir() if path.is_dir()} == FOLDERS.keys()
    for name, (depth, heads) in FOLDERS.items():
        vit, config = read_model(out / name)
        expected = learngene.descend(arch_of(depth, heads)).state_dict()
        assert vit.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in vit.state_dict().items())
        assert config["pretrained_cfg"]["input_size"] == [3, 16, 16]
        assert config["pretrained_cfg"]["crop_mode"] == "squash"
        assert config["label_names"] == list("0123456789")
    left_out = [line for line in outcome.stdout.splitlines() if line.startswith("left out")]
    assert len(left_out) == 1
    assert left_out[0].startswith("left out, 5 heads: ")
    assert "width 160" in left_out[0]


def test_the_numbers_of_the_table(gene, family):
    out, _ = family
    digits, _ = build_dataset("DIGITS", None, False, build_transform("DIGITS", False, 16))
    images, labels = torch.stack([image for image, _ in digits]), torch.tensor(digits.targets)
    rows = rows_of(out)
    assert [(int(row["depth"]), int(row["heads"])) for row in rows] == [(d, h) for h in HEADS for d in DEPTHS]
    stored = sum(tensor.numel() for tensor in models.load_learngene(gene).tensors.values())
    for row in rows:
        vit, _ = read_model(out / f"L{row['depth']}-H{row['heads']}")
        assert int(row["width"]) == vit.embed_dim
        assert int(row["parameters"]) == sum(p.numel() for p in vit.parameters())
        for block in vit.blocks:
            block.attn.fused_attn = False  # which the counter does not know on every device
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vit(images[:1])
        assert 2 * int(row["macs"]) == counter.get_total_flops()
        with torch.no_grad():
            right = (vit(images).argmax(1) == labels).sum().item()
        one_image = 100 / len(labels)  # which may lie on the border of two classes
        assert float(row["accuracy_before"]) == pytest.approx(right * one_image, abs=1.01 * one_image)
        assert row["accuracy_after"] == ""
        assert int(row["stored_parameters"]) == stored
        for quantity in ("latency_ms_1", "latency_ms_64", "images_per_s_64"):
            assert 0 < float(row[f"{quantity}_low"]) <= float(row[quantity]) <= float(row[f"{quantity}_high"])
        assert float(row["images_per_s_64"]) == pytest.approx(64_000 / float(row["latency_ms_64"]), rel=0.5)
        weights = 4 * int(row["parameters"])
        one, many = (float(row[f"memory_bytes_{batch}"]) for batch in (1, 64))
        assert {float(row[f"memory_bytes_1_{part}"]) for part in ("low", "high")} == {one}  # it is counted
        hidden = 4 * 4 * 4 * int(row["width"])  # bytes of an image's four patches
        assert weights + hidden < one < weights + 20 * hidden
        assert many - weights == pytest.approx(64 * (one - weights), rel=0.2)
        assert "threads, float32" in row["device"]


def test_table_and_costs_in_markdown(gene, family):
    out, _ = family
    lines = (out / "family.md").read_text().splitlines()
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len({len(row) for row in tables[: len(FOLDERS) + 2]}) == 1
    assert tables[0][4:8] == ["ms, 1 image", "images/s", "MB, 1 image", "MB, 64 images"]
    for row, shown in zip(rows_of(out), tables[2:], strict=False):
        accuracy = f"{float(row['accuracy_before']):.2f} %"
        assert shown[:2] == [f"L{row['depth']}-H{row['heads']}", row["width"]]
        assert shown[2:4] == [f"{int(row[name]):,}" for name in ("parameters", "macs")]
        assert shown[4].split()[0] == f"{float(row['latency_ms_1']):.2f}"
        assert shown[5].split()[0] == f"{float(row['images_per_s_64']):,.0f}"
        assert shown[6] == f"{float(row['memory_bytes_1']) / 1e6:.2f}"
        assert shown[8:] == [accuracy, ""]

    cells = {row[0]: row[1:] for row in tables[len(FOLDERS) + 2 :]}
    learngene = models.load_learngene(gene)
    params, macs = (sum(int(row[name]) for row in rows_of(out)) for name in ("parameters", "macs"))
    stored = sum(tensor.numel() for tensor in learngene.tensors.values())
    assert cells["parameters stored"] == [f"{stored:,}", f"{params:,}, {params / stored:.2f} times as many"]
    per_epoch = 3 * 1437  # forward and backward, training images
    aux = arch_of(4, 3).macs(10)
    each = f"{per_epoch * EPOCHS * macs:.3e}, {macs / aux:.2f} times as many"
    assert cells["MACs of training, together"] == [f"{per_epoch * EPOCHS * aux:.3e}", each]
    assert float(cells["MACs of fine-tuning for 0 epochs"][0]) == 0


def test_picture(family):
    with Image.open(family[0] / "family.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    assert width > 1500
    assert height > 500
    coloured = pixels.max(-1) - pixels.min(-1) > 60  # markers and fronts; everything else is grey
    thirds = np.array_split(coloured, 3, axis=1)
    assert all(third.sum() > 200 for third in thirds)


def test_the_best_is_named(family):
    out, outcome = family
    best = max(rows_of(out), key=lambda row: (float(row["accuracy_before"]), -int(row["parameters"])))
    line = next(line for line in outcome.stdout.splitlines() if line.startswith("the best that fits: "))
    assert f": L{best['depth']}-H{best['heads']} with {float(best['accuracy_before']):.2f} %, " in line
    assert f"{int(best['parameters']):,} parameters" in line


def test_continuing_does_what_is_missing_and_nothing_else(gene, copy, run_here):
    record = json.loads((copy / "L4-H1" / "family.json").read_text())
    record["accuracy_before"] = 99.5
    (copy / "L4-H1" / "family.json").write_text(json.dumps(record))  # a second evaluation would overwrite it
    (copy / "L2-H1" / "model.safetensors").unlink()
    (copy / "L1-H1" / "family.json").unlink()
    (copy / "family.csv").unlink()
    kept = {name: (copy / name / "model.safetensors").stat().st_mtime_ns for name in FOLDERS.keys() - {"L2-H1"}}

    outcome = run_here("--load-gene", gene, "--depths", "1-4", "--heads", "1,3", *DIGITS, "--output-dir", copy)
    assert outcome.code == 0, outcome
    rows = {f"L{row['depth']}-H{row['heads']}": row for row in rows_of(copy)}
    assert rows.keys() == FOLDERS.keys() | {"L3-H1", "L3-H3"}
    assert float(rows["L4-H1"]["accuracy_before"]) == 99.5
    assert "the best that fits: L4-H1 with 99.50 %" in outcome.stdout
    changed = {name for name in kept if (copy / name / "model.safetensors").stat().st_mtime_ns != kept[name]}
    assert changed == {"L1-H1"}
    for name in rows:
        assert json.loads((copy / name / "family.json").read_text())["accuracy_before"] is not None
        read_model(copy / name)


def test_a_record_without_what_was_not_measured_then_is_completed(gene, copy, run_here):
    path = copy / "L1-H1" / "family.json"
    record = json.loads(path.read_text())
    former = ("identity", "training", "device", "latency_ms_1", "latency_ms_64", "accuracy_before", "accuracy_after")
    path.write_text(json.dumps({**{name: record[name] for name in former}, "accuracy_before": 77.5}))
    options = ["--load-gene", gene, "--depths", "1", "--heads", "1", *DIGITS, "--output-dir", copy]
    assert run_here(*options).code == 0
    completed = json.loads(path.read_text())
    assert completed.keys() == record.keys()
    assert completed["accuracy_before"] == 77.5
    assert completed["memory_bytes_64"] == record["memory_bytes_64"]


def test_other_options_are_refused_before_anything_is_done(gene, copy, tmp_path, run_here):
    common = ["--depths", "1-3", "--heads", "1", "--output-dir", copy]
    assert said_in_one_sentence(run_here("--load-gene", gene, *common), "L1-H1 was made with data_set DIGITS, not None")
    smaller = run_here("--load-gene", gene, *DIGITS, *common, "--input-size", 8)
    assert said_in_one_sentence(smaller, "input_size 16, not 8", "another --output-dir")
    learngene = models.load_learngene(gene)
    learngene.tensors["head_bias"] = learngene.tensors["head_bias"] + 1
    learngene.save(tmp_path / "other.safetensors")
    other = run_here("--load-gene", tmp_path / "other.safetensors", *DIGITS, *common)
    assert said_in_one_sentence(other, "L1-H1 was made with learngene")
    assert not (copy / "L3-H1").exists()

    (copy / "L1-H1" / "family.json").write_text("[]")
    assert said_in_one_sentence(run_here("--load-gene", gene, *DIGITS, *common), "family.json is not a record")
    (copy / "L1-H1" / "family.json").unlink()
    (copy / "L1-H1" / "log.txt").touch()
    assert said_in_one_sentence(run_here("--load-gene", gene, *DIGITS, *common), "holds a run of main.py")


@pytest.mark.parametrize(("option", "count"), [("--max-params", "num_params"), ("--max-macs", "macs")])
def test_what_is_over_a_limit_is_not_built(gene, tmp_path, run_here, option, count):
    costs = {name: getattr(arch_of(*sizes), count)(10) for name, sizes in FOLDERS.items()}
    by_cost = sorted(costs, key=costs.get)
    limit = costs[by_cost[2]]
    options = ["--load-gene", gene, "--depths", "1,2,4", "--heads", "1,3", "--output-dir", tmp_path]
    outcome = run_here(*options, option, f"{limit / 1000}K")
    assert outcome.code == 0, outcome
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(by_cost[:3])
    assert len(rows_of(tmp_path)) == 3
    nearest = arch_of(*FOLDERS[by_cost[3]])
    costs = f"{nearest.num_params(10):,} parameters, {nearest.macs(10):,} MACs"
    assert f"the nearest that does not fit: {by_cost[3]} with {costs}\n" in outcome.stdout
    assert "the largest that fits: " in outcome.stdout

    assert said_in_one_sentence(run_here(*options, option, 1), "nothing fits the limits", "nearest is L1-H1 with")


def test_what_is_too_slow_is_dropped(gene, tmp_path, run_here):
    options = ["--load-gene", gene, "--depths", "1-2", "--heads", "1", "--output-dir", tmp_path]
    outcome = run_here(*options, "--max-latency-ms", 1e-6)
    assert said_in_one_sentence(outcome, "nothing fits the limits", " ms")
    assert list(tmp_path.iterdir()) == []
    assert run_here(*options, "--max-latency-ms", 1e6).code == 0
    assert {row["accuracy_before"] for row in rows_of(tmp_path)} == {""}
    assert all(0 < float(row["latency_ms_1"]) < 1e6 for row in rows_of(tmp_path))


def test_hidden_neurons_are_an_axis_of_the_grid(gene, tmp_path, run_here):
    options = ["--load-gene", gene, "--depths", "1-2", "--heads", "1,3", "--output-dir", tmp_path]
    outcome = run_here(*options, "--mlp-ratios", "2.5,4,5")
    assert outcome.code == 0, outcome
    left_out = [line for line in outcome.stdout.splitlines() if line.startswith("left out")]
    assert len(left_out) == 1
    assert left_out[0].startswith("left out, 3 heads and MLP ratio 5: ")
    assert "480 hidden neurons" in left_out[0]
    assert "up to 384" in left_out[0]
    names = {f"L{depth}-{size}" for depth in (1, 2) for size in ("H1", "H1-M2.5", "H1-M5", "H3", "H3-M2.5")}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == names
    learngene = models.load_learngene(gene)
    for row in rows_of(tmp_path):
        own = "" if float(row["mlp_ratio"]) == 4 else f"-M{float(row['mlp_ratio']):g}"
        name = f"L{row['depth']}-H{row['heads']}{own}"
        expected = learngene.descend(f"@{name}")
        vit, config = read_model(tmp_path / name)
        assert all(torch.equal(tensor, vit.state_dict()[key]) for key, tensor in expected.state_dict().items())
        assert vit.blocks[0].mlp.fc2.in_features == float(row["mlp_ratio"]) * int(row["width"])
        assert int(row["parameters"]) == sum(p.numel() for p in vit.parameters())
        alone = timm.create_model(config["architecture"], num_classes=10, **config["model_args"])
        alone.load_state_dict(vit.state_dict())
    lines = [line.strip("|").split(" | ") for line in (tmp_path / "family.md").read_text().splitlines()]
    assert lines[0][2] == "hidden"
    hidden = {line[0].strip(): line[2] for line in lines if line[0].strip() in names}
    assert (hidden["L1-H1-M2.5"], hidden["L2-H3"]) == ("80", "384")
    kept = (tmp_path / "L1-H1" / "model.safetensors").stat().st_mtime_ns
    assert run_here(*options).code == 0  # the same members without -M
    assert (tmp_path / "L1-H1" / "model.safetensors").stat().st_mtime_ns == kept
    assert said_in_one_sentence(run_here(*options, "--mlp-ratios", "2,0"), "--mlp-ratios", "above 0")


def test_depths_that_a_learngene_does_not_make_are_left_out(tmp_path, run_here):
    name = "deit_nano_patch8_16_L3_H2"
    source = models.create_aux_net(name, num_classes=10)
    trained = {"src_arch": name, "epochs": 2, "data_set": "DIGITS", "descendants": 1, "descendant_depths": [1, 2]}
    models.Learngene.of(source, trained).save(tmp_path / "gene.safetensors")
    options = ["--load-gene", tmp_path / "gene.safetensors", "--depths", "2-4", "--heads", "2", "--mlp-ratios", "1,4"]
    outcome = run_here(*options, *DIGITS, "--no-eval", "--output-dir", tmp_path / "out")
    assert outcome.code == 0, outcome
    sizes = [models.parse_arch(f"deit_nano_patch8_16_L{depth}_H{heads}") for depth in (1, 2) for heads in (1, 2)]
    stage_1 = 3 * 2 * 1437 * sum(arch.macs(10) for arch in sizes) / 4  # one of them in each step
    assert f"| MACs of stage 1 | {stage_1:.3e} |" in (tmp_path / "out" / "family.md").read_text()
    left_out = [line for line in outcome.stdout.splitlines() if line.startswith("left out")]
    assert [line.partition(": ")[0] for line in left_out] == ["left out, L4-H2-M1", "left out, L4-H2"]
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {
        f"L{depth}-H2{ratio}" for depth in (2, 3) for ratio in ("", "-M1")
    }


def test_tleg_family_without_evaluation(tmp_path, run_here):
    aux_net = models.create_model("aux_deit_nano_patch8_24_L6_H2", num_classes=7, in_chans=1)
    models.Learngene.of(aux_net).save(tmp_path / "gene.safetensors")
    options = ["--load-gene", tmp_path / "gene.safetensors", "--depths", "2,5", "--heads", "2"]
    outcome = run_here(*options, "--output-dir", tmp_path / "own")
    assert outcome.code == 0, outcome
    for depth in (2, 5):
        vit, config = read_model(tmp_path / "own" / f"L{depth}-H2")
        assert (len(vit.blocks), vit.num_classes) == (depth, 7)
        assert config["pretrained_cfg"]["input_size"] == [1, 24, 24]
    assert {row["latency_ms_1"] + row["accuracy_before"] for row in rows_of(tmp_path / "own")} == {""}
    assert not (tmp_path / "own" / "family.png").exists()
    assert not (tmp_path / "own" / "family.html").exists()
    assert "cost of stage 1 is unknown" in (tmp_path / "own" / "family.md").read_text()

    outcome = run_here(*options, *DIGITS, "--no-eval", "--output-dir", tmp_path / "digits")
    assert "the heads are re-initialised" in outcome.stdout
    before = (tmp_path / "digits" / "L2-H2" / "model.safetensors").stat().st_mtime_ns
    assert run_here(*options, *DIGITS, "--output-dir", tmp_path / "digits").code == 0  # evaluates what there is
    assert (tmp_path / "digits" / "L2-H2" / "model.safetensors").stat().st_mtime_ns == before
    assert all(0 <= float(row["accuracy_before"]) <= 100 for row in rows_of(tmp_path / "digits"))
    assert (tmp_path / "digits" / "family.png").exists()


def test_fine_tuning_of_a_size_with_an_mlp_ratio(gene, tmp_path, run_here, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--load-gene", gene, "--depths", "1", "--heads", "1", "--mlp-ratios", "2", *DIGITS]
    fast = ["--aa", "none", "--reprob", "0", "--batch-size", "256", "--warmup-epochs", "0"]
    outcome = run_here(*options, "--output-dir", tmp_path, "--epochs", 1, *MAIN_OPTIONS, *fast)
    assert outcome.code == 0, outcome
    assert (tmp_path / "L1-H1-M2" / "log.txt").exists()
    assert float(rows_of(tmp_path)[0]["accuracy_after"]) > 0
    assert read_model(tmp_path / "L1-H1-M2")[0].blocks[0].mlp.fc2.in_features == 64
    assert (tmp_path / "family.png").exists()


def test_fine_tuning(gene, tmp_path, run_here, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of main.py, which is another process
    folder = tmp_path / "L2-H3"
    common = ["--load-gene", gene, "--depths", "2", "--heads", "3", *DIGITS, "--output-dir", tmp_path, "--epochs"]
    fast = ["--aa", "none", "--reprob", "0", "--batch-size", "128", "--warmup-epochs", "0"]
    outcome = run_here(*common, 1, *MAIN_OPTIONS, *fast)
    assert outcome.code == 0, outcome
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [-1, 0]
    row = rows_of(tmp_path)[0]
    assert [float(row[f"accuracy_{when}"]) for when in ("before", "after")] == [line["test_acc1"] for line in log]
    assert f"the best that fits: L2-H3 with {log[1]['test_acc1']:.2f} %" in outcome.stdout
    trained, _ = read_model(folder)
    untrained = models.load_learngene(gene).descend(arch_of(2, 3))
    assert not torch.equal(trained.head.weight, untrained.head.weight)
    fine_tuning = f"{3 * 1437 * arch_of(2, 3).macs(10):.3e}"
    assert f"| MACs of fine-tuning for 1 epoch | {fine_tuning} |" in (tmp_path / "family.md").read_text()

    # stopped after the last epoch, before it was recorded: the checkpoint is continued, not begun again
    record = json.loads((folder / "family.json").read_text())
    (folder / "family.json").write_text(json.dumps({**record, "accuracy_after": None}))
    outcome = run_here(*common, 1, *MAIN_OPTIONS, *fast)
    assert "nothing left to train" in outcome.stdout
    assert json.loads((folder / "family.json").read_text()) == record

    again = run_here(*common, 1, *MAIN_OPTIONS, *fast)
    assert (again.code, "L2-H3: " in again.stdout) == (0, False)
    assert said_in_one_sentence(run_here(*common, 2, *MAIN_OPTIONS, *fast), "was made with epochs 1, not 2")
    other_rate = run_here(*common, 1, *MAIN_OPTIONS, *fast, "--lr", "1e-3")
    assert said_in_one_sentence(other_rate, "was made with lr 0.0005, not 0.001")


@pytest.mark.full
def test_training_that_fails(gene, tmp_path, run_here):
    options = ["--load-gene", gene, "--depths", "1", "--heads", "1", *DIGITS, "--output-dir", tmp_path, "--epochs", 1]
    outcome = run_here(*options, *MAIN_OPTIONS, "--teacher-path", "no.pth", "--distillation-type", "soft")
    assert said_in_one_sentence(outcome, "main.py cannot train L1-H1", "no.pth is missing")
    assert rows_of(tmp_path)[0]["accuracy_after"] == ""


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--depths", "3-"], ["--depths", "'3-'", "3-6,9,12"]),
        (["--depths", "6-3"], ["--depths", "'6-3'"]),
        (["--heads", "0"], ["--heads", "'0'", "expected 1 to"]),
        (["--heads", "4-9"], ["--heads 4,5,6,7,8,9", "none of these"]),
        (["--max-params", "10Q"], ["--max-params", "'10Q'", "10M"]),
        (["--max-latency-ms", "nan"], ["--max-latency-ms", "'nan'"]),
        (["--load-gene", "nowhere.safetensors"], ["--load-gene nowhere.safetensors", "missing"]),
        (["--epochs", "1"], ["--epochs 1", "--data-set is missing"]),
        (["--epochs", "1", *DIGITS, "--no-eval"], ["--epochs 1", "--no-eval"]),
        (["--data-set", "FOLDER"], ["--data-set FOLDER needs --data-path"]),
        (["--input-size", "4"], ["--input-size 4", "no patch of 8"]),
        (["--width-select", "widest"], ["--width-select", "widest"]),
        (["--lr", "1"], ["--lr", "after --"]),
        (["--", "--epochs", "1"], ["--epochs belongs before --"]),
        (["--", "--learning", "1"], ["--learning"]),
        (["--", "--mapping_layer", "0,1"], ["--mapping-layer", "cannot be used for a family"]),
    ],
)
def test_bad_options(gene, tmp_path, run_here, options, parts):
    out = tmp_path / "out"
    given = ["--load-gene", gene, "--depths", "1", "--heads", "1", "--output-dir", out, *options]
    assert said_in_one_sentence(run_here(*given), *parts)
    assert not out.exists() or list(out.iterdir()) == []


def test_heads_without_a_name_cannot_be_trained(tmp_path, run_here):
    published = TESTS / "fixtures" / "tleg_learngene.pth"
    learngene = models.load_learngene(published, head_dim=4)
    options = ["--load-gene", published, "--head-dim", 4, "--depths", 2, "--heads", learngene.arch.num_heads]
    refused = run_here(*options, *DIGITS, "--epochs", 1, "--output-dir", tmp_path)
    assert said_in_one_sentence(refused, "--epochs 1", "heads of 4 neurons")
    assert list(tmp_path.iterdir()) == []
    assert run_here(*options, "--output-dir", tmp_path).code == 0
    vit, _ = read_model(tmp_path / f"L2-H{learngene.arch.num_heads}")
    assert vit.blocks[0].attn.head_dim == 4
