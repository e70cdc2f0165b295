"""Learngenes of any kind of timm's ViTs through main.py: names, timm's weights, model folders."""

import csv
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import models
from models.formats.timm_folder import read_model

import pytest
import timm
import torch
from conftest import ENVIRONMENT, TESTS, Outcome, Run, assert_same_result, run_many
from hub_stand_in import HubStandIn
from safetensors.torch import load_file, save

BASE = "--data-set DIGITS --num-workers 0 --batch-size 64 --train-images 128 --warmup-epochs 0 --device cpu"
STEADY = "--sched step --decay-epochs 100 --input-size 32"  # the same learning rate however many epochs are asked for
TAGGED = "test_vit.r160_in1k"  # 6 layers of 2 heads of 32 neurons, patches of 16 pixels, a class token
ROTARY = "vit_small_patch16_dinov3"  # LayerScale, register tokens, no position embedding; heads of 64 neurons
LOCAL_DIR = tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 16)  # the first with local-dir

FIRST = {
    "source": f"--model test_vit@L3-H1 {STEADY} --epochs 1 --output-dir OUT/source",
    "tleg": f"--method tleg --model test_vit@L4-H2 {STEADY} --epochs 1 --output-dir OUT/tleg",
    "pretrained": f"--src-arch {TAGGED} --src-path timm --tgt-arch @L7-H3 --epochs 0 --output-dir OUT/pretrained",
    "finetune": f"--model {TAGGED} --finetune timm --epochs 0 --output-dir OUT/finetune",
}
SECOND = {
    "lets": f"--src-arch test_vit@L3-H1 --src-path OUT/source --tgt-arch @L4-H2 {STEADY} --epochs 1 "
    "--output-dir OUT/lets",
    "source-size": "--des-arch @L6-H2 --load-gene OUT/pretrained --epochs 0 --output-dir OUT/source-size",
    "tleg-narrower": "--des-arch @L5-H1 --load-gene OUT/tleg --epochs 0 --output-dir OUT/tleg-narrower",
}
THIRD = {
    "narrower": "--des-arch @L2-H1 --load-gene OUT/lets --epochs 0 --output-dir OUT/narrower",
    "wider": "--model test_vit@L3-H2 --load-gene OUT/lets --epochs 0 --output-dir OUT/wider",
    "deeper": "--des-arch @L6-H2 --load-gene OUT/lets --epochs 0 --output-dir OUT/deeper",
}
FULL = {
    "two-processes": f"--src-arch {TAGGED} --src-path timm --tgt-arch @L7-H3 --input-size 32 --epochs 1",
    "folder-at-the-hub": f"--model {TAGGED} --finetune hf-hub:timm/{TAGGED} --epochs 0",
    "descendants": "--src-arch test_vit@L3-H1 --tgt-arch @L4-H2 --input-size 32 --epochs 1 --descendants 2 "
    "--descendant-depths 2,3 --descendant-heads 1,2",
    "rotary": f"--src-arch {ROTARY}@L2-H1 --tgt-arch @L3-H2 {STEADY} --epochs 2 --output-dir OUT/rotary",
    "rotary-half": f"--src-arch {ROTARY}@L2-H1 --tgt-arch @L3-H2 {STEADY} --epochs 1 --output-dir OUT/resumed",
    "rotary-tleg": f"--method tleg --model {ROTARY}@L3-H2 {STEADY} --epochs 1 --grad-checkpointing --drop-path 0",
}
FULL_SECOND = {
    "resumed": f"--src-arch {ROTARY}@L2-H1 --tgt-arch @L3-H2 {STEADY} --epochs 2 --resume auto "
    "--output-dir OUT/resumed",
    "averaged": f"--src-arch {ROTARY}@L2-H1 --tgt-arch @L3-H2 {STEADY} --eval --model-ema "
    "--resume OUT/rotary/checkpoint.pth",
    "rotary-des": f"--des-arch {ROTARY}@L4-H1 --load-gene OUT/rotary --epochs 1 --output-dir OUT/rotary-des",
    "teacher": "--model deit_nano_patch8_32_L2 --epochs 1 --distillation-type soft --teacher-model test_vit@L3-H1 "
    "--teacher-path OUT/source",
}
REFUSED = {  # a command line, and what its message says
    "not-there": ("--model test_vit3 --finetune timm --epochs 0", "timm/test_vit3.r160_in1k could not be downloaded"),
    "unknown": (
        "--model test_vit.x --finetune timm --epochs 0",
        "unknown tag 'x' of test_vit",
    ),
}


