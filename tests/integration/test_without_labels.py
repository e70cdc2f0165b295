"""Elastic stage 1 without labels: features of a source without head as targets, through main.py."""

import csv
import json
import re
import runpy
import sys

import models
from losses import unexplained_variance
from training.command_line import parse_options
from training.launch import prepare

import pytest
import timm
import torch
from conftest import TESTS, assert_same_result, epochs_of, set_up_run
from runs_of_families import Runs, run_phases, write_source
from safetensors import safe_open

BASE = "--data-set DIGITS --num-workers 0 --batch-size 64 --train-images 128 --warmup-epochs 0 --device cpu"
BASE += " --sched step --decay-epochs 100"  # the same learning rate however many epochs are asked for
DINO = "--src-arch vit_small_patch14_reg4_dinov2@L3-H2 --src-path OUT/dinov2"
FEATURES = "--teacher-model source --distillation-type feature --descendant-depths 2,3 --descendant-heads 1,2"
FEATURES = f"{DINO} {FEATURES}"
ROTARY = FEATURES.replace(DINO, "--src-arch vit_small_patch16_dinov3@L3-H2 --src-path OUT/dinov3")

FIRST = {
    "whole": f"{FEATURES} --epochs 2 --accum-iter 2 --output-dir OUT/whole",
    "half": f"{FEATURES} --epochs 1 --accum-iter 2 --output-dir OUT/resumed",
    "free": f"{FEATURES} --epochs 0 --output-dir OUT/free",
    "two": f"{FEATURES} --epochs 1 --batch-size 32 --output-dir OUT/two",
}
SECOND = {
    "resumed": f"{FEATURES} --epochs 2 --accum-iter 2 --resume auto --output-dir OUT/resumed",
    "des-net": "--des-arch @L2-H1 --load-gene OUT/whole --epochs 0 --output-dir OUT/des-net",
}
FULL = {
    "rotary": f"{ROTARY} --epochs 1 --grad-checkpointing --amp-dtype bfloat16 --output-dir OUT/rotary",
    "labels": f"{FEATURES} --distillation-alpha 0.5 --descendant-weight 0.5 --epochs 1 --output-dir OUT/labels",
    "evaluated": f"{FEATURES} --eval --resume OUT/whole/checkpoint.pth",
}


IMAGES = {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, all_tests) -> Runs:
    out = tmp_path_factory.mktemp("features")
    write_source(out / "dinov2", "vit_small_patch14_reg4_dinov2@L3-H2", 28, 0, {"input_size": [3, 28, 28], **IMAGES})
    if all_tests:
        write_source(out / "dinov3", "vit_small_patch16_dinov3@L3-H2", 32, 0, {"input_size": [3, 32, 32], **IMAGES})
    return run_phases([FIRST, SECOND | (FULL if all_tests else {})], BASE, out)


def test_features_of_a_source_without_head_make_a_learngene_without_head(runs):
    gene = models.load_learngene(runs.finished("whole") / "learngene.safetensors")
    assert (gene.num_classes, gene.classes, gene.preprocessing.mean) == (0, None, (0.5, 0.5, 0.5))
    with safe_open(runs.out / "whole" / "learngene.safetensors", "pt") as file:
        names = {*file.keys()}
        assert "feature_maps" not in names | file.metadata().keys()
        assert not [name for name in names if "head" in name]
    checkpoint = models.load_learngene(runs.out / "whole" / "checkpoint.pth")
    assert checkpoint.tensors.keys() == gene.tensors.keys() == names
    loss = [epoch["train_loss"] for epoch in epochs_of(runs.out / "whole")]
    assert 0 < loss[1] < loss[0] < 2
    assert runs.outcomes["whole"].stdout.count("(linear probe)") == 2
    assert {"test_acc1", "ema_test_acc1", "smallest_test_acc1"} <= epochs_of(runs.out / "whole")[-1].keys()


def test_resumed_run_is_the_same(runs):
    runs.finished("whole"), runs.finished("half"), runs.finished("resumed")
    assert_same_result(runs.out / "resumed", runs.out / "whole")


def test_without_training_the_source_itself_is_in_the_learngene(runs):
    gene = models.load_learngene(runs.finished("free") / "learngene.safetensors")
    source = timm.create_model("vit_small_patch14_reg4_dinov2", **{"img_size": 28, "num_classes": 0}).state_dict()
    found = gene.descend("@L3-H2").state_dict()
    with safe_open(runs.out / "dinov2" / "model.safetensors", "pt") as file:
        assert found.keys() == {*file.keys()} <= source.keys()
        assert all(torch.equal(found[name], file.get_tensor(name)) for name in found)
    assert epochs_of(runs.out / "free")[0]["test_acc1"] > 20  # a probe of features, not a random head


