"""Runs that are stopped or killed, and resumed, also by another number of processes."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import main
import models
from common.files import hardlink_or_copy, remove_unfinished
from training.checkpoints import find_checkpoint, newest_checkpoint, save_checkpoint
from training.command_line import parse_options
from training.loop import train

import pytest
import torch
from conftest import COMPARABLE, assert_same_result, epochs_of, position_of, read_until, run_main, set_up_run, started

DIGITS = "--data-set DIGITS --num-workers 0 --warmup-epochs 0 --device cpu --log-interval 1"
LETS = "--src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2"
TINY = "deit_nano_patch8_16_L2_H1"
TWO = f"{DIGITS} {LETS} --train-images 640 --batch-size 32 --epochs 2 --lr 5e-3"


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


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("SIGTERM", 143),
        pytest.param("SIGUSR1", 138, marks=pytest.mark.full),
        pytest.param("SIGINT", 130, marks=pytest.mark.full),
    ],
)
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


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
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
    assert "starting from epoch 0" in capsys.readouterr().out
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


@pytest.mark.full
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
        torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=1e-3)
    assert epochs_of(tmp_path)[0]["train_loss"] == pytest.approx(epochs_of(alone)[0]["train_loss"], rel=1e-5)
