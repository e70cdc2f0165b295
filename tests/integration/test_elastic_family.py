"""The elastic family through main.py: plain, with class token, without head, with rotary positions."""

import json
import subprocess
import sys

import models
import utils

import pytest
import timm
import torch
from conftest import ENVIRONMENT, assert_same_result, epochs_of, set_up_run
from runs_of_families import Runs, run_phases, write_source
from safetensors.torch import load_file

BASE = "--data-set DIGITS --num-workers 0 --batch-size 64 --train-images 256 --warmup-epochs 0 --device cpu"
STEADY = "--sched step --decay-epochs 100"  # the same learning rate however many epochs are asked for
ANY_KIND = "--descendant-depths 1,2,3 --descendant-heads 1,2 --descendant-mlp-ratios"  # not all have 4 to begin with
SIZES = f"{ANY_KIND} 1,4"
TARGETS = "--teacher-model source --distillation-type soft --distillation-tau 2 --chain-weight 0.5"
POLICY = "--descendants 3 --descendant-sampling sandwich --descendant-warmup-epochs 1 --descendant-coarse-to-fine"
SOURCES = {  # name of the source → its images
    "deit_nano_patch8_16_L3_H2": 16,  # plain
    "test_vit@L3-H2": 32,  # class token
    "vit_small_patch14_dinov2@L3-H2": 28,  # LayerScale, class token, no head
    "vit_small_patch16_dinov3@L3-H2": 32,  # rotary positions, registers, no head
}
PLAIN = "deit_nano_patch8_16_L3_H2"


def slug(name: str) -> str:
    return name.replace("@", "-")


def first_runs() -> dict[str, str]:
    lines = {}
    for name, size in SOURCES.items():
        stage_1 = f"--src-arch {name} --src-path OUT/{slug(name)} --input-size {size} {ANY_KIND} 1,2"
        lines[f"family-{slug(name)}"] = f"{stage_1} --epochs 2 {POLICY} --output-dir OUT/family-{slug(name)}"
        lines[f"free-{slug(name)}"] = f"{stage_1} --epochs 0 --output-dir OUT/free-{slug(name)}"
    stage_1 = f"--src-arch {PLAIN} --src-path OUT/{slug(PLAIN)} {SIZES} {TARGETS} {POLICY}"
    lines["whole"] = f"{stage_1} {STEADY} --epochs 3 --teacher-cache OUT/cache --output-dir OUT/whole"
    lines["cut"] = f"{stage_1} {STEADY} --epochs 1 --descendant-warmup-epochs 0 --output-dir OUT/cut"
    lines["uncut"] = f"{stage_1} {STEADY} --epochs 2 --descendant-warmup-epochs 0 --output-dir OUT/uncut"
    lines["two"] = f"{stage_1} --epochs 2 --batch-size 32 --output-dir OUT/two"
    lines["scratch"] = f"--src-arch {PLAIN} --epochs 1 --output-dir OUT/scratch"
    return lines


