"""main.py on an accelerator that this program does not know by name: `emulated_device`."""

from common.files import read_checkpoint

import emulated_device
import pytest
import torch
from conftest import COMPARABLE, epochs_of
from forked_cases import Case, run_cases
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not emulated_device.POSSIBLE, reason="this torch emulates no device without C++")

DATA = "--data-set DIGITS --train-images 64 --batch-size 16 --input-size 16 --num-workers 0 --warmup-epochs 0 --lr 5e-3"
STEADY = f"{DATA} --sched step --decay-epochs 100 {COMPARABLE}"  # the same learning rate however many epochs there are
LETS = f"{STEADY} --src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2 --descendants 1"
DES = f"{STEADY} --load-gene OUT/whole --des-arch @L2-H1 --cache-data --accum-iter 2 --clip-grad 1 --epochs 1"
TEACHER = "--teacher-model deit_nano_patch8_16_L2_H1 --teacher-path OUT/des --distillation-type soft --epochs 1"
RUNS = {
    "whole": f"{LETS} --epochs 2",
    "cut": f"{LETS} --epochs 1",
    "des": f"{DES} --model-ema-force-cpu",
    "cached": f"{STEADY} --model aux_deit_nano_patch8_16 {TEACHER} --teacher-cache OUT/cache --teacher-cache-top 3",
}
WRONG = {"chip:1": "found 1 chip device here, and no number 1", "cuda": "found no cuda device here", "chips": "chip"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple:
    """The folder of the runs on each device, and what those on the accelerator said."""
    out, outcomes = tmp_path_factory.mktemp("runs"), {}
    for device, code in (("cpu", ""), ("auto", "import emulated_device; emulated_device.activate()")):
        (out / device).mkdir()
        lines = {name: f"{line} --output-dir OUT/{name}" for name, line in RUNS.items()}
        lines["resumed"] = f"{LETS} --epochs 2 --resume OUT/cut/checkpoint.pth --output-dir OUT/resumed"
        cases = {
            name: Case(f"{line} --device {device}".replace("OUT", str(out / device)).split(), code=code)
            for name, line in lines.items()
        }
        if code:
            wrong = {name: Case(f"{LETS} --device {name}".split(), code=code) for name in WRONG}
            cases |= wrong
        outcomes |= {f"{device} {name}": outcome for name, outcome in run_cases(cases, out / f"of-{device}").items()}
    return out, outcomes


@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_a_run_is_that_of_the_cpu(runs, name):
    out, outcomes = runs
    for device in ("cpu", "auto"):
        assert outcomes[f"{device} {name}"].codes == [0], outcomes[f"{device} {name}"].said
    assert "on chip:0, 1 process(es)" in outcomes[f"auto {name}"].said[0]
    found, expected = (epochs_of(out / device / name) for device in ("auto", "cpu"))
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_resumed_run_is_the_whole_one_to_the_last_bit(runs):
    out, _ = runs
    whole, resumed = (load_file(out / "auto" / name / "learngene.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_files_are_for_every_device(runs):
    content = read_checkpoint(runs[0] / "auto" / "whole" / "checkpoint.pth")
    assert all(type(tensor) is torch.Tensor and tensor.device.type == "cpu" for tensor in content["model"].values())


@pytest.mark.parametrize("name", WRONG)
def test_a_device_that_is_not_there_is_one_line(runs, name):
    outcome = runs[1][f"auto {name}"]
    assert outcome.codes == [2]
    (line,) = outcome.errors
    assert f"--device {name}: " in line
    assert WRONG[name] in line
