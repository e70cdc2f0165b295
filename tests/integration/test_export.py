"""scripts/predict.py and scripts/export_model.py: what they give is computed again here from the models themselves."""

import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import main
import models
from datasets import build_dataset, build_transform
from models.formats.timm_folder import save_model
from scripts.predict import load, read_picture

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ENVIRONMENT, TESTS
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets.folder import default_loader

SCRIPTS = TESTS.parent / "scripts"
ARCH = models.parse_arch("deit_nano_patch4_16_L1")
SMALL = {"input_size": [3, 16, 16], "crop_pct": 1.0, "crop_mode": "squash"}
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MEANINGS = {"seven": "a prime number", "nine": "a square"}


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


class Model(NamedTuple):
    folder: Path
    vit: nn.Module


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """A ViT of digits whose logits are some units apart, as those of a trained one are."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vit = models.create_vit(ARCH, num_classes=10).eval()
    with torch.no_grad():
        vit.head.weight.mul_(50)
    save_model(vit, folder, ARCH, {}, SMALL, NAMES, MEANINGS)
    return Model(folder, vit)


@pytest.fixture
def copy(model, tmp_path) -> Path:
    """A copy of the model folder, to damage."""
    return Path(shutil.copytree(model.folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """Five digits, and every kind of image that has to become RGB; not all are square."""
    folder = tmp_path_factory.mktemp("pictures")
    digits, _ = build_dataset("DIGITS", None, is_train=False, transform=None)
    images = {f"digit-{i}.png": digits[i][0] for i in range(5)}
    noise = np.random.default_rng(0).integers(0, 256, (21, 34, 4), dtype=np.uint8)
    colour = Image.fromarray(noise)
    images["transparent.png"] = colour
    images["palette.png"] = colour.convert("RGB").quantize(16)
    images["palette-with-transparency.png"] = colour.quantize(16)
    images["grey.png"] = colour.convert("L")
    images["grey-transparent.webp"] = colour.convert("LA")
    images["black-and-white.bmp"] = colour.convert("1")
    images["sixteen-bits.png"] = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    images["floats.tiff"] = Image.fromarray(noise[..., 0].astype(np.float32))
    images["print.jpg"] = colour.convert("RGB").convert("CMYK")
    for name, image in images.items():
        image.save(folder / name)
    return [str(folder / name) for name in images]


def as_shown(path: str) -> Image.Image:
    """A picture as torchvision reads it, but for the one of 16 bits, which it would make white."""
    if Path(path).name != "sixteen-bits.png":
        return default_loader(path)
    return Image.fromarray((np.asarray(Image.open(path)) // 257).astype(np.uint8)).convert("RGB")


@pytest.fixture
def run(monkeypatch, capfd) -> Callable[..., Outcome]:
    """Run a script of this project with the given arguments in this process."""

    def run(script: str, *args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        return Outcome(end.value.code, *capfd.readouterr())

    return run


def said_in_one_sentence(outcome: Outcome, code: int, *parts: str) -> bool:
    """Whether the outcome is nothing but an error that has all of ``parts``."""
    assert (outcome.code, outcome.stdout, outcome.stderr.count("\n")) == (code, "", 1), outcome
    assert outcome.stderr.startswith("error: ")
    assert [part for part in parts if part not in outcome.stderr] == [], outcome.stderr
    return True


# ---------------------------------------------------------------------------------------------------------------------
# predict.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [3, 10])
def test_predictions(run, model, pictures, top_k):
    outcome = run("predict.py", "--model", model.folder, "--top-k", top_k, *pictures)
    assert (outcome.code, outcome.stderr) == (0, "")
    prepare = build_transform("DIGITS", is_train=False, input_size=16)
    lines = iter(outcome.stdout.splitlines())
    for path in pictures:
        with torch.no_grad():
            probabilities = model.vit(prepare(as_shown(path))[None])[0].softmax(-1)
        assert next(lines) == path
        for i in probabilities.argsort(descending=True)[:top_k]:
            percent, shown = next(lines).split("%  ")
            assert float(percent) == pytest.approx(probabilities[i].item() * 100, abs=0.006)
            assert shown == (f"{NAMES[i]}  {MEANINGS[NAMES[i]]}" if NAMES[i] in MEANINGS else NAMES[i])
    assert list(lines) == []


def test_classes_without_names(run, copy, pictures):
    config = json.loads((copy / "config.json").read_text())
    del config["label_names"], config["label_descriptions"]
    (copy / "config.json").write_text(json.dumps(config))
    outcome = run("predict.py", "--model", copy, "--top-k", 12, pictures[0])
    assert sorted(line.split()[1] for line in outcome.stdout.splitlines()[1:]) == list("0123456789")


def test_control_characters_do_not_reach_the_terminal(run, copy, pictures):
    config = json.loads((copy / "config.json").read_text())
    config["label_names"] = ["\x1b[2J\u202e" + name for name in NAMES]
    config["label_descriptions"] = dict.fromkeys(config["label_names"], "\r\n\x07\x9b31m")
    (copy / "config.json").write_text(json.dumps(config))
    outcome = run("predict.py", "--model", copy, "--top-k", 10, pictures[0])
    lines = outcome.stdout.splitlines()
    assert all(line.isprintable() for line in lines)
    assert sorted(line.split()[1] for line in lines[1:]) == sorted("[2J" + name for name in NAMES)

    config["model_args"]["\x1b[2J"] = 1
    config["architecture"] = "resnet18"
    (copy / "config.json").write_text(json.dumps(config))
    outcome = run("predict.py", "--model", copy, pictures[0])
    assert said_in_one_sentence(outcome, 2, "config.json")
    assert outcome.stderr[:-1].isprintable()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Model folders of main.py's: for small images, used whole, and for photographs, by ViTs of its own and timm's."""
    folder = tmp_path_factory.mktemp("trained")
    always = ["--data-set", "DIGITS", "--epochs", "0", "--num-workers", "0", "--device", "cpu", "--no-model-ema"]
    options = {
        "small": ["--model", "deit_nano_patch4_16_L1"],
        "photographs": ["--model", "deit_nano_patch16_97_L1", "--eval-crop-ratio", "0.9"],
        "timm's": ["--model", "test_vit", "--input-size", "96"],
    }
    for name, of_model in options.items():
        assert main.main([*always, *of_model, "--output-dir", str(folder / name)]) == 0
    return folder


