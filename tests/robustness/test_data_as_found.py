"""Data as people have them: class names, other files among the images, one split alone, more than 8 bits, downloads."""

import io
import json
import shutil
import struct
import sys
import tarfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import models
from common.errors import InputError
from datasets import build_dataset
from models.learngene import save_published
from pipeline import folders, images
from pipeline.folders import own_folder
from scripts import make_shards, predict
from training.command_line import parse_options
from training.config import TeacherConfig
from training.label_check import check_teacher_names
from training.launch import fetch_data
from training.loop import train

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, Outcome, Run, run_many, set_up_run
from data_layouts import make_cifar
from hub_stand_in import HubStandIn
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from torchvision import datasets as tv

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
    assert len(build_dataset("WDS", str(tmp_path), False, None, alone=True)[0]) == 6
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "train": []}))
    assert len(build_dataset("WDS", str(tmp_path), False, None, alone=True)[0]) == 6


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
        build_dataset("FOLDER", str(tmp_path), False, None, alone=True)


def test_a_checkpoint_of_ten_classes_is_refused_for_three(done):
    assert "has 3 classes, the data 10" in refusal(done["evaluation from memory"])  # and not for want of images


# ---------------------------------------------------------------------------------------------------------------------
# More than 8 bits
# ---------------------------------------------------------------------------------------------------------------------

DEEP = np.tile(np.linspace(0, 65535, 512).round().astype(np.uint16), (8, 1))
TWIN = np.rint(DEEP / 257).astype(np.uint8)


def saved(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind, **options)
    return file.getvalue()


def tiff(data: bytes, bits: int, kind: int = 1, photometric: int = 1, order: str = "<") -> bytes:
    """One grey image of the size of `DEEP`, as it can be but Pillow does not write it."""
    tags = [(256, 512), (257, 8), (258, bits), (259, 1), (262, photometric), (277, 1), (278, 8), (339, kind)]
    tags = [struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags]
    tags += [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in ((273, 8), (279, len(data)))]
    tags.sort(key=lambda entry: struct.unpack(f"{order}H", entry[:2]))
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(tags)) + b"".join(tags) + bytes(4)


def twelve_bits() -> bytes:
    first, second = (DEEP >> 4).reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def png(colour: int, *channels: np.ndarray) -> bytes:
    rows = np.stack(channels, 2).astype(">u2")
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 512, 8, 16, colour, 0, 0, 0)}
    chunks |= {b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


FRACTIONS = (DEEP / 65535).astype(np.float32)
DEEP_FILES = {
    "png": lambda: saved(DEEP, "PNG"),
    "png with alpha": lambda: png(4, DEEP, np.full_like(DEEP, 65535)),
    "png in colour": lambda: png(2, DEEP, DEEP, DEEP),
    "tiff": lambda: saved(DEEP, "TIFF"),
    "tiff, packed": lambda: saved(DEEP, "TIFF", compression="tiff_lzw"),
    "tiff of the other byte order": lambda: tiff(DEEP.astype(">u2").tobytes(), 16, order=">"),
    "tiff, white is zero": lambda: tiff((65535 - DEEP).astype("<u2").tobytes(), 16, photometric=0),
    "tiff, 12 bits": lambda: tiff(twelve_bits(), 12),
    "tiff, signed": lambda: tiff((DEEP >> 1).astype("<i2").tobytes(), 16, kind=2),
    "tiff, 32 bits": lambda: saved(DEEP.astype(np.int32), "TIFF"),
    "tiff, 8 of 32 bits": lambda: saved(TWIN.astype(np.int32), "TIFF"),
    "tiff, fractions": lambda: saved(FRACTIONS, "TIFF"),
    "tiff, fractions, white is zero": lambda: tiff((1 - FRACTIONS).astype("<f4").tobytes(), 32, 3, photometric=0),
    "tiff, whole numbers as floats": lambda: saved(DEEP.astype(np.float32), "TIFF"),
    "tiff, 8 bits as floats": lambda: saved(TWIN.astype(np.float32), "TIFF"),
    "pgm": lambda: saved(DEEP, "PPM"),
    "pgm, 10 bits": lambda: b"P5 512 8 1023\n" + (DEEP >> 6).astype(">u2").tobytes(),
    "pgm in words": lambda: b"P2 512 8 65535\n" + " ".join(map(str, DEEP.flat)).encode(),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_deep_images_are_scaled_to_8_bits(name, tmp_path):
    """By every reader: those of folders and shards call `decode`, predict.py has its own limits."""
    (tmp_path / "image").write_bytes(DEEP_FILES[name]())
    for found in (images.decode(open(tmp_path / "image", "rb")), predict.read_picture(tmp_path / "image")):  # noqa: SIM115
        assert found.mode == "RGB"
        assert np.abs(np.asarray(found).astype(int) - TWIN[..., None]).max() <= 1


@pytest.mark.parametrize("pixels", [FRACTIONS * 1.5, FRACTIONS - 0.5, FRACTIONS * np.nan, DEEP.astype(np.int32) * 2])
def test_numbers_whose_white_is_not_known_are_refused(pixels, tmp_path):
    """Also by a run, which names the file."""
    make_data(tmp_path, ABC)
    (tmp_path / "val" / "bat" / "0.png").write_bytes(saved(pixels, "TIFF"))
    options = f"{COMMON} {tmp_path} --model {VIT} --epochs 0"
    with pytest.raises(InputError, match=r"bat/0.png \(its 32-bit pixels go from .* cannot be read as an image"):
        train(set_up_run(options.split()))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of phones
# ---------------------------------------------------------------------------------------------------------------------

TURNED_BACK = {  # orientation → how the camera holds the upright picture
    1: (),
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_90,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_270,),
}


def held(upright: Image.Image, orientation: int) -> Image.Image:
    for method in TURNED_BACK[orientation]:
        upright = upright.transpose(method)
    return upright


@pytest.mark.parametrize("orientation", TURNED_BACK)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_upright(kind, orientation, tmp_path):
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8))
    upright = smooth.resize((80, 48), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[274] = orientation
    held(upright, orientation).save(tmp_path / "phone", format=kind, exif=exif, quality=95)
    found = predict.read_picture(tmp_path / "phone")
    assert found.size == upright.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(upright)).mean() < 4


