"""Full disks, unreadable images and data that vanish during a run."""

import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.loader import SeededDataset, collate
from training.checkpoints import newest_checkpoint

import pytest
import torch
from conftest import ENVIRONMENT, MAIN, Outcome, Run, position_of, read_until, run_many, started
from PIL import Image

DIGITS = "--data-set DIGITS --num-workers 0 --warmup-epochs 0 --device cpu --log-interval 1"
LETS = "--src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2"
TINY = "deit_nano_patch8_16_L2_H1"


@pytest.mark.full
def test_a_full_disk_keeps_the_checkpoint_and_the_run(tmp_path):
    """A real file system that is too small for the second checkpoint, in a name space of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", disk]).returncode:
        pytest.skip("no file system can be mounted here")
    command = f"{sys.executable} {MAIN} {DIGITS} {LETS} --batch-size 64 --epochs 3 --output-dir {disk}/run"
    script = f"""
        mount -t tmpfs -o size=2400k none {disk}
        {command}
        status=$?
        cp -r {disk}/run {tmp_path}/kept
        exit $status
    """
    elsewhere = ["unshare", "--map-root-user", "--mount", "bash", "-c", script]
    done = subprocess.run(elsewhere, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "checkpoint.pth cannot be written (No space left on device): the run goes on" in done.stderr
    assert "epoch 2: test_acc1" in done.stdout  # the last one was trained
    assert "lacks what was trained last" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert newest_checkpoint(tmp_path / "kept").name == "checkpoint.pth"
    assert position_of(tmp_path / "kept" / "checkpoint.pth")[0] in (1, 2)
    assert not list((tmp_path / "kept").glob(".*"))


PICTURES = f"--data-set FOLDER --warmup-epochs 0 --model {TINY} --input-size 16 --batch-size 6 --log-interval 1"
BAD = ("train/cat/3.png", "train/dog/5.png", "val/cat/1.png")


def make_pictures(root: Path) -> Path:
    """Two classes of 12 images to train and 4 to test."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (24, 24, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> tuple[Path, dict[str, Outcome]]:
    """Pictures of which two are cut off and one is none, and the runs that met them."""
    folder = tmp_path_factory.mktemp("spoiled")
    pictures = make_pictures(folder / "pictures")
    for name in BAD[::2]:
        (pictures / name).write_bytes((pictures / name).read_bytes()[:700])
    (pictures / BAD[1]).write_text("no picture")
    common = f"{PICTURES} --data-path {pictures} --epochs 2 --no-repeated-aug --num-workers"
    runs = {
        f"stop, {workers} workers, {processes} processes": Run(f"{common} {workers}".split(), processes)
        for workers in (0, 2) for processes in (1, 2)
    }  # fmt: skip
    runs |= {f"skip, {n} workers": Run(f"{common} {n} --skip-bad-images".split()) for n in (0, 2)}
    return pictures, run_many(runs, folder / "outcomes")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_and_the_run_stops(spoiled, processes, workers):
    pictures, outcomes = spoiled
    outcome = outcomes[f"stop, {workers} workers, {processes} processes"]
    assert 2 in outcome.codes
    assert 0 not in outcome.codes
    assert outcome.stderr.count("error: ") == 1
    assert any(f"error: {pictures / name} (" in outcome.stderr for name in BAD[:2])
    assert "cannot be read as an image: --skip-bad-images goes on without it" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_and_counted(spoiled, workers):
    pictures, outcomes = spoiled
    outcome = outcomes[f"skip, {workers} workers"]
    assert outcome.codes == [0], outcome.stderr
    for name in BAD:
        assert outcome.stderr.count(f"warning: {pictures / name} (") == 1
    # every epoch meets each of the three once
    assert outcome.stdout.count("unreadable images: 2 replaced, 1 left out of the test") == 2


def test_data_that_vanish_are_named(tmp_path):
    pictures = make_pictures(tmp_path)
    options = f"{PICTURES} --data-path {pictures} --num-workers 0 --skip-bad-images --epochs 500".split()
    with started(*options) as process:
        read_until(process, "training 3/")
        shutil.rmtree(pictures / "train")
        rest = process.stdout.read()
        assert process.wait() == 2
    (message,) = (line for line in rest.splitlines() if line.startswith("error: "))
    assert "images of one batch cannot be read" in message
    assert f"{pictures}/train/" in message
    assert "No such file" in message


def test_replacements_are_the_images_that_follow():
    class Numbers(torch.utils.data.Dataset):
        samples = tuple((f"{i}.png", 0) for i in range(5))

        def __len__(self):
            return 5

        def __getitem__(self, index):
            if index in (2, 3, 4):
                raise OSError("cut off")
            return torch.tensor([float(index)]), index

    dataset = SeededDataset(Numbers(), replacements=2)
    assert dataset[1, 7] == (torch.tensor([1.0]), 1, [])
    assert dataset[3, 7] == (torch.tensor([0.0]), 0, ["3.png (cut off)", "4.png (cut off)"])
    assert dataset[2, 7].image is None
    images, labels, unreadable = collate([dataset[0, 1], dataset[2, 1], dataset[1, 1]])
    assert (images.flatten().tolist(), labels.tolist()) == ([0.0, 1.0], [0, 1])
    assert unreadable == [f"{i}.png (cut off)" for i in (2, 3, 4)]
