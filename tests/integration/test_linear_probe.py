"""--linear-probe: the head that fits the features of a ViT best, through main.py."""

import json

import models
from training import probe

import pytest
import torch
from conftest import epochs_of, set_up_run
from data_layouts import make_fmnist
from runs_of_families import Runs, run_phases
from safetensors.torch import load_file

BASE = "--data-set DIGITS --num-workers 0 --batch-size 64 --train-images 256 --warmup-epochs 0 --lr 5e-3 --device cpu"
VIT = "--model deit_nano_patch8_16_L2_H1"
GENE = "--src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2"
PROBE = "--epochs 0 --linear-probe"
FEATURES = "--src-path OUT/headless.pth --teacher-model source --distillation-type feature"  # no head is trained
OTHER = "--data-set FMNIST --data-path OUT/data --train-images 20"

PHASES = [
    {
        "vit": f"{VIT} --epochs 1 --output-dir OUT/vit",
        "gene": f"{GENE} --epochs 1 --output-dir OUT/gene",
        "features": f"--src-arch deit_nano_patch8_16_L2_H1 {FEATURES} --epochs 1 --output-dir OUT/features",
    },
    {
        "probe": f"{VIT} {PROBE} --finetune OUT/vit/model.safetensors --resume auto --output-dir OUT/probe",
        "two": f"{VIT} {PROBE} --finetune OUT/vit/model.safetensors --output-dir OUT/two",
        "des-net": f"--des-arch deit_nano_patch8_16_L2_H2 {PROBE} --load-gene OUT/gene --output-dir OUT/des-net",
        "other": f"{VIT} {PROBE} {OTHER} --finetune OUT/vit/model.safetensors --output-dir OUT/other",
        "backbone": f"{VIT} {PROBE} --finetune OUT/headless.pth --output-dir OUT/backbone",
        "member": f"--des-arch @L1-H1 {PROBE} --load-gene OUT/features --output-dir OUT/member",
        "trained": f"{VIT} {PROBE} --resume auto --output-dir OUT/vit",
    },
    {
        "again": "--config OUT/probe/args.yaml --output-dir OUT/again",
        "eval-probe": f"{VIT} --eval --resume OUT/probe/model.safetensors",
        "eval-des-net": "--model deit_nano_patch8_16_L2_H2 --eval --resume OUT/des-net/model.safetensors",
        "eval-backbone": f"{VIT} --eval --resume OUT/backbone/model.safetensors",
        "eval-member": "--model deit_nano_patch8_16_L1_H1 --eval --resume OUT/member/model.safetensors",
        "eval-other": f"{VIT} --eval {OTHER} --resume OUT/other/model.safetensors",
    },
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    out = tmp_path_factory.mktemp("probe")
    make_fmnist(out / "data")
    torch.manual_seed(0)
    backbone = models.create_vit(models.parse_arch("deit_nano_patch8_16_L2_H1"), num_classes=0)
    torch.save(backbone.state_dict(), out / "headless.pth")
    return run_phases(PHASES, BASE, out)


@pytest.mark.parametrize("name", ["probe", "des-net", "other", "backbone", "member"])
def test_written_model_has_the_head_of_the_probe(runs, name):
    (line,) = epochs_of(runs.finished(name))
    assert line["epoch"] == -1
    assert runs.outcomes[name].stdout.count("(linear probe)") == 1
    assert "is kept" not in runs.outcomes[name].stderr  # as a head of other classes would be
    runs.finished(f"eval-{name}")
    evaluated = json.loads(runs.outcomes[f"eval-{name}"].stdout.splitlines()[-1])
    assert evaluated["test_acc1"] == line["test_acc1"]
    assert not (runs.out / name / "model_ema.safetensors").exists()  # of a head that no probe has fitted


def test_probe_changes_the_head_alone(runs):
    found, before = (load_file(runs.finished(name) / "model.safetensors") for name in ("probe", "vit"))
    assert [key for key in found if not torch.equal(found[key], before[key])] == ["head.bias", "head.weight"]
    assert epochs_of(runs.out / "probe")[0]["test_acc1"] > epochs_of(runs.out / "vit")[-1]["test_acc1"]
    again = load_file(runs.finished("again") / "model.safetensors")
    assert all(torch.equal(found[key], again[key]) for key in found)


def test_backbone_without_head_stays_as_it_is(runs):
    found = load_file(runs.finished("backbone") / "model.safetensors")
    before = torch.load(runs.out / "headless.pth", weights_only=True)
    assert found.keys() - before.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(found[key], value) for key, value in before.items())
    assert epochs_of(runs.out / "backbone")[0]["test_acc1"] > 40  # random features tell digits apart; chance is 10


def test_all_images_of_the_run_are_fitted(runs, monkeypatch):
    monkeypatch.setattr(probe, "PROBE_IMAGES", 100)
    images = {
        name: sum(len(images) for images, _ in set_up_run(f"{BASE} {options}".split()).probe_loader)
        for name, options in {
            "probe": f"{VIT} {PROBE} --holdout 500",
            "of a run without labels": f"--src-arch deit_nano_patch8_16_L2_H1 {FEATURES}".replace("OUT", str(runs.out)),
        }.items()
    }
    assert images == {"probe": 256, "of a run without labels": 100}


def test_two_processes_fit_the_same_head(runs):
    found, expected = (load_file(runs.finished(name) / "model.safetensors") for name in ("two", "probe"))
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)


def test_classes_are_those_of_the_other_data_set(runs):
    assert "Sandal" in json.loads((runs.finished("other") / "config.json").read_text())["label_names"]


def test_a_run_that_has_trained_is_not_probed(runs):
    assert runs.outcomes["trained"].codes == [2]
    (line,) = runs.outcomes["trained"].stderr.splitlines()
    assert "--linear-probe" in line
    assert "--finetune" in line