def test_a_deep_picture_is_turned_and_one_with_broken_metadata_read(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(DEEP).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "deep.png", exif=exif)
    assert np.abs(np.asarray(predict.read_picture(tmp_path / "deep.png")).astype(int) - TWIN[..., None]).max() <= 1
    Image.fromarray(TWIN).save(tmp_path / "broken.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert predict.read_picture(tmp_path / "broken.jpg").size == (512, 8)


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


# ---------------------------------------------------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Iterator[list[str]]:
    """CIFAR-10 on a server of this machine; what was asked for."""
    (tmp_path / "served").mkdir()
    make_cifar(tmp_path / "served", monkeypatch, tv.CIFAR10, 10)
    archive = tmp_path / "served" / tv.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "served" / tv.CIFAR10.base_folder, tv.CIFAR10.base_folder)
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *args):
            asked.append(self.path)

        def log_error(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "served")) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(tv.CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        monkeypatch.setattr(tv.CIFAR10, "tgz_md5", folders.tv.utils.calculate_md5(archive))
        yield asked
        server.shutdown()


def test_download_fetches_what_is_not_there(cifar, tmp_path):
    options = f"--device cpu --num-workers 0 --data-set CIFAR10 --download --data-path {tmp_path}/new/data --epochs 1"
    command = [*options.split(), *f"--model {VIT} --input-size 16 --batch-size 8".split()]
    unfinished = tmp_path / "new" / "data" / ".download-CIFAR10" / "cifar-10-batches-py"
    unfinished.mkdir(parents=True)
    (unfinished / "data_batch_1").write_bytes(b"of a download that was killed")
    fetch_data(parse_options(command))
    asked = len(cifar)
    assert asked > 0
    assert [path.name for path in (tmp_path / "new" / "data").iterdir() if path.is_dir()] == ["cifar-10-batches-py"]
    assert train(set_up_run(command)) == 0
    fetch_data(parse_options(command))
    assert len(cifar) == asked  # it is there


def test_a_download_that_fails_is_one_line_and_leaves_nothing_that_looks_whole(cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(tv.CIFAR10, "url", tv.CIFAR10.url + ".no")
    for _ in range(2):
        with pytest.raises(InputError, match=r"--download: CIFAR10 could not be fetched .*404") as raised:
            folders.download("CIFAR10", str(tmp_path / "new"))
        assert "\n" not in str(raised.value)
    assert own_folder("CIFAR10", tmp_path / "new") is None


def test_download_does_not_touch_what_is_there_in_part(cifar, tmp_path):
    part = tmp_path / "new" / "cifar-10-batches-py"
    part.mkdir(parents=True)
    (part / "batches.meta").write_bytes(b"mine")
    with pytest.raises(InputError, match="cifar-10-batches-py is there, but not all of CIFAR10"):
        folders.download("CIFAR10", str(tmp_path / "new"))
    assert (cifar, [path.name for path in part.iterdir()]) == ([], ["batches.meta"])


def test_what_cannot_be_downloaded_is_said(done):
    message = refusal(done["download of a folder"])
    assert "--download cannot fetch FOLDER" in message
    assert "CIFAR10, CIFAR100, FLOWERS, FMNIST, FOOD101" in message
    with pytest.raises(InputError, match=r"cannot fetch CARS .*gone"):
        folders.download("CARS", "/nowhere")
    with pytest.raises(InputError, match="needs --data-path"):
        folders.download("FMNIST", None)