def test_two_processes_train_maps_of_whatever_widths_are_drawn(runs):
    assert len(epochs_of(runs.finished("two"))) == 1


def test_des_nets_are_fine_tuned_with_a_new_head(runs):
    runs.finished("des-net")
    vit = timm.create_model(
        "vit_small_patch14_reg4_dinov2", **json.loads((runs.out / "des-net" / "config.json").read_text())["model_args"]
    )
    assert (len(vit.blocks), vit.embed_dim) == (2, 64)


def test_family_of_a_learngene_without_head_is_measured_by_a_linear_probe(runs, monkeypatch):
    gene, out = runs.finished("whole") / "learngene.safetensors", runs.out / "family"
    options = f"--load-gene {gene} --depths 2,3 --heads 1,2 --output-dir {out} --data-set DIGITS"
    monkeypatch.setattr(
        sys, "argv", [*f"make_family.py {options} -- {BASE}".replace("--data-set DIGITS --num", "--num").split()]
    )
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TESTS.parent / "scripts" / "make_family.py"), run_name="__main__")
    assert not end.value.code
    rows = [*csv.DictReader((out / "family.csv").open())]
    assert all(float(row["accuracy_before"]) > 20 for row in rows)
    assert "a linear probe, fitted to 128 training images" in (out / "family.md").read_text()
    page = (out / "family.html").read_text()
    assert all(part in page for part in ("--linear-probe", "--des-arch=@L2-H1", f"local-dir:{out}/L2-H1"))
    timm_args = json.loads((out / "L2-H1" / "config.json").read_text())
    assert timm_args["num_classes"] == 10  # with the head of the probe


@pytest.mark.full
def test_rotary_positions_labels_and_evaluation(runs):
    assert models.load_learngene(runs.finished("rotary") / "learngene.safetensors").num_classes == 0
    gene = models.load_learngene(runs.finished("labels") / "learngene.safetensors")
    assert gene.num_classes == 10
    assert "linear probe" not in runs.outcomes["labels"].stdout
    assert set(runs.outcomes["evaluated"].codes) == {0}
    found = json.loads(runs.outcomes["evaluated"].stdout.splitlines()[-1])
    assert found["test_acc1"] == epochs_of(runs.out / "whole")[-1]["test_acc1"]


@pytest.mark.parametrize("order", ["none", "magnitude"])
def test_source_leaves_nothing_to_learn_in_any_order_of_its_neurons(runs, order):
    options = f"{BASE} {FEATURES} --descendant-depths 3 --descendant-heads 1,2 --drop-path 0 --order {order}"
    run = set_up_run(options.replace("OUT", str(runs.out)).split())
    run.supernet.train().drawn = run.supernet.sampler.archs[::-1]
    images, _ = next(iter(run.test_loader))
    with torch.no_grad():
        teacher = run.teacher(images)
        whole, part = (unexplained_variance(features, teacher).item() for features in run.supernet(images))
    assert whole < 1e-5 < 0.01 < part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model deit_nano_patch8_16_L2 --distillation-type feature", "needs --src-arch without --tgt-arch"),
        (f"{FEATURES} --tgt-arch @L4-H3 --descendants 1", "needs --src-arch without --tgt-arch"),
        (f"{FEATURES} --teacher-model regnety_160", "no use for --teacher-model regnety_160: expected source"),
        (f"{FEATURES} --teacher-cache OUT", "--teacher-cache keeps logits"),
        (f"{FEATURES} --chain-weight 0.5", "--chain-weight 0.5 is about logits"),
        (f"{FEATURES} --distillation-tau 2", "--distillation-tau 2.0 is about logits"),
        (f"{FEATURES} --distillation-mean logits", "--distillation-mean logits is about logits"),
        (f"{FEATURES} --order taylor", "--order taylor needs the loss of a head"),
    ],
)
def test_what_has_no_use_for_features_is_one_line(options, message):
    with pytest.raises(models.InputError, match=re.escape(message)) as error:
        prepare(parse_options(f"{BASE} {options}".split()))
    assert "\n" not in str(error.value)


def test_share_of_features_is_all_of_the_loss_unless_given():
    for options, expected in ((FEATURES, 1.0), (f"{FEATURES} --distillation-alpha 0.3", 0.3)):
        assert prepare(parse_options(f"{BASE} {options}".split())).teacher.distillation_alpha == expected
    soft = "--model deit_nano_patch8_16_L2 --distillation-type soft"
    assert prepare(parse_options(f"{BASE} {soft}".split())).teacher.distillation_alpha == 0.5