@pytest.mark.parametrize(("kind", "size", "ratio"), [("small", 16, 1), ("photographs", 97, 0.9), ("timm's", 96, 0.875)])
def test_pictures_are_prepared_as_for_evaluation(trained, pictures, kind, size, ratio):
    _, prepare, _ = load(trained / kind)
    evaluation = build_transform("DIGITS", is_train=False, input_size=size, eval_crop_ratio=ratio)
    for path in pictures:
        assert torch.equal(prepare(read_picture(path)), evaluation(as_shown(path)))


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{'architecture': vit}")


def unfit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(folder / "ran")))


def zipped_pickle(folder: Path) -> None:
    torch.save({"head.weight": Payload(folder / "ran")}, folder / "model.safetensors")


@pytest.mark.parametrize("script", ["predict.py", "export_model.py"])
@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (shutil.rmtree, ["copy is no folder"]),
        (without_config, ["config.json", "No such file"]),
        (damaged_config, ["config.json is not JSON"]),
        (pickled_weights, ["model.safetensors is damaged or no file of weights"]),
        (zipped_pickle, ["model.safetensors is refused", "system"]),
        (lambda folder: unfit_config(folder, input_size=[3, 24, 24]), ["config.json", "pictures", "24"]),
        (lambda folder: unfit_config(folder, crop_pct=1e-9), ["config.json", "crop_pct"]),
        (lambda folder: unfit_config(folder, interpolation="none"), ["config.json", "'none'"]),
        (lambda folder: unfit_config(folder, std=[0, 0, 0]), ["config.json", "std"]),
    ],
)
def test_model_folder_that_cannot_be_used(run, copy, pictures, script, damage, parts):
    damage(copy)
    files = [pictures[0]] if script == "predict.py" else []
    assert said_in_one_sentence(run(script, "--model", copy, *files), 2, *parts)
    assert not (copy / "ran").exists()


def text(path: Path) -> None:
    path.write_text("a picture of a cat\n")


def cut_off(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:4000])


def bomb(path: Path) -> None:
    path.write_bytes(b"P6 30000 30000 255\n")


def elongated(path: Path) -> None:
    Image.new("L", (1001, 10)).save(path, "PNG")


