"""Sources of elastic families, and runs of main.py that start from each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import models
from models.formats.timm_folder import save_model

import torch
from conftest import Outcome, Run, run_many


class Runs(NamedTuple):
    """What runs of main.py have written, and what they said."""

    out: Path
    outcomes: dict[str, Outcome]

    def finished(self, name: str) -> Path:
        """The folder of a run, which has ended well."""
        assert set(self.outcomes[name].codes) == {0}, self.outcomes[name].stderr
        return self.out / name


def run_phases(phases: Sequence[Mapping[str, str]], base: str, out: Path) -> Runs:
    """Runs by name, each phase after the one before.

    Args:
        phases: the options of each run besides ``base``, where OUT stands for ``out``. The run ``two`` has two
            processes.
    """
    outcomes = {}
    for number, phase in enumerate(phases):
        lines = {name: f"{base} {line.replace('OUT', str(out))}".split() for name, line in phase.items()}
        runs = {name: Run(line, 1 + (name == "two")) for name, line in lines.items()}
        outcomes |= run_many(runs, out / f"phase{number}")
    return Runs(out, outcomes)


def write_source(folder: Path, name: str, size: int, num_classes: int, data_config: Mapping = {}) -> None:
    """A ViT that is not as timm initialises it, as a folder in timm's format.

    Args:
        size: of its images, in pixels.
        data_config: how they are prepared.
    """
    torch.manual_seed(0)
    arch = models.ViTArch(**models.parse_arch(name).as_dict() | {"img_size": size})
    vit = models.create_vit(arch, num_classes=num_classes)
    for parameter in vit.requires_grad_(False).parameters():  # so that the class token depends on the image
        parameter.add_(0.05 * torch.randn_like(parameter))
    folder.mkdir()
    save_model(vit, folder, arch, model_args={}, data_config=data_config)
