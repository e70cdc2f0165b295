"""Data as people have them: class names, other files among the images, one split alone."""

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import models
from common.errors import InputError
from datasets import build_dataset
from models.learngene import save_published
from pipeline import folders
from scripts import make_shards, predict
from training.config import TeacherConfig
from training.label_check import check_teacher_names
from training.loop import train

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, Outcome, Run, run_many, set_up_run
from hub_stand_in import HubStandIn
from image_files import DEEP, FRACTIONS, held, saved
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from torchvision import datasets as tv

pytestmark = pytest.mark.full  # its runs take minutes

VIT = "deit_nano_patch8_16_L2_H1"
COMMON = "--device cpu --num-workers 0 --batch-size 8 --input-size 16 --data-set FOLDER --warmup-epochs 0 --data-path"
ABC, OTHERS = ("ant", "bat", "cow"), ("bat", "cow", "dog")


def make_images(folder: Path, names: Sequence[str], count: int = 8) -> None:
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def make_data(root: Path, names: Sequence[str]) -> None:
    make_images(root / "train", names)
    make_images(root / "val", names, 2)


def make_messy(root: Path) -> None:
    """`ABC` with files of other endings, and what programs leave in folders: all of it images by their content."""
    make_data(root, ABC)
    image = (root / "train" / "ant" / "0.png").read_bytes()
    for name in ("ant/a.jfif", "ant/b.gif", "bat/c.gif", "bat/none", "cow/notes.txt", "loose.png"):
        (root / "train" / name).write_bytes(image)
    for name in (".ipynb_checkpoints/0-checkpoint.png", "@eaDir/0.png", "ant/@eaDir/0.png", "__MACOSX/._0.png"):
        for split in ("train", "val"):
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / name).write_bytes(image)
    for name in (".DS_Store", "ant/.DS_Store", "ant/._0.png", "ant/.cache/1.png"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).write_bytes(image)
    (root / "train" / "ant" / "again").symlink_to(root / "train" / "ant")  # would be walked through 40 times
    for place, link in (("x", "y"), ("y", "x")):  # and these
        (root / "train" / "cow" / place).mkdir()
        (root / "train" / "cow" / place / link).symlink_to(root / "train" / "cow" / link)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Data sets, and what runs on the first of them have left."""
    root = tmp_path_factory.mktemp("data")
    make_data(root / "abc", ABC)
    make_data(root / "others", OTHERS)
    make_images(root / "val_alone" / "val", ABC, 2)
    make_images(root / "train_alone" / "train", ABC)
    make_messy(root / "messy")
    make_data(root / "gif", ABC)
    for file in (root / "gif" / "train" / "bat").iterdir():
        file.rename(file.with_suffix(".gif"))
    for name, model in (("plain", VIT), ("aux", "aux_deit_nano_patch8_16_L2")):
        options = f"{COMMON} {root}/abc --model {model} --epochs 1 --output-dir {root}/{name}"
        assert train(set_up_run(options.split())) == 0
    checkpoint = torch.load(root / "plain" / "checkpoint.pth", weights_only=True)
    assert checkpoint.pop("classes") == list(ABC)
    torch.save(checkpoint, root / "nameless.pth")
    shutil.copytree(root / "plain", root / "continued")
    return root


DISTILLED = f"--model {VIT} --epochs 0 --distillation-type soft --teacher-model {VIT} --teacher-path"
EVALUATED = f"--model {VIT} --eval --resume ROOT/plain/checkpoint.pth"
RUNS = {  # data set → name → other options
    "others": {
        "resume": (f"--model {VIT} --epochs 2 --resume ROOT/plain/checkpoint.pth", 2),
        "resume auto": (f"--model {VIT} --epochs 2 --resume auto --output-dir ROOT/continued", 1),
        "resume to evaluate": (EVALUATED, 1),
        "resume of an Aux-Net": ("--model aux_deit_nano_patch8_16_L2 --epochs 2 --resume ROOT/aux/checkpoint.pth", 1),
        "resume without names": (f"--model {VIT} --eval --resume ROOT/nameless.pth", 1),
        "teacher's folder": (f"{DISTILLED} ROOT/plain/model.safetensors", 2),
        "teacher's checkpoint": (f"{DISTILLED} ROOT/plain/checkpoint.pth", 1),
        "teacher on the Hub": (f"{DISTILLED} hf-hub:owner/teacher", 1),
        "teacher without names": (f"{DISTILLED} ROOT/nameless.pth", 1),
        "finetune": (f"--model {VIT} --epochs 0 --finetune ROOT/plain/model.safetensors", 2),
        "finetune a checkpoint": (f"--model {VIT} --epochs 0 --finetune ROOT/plain/checkpoint.pth", 1),
        "finetune an Aux-Net": ("--model aux_deit_nano_patch8_16_L2 --epochs 0 --finetune ROOT/aux/checkpoint.pth", 1),
        "init": (f"--model {VIT} --epochs 0 --init stacking --init-path ROOT/plain/model.safetensors", 1),
        "gene": (f"--des-arch {VIT} --epochs 0 --load-gene ROOT/aux/learngene.safetensors", 1),
        "gene in a checkpoint": (f"--des-arch {VIT} --epochs 0 --load-gene ROOT/aux/checkpoint.pth", 1),
    },
    "abc": {
        "same classes": (f"{DISTILLED} ROOT/plain/checkpoint.pth --finetune ROOT/plain/model.safetensors", 1),
        "same learngene": (f"--des-arch {VIT} --epochs 0 --load-gene ROOT/aux/learngene.safetensors", 1),
        "download of a folder": (f"--model {VIT} --download", 2),
    },
    "val_alone": {
        "evaluation alone": (EVALUATED, 2),
        "evaluation from memory": (
            f"{EVALUATED} --cache-data --data-set DIGITS --train-images 9", 1
        ),
        "training needs both": (f"--model {VIT} --epochs 1", 1),
    },
    "train_alone": {
        "holdout": (f"--model {VIT} --epochs 1 --holdout 6", 1),
        "evaluation of the holdout": (f"--model {VIT} --eval --holdout 6 --resume ROOT/plain/checkpoint.pth", 1),
        "evaluation needs val": (EVALUATED, 1),
    },
    "messy": {"messy": (f"--model {VIT} --epochs 0", 2), "messy holdout": (f"--model {VIT} --epochs 0 --holdout 6", 1)},
    "gif": {"gif": (f"--model {VIT} --epochs 0", 2)},
}  # fmt: skip


@pytest.fixture(scope="module")
def done(root) -> dict[str, Outcome]:
    folder = root / "plain"
    with HubStandIn() as hub, pytest.MonkeyPatch.context() as patch:
        hub.add("owner/teacher", {n: (folder / n).read_bytes() for n in ("model.safetensors", "config.json")})
        for name, value in hub.environment(root / "hub").items():
            patch.setitem(ENVIRONMENT, name, value)
        runs = {
            name: Run([*COMMON.split(), f"{root}/{data}", *options.replace("ROOT", str(root)).split()], processes)
            for data, of_data in RUNS.items()
            for name, (options, processes) in of_data.items()
        }
        return run_many(runs, root / "printed")


def refusal(outcome: Outcome) -> str:
    """The one line of a run that was refused, by all its processes."""
    assert set(outcome.codes) == {2}, outcome
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Class names
# ---------------------------------------------------------------------------------------------------------------------

DIFFERENCE = "class 0 is 'ant' there, 'bat' in the data"


@pytest.mark.parametrize(
    "name",
    [
        *("resume", "resume auto", "resume to evaluate", "resume of an Aux-Net"),
        *("teacher's folder", "teacher's checkpoint", "teacher on the Hub"),
    ],
)
def test_other_classes_are_refused(name, done):
    message = refusal(done[name])
    assert DIFFERENCE in message
    assert ("--teacher-path" if "teacher" in name else "--resume") in message


@pytest.mark.parametrize(
    "name", ["finetune", "finetune a checkpoint", "finetune an Aux-Net", "init", "gene", "gene in a checkpoint"]
)
def test_a_head_that_is_kept_for_other_classes_is_warned_of(name, done):
    outcome = done[name]
    assert set(outcome.codes) == {0}, outcome.stderr
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("warning: ")
    assert DIFFERENCE in line


@pytest.mark.parametrize(
    "name", ["resume without names", "teacher without names", "same classes", "same learngene", "evaluation alone"]
)
def test_nothing_is_said_of_the_same_classes_or_where_one_side_knows_none(name, done):
    assert (set(done[name].codes), done[name].stderr) == ({0}, "")


def test_a_learngene_keeps_its_class_names_through_both_formats(root, tmp_path):
    gene = models.load_learngene(root / "aux" / "learngene.safetensors")
    assert gene.classes == list(ABC)
    assert "classes" not in gene.header  # whose entries earlier versions of this program take for sizes
    save_published(gene, tmp_path / "published.pth")
    assert models.load_learngene(tmp_path / "published.pth", head_dim=32).classes == list(ABC)
    save_file(load_file(root / "aux" / "learngene.safetensors"), tmp_path / "old.safetensors",
              metadata={"learngene": json.dumps(gene.header)})  # fmt: skip
    assert models.load_learngene(tmp_path / "old.safetensors").classes is None


def test_timms_weights_of_imagenet_are_compared_by_the_codes_of_the_classes():
    teacher = TeacherConfig("resnet18", distillation_type="hard")
    codes = ImageNetInfo().label_names()
    check_teacher_names(teacher, codes)
    check_teacher_names(teacher, [f"thing {i}" for i in range(1000)])  # which may be the same ones
    with pytest.raises(InputError, match=rf"resnet18 .*class 5 is '{codes[5]}' there, '{codes[6]}'"):
        check_teacher_names(teacher, [*codes[:5], codes[6], codes[5], *codes[7:]])


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------

PASSED_OVER = "; 6 files passed over (.gif 2, in no class 1, .jfif 1, no ending 1, .txt 1)"


def test_what_was_found_and_passed_over_is_said_once(done):
    for name in ("messy", "messy holdout"):
        assert set(done[name].codes) == {0}, done[name].stderr
    lines = done["messy"].stdout.splitlines()
    assert lines.count("train: 24 images of 3 classes" + PASSED_OVER) == 1
    assert lines.count("val: 6 images of 3 classes") == 1
    lines = done["messy holdout"].stdout.splitlines()
    assert [line for line in lines if "images of" in line] == ["train: 24 images of 3 classes" + PASSED_OVER]


def test_a_class_without_images_is_refused_with_its_endings(done):
    message = refusal(done["gif"])
    assert "train/bat" in message
    assert ".gif 8" in message
    assert ".jpeg" in message


def test_images_have_the_order_of_torchvision(root):
    make = {"transform": None, "loader": lambda path: path}
    for part in ("abc", "others"):
        expected = tv.ImageFolder(root / part / "train", **make)
        found, _ = build_dataset("FOLDER", str(root / part), True, None)
        assert (found.samples, found.classes, found.targets) == (expected.samples, expected.classes, expected.targets)


def test_shards_are_made_without_what_is_hidden(root, tmp_path, capsys):
    arguments = ["--data-path", str(root / "messy"), "--output-dir", str(tmp_path / "shards")]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "._train-000000.tar").write_bytes(b"of macOS")
    assert make_shards.main(arguments) == 0
    assert "train: 24 images of 3 classes" + PASSED_OVER in capsys.readouterr().out
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert index["classes"] == list(ABC)
    assert [shard["samples"] for shard in index["train"]] == [24]
    # as macOS's tar writes it: a hidden file before each
    with tarfile.open(tmp_path / "shards" / "train-000000.tar") as tar:
        members = [(entry, tar.extractfile(entry).read()) for entry in tar]
    with tarfile.open(tmp_path / "shards" / "train-000000.tar", "w") as tar:
        for entry, content in members:
            place, _, name = entry.name.rpartition("/")
            hidden = tarfile.TarInfo(f"{place}/._{name}")
            hidden.size = len(content)
            tar.addfile(hidden, io.BytesIO(content))
            tar.addfile(entry, io.BytesIO(content))
    assert make_shards.main(["--index", str(tmp_path / "shards")]) == 0
    dataset, _ = build_dataset("WDS", str(tmp_path / "shards"), True, None)
    assert len({dataset.name_of(i) for i in range(len(dataset))}) == 24


def test_shards_of_one_split_alone(root, tmp_path):
    assert make_shards.main(["--data-path", str(root / "abc"), "--output-dir", str(tmp_path)]) == 0
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(InputError, match=r"train-000000\.tar cannot be read"):
        build_dataset("WDS", str(tmp_path), False, None)
    assert len(build_dataset("WDS", str(tmp_path), False, None, single_split=True)[0]) == 6
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "train": []}))
    assert len(build_dataset("WDS", str(tmp_path), False, None, single_split=True)[0]) == 6


@pytest.mark.parametrize("name", ["evaluation alone", "holdout", "evaluation of the holdout"])
def test_one_split_is_enough(name, done):
    assert set(done[name].codes) == {0}, done[name].stderr
    found = {"evaluation alone": "val: 6 images"}.get(name, "train: 24 images")
    assert [line.partition(" of ")[0] for line in done[name].stdout.splitlines() if " images of " in line] == [found]


def test_both_splits_are_needed_to_train(done):
    assert "no folder train/: expected train/ and val/" in refusal(done["training needs both"])
    assert "no folder val/: expected val/" in refusal(done["evaluation needs val"])


def test_classes_of_both_splits_are_compared_where_both_are_there(root, tmp_path):
    make_data(tmp_path, ABC)
    (tmp_path / "train" / "cow").rename(tmp_path / "train" / "dog")
    with pytest.raises(InputError, match="the first that is in one alone is cow"):
        build_dataset("FOLDER", str(tmp_path), False, None, single_split=True)


def test_a_checkpoint_of_ten_classes_is_refused_for_three(done):
    assert "has 3 classes, the data 10" in refusal(done["evaluation from memory"])  # and not for want of images


def test_what_cannot_be_downloaded_is_said(done):
    message = refusal(done["download of a folder"])
    assert "--download cannot fetch FOLDER" in message
    assert "CIFAR10, CIFAR100, FLOWERS, FMNIST, FOOD101" in message
    with pytest.raises(InputError, match=r"cannot fetch CARS .*no longer"):
        folders.download("CARS", "/nowhere")
    with pytest.raises(InputError, match="needs --data-path"):
        folders.download("FMNIST", None)


@pytest.mark.parametrize("pixels", [FRACTIONS * 1.5, FRACTIONS - 0.5, FRACTIONS * np.nan, DEEP.astype(np.int32) * 2])
def test_numbers_whose_white_is_not_known_are_refused(pixels, tmp_path):
    """Also by a run, which names the file."""
    make_data(tmp_path, ABC)
    (tmp_path / "val" / "bat" / "0.png").write_bytes(saved(pixels, "TIFF"))
    options = f"{COMMON} {tmp_path} --model {VIT} --epochs 0"
    with pytest.raises(InputError, match=r"bat/0.png \(its 32-bit pixels go from .* cannot be read as an image"):
        train(set_up_run(options.split()))


def test_the_same_probabilities_for_a_phone_and_its_upright_twin(root, tmp_path, monkeypatch, capsys):
    upright = Image.open(root / "abc" / "val" / "ant" / "0.png")
    exif = Image.Exif()
    exif[274] = 8
    upright.save(tmp_path / "a.png")
    held(upright, 8).save(tmp_path / "b.png", exif=exif)
    printed = []
    for name in ("a.png", "b.png"):
        monkeypatch.setattr(sys, "argv", ["predict.py", "--model", str(root / "plain"), str(tmp_path / name)])
        assert predict.main() == 0
        printed.append(capsys.readouterr().out.splitlines()[1:])
    assert printed[0] == printed[1]
    assert len(printed[0]) == 3