def postscript(path: Path) -> None:
    Image.new("L", (8, 8)).save(path, "EPS")


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["missing"]),
        (Path.mkdir, ["is a folder"]),
        (Path.touch, ["is no picture", "PNG"]),
        (text, ["is no picture", "PNG"]),
        (cut_off, ["cannot be read", "truncated"]),
        (bomb, ["cannot be read", "900000000 pixels"]),
        (elongated, ["1001×10", "100 times"]),
        (postscript, ["is no picture", "PNG"]),
    ],
)
def test_files_that_are_no_pictures(run, model, pictures, tmp_path, make, parts):
    path = tmp_path / "picture.png"
    make(path)
    outcome = run("predict.py", "--model", model.folder, pictures[0], path)
    assert said_in_one_sentence(outcome, 2, str(path), *parts)


def test_too_few_classes_asked_for(run, model, pictures):
    assert said_in_one_sentence(run("predict.py", "--model", model.folder, "--top-k", 0, pictures[0]), 2, "--top-k 0")


# ---------------------------------------------------------------------------------------------------------------------
# export_model.py
# ---------------------------------------------------------------------------------------------------------------------


def agree(exported: Callable[[Tensor], Tensor], model: nn.Module, size: int) -> bool:
    """Whether one image and five give the logits of the model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for count in (1, 5):
            images = torch.randn(count, 3, size, size, generator=generator)
            torch.testing.assert_close(exported(images), model(images), rtol=0, atol=1e-4)
    return True


def test_both_formats(model, copy):
    command = [sys.executable, SCRIPTS / "export_model.py", "--model", "copy"]
    done = subprocess.run(command, cwd=copy.parent, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split(": ") for line in done.stdout.splitlines()]
    assert [path for path, _ in lines] == ["copy/model.onnx", "copy/model.pt2"]
    for _, said in lines:
        number = re.fullmatch(r"largest difference of a logit (\S+), in batches of 1, 2 and 16 images", said)[1]
        assert 0 <= float(number) <= 1e-4
    assert sorted(p.name for p in copy.iterdir()) == ["config.json", "model.onnx", "model.pt2", "model.safetensors"]

    session = onnxruntime.InferenceSession(copy / "model.onnx", providers=["CPUExecutionProvider"])
    assert agree(lambda images: torch.from_numpy(*session.run(["logits"], {"images": images.numpy()})), model.vit, 16)
    # the file has been written by the test; others should not be loaded in this way
    assert agree(torch.export.load(copy / "model.pt2").module(), model.vit, 16)


def test_convolutional_network_compared_on_one_picture(run, tmp_path, pictures):
    network = models.create_model("test_resnet", num_classes=3).eval()
    data = {"input_size": [3, 32, 32], "crop_pct": 0.9, "crop_mode": "center"}
    save_model(network, tmp_path, "test_resnet", {}, data)
    outcome = run("export_model.py", "--model", tmp_path, "--formats", "torch", "--images", pictures[-1])
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.endswith("in batches of 1 and 2 images\n")
    assert agree(torch.export.load(tmp_path / "model.pt2").module(), network, 32)


def test_file_that_differs_is_not_kept(run, model, tmp_path, pictures):
    vit = deepcopy(model.vit)
    with torch.no_grad():
        vit.head.weight.mul_(1e5)  # what rounding changes is now more than is allowed
    save_model(vit, tmp_path, ARCH, {}, SMALL)
    outcome = run("export_model.py", "--model", tmp_path, "--formats", "onnx", "--images", *pictures[:3])
    assert said_in_one_sentence(outcome, 1, "model.onnx is not written", "onnxscript", "1e-04")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_model_that_gives_no_numbers(run, model, tmp_path, pictures):
    vit = deepcopy(model.vit)
    with torch.no_grad():
        vit.head.weight.fill_(3e38)
    save_model(vit, tmp_path, ARCH, {}, SMALL)
    assert said_in_one_sentence(run("predict.py", "--model", tmp_path, pictures[0]), 2, str(tmp_path), "not finite")


def test_int8_file_and_the_accuracy_of_each(run, model, copy):
    save_model(model.vit, copy, ARCH, {}, SMALL)  # without names of its classes, which are not those of the data
    outcome = run("export_model.py", "--model", copy, "--formats", "onnx", "--int8", "--data-set", "DIGITS")
    assert (outcome.code, outcome.stderr) == (0, "")
    lines = dict(line.split(": ") for line in outcome.stdout.splitlines()[1:2])
    share = re.fullmatch(r"\d+% of the bytes, logits (\S+)% of their spread off the model's", *lines.values())[1]
    assert 0 < float(share) < 25

    weights = {tensor.name: tensor.data_type for tensor in onnx.load(copy / "model_int8.onnx").graph.initializer}
    assert sum(kind == onnx.TensorProto.UINT8 for name, kind in weights.items() if "_quantized" in name) == 5
    digits, _ = build_dataset("DIGITS", None, False, build_transform("DIGITS", is_train=False, input_size=16))
    images, labels = torch.stack([image for image, _ in digits]), torch.tensor(digits.targets)
    with torch.no_grad():
        expected = model.vit(images)
    for name in ("model.onnx", "model_int8.onnx"):
        session = onnxruntime.InferenceSession(copy / name, providers=["CPUExecutionProvider"])
        logits = [torch.from_numpy(*session.run(["logits"], {"images": images[:n].numpy()})) for n in (1, 360)]
        assert (logits[1] - expected).square().mean().sqrt() < 0.25 * expected.std()
        assert (len(logits[0]), len(logits[1])) == (1, 360)
        accuracy = (logits[1].argmax(dim=1) == labels).double().mean().item()
        (line,) = [line for line in outcome.stdout.splitlines() if line.startswith(f"{copy / name}: accuracy")]
        shown = re.fullmatch(r".*: accuracy (\S+)% on 360 test images of DIGITS", line)[1]
        assert float(shown) == pytest.approx(100 * accuracy, abs=0.6)  # batches of other sizes may round otherwise


def test_int8_file_that_differs_is_not_kept(run, model, tmp_path):
    vit = deepcopy(model.vit)
    with torch.no_grad():  # weights of an input that is always 0, beside which the others vanish in 8 bits
        vit.head.weight[:, 0] = 1e5
        vit.fc_norm.weight[0] = vit.fc_norm.bias[0] = 0
    save_model(vit, tmp_path, ARCH, {}, SMALL)
    outcome = run("export_model.py", "--model", tmp_path, "--formats", "onnx", "--int8")
    assert outcome.code == 1
    (line,) = outcome.stderr.splitlines()
    assert "model_int8.onnx is not written" in line
    assert "of their spread off the model's" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.onnx", "model.safetensors"]


def test_what_int8_and_accuracies_need(run, model, copy):
    outcome = run("export_model.py", "--model", copy, "--formats", "torch", "--int8")
    assert said_in_one_sentence(outcome, 2, "--int8", "expected onnx in --formats, found torch")
    outcome = run("export_model.py", "--model", copy, "--data-set", "FOLDER", "--data-path", copy / "no")
    assert said_in_one_sentence(outcome, 2, "--data-path", "is not a folder")
    outcome = run("export_model.py", "--model", copy, "--data-path", copy)
    assert said_in_one_sentence(outcome, 2, "--data-path", "needs --data-set")
    save_model(models.create_vit(ARCH, num_classes=3), copy, ARCH, {}, SMALL)
    outcome = run("export_model.py", "--model", copy, "--data-set", "DIGITS")
    assert said_in_one_sentence(outcome, 2, "--data-set DIGITS has 10 classes, the model 3")
    save_model(model.vit, copy, ARCH, {}, SMALL, NAMES)
    outcome = run("export_model.py", "--model", copy, "--data-set", "DIGITS")
    assert said_in_one_sentence(outcome, 2, "--data-set DIGITS has other classes than the model", "'zero'", "'0'")
    assert not (copy / "model.onnx").exists()


def test_formats_that_cannot_be_written(run, model, monkeypatch):
    outcome = run("export_model.py", "--model", model.folder, "--formats", "torch,tflite")
    assert said_in_one_sentence(outcome, 2, "--formats torch,tflite", "'tflite'", "onnx or torch")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    outcome = run("export_model.py", "--model", model.folder)
    assert said_in_one_sentence(outcome, 2, "onnxruntime", "pip install onnx onnxscript onnxruntime")
    assert sorted(path.name for path in model.folder.iterdir()) == ["config.json", "model.safetensors"]