class Runs(NamedTuple):
    """What main.py wrote and said, and the weights of `TAGGED` at the stand-in of the Hub."""

    out: Path
    outcomes: dict[str, Outcome]
    pretrained: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, all_tests) -> Runs:
    out = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(0)
    pretrained = timm.create_model("test_vit").state_dict()
    config = {"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": {"tag": "r160_in1k"}}
    phases = [FIRST | {name: line for name, (line, _) in REFUSED.items()}, SECOND, THIRD]
    if all_tests:
        phases[0], phases[1] = phases[0] | FULL, phases[1] | FULL_SECOND
    with HubStandIn() as hub, pytest.MonkeyPatch.context() as patch:
        hub.add(f"timm/{TAGGED}", {"model.safetensors": save(pretrained), "config.json": json.dumps(config).encode()})
        for name, value in hub.environment(out / "hub").items():
            patch.setitem(ENVIRONMENT, name, value)
        outcomes = {}
        for number, phase in enumerate(phases):
            lines = {name: f"{BASE} {line.replace('OUT', str(out))}".split() for name, line in phase.items()}
            commands = {name: Run(line, 1 + (name == "two-processes")) for name, line in lines.items()}
            outcomes |= run_many(commands, out / f"runs{number}")
        yield Runs(out, outcomes, pretrained)


def finished(runs: Runs, name: str) -> Path:
    """The folder of a run, which has ended well."""
    assert set(runs.outcomes[name].codes) == {0}, runs.outcomes[name].stderr
    return runs.out / name


def same_but_for_the_head(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected if not name.startswith("head."))


# ---------------------------------------------------------------------------------------------------------------------
# Names, and the weights of a tag
# ---------------------------------------------------------------------------------------------------------------------


def test_names_are_understood_in_python():
    vit = models.create_model("test_vit@L2-H1", num_classes=3, img_size=32)
    assert (len(vit.blocks), vit.embed_dim, vit.num_classes, vit.cls_token.shape) == (2, 32, 3, (1, 1, 32))
    aux_net = models.create_aux_net("test_vit", "@L7-H3", num_classes=3)
    assert aux_net.arch == models.parse_arch("test_vit@L7-H3")
    des_net = models.Learngene.of(aux_net).descend("@L3-H1")
    assert models.parse_arch("test_vit@L3-H1").num_params(3) == sum(p.numel() for p in des_net.parameters())
    with pytest.raises(models.InputError, match="no pretrained weights of its own"):
        models.create_model("test_vit@L2-H1", pretrained=True)
    with pytest.raises(models.InputError, match="the tags that timm knows are r160_in1k"):
        models.create_model("test_vit.nonsense")


def test_des_net_of_the_sources_own_size_is_the_source_before_any_training(runs):
    finished(runs, "pretrained")
    found = load_file(finished(runs, "source-size") / "model.safetensors")
    assert same_but_for_the_head(found, runs.pretrained)


def test_word_timm_loads_the_weights_of_the_tag(runs):
    assert same_but_for_the_head(load_file(finished(runs, "finetune") / "model.safetensors"), runs.pretrained)
    for name in ("pretrained", "finetune"):
        said = f"timm's {TAGGED} has 1000 classes, the data 10: the head is re-initialised"
        assert runs.outcomes[name].stdout.count(said) == 1


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_timm_cannot_give_are_one_sentence(runs, name):
    outcome = runs.outcomes[name]
    assert (outcome.codes, outcome.stderr.count("\n")) == ([2], 1)
    assert REFUSED[name][1] in outcome.stderr


# ---------------------------------------------------------------------------------------------------------------------
# From a learngene of a kind
# ---------------------------------------------------------------------------------------------------------------------

SIZES = {  # folder → layers, heads of 32 neurons, pixels
    "source": (3, 1, 32),
    "finetune": (6, 2, 160),
    "source-size": (6, 2, 160),
    "tleg-narrower": (5, 1, 32),
    "narrower": (2, 1, 32),
    "wider": (3, 2, 32),
    "deeper": (6, 2, 32),
}


