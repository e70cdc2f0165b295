"""main.py on an accelerator that this program does not know by name: `emulated_device`."""

from collections.abc import Mapping
from pathlib import Path

from common.files import read_checkpoint

import emulated_device
import pytest
import torch
from conftest import COMPARABLE, Outcome, Run, become, epochs_of, fork_server, run_many
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not emulated_device.POSSIBLE, reason="this torch emulates no device without C++")

DATA = "--data-set DIGITS --train-images 48 --holdout 40 --batch-size 16 --input-size 16 --num-workers 0 --lr 5e-3"
STEADY = f"{DATA} --warmup-epochs 0 --sched step --decay-epochs 100 {COMPARABLE}"  # the same rate in all epochs
LETS = f"{STEADY} --src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2 --descendants 1"
DES = f"{STEADY} --load-gene OUT/cut --des-arch @L2-H1 --cache-data --accum-iter 2 --clip-grad 1 --epochs 1"
TEACHER = "--teacher-model deit_nano_patch8_16_L2_H1 --teacher-path OUT/des --distillation-type soft --epochs 1"
FIRST = {"cut": f"{LETS} --epochs 1", "des": f"{DES} --model-ema-force-cpu"}
MORE = {
    "whole": f"{LETS} --epochs 2",
    "resumed": f"{LETS} --epochs 2 --resume OUT/cut/checkpoint.pth",
    "cached": f"{STEADY} --model aux_deit_nano_patch8_16 {TEACHER} --teacher-cache OUT/cache --teacher-cache-top 3",
}
WRONG = {"chip:1": "found 1 chip device here, and no number 1", "cuda": "found no cuda device here", "chips": "chip"}
every_run = [*FIRST, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)]


def run_emulated(lines: Mapping[str, str], folder: Path) -> dict[str, Outcome]:
    """Run main.py many times on a machine that has the accelerator."""
    folder.mkdir()
    outcomes = {}
    for name, line in lines.items():
        place = Run(line.split()), 0, 0, folder / name, str(folder)
        process = fork_server().Process(target=become_emulated, args=place)
        process.start()
        process.join()
        said = [(folder / name).with_suffix(f".{stream}").read_text() for stream in ("stdout", "stderr")]
        outcomes[name] = Outcome([process.exitcode], *said)
    return outcomes


def become_emulated(*place: object) -> None:
    emulated_device.activate()
    become(*place)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, all_tests) -> tuple[Path, dict[str, Outcome]]:
    """The folder of the runs, those of the CPU in ``cpu`` and those of the accelerator in ``auto``; what these said."""
    out, outcomes = tmp_path_factory.mktemp("runs"), {}
    lines = {name: f"{line} --output-dir OUT/{name}" for name, line in (FIRST | (MORE if all_tests else {})).items()}
    for device in ("cpu", "auto"):
        (out / device).mkdir()
        own = {name: f"{line} --device {device}".replace("OUT", str(out / device)) for name, line in lines.items()}
        if device == "auto":
            own |= {name.replace(":", "-"): f"{LETS} --device {name}" for name in WRONG}
            outcomes = run_emulated(own, out / "of-auto")
        else:
            for name, line in own.items():
                assert run_many({name: Run(line.split())}, out / f"of-{name}")[name].codes == [0]
    return out, outcomes


@pytest.mark.parametrize("name", every_run)
def test_a_run_is_that_of_the_cpu(runs, name):
    out, outcomes = runs
    assert outcomes[name].codes == [0], outcomes[name].stderr
    assert "on chip:0, 1 process(es)" in outcomes[name].stdout
    found, expected = (epochs_of(out / device / name) for device in ("auto", "cpu"))
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.full
def test_a_resumed_run_is_the_whole_one_to_the_last_bit(runs):
    out, _ = runs
    whole, resumed = (load_file(out / "auto" / name / "learngene.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_files_are_for_every_device(runs):
    content = read_checkpoint(runs[0] / "auto" / "cut" / "checkpoint.pth")
    assert all(type(tensor) is torch.Tensor and tensor.device.type == "cpu" for tensor in content["model"].values())


@pytest.mark.parametrize("name", WRONG)
def test_a_device_that_is_not_there_is_one_line(runs, name):
    outcome = runs[1][name.replace(":", "-")]
    assert outcome.codes == [2]
    (line,) = outcome.stderr.splitlines()
    assert line.startswith(f"error: --device {name}: ")
    assert WRONG[name] in line
