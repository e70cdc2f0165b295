"""Processes that are killed and resumed, and processes that share a run."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping

import main
import training.logs
from device import arithmetic
from device.runs import BATCH, FLOAT32, Runs, distance, drift
from training.config import CHECKPOINT

import pytest
import torch
from conftest import epochs_of, free_port, position_of, read_until
from safetensors.torch import load_file

SECONDS = 100


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operators that give the same bits in each run, also here."""
    monkeypatch.setattr(training.logs.EpochLog, "_draw", lambda log: None)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def start(how: str, options: list[str], environment: Mapping[str, object] = {}) -> subprocess.Popen[str]:
    """main.py in a process of its own, whose arithmetic is as ``device/arithmetic.py`` makes it."""
    command = [sys.executable, arithmetic.__file__, how, *options]
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("descendants", f"{FLOAT32} --mixup 0.8 --drop-path 0.1 --cache-data"),
        pytest.param(
            "stage-2", "--amp-dtype float16 --drop-path 0.1 --aa rand-m9-mstd0.5-inc1", marks=pytest.mark.full
        ),
    ],
)
def test_a_run_that_is_killed_resumes_bit_for_bit(runs, kind, more):
    more = f"{more} --save-every-steps 2 --log-interval 1 --output-dir OUT"
    killed, whole = (runs.options(kind, f"{more}/{name}") for name in ("killed", "whole"))
    with start("repeatable", killed) as process:
        try:
            read_until(process, "training 9/12")  # in the second epoch, with a checkpoint after 8 steps
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    folder = runs.out / kind
    epoch, images = position_of(folder / "killed" / CHECKPOINT)
    assert (epoch, 0 < images < 96) == (1, True)
    assert main.main(whole) == 0
    assert main.main([*killed, "--resume", "auto"]) == 0
    assert epochs_of(folder / "killed") == epochs_of(folder / "whole")
    names = sorted(path.name for path in (folder / "whole").glob("*.safetensors"))
    assert len(names) == 2
    for name in names:
        found, expected = (load_file(folder / run / name) for run in ("killed", "whole"))
        apart = distance(found, expected)
        assert apart == 0, name


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


def for_two(device: torch.device) -> str:
    """--device for two processes: the CPU, a device for each, or the one that there is for both."""
    several = device.type == "cpu" or torch.get_device_module(device.type).device_count() > 1
    return device.type if several else f"{device.type}:{device.index}"


def run_together(runs: Runs, kind: str, more: str) -> list[str]:
    """The output of two processes that share a run; the first writes into OUT/two."""
    world = dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    processes = []
    try:
        for rank in range(2):
            options = [*runs.options(kind, f"{more} --output-dir OUT/two"), "--device", for_two(runs.device)]
            processes.append(start("exact", options, {**world, "RANK": rank, "LOCAL_RANK": rank}))
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return outputs


def test_two_processes_compute_what_one_does(runs):
    if runs.device.type == "mps":
        pytest.skip("torch connects no processes on mps")
    kind, common = "lets", FLOAT32
    outputs = run_together(runs, kind, f"{common} --batch-size {BATCH // 2}")
    assert "2 process(es)" in outputs[0]
    one, folder = runs.of(kind, common), runs.out / kind / "two"
    found = load_file(folder / "learngene.safetensors")
    of_weights = drift(found, {name: one.weights[name] for name in found}, {name: one.start[name] for name in found})
    assert of_weights < 1e-3
    assert epochs_of(folder)[-1]["test_loss"] == pytest.approx(one.epochs[-1]["test_loss"], rel=1e-4)
    assert epochs_of(folder)[-1]["train_loss"] == pytest.approx(one.loss, rel=1e-4)
