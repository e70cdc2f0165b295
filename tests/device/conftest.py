"""The device under test, and the files that runs on it start from."""

from pathlib import Path

import models
from common.devices import device_of
from device import arithmetic
from device.runs import AUX, LEARNGENE, SIZE, Runs

import pytest
import torch
from runs_of_families import write_source
from safetensors.torch import save_file

arithmetic.exact()
CLASSES = 10


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="auto", help="what tests/device runs on, as main.py's --device")


def pytest_configure(config: pytest.Config) -> None:
    """Show both streams of a failed test, and not its log: torch's compiler writes thousands of lines there."""
    if config.option.showcapture == "all":
        config.option.showcapture = "std"


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """That of --device; default: the accelerator that torch finds, else the CPU."""
    return device_of(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a source of an elastic family, and a learngene: with random weights, as a step needs no others."""
    folder = tmp_path_factory.mktemp("files")
    write_source(folder / "source", AUX, SIZE, CLASSES)
    (folder / "teacher").mkdir()
    teacher = models.create_model("test_resnet", num_classes=CLASSES)
    save_file(teacher.state_dict(), folder / "teacher" / "model.safetensors")
    models.Learngene.of(models.create_aux_net(LEARNGENE, AUX, num_classes=CLASSES)).save(
        folder / "learngene.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def runs(device: torch.device, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(device, files, tmp_path_factory.mktemp("runs"))
