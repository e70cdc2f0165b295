"""Processes that fail, run out of memory, are killed or wait for others, and the events that they leave."""

import subprocess
import sys

import models

import pytest
import yaml
from conftest import ENVIRONMENT, MAIN, SECONDS, free_port, read_until, run_main, set_up_run, started
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DIGITS = "--data-set DIGITS --num-workers 0 --warmup-epochs 0 --device cpu --log-interval 1"
LETS = "--src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2"
TINY = "deit_nano_patch8_16_L2_H1"
TWO = f"{DIGITS} {LETS} --batch-size 32 --epochs 2 --lr 5e-3"


@pytest.mark.full
def test_out_of_memory_is_one_sentence(tmp_path):
    """A real limit on memory, and a batch that does not fit."""
    options = f"{DIGITS} --model deit_tiny_patch2_384_L12 --batch-size 64 --input-size 384 --aa none --reprob 0"
    script = f"ulimit -v 6000000; exec {sys.executable} {MAIN} {options} --epochs 1 --no-repeated-aug"
    done = subprocess.run(["bash", "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: out of memory on process 0 of 1")
    assert "--batch-size" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.full
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


@pytest.mark.full
def test_a_failing_process_brings_the_others_down_with_its_traceback_said_once(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(tmp_path / "failing.py"), str(MAIN.parent)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1
    assert done.stderr.count("process 1 of 2 failed\nTraceback") == 1
    assert done.stderr.count("IndexError: list index out of range") == 1
    assert "lost its connection" not in done.stderr


@pytest.mark.full
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