@pytest.mark.parametrize("name", SIZES)
def test_model_folder_names_kind_and_sizes(runs, name):
    depth, heads, size = SIZES[name]
    model, config = read_model(finished(runs, name))
    assert config["architecture"] == "test_vit"
    sizes = {"embed_dim": 32 * heads, "depth": depth, "num_heads": heads, "patch_size": 16, "img_size": size}
    assert config["model_args"] == sizes
    assert config["pretrained_cfg"]["input_size"] == [3, size, size]
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 10)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "resnet18"}, "resnet18 cannot be changed in size"),
        ({"model_args": {"embed_dim": 32}}, "does not describe model.safetensors: KeyError 'depth'"),
        ({"depth": 3}, "is not in model.safetensors in the same shape"),
        ({"depth": 10**6}, "at most 256"),
        ({"num_heads": 5}, "cannot be divided among 5 heads"),
        ({"img_size": 10**6}, "patches of width 32 are too many"),
        ({"embed_dim": 10**9, "num_heads": 1}, "patches of width 1,000,000,000 are too many"),
        ({"class_token": False}, "model_args are not those of a ViT of these sizes"),
    ],
    ids=str,
)
def test_model_folder_that_does_not_describe_its_weights(runs, tmp_path, changed, message):
    folder = shutil.copytree(finished(runs, "narrower"), tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    place = config if changed.keys() <= config.keys() else config["model_args"]
    place |= changed
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(models.InputError, match=re.escape(message)):
        read_model(folder)


TIMM_ALONE = """
import sys
import timm, torch
logits = {}
for folder in sys.argv[2:]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    size = model.pretrained_cfg["input_size"]
    logits[folder] = model(torch.linspace(-1, 1, 2 * size[0] * size[1] * size[2]).view(2, *size)).detach()
assert not {"models", "common", "training"} & sys.modules.keys()
torch.save(logits, sys.argv[1])
"""


@pytest.mark.skipif(not LOCAL_DIR, reason="timm has no local-dir")
def test_timm_alone_reads_every_model_folder(runs, tmp_path, all_tests):
    names = [*SIZES, *(["rotary-des"] if all_tests else [])]
    folders = [str(finished(runs, name)) for name in names]
    alone = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", TIMM_ALONE, str(tmp_path / "logits.pth"), *folders]
    done = subprocess.run(command, env=alone, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, logits in torch.load(tmp_path / "logits.pth", weights_only=True).items():
        model, config = read_model(folder)
        size = config["pretrained_cfg"]["input_size"]
        images = torch.linspace(-1, 1, 2 * size[0] * size[1] * size[2]).view(2, *size)
        assert torch.equal(model(images), logits), folder


def test_learngene_states_its_kind(runs):
    gene = models.load_learngene(finished(runs, "lets"))
    assert gene.arch == models.ViTArch(64, 4, 2, 16, 32, kind="test_vit")
    assert f"{gene}".startswith("LeTs learngene (learngene file), test_vit, L3-H1 (width 32)")


def test_inspector_shows_what_the_kind_has(runs, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "gene.png"
    script = str(TESTS.parent / "scripts" / "inspect_learngene.py")
    monkeypatch.setattr(sys, "argv", [script, str(finished(runs, "tleg")), "--plot", str(picture)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    said = capsys.readouterr().out
    assert (end.value.code, picture.stat().st_size > 0) == (0, True)
    assert "ViTs of the kind test_vit of timm's" in said
    assert re.search(r"\n  tokens +64 ", said)  # the class token; there are no others
    assert "pooling block" not in said
    assert "the largest of these: test_vit@L4-H2" in said


@pytest.mark.full
def test_family_of_a_kind(runs, tmp_path, monkeypatch, forking_python):
    script = str(TESTS.parent / "scripts" / "make_family.py")
    command = [script, "--load-gene", finished(runs, "lets"), "--depths", "2,3", "--heads", "1,2"]
    command += ["--data-set", "DIGITS", "--epochs", "1", "--output-dir", tmp_path / "family"]
    command += ["--", *BASE.split()[2:]]
    monkeypatch.setattr(sys, "executable", forking_python)
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert end.value.code == 0
    with (tmp_path / "family" / "family.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["depth"], row["heads"], row["width"]) for row in rows] == [
        (depth, heads, width) for heads, width in (("1", "32"), ("2", "64")) for depth in "23"
    ]
    for row in rows:
        folder = tmp_path / "family" / f"L{row['depth']}-H{row['heads']}"
        model, config = read_model(folder)
        assert config["architecture"] == "test_vit"
        assert int(row["parameters"]) == sum(p.numel() for p in model.parameters())
        assert float(row["accuracy_after"]) >= 0


# ---------------------------------------------------------------------------------------------------------------------
# The program around it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("name", [*FULL, *FULL_SECOND])
def test_run_of_a_kind(runs, name):
    finished(runs, name)


@pytest.mark.full
def test_run_of_a_rotary_kind_is_resumed_exactly(runs):
    finished(runs, "resumed")
    assert_same_result(runs.out / "resumed", finished(runs, "rotary"))


@pytest.mark.full
def test_averaged_weights_of_a_rotary_kind_are_evaluated(runs):
    finished(runs, "averaged")
    last = json.loads((runs.out / "rotary" / "log.txt").read_text().splitlines()[-1])
    assert json.loads(runs.outcomes["averaged"].stdout.splitlines()[-1])["test_acc1"] == last["ema_test_acc1"]


@pytest.mark.full
def test_timms_weights_are_downloaded_once_for_two_processes(runs):
    finished(runs, "two-processes")
    assert runs.outcomes["two-processes"].stdout.count("has 1000 classes, the data 10") == 1
