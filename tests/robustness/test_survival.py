"""What a run survives: signals, lost workers, full disks, bad images, losses that are not finite."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import engine
import main
import models
import utils
from common.files import hardlink_or_copy, read_checkpoint, remove_unfinished
from losses import DistillationLoss
from pipeline.loader import SeededDataset, collate
from training.checkpoints import find_checkpoint, newest_checkpoint, save_checkpoint
from training.command_line import parse_options
from training.loop import ROLLBACKS, train

import pytest
import torch
import yaml
from conftest import (
    COMPARABLE,
    ENVIRONMENT,
    MAIN,
    SECONDS,
    Outcome,
    Run,
    assert_same_result,
    free_port,
    run_main,
    run_many,
    set_up_run,
)
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

DIGITS = "--data-set DIGITS --num-workers 0 --warmup-epochs 0 --device cpu --log-interval 1"
LETS = "--src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2"
TINY = "deit_nano_patch8_16_L2_H1"
TWO = f"{DIGITS} {LETS} --batch-size 32 --epochs 2 --lr 5e-3"


@contextmanager
def started(*args: object, launcher: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """main.py in a process of its own, whose output is read while it runs; both streams are one."""
    command = [sys.executable, *launcher, str(MAIN), *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """The output up to the line that holds ``text``."""
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(f"it ended without {text!r}:\n{read}")


def epochs_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def position_of(path: Path) -> tuple[int, int]:
    """The epoch that a checkpoint is in, and the images it has seen of it."""
    content = read_checkpoint(path)
    return content["epoch"] + 1, content["position"]["images"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Two epochs of stage 1 in two processes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_main(*TWO.split(), "--output-dir", folder, processes=2)
    assert done.returncode == 0, done.stderr
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Asked to stop, killed, restarted
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130)])
def test_a_signal_saves_within_a_step_and_ends_with_its_status(tmp_path, name, status):
    options = f"{DIGITS} --model {TINY} --batch-size 16 --epochs 2 --output-dir {tmp_path / 'run'}"
    with started(*options.split()) as process:
        seen = read_until(process, "training 20/")
        process.send_signal(signal.Signals[name])
        seen += process.stdout.read()
        assert process.wait() == status
    assert seen.count(f"stopped by {name}, in epoch 0 after ") == 1
    assert "--resume auto continues" in seen
    assert "Traceback" not in seen
    epoch, images = position_of(tmp_path / "run" / "checkpoint.pth")
    assert (epoch, images) == (0, 16 * seen.count("training "))  # a line per step: the last one is in the checkpoint


def test_a_signal_during_evaluation_saves_too(tmp_path):
    """What has been trained is kept although the epoch is not finished, and the evaluation is made again."""
    common = f"{DIGITS} --model {TINY} --batch-size 16 --epochs 1 --output-dir".split()
    run = set_up_run([*common, str(tmp_path / "run")])
    batches = run.test_loader

    def interrupted() -> Iterator:
        for i, batch in enumerate(batches):
            if i == 3:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    class Interrupted:
        skipped = 0
        __iter__ = staticmethod(interrupted)
        __len__ = batches.__len__

    run.test_loader = Interrupted()
    assert train(run) == 143
    assert position_of(tmp_path / "run" / "checkpoint.pth") == (0, 1424)
    assert epochs_of(tmp_path / "run") == []
    resume = ["--resume", str(tmp_path / "run" / "checkpoint.pth")]
    resumed = set_up_run([*common, str(tmp_path / "run"), *resume])
    assert train(resumed) == 0
    whole = set_up_run([*common, str(tmp_path / "whole")])
    assert train(whole) == 0
    assert epochs_of(tmp_path / "run") == epochs_of(tmp_path / "whole")


def test_a_killed_worker_is_restarted_by_torchrun(tmp_path, undisturbed):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "3")
    options = [*TWO.split(), "--resume", "auto", "--save-every-steps", "4", "--output-dir", str(tmp_path / "run")]
    with started(*options, launcher=launcher) as process:
        seen = read_until(process, "training 7/")
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[1]), signal.SIGKILL)
        seen += process.stdout.read()
        assert process.wait() == 0, seen
    assert seen.count("error: process 0 of 2 has lost its connection to the others") == 1
    assert "continuing from" in seen
    assert_same_result(tmp_path / "run", undisturbed)


def test_time_and_number_of_checkpoints(tmp_path):
    """One after every step, as time is always up; two old ones are kept, and the best by accuracy."""
    options = f"{DIGITS} --model {TINY} --batch-size 128 --epochs 3 --lr 2e-2 --no-model-ema --save-every-minutes 1e-9"
    folder = tmp_path / "run"
    assert main.main([*options.split(), "--keep-checkpoints", "2", "--output-dir", str(folder)]) == 0
    assert {path.name for path in folder.glob("*.pth")} == {
        "checkpoint.pth", "checkpoint.1.pth", "checkpoint.2.pth", "best_checkpoint.pth"
    }  # fmt: skip
    assert position_of(folder / "checkpoint.pth") == (3, 0)
    assert position_of(folder / "checkpoint.1.pth") == (2, 1408)
    assert position_of(folder / "checkpoint.2.pth") == (2, 1280)
    accuracies = [line["test_acc1"] for line in epochs_of(folder)]
    assert position_of(folder / "best_checkpoint.pth")[0] == accuracies.index(max(accuracies)) + 1
    more = ["--keep-checkpoints", "0", "--resume", "auto", "--epochs", "4"]
    assert main.main([*options.split(), *more, "--output-dir", str(folder)]) == 0
    assert not (folder / "checkpoint.1.pth").exists()
    # another run, from its start
    assert main.main([*options.split(), "--epochs", "1", "--output-dir", str(folder)]) == 0
    assert position_of(folder / "checkpoint.1.pth")[0] == 0  # nothing of the first one is there to fall back to


def test_files_of_others_stay_what_they_are(tmp_path):
    """Copies that somebody has made are neither continued from nor removed, nor is what a killed process has linked."""
    path = tmp_path / "checkpoint.pth"
    copies = {tmp_path / name: name.encode() for name in ("checkpoint_mine.pth", "checkpoint.300.pth")}
    for copy, content in copies.items():
        copy.write_bytes(content)
    for epoch in range(4):
        save_checkpoint(path, {"epoch": epoch}, keep=1)
    (tmp_path / f".best_checkpoint.pth.{os.getpid()}").hardlink_to(tmp_path / "checkpoint.1.pth")
    hardlink_or_copy(path, tmp_path / "best_checkpoint.pth")
    epochs = {p.name: torch.load(p, weights_only=True)["epoch"] for p in tmp_path.glob("*.pth") if p not in copies}
    assert epochs == {"checkpoint.pth": 3, "checkpoint.1.pth": 2, "best_checkpoint.pth": 3}
    assert {copy: copy.read_bytes() for copy in copies} == copies
    assert newest_checkpoint(tmp_path) == path
    remove_unfinished(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_optimisers_that_count_steps_in_their_groups_go_on_counting(tmp_path):
    options = f"{DIGITS} --model {TINY} --batch-size 64 --epochs 1 --opt lamb --output-dir {tmp_path}".split()
    assert main.main(options) == 0
    run = set_up_run([*options, "--resume", str(tmp_path / "checkpoint.pth"), "--epochs", "2"])
    assert [int(group["step"]) for group in run.optimizer.param_groups] == [22, 22]


def test_auto_passes_over_damaged_checkpoints_and_starts_afresh_without_any(tmp_path, capsys):
    def found(*more: str) -> str | None:
        options = f"{DIGITS} --model {TINY} --resume auto --output-dir {tmp_path}"
        path = find_checkpoint(parse_options([*options.split(), *more]))
        return path and Path(path).name

    assert found() is None
    assert "starting afresh" in capsys.readouterr().out
    with pytest.raises(models.InputError, match="no checkpoint in --output-dir"):
        found("--eval")
    content = {"model": {"x": torch.arange(1000.0)}}
    for age in (0, 1, 2):
        save_checkpoint(tmp_path / "checkpoint.pth", {**content, "epoch": age}, keep=2)
    assert found() == "checkpoint.pth"
    damaged = bytearray((tmp_path / "checkpoint.pth").read_bytes())
    damaged[len(damaged) // 2] ^= 4  # a bit of the weights, which torch.load would not notice
    (tmp_path / "checkpoint.pth").write_bytes(damaged)
    capsys.readouterr()
    assert found() == "checkpoint.1.pth"
    assert "checkpoint.pth, which is damaged" in capsys.readouterr().err
    (tmp_path / "checkpoint.1.pth").write_bytes((tmp_path / "checkpoint.1.pth").read_bytes()[:1000])
    assert found() == "checkpoint.2.pth"
    assert torch.load(tmp_path / "checkpoint.2.pth", weights_only=True)["epoch"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Another number of processes
# ---------------------------------------------------------------------------------------------------------------------


def options_of(folder: Path, processes: int) -> list[str]:
    """The same images in every step; mixup and drop-path, which each process draws, are off."""
    common = f"{DIGITS} {LETS} --epochs 1 --lr 2e-3 --mixup 0 --cutmix 0 --drop-path 0 --clip-grad 1 {COMPARABLE}"
    return [*common.split(), "--batch-size", str(64 // processes), "--output-dir", str(folder)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """An epoch in one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert main.main(options_of(folder, 1)) == 0
    return folder


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on_with_the_epoch(tmp_path, alone, before, after):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(before)) * (before > 1)
    with started(*options_of(tmp_path, before), "--save-every-steps", "5", launcher=launcher) as process:
        read_until(process, "training 12/")
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert position_of(tmp_path / "checkpoint.pth")[1] >= 10 * 64
    done = run_main(*options_of(tmp_path, after), "--resume", "auto", processes=after)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"begun by {before} processes and is continued by {after}: no image is repeated") == 1
    a, b = (models.load_learngene(folder / "learngene.safetensors").tensors for folder in (tmp_path, alone))
    for key in b:
        torch.testing.assert_close(a[key], b[key], atol=2e-5, rtol=1e-4)
    assert epochs_of(tmp_path)[0]["train_loss"] == pytest.approx(epochs_of(alone)[0]["train_loss"], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Disks and images
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are not finite
# ---------------------------------------------------------------------------------------------------------------------


def poisoned_epoch(bad: Iterable[int], count: int = 8, half: bool = False, **kwargs) -> tuple[nn.Module, dict, list]:
    """An epoch of ``count`` batches, in which the images of some are not finite."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 16, 16, generator=generator), torch.arange(4)) for _ in range(count)]
    for i in bad:
        batches[i][0][1] = math.inf
    torch.manual_seed(0)
    model, seen = models.create_model(TINY, num_classes=4), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = DistillationLoss(nn.CrossEntropyLoss(), "none", 0.5, 1.0)
    result = engine.train_one_epoch(
        model, criterion, batches, optimizer, torch.device("cpu"), 3,
        scaler=torch.amp.GradScaler("cpu", enabled=half), autocast=nullcontext(), log_interval=4,
        report=seen.append, **kwargs,
    )  # fmt: skip
    return model, result, seen


def test_the_step_of_a_loss_that_is_not_finite_is_named():
    """Also where it lies between two looks at the loss."""
    with pytest.raises(utils.NotFiniteError, match=r"not finite in epoch 3 at step 6, after a loss of \d.*1\.00e-01"):
        poisoned_epoch({5})


@pytest.mark.parametrize("half", [False, True])  # with the scaler of float16, which judges gradients itself
def test_steps_that_are_not_finite_can_be_left_out(half):
    model, result, seen = poisoned_epoch({1, 5, 6}, skip_nan=True, half=half)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert math.isfinite(result["loss"])
    assert [numbers["steps left out"] for numbers in seen] == [1, 2]


def test_leaving_steps_out_ends_where_all_of_them_are():
    with pytest.raises(utils.NotFiniteError, match="not finite in 50 steps in a row in epoch 3 at step 55"):
        poisoned_epoch(range(5, 60), 60, skip_nan=True)
    with pytest.raises(utils.NotFiniteError, match="no loss was finite"):
        poisoned_epoch(range(8), skip_nan=True)


class NotFiniteOnce(nn.Module):
    """A criterion whose loss is not finite in one step of a run."""

    def __init__(self, criterion: nn.Module, step: int):
        super().__init__()
        self.criterion, self.step, self.calls = criterion, step, 0

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.criterion(*args) * (math.nan if self.calls == self.step else 1)


def test_rolling_back_goes_on_after_the_batches_that_led_there(tmp_path, capsys):
    options = f"{DIGITS} --model {TINY} --batch-size 64 --epochs 2 --save-every-steps 10 --on-nan rollback"
    run = set_up_run([*options.split(), "--output-dir", str(tmp_path)])
    run.criterion = NotFiniteOnce(run.criterion, step=15)
    assert train(run) == 0
    said = capsys.readouterr().out
    assert said.count("back to the weights of") == 1
    assert "not finite in epoch 0 at step 15" in said
    assert [line["epoch"] for line in epochs_of(tmp_path)] == [0, 1]
    assert all(math.isfinite(value) for line in epochs_of(tmp_path) for value in line.values())
    assert run.criterion.calls == 44  # no batch twice
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_rolling_back_goes_to_no_other_run(tmp_path, capsys):
    """A folder that holds the checkpoint of an earlier run, and a loss that is not finite before the first of this."""
    options = f"{DIGITS} --model {TINY} --batch-size 64 --epochs 1 --on-nan rollback --output-dir {tmp_path}"
    assert main.main(options.split()) == 0
    run = set_up_run(options.split())
    run.criterion = NotFiniteOnce(run.criterion, step=3)
    with pytest.raises(utils.NotFiniteError, match="at step 3"):
        train(run)
    assert "back to the weights of" not in capsys.readouterr().out


def test_rolling_back_in_vain_stops(tmp_path, capsys):
    options = f"{DIGITS} --model {TINY} --batch-size 64 --epochs 2 --on-nan rollback --output-dir {tmp_path}"
    assert main.main(f"{options} --epochs 1".split()) == 0
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(SystemExit, match="1"):
        main.main(f"{options} --resume auto --lr 1e30 --unscale-lr".split())
    outcome = capsys.readouterr()
    assert outcome.out.count("back to the weights of") == ROLLBACKS
    assert outcome.err.count("error: the loss is not finite in epoch 1") == 1
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# Failures, and what there is to see
# ---------------------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_one_sentence(tmp_path):
    """A real limit on memory, and a batch that does not fit."""
    options = f"{DIGITS} --model deit_tiny_patch8_384_L12 --batch-size 1400 --input-size 384 --aa none --reprob 0"
    script = f"ulimit -v 6000000; exec {sys.executable} {MAIN} {options} --epochs 1 --no-repeated-aug"
    done = subprocess.run(["bash", "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: out of memory on process 0 of 1")
    assert "--batch-size" in done.stderr
    assert "Traceback" not in done.stderr


def test_events_of_an_interrupted_run_are_those_of_a_whole_one(tmp_path):
    """Every scalar of every step once, also those that were written after the checkpoint that is continued from."""
    options = f"{DIGITS} {LETS} --batch-size 64 --epochs 2 --save-every-steps 5".split()
    folder = tmp_path / "run"
    with started(*options, "--output-dir", folder) as process:
        read_until(process, "training 18/")
        process.kill()
    # in a process of its own: TensorBoard orders files of the same second by the number of the process
    assert run_main(*options, "--output-dir", folder, "--resume", "auto").returncode == 0
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    expected = {"loss", "lr", "gradient norm", "images/s", "waiting for data"}
    assert {f"step/{name}" for name in expected} | {"memory", "test_acc1", "train_loss"} <= tags
    places = [event.step for event in events.Scalars("step/loss")]
    assert places == [round(1000 * step / 22) for step in range(1, 45)]
    rows = {tag for tag in tags if tag.startswith("g/fc1/")}
    assert len(rows) == 4  # two rows, two layers in each pair
    values = [event.value for event in events.Scalars("g/fc1/row 0, layer 0 of its group")]
    assert len(values) == 2
    assert values[0] != values[1]  # it is trained
    assert yaml.safe_load((folder / "args.yaml").read_text())["save_every_steps"] == 5


FAILING = """
import sys
sys.path.insert(0, sys.argv[1])
import datetime, torch, utils
utils.init_distributed(datetime.timedelta(minutes=1))
with utils.failures_reported_once():
    if utils.rank() == 1:
        [][3]
    torch.distributed.all_reduce(torch.ones(1))
"""


def test_a_failing_process_brings_the_others_down_with_its_traceback_said_once(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(tmp_path / "failing.py"), str(MAIN.parent)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1
    assert done.stderr.count("process 1 of 2 failed\nTraceback") == 1
    assert done.stderr.count("IndexError: list index out of range") == 1
    assert "lost its connection" not in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_left_alone_says_so(rank):
    """As long as --dist-timeout, it waits for the others."""
    world = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment = {**ENVIRONMENT, **{name: str(value) for name, value in world.items()}}
    command = [sys.executable, str(MAIN), *TWO.split(), "--dist-timeout", "0.01"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"error: process {rank} of 2 has not met the others at 127.0.0.1:")
    assert "within 0.01 minutes (--dist-timeout)" in message
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--resume auto", "--on-nan rollback", "--wandb project"])
def test_what_needs_an_output_folder(option):
    with pytest.raises(models.InputError, match="--output-dir is missing: " + option.split()[0]):
        set_up_run(f"{DIGITS} --model {TINY} --epochs 1 {option}".split())
