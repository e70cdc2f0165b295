"""The images of a run are prepared as those that its first weights were trained on, whatever file says how."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import models
from models.formats.timm_folder import save_model
from models.preprocessing import DEFAULT, Preprocessing
from scripts.predict import load, read_picture

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import ENVIRONMENT, Outcome, Run, run_many, set_up_run
from hub_stand_in import HubStandIn
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.datasets import ImageFolder

ARCH = "deit_nano_patch8_32_L2_H1"
OWN = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.25, 0.5), "bilinear", 0.8, "squash")
PLAIN = "--no-repeated-aug --aa none --reprob 0 --color-jitter none --mixup 0 --cutmix 0 --smoothing 0"
ALWAYS = f"--input-size 32 --batch-size 8 --num-workers 0 --device cpu {PLAIN} --epochs 0"
STAGE_1 = f"--src-arch deit_nano_patch8_32_L2_H1 --tgt-arch deit_nano_patch8_32_L2_H2 {ALWAYS}"
TLEG = f"--model aux_{ARCH} {ALWAYS}"
TIMM = "test_vit.r160_in1k"  # whose weights timm has for mean 0.5

PHASES = [
    {
        "finetune": f"--model {ARCH} --finetune SOURCE {ALWAYS}",
        "trained": f"--model {ARCH} --finetune SOURCE {ALWAYS} --epochs 1",
        "override": f"--model {ARCH} --finetune SOURCE {ALWAYS} --mean 0.1 0.2 0.3 --crop-mode border",
        "init": f"--model {ARCH.replace('L2', 'L1')} --init interpolation --init-path SOURCE {ALWAYS}",
        "scratch": f"--model {ARCH} {ALWAYS}",
        "stage-1": f"{STAGE_1} --src-path SOURCE",
        "tleg": f"{TLEG} --interpolation bilinear",
        "tag": f"--model {TIMM} --finetune BARE {ALWAYS}",
        "kind": f"--model test_vit --finetune KIND {ALWAYS.replace('--input-size 32', '')}",
        "kind-sized": f"--model test_vit --finetune KIND {ALWAYS}",
        "no-tag": f"--model test_vit --finetune BARE {ALWAYS}",
        "cached": f"--model {ARCH} --finetune TEN {ALWAYS} --data-set DIGITS --cache-data",
        "loaded": f"--model {ARCH} --finetune TEN {ALWAYS} --data-set DIGITS",
        "no-std": f"--model {ARCH} --finetune SPOILT {ALWAYS}",
        "no-such-tag": f"--model test_vit.no_such_tag --finetune BARE {ALWAYS}",
        "std-0": f"--model {ARCH} {ALWAYS} --std 0.5 0 0.5",
        "mean-nan": f"--model {ARCH} {ALWAYS} --mean 0.5 nan 0.5",
        "two-means": f"--model {ARCH} {ALWAYS} --mean 0.5 0.5",
        "unknown": f"--model {ARCH} {ALWAYS} --interpolation cubic",
    },
    {
        "stage-2": f"--des-arch {ARCH} --load-gene OUT/stage-1/learngene.safetensors {ALWAYS}",
        "tleg-again": f"{TLEG} --finetune OUT/tleg/learngene.safetensors",
        "eval": f"--model {ARCH} --resume OUT/trained/checkpoint.pth --eval {ALWAYS}",
        "resumed": f"--model {ARCH} --resume OUT/trained/checkpoint.pth {ALWAYS} --epochs 2",
        "repeated": "--config OUT/trained/args.yaml",
    },
]


class Runs(NamedTuple):
    out: Path
    outcomes: dict[str, Outcome]

    def folder(self, name: str) -> Path:
        assert self.outcomes[name].codes == [0], self.outcomes[name].stderr
        return self.out / name

    def log(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder(name) / "log.txt").read_text().splitlines()]

    def recorded(self, name: str) -> Preprocessing:
        """What args.yaml says."""
        options = yaml.safe_load((self.folder(name) / "args.yaml").read_text())
        return Preprocessing.from_config({**options, "crop_pct": options["eval_crop_ratio"]})

    def written(self, name: str) -> Preprocessing:
        """What the config.json of the model says."""
        return Preprocessing.from_config(json.loads((self.out / name / "config.json").read_text())["pretrained_cfg"])


def write_photographs(root: Path) -> None:
    """Pictures of four classes, none of them square."""
    generator = np.random.default_rng(0)
    for split, number in (("train", 4), ("val", 8)):
        for label in range(4):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(number):
                coarse = Image.fromarray(generator.integers(256, size=(4, 6, 3), dtype=np.uint8))
                picture = coarse.resize((60 + label, 44), Image.Resampling.BICUBIC)
                picture.save(root / split / f"class{label}" / f"{i}.png")


def write_source(folder: Path, num_classes: int, preprocessing: Preprocessing) -> None:
    """A model folder in timm's format, whose logits differ between pictures."""
    folder.mkdir()
    torch.manual_seed(0)
    vit = models.create_model(ARCH, num_classes=num_classes)
    with torch.no_grad():
        vit.head.weight.mul_(100)
    data_config = {"input_size": [3, 32, 32], **preprocessing.as_config()}
    save_model(vit, folder, models.parse_arch(ARCH), {}, data_config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    out = tmp_path_factory.mktemp("preprocessing")
    write_photographs(out / "data")
    write_source(out / "source", 4, OWN)
    write_source(out / "ten", 10, OWN)
    write_source(out / "spoilt", 4, OWN)
    config = json.loads((out / "spoilt" / "config.json").read_text())
    config["pretrained_cfg"]["std"] = [0.5, 0, 0.5]
    (out / "spoilt" / "config.json").write_text(json.dumps(config))
    kind, of_48 = timm.create_model("test_vit", img_size=48, num_classes=4), {"input_size": [3, 48, 48]}
    (out / "kind").mkdir()
    save_model(kind, out / "kind", "test_vit", {"img_size": 48}, of_48 | OWN.as_config())
    torch.save(timm.create_model("test_vit", img_size=32, num_classes=4).state_dict(), out / "bare.pth")
    places = {"SOURCE": "source/model.safetensors", "SPOILT": "spoilt/model.safetensors", "BARE": "bare.pth"}
    places |= {"TEN": "ten/model.safetensors", "KIND": "kind", "OUT": "."}
    outcomes = {}
    for i, phase in enumerate(PHASES):
        commands = {}
        for name, options in phase.items():
            for place, where in places.items():
                options = options.replace(place, str(out / where))
            data = [] if "--data-set" in options or "--config" in options else ["--data-set", "FOLDER"]
            data += ["--data-path", str(out / "data")] if data else []
            commands[name] = Run([*data, *options.split(), "--output-dir", str(out / name)])
        outcomes |= run_many(commands, out / f"phase{i}")
    return Runs(out, outcomes)


def load_with_timm(folder: Path) -> nn.Module:
    config = json.loads((folder / "config.json").read_text())
    args = {"num_classes": config["num_classes"], **config["model_args"]}
    return timm.create_model(config["architecture"], checkpoint_path=folder / "model.safetensors", **args).eval()


def evaluate_with_timm(folder: Path, data: Path) -> tuple[float, float]:
    """Accuracy in percent and loss of a model folder, by timm alone."""
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    dataset = ImageFolder(data, create_transform(**resolve_data_config(pretrained_cfg=config)))
    images, labels = torch.stack([image for image, _ in dataset]), torch.tensor(dataset.targets)
    with torch.inference_mode():
        logits = load_with_timm(folder)(images)
    return (logits.argmax(1) == labels).double().mean().item() * 100, nn.functional.cross_entropy(logits, labels).item()


# ---------------------------------------------------------------------------------------------------------------------
# Where it comes from
# ---------------------------------------------------------------------------------------------------------------------


def test_evaluation_of_a_source_is_timms(runs):
    accuracy, loss = evaluate_with_timm(runs.out / "source", runs.out / "data" / "val")
    (line,) = runs.log("finetune")
    assert line["test_acc1"] == pytest.approx(accuracy)
    assert line["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert "--mean 0.5 0.5 0.5, --std 0.5 0.25 0.5" in runs.outcomes["finetune"].stdout
    assert "--eval-crop-ratio 0.8, --crop-mode squash: as in --finetune" in runs.outcomes["finetune"].stdout
    for i, other in enumerate((DEFAULT, replace(OWN, crop_mode="center"), replace(OWN, interpolation="bicubic"))):
        write_source(runs.out / f"other{i}", 4, other)
        _, other_loss = evaluate_with_timm(runs.out / f"other{i}", runs.out / "data" / "val")
        assert other_loss != pytest.approx(loss, rel=1e-4)  # the numbers can tell them apart


@pytest.mark.parametrize("name", ["finetune", "trained", "init", "stage-2", "resumed", "repeated"])
def test_preprocessing_of_the_source_is_recorded(runs, name):
    assert runs.recorded(name) == runs.written(name) == OWN


def test_written_folder_evaluates_as_the_run_did(runs):
    accuracy, loss = evaluate_with_timm(runs.folder("trained"), runs.out / "data" / "val")
    last = runs.log("trained")[-1]
    assert (last["test_acc1"], last["test_loss"]) == (pytest.approx(accuracy), pytest.approx(loss, rel=1e-4))
    picture = runs.out / "data" / "val" / "class0" / "0.png"
    _, transform, _ = load(runs.out / "trained")
    config = {"input_size": (3, 32, 32), **OWN.as_config()}
    assert torch.equal(transform(read_picture(picture)), create_transform(**config)(Image.open(picture)))


def test_size_of_images_is_the_sources(runs):
    """48 pixels in config.json, while the architecture is for 160."""
    for name, size in {"kind": 48, "kind-sized": 32}.items():
        config = json.loads((runs.folder(name) / "config.json").read_text())["pretrained_cfg"]
        assert config["input_size"] == [3, size, size]
        assert Preprocessing.from_config(config) == OWN


def test_options_win(runs):
    expected = Preprocessing((0.1, 0.2, 0.3), OWN.std, "bilinear", 0.8, "border")
    assert runs.recorded("override") == runs.written("override") == expected
    assert "--mean" not in runs.outcomes["override"].stdout
    assert "--std 0.5 0.25 0.5" in runs.outcomes["override"].stdout


def test_without_source_it_is_deits(runs):
    assert runs.recorded("scratch") == runs.written("scratch") == DEFAULT
    assert "as in" not in runs.outcomes["scratch"].stdout


def test_learngene_states_it(runs):
    path = runs.folder("stage-1") / "learngene.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["preprocessing"]) == OWN.as_config()
    gene = models.load_learngene(path)
    assert gene.preprocessing == OWN
    assert Preprocessing.from_config(gene.descend(ARCH).pretrained_cfg) == OWN
    assert "as in --load-gene" in runs.outcomes["stage-2"].stdout
    assert "--interpolation bilinear: as in --finetune" in runs.outcomes["tleg-again"].stdout
    gene = models.load_learngene(runs.folder("tleg-again") / "learngene.safetensors")
    assert gene.preprocessing == Preprocessing(interpolation="bilinear")


def test_older_learngene_has_deits(runs, tmp_path):
    path = runs.folder("stage-1") / "learngene.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    del metadata["preprocessing"]
    save_file(load_file(path), tmp_path / "older.safetensors", metadata)
    assert models.load_learngene(tmp_path / "older.safetensors").preprocessing == DEFAULT


def test_checkpoint_states_it(runs):
    shown = json.loads(runs.outcomes["eval"].stdout.splitlines()[-1])
    assert shown["test_loss"] == pytest.approx(runs.log("trained")[-1]["test_loss"], rel=1e-5)
    assert "as in --resume" in runs.outcomes["eval"].stdout
    assert [line["epoch"] for line in runs.log("resumed")] == [-1, 0, 1]


def test_tag_of_the_name_says_it_for_a_file_that_does_not(runs):
    of_tag = Preprocessing.from_config(timm.get_pretrained_cfg(TIMM).to_dict())
    assert runs.recorded("tag") == of_tag
    assert runs.recorded("no-tag") == DEFAULT
    assert f"{TIMM} has --mean 0.5 0.5 0.5" in runs.outcomes["no-tag"].stdout


@pytest.mark.full
def test_repository_of_the_hub_says_it(runs, tmp_path, monkeypatch):
    files = {name: (runs.out / "kind" / name).read_bytes() for name in ("model.safetensors", "config.json")}
    options = f"--model test_vit --finetune hf-hub:owner/vit {ALWAYS.replace('--input-size 32', '')}".split()
    options += ["--data-set", "FOLDER", "--data-path", str(runs.out / "data"), "--output-dir", str(tmp_path / "out")]
    with HubStandIn() as hub:
        hub.add("owner/vit", files)
        for name, value in hub.environment(tmp_path / "hub").items():
            monkeypatch.setitem(ENVIRONMENT, name, value)
        outcome = run_many({"hub": Run(options, processes=2)}, tmp_path / "printed")["hub"]
    assert outcome.codes == [0, 0], outcome.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert config["input_size"] == [3, 48, 48]
    assert Preprocessing.from_config(config) == OWN


# ---------------------------------------------------------------------------------------------------------------------
# What the network sees
# ---------------------------------------------------------------------------------------------------------------------


def normalised_differently(images: torch.Tensor) -> torch.Tensor:
    numbers = (DEFAULT.mean, DEFAULT.std, OWN.mean, OWN.std)
    mean, std, own_mean, own_std = (torch.tensor(colours).view(3, 1, 1) for colours in numbers)
    return (images * std + mean - own_mean) / own_std


@pytest.mark.parametrize("data", ["FOLDER", "DIGITS", "DIGITS --cache-data"])
def test_training_images_are_normalised_so(runs, data):
    where = [] if data.startswith("DIGITS") else ["--data-path", str(runs.out / "data")]
    options = ["--data-set", *data.split(), *where, "--model", ARCH, *ALWAYS.split()]
    colours = [*map(str, ("--mean", *OWN.mean, "--std", *OWN.std))]
    batches = [next(iter(set_up_run([*options, *more]).train_loader))[0] for more in ([], colours)]
    torch.testing.assert_close(batches[1], normalised_differently(batches[0]), rtol=1e-4, atol=1e-5)


def test_images_in_memory_are_normalised_so(runs):
    (cached,), (loaded,) = runs.log("cached"), runs.log("loaded")
    assert cached["test_loss"] == pytest.approx(loaded["test_loss"], rel=1e-6)
    assert runs.recorded("cached").mean == OWN.mean


def test_teacher_sees_images_as_it_was_trained_on(runs, capsys):
    teacher = runs.out / "source" / "model.safetensors"
    options = ["--data-set", "FOLDER", "--data-path", str(runs.out / "data"), "--model", ARCH, *ALWAYS.split()]
    options += ["--distillation-type", "soft", "--teacher-model", ARCH, "--teacher-path", str(teacher)]
    run = set_up_run(options)
    assert "sees the images with its own mean 0.5 0.5 0.5, std 0.5 0.25 0.5" in capsys.readouterr().out
    images = torch.randn(4, 3, 32, 32)
    expected = load_with_timm(teacher.parent)(normalised_differently(images))
    torch.testing.assert_close(run.teacher(images), expected, rtol=1e-4, atol=1e-4)
    same = set_up_run([*options, *map(str, ("--mean", *OWN.mean, "--std", *OWN.std))])
    assert torch.equal(same.teacher(images), same.teacher.model(images))
    assert same.teacher.digest() != run.teacher.digest()  # which is in the key of a teacher cache


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("no-std", ("--finetune", "config.json: std is 0.5 0 0.5, expected three numbers above 0")),
        ("no-such-tag", ("'no_such_tag' of test_vit", "r160_in1k")),
        ("std-0", ("--std", "0 is not above 0")),
        ("mean-nan", ("--mean", "nan is not a finite number")),
        ("two-means", ("--mean", "expected 3 arguments")),
        ("unknown", ("--interpolation", "cubic")),
    ],
)
def test_error_is_one_line(runs, name, parts):
    outcome = runs.outcomes[name]
    assert outcome.codes == [2]
    assert re.fullmatch(r"error: .*\n", outcome.stderr)
    assert all(part in outcome.stderr for part in parts)


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"mean": [0.5, "half", 0.5]}, "mean is 0.5 'half' 0.5, expected three numbers"),
        ({"std": [1e400, 1, 1]}, "std is inf 1 1, expected three numbers above 0"),
        ({"mean": 0.5}, "mean is 0.5, expected three numbers"),
        ({"interpolation": "none"}, "interpolation is 'none', expected one of bicubic"),
        ({"crop_pct": 0}, "crop_pct is 0, expected a number above 0"),
        ({"crop_mode": ["center"]}, "crop_mode is 'center', expected one of center"),
        ([], "its preprocessing is 'a list', expected a mapping"),
    ],
)
def test_entry_of_a_learngene_is_checked(runs, tmp_path, entry, part):
    path = runs.folder("stage-1") / "learngene.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "preprocessing": json.dumps(entry)}
    save_file(load_file(path), tmp_path / "gene.safetensors", metadata)
    with pytest.raises(models.InputError) as caught:
        models.load_learngene(tmp_path / "gene.safetensors")
    assert part in str(caught.value)


def test_small_images_say_nothing_about_photographs(runs, tmp_path):
    shutil.copytree(runs.folder("loaded"), tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["pretrained_cfg"]["crop_pct"] == 1
    options = ["--model", ARCH.replace("32", "72"), "--finetune", str(tmp_path / "small" / "model.safetensors")]
    run = set_up_run([*options, "--data-set", "FOLDER", "--data-path", str(runs.out / "data"), *ALWAYS.split()])
    assert (run.config.data.eval_crop_ratio, run.config.data.crop_mode) == (0.875, "center")
    assert run.config.data.mean == OWN.mean