SECOND = {
    "continued": f"--src-arch {PLAIN} --src-path OUT/{PLAIN} {SIZES} {TARGETS} {POLICY} {STEADY} --epochs 2 "
    "--descendant-warmup-epochs 0 --resume auto --output-dir OUT/cut",
    "cached": f"--src-arch {PLAIN} --src-path OUT/{PLAIN} {SIZES} {TARGETS} {POLICY} {STEADY} --epochs 3 "
    "--teacher-cache OUT/cache --output-dir OUT/cached",
    "member": f"--des-arch @L2-H1-M1 --load-gene OUT/whole --epochs 1 --distillation-type soft --teacher-model {PLAIN} "
    "--teacher-path OUT/whole-source --output-dir OUT/member",
    "rotary-member": "--des-arch @L2-H1 --load-gene OUT/family-vit_small_patch16_dinov3-L3-H2 --epochs 0 "
    "--output-dir OUT/rotary-member",
}
REFUSED = {  # a command line, and what its message says
    "no-source": (f"--src-arch {PLAIN} {TARGETS}", "--src-path is missing: --teacher-model source"),
    "no-type": (f"--src-arch {PLAIN} --src-path OUT/x --teacher-model source", "--distillation-type is missing"),
    "two-weights": (
        f"--src-arch {PLAIN} --src-path OUT/x --teacher-path OUT/y {TARGETS}",
        "--teacher-path belongs to another teacher",
    ),
    "order": (f"--src-arch {PLAIN} --order taylor", "--src-path is missing: --order taylor"),
    "lets-order": (
        f"--src-arch {PLAIN} --tgt-arch @L4-H2 --order taylor",
        "--order needs --src-arch without --tgt-arch",
    ),
    "too-large": (f"--src-arch {PLAIN} --descendant-heads 3", "3 heads, the source 2"),
    "too-many-neurons": (
        f"--src-arch {PLAIN} --descendant-mlp-ratios 5",
        "320 hidden neurons in a layer, the source 256",
    ),
    "no-ratio": (f"--src-arch {PLAIN} --descendant-mlp-ratios 1,x", "'1,x' is not a list of numbers"),
    "only-warm-up": (
        f"--src-arch {PLAIN} --descendant-warmup-epochs 3 --epochs 3",
        "--descendant-warmup-epochs 3 leaves none of 3 epochs",
    ),
    "no-chain": (
        f"--src-arch {PLAIN} --descendants 1 --chain-weight 0.5",
        "--chain-weight needs two members in a step",
    ),
    "smallest-alone": (
        f"--src-arch {PLAIN} --descendants 1 --descendant-sampling smallest",
        "1 descendant in a step is always the smallest",
    ),
    "stage-2": (f"--model {PLAIN} --descendant-sampling sandwich", "--descendant-sampling needs stage 1"),
    "other-head": (
        f"--src-arch {PLAIN} --src-path OUT/seven-classes {TARGETS} {SIZES}",
        "--src-path OUT/seven-classes: has 7 classes, the data 10",
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    out = tmp_path_factory.mktemp("elastic")
    for name, size in SOURCES.items():
        write_source(out / slug(name), name, size, num_classes=0 if "dino" in name else 10)
    write_source(out / "whole-source", PLAIN, 16, 10)
    write_source(out / "seven-classes", PLAIN, 16, 7)
    refused = {name: line for name, (line, _) in REFUSED.items()}
    return run_phases([first_runs() | refused, SECOND], BASE, out)


def source_of(runs: Runs, name: str) -> dict[str, torch.Tensor]:
    return load_file(runs.out / slug(name) / "model.safetensors")


@pytest.mark.parametrize("name", SOURCES)
def test_a_family_without_training_is_made_of_its_source(runs, name):
    gene = models.load_learngene(runs.finished(f"free-{slug(name)}") / "learngene.safetensors")
    whole, expected = gene.descend("@L3-H2").state_dict(), source_of(runs, name)
    same = [key for key in whole if not key.startswith(("head.", "fc_norm.")) or key in expected]
    assert all(torch.equal(whole[key], expected[key]) for key in same)
    assert len(same) >= len(whole) - 4  # a backbone has no head


@pytest.mark.parametrize("name", SOURCES)
def test_one_command_makes_a_family_of_any_kind(runs, name):
    folder = runs.finished(f"family-{slug(name)}")
    gene = models.load_learngene(folder / "learngene.safetensors")
    images = torch.randn(2, 3, SOURCES[name], SOURCES[name])
    assert gene.method == "elastic"
    for member in ("@L1-H1-M1", "@L2-H2", "@L3-H2"):
        vit = gene.descend(member).eval()
        assert type(vit).__module__.startswith("timm.")
        assert vit(images).isfinite().all()


def test_a_stage_1_is_resumed_bit_for_bit(runs):
    for name in ("cut", "uncut", "continued"):
        assert runs.outcomes[name].codes == [0], runs.outcomes[name].stderr
    assert_same_result(runs.out / "cut", runs.out / "uncut")


def test_the_cache_of_the_source_gives_the_same_run(runs):
    runs.finished("whole"), runs.finished("cached")
    assert_same_result(runs.out / "cached", runs.out / "whole")


def test_the_cost_is_logged(runs):
    epochs = epochs_of(runs.finished("whole"))
    macs = [line["train_macs"] for line in epochs]
    largest = models.parse_arch(PLAIN).macs(10)
    assert macs[0] == 3 * largest * 256  # forward and backward of the warm-up, which trains the largest alone
    assert macs[0] < macs[1] - macs[0] < 3 * macs[0]
    assert f"12 sizes took {macs[-1]:.3g} MACs" in runs.outcomes["whole"].stdout


def test_two_processes_train_one_learngene(runs):
    gene = models.load_learngene(runs.finished("two") / "learngene.safetensors")
    assert gene.descend("@L1-H1")(torch.randn(1, 3, 16, 16)).isfinite().all()


def test_all_processes_of_a_step_draw_the_same_sizes(monkeypatch):
    run = set_up_run(f"{BASE} --src-arch {PLAIN} {SIZES} --epochs 2".split())
    drawn = [run.sizes_of_step(epoch, step) for epoch in (0, 1) for step in range(10)]
    monkeypatch.setattr(utils, "rank", lambda: 1)
    assert drawn == [run.sizes_of_step(epoch, step) for epoch in (0, 1) for step in range(10)]
    assert len({tuple(sizes) for sizes in drawn}) > 10


def test_without_a_source_the_family_is_trained_from_scratch(runs):
    gene = models.load_learngene(runs.finished("scratch") / "learngene.safetensors")
    assert (gene.options["descendants"], gene.options["descendant_weight"]) == (2, 1.0)


def test_members_are_plain_timm_models(runs):
    folder = runs.finished("member")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_args"]["mlp_ratio"] == 1
    runs.finished("rotary-member")
    program = f"import timm; print(type(timm.create_model('local-dir:{folder}', pretrained=True)).__name__)"
    if tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 16):  # the first with local-dir
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
        assert found.stdout.strip() == "VisionTransformer", found.stderr


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_said_in_one_line(runs, name):
    outcome, found = runs.outcomes[name], REFUSED[name][1].replace("OUT", str(runs.out))
    assert outcome.codes == [2]
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.startswith(("error: ", "main.py: error: "))
    assert found in last
