"""Agreement with whole training runs of the published programs, 20 steps each, both stages of both methods.

Each golden trajectory is trained again by this program's own loop, from options to optimiser, schedule, loss and
average. TRAJECTORIES names a folder with other ones.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import models
from models.formats.published import fuse_qkv
from training.build import build_criterion, build_ema, build_optimizer
from training.build_data import build_mixup
from training.command_line import parse_options
from training.config import resolve
from training.loop import train
from training.run import Run

import pytest
import torch
from conftest import TESTS
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(os.environ.get("TRAJECTORIES", TESTS / "fixtures" / "trajectories"))
TRAJECTORIES = json.loads((FOLDER / "trajectories.json").read_text())["trajectories"]
TOLERANCE = 1e-5


class Recorded:
    """The recorded batches in the place of a loader, and the recorded logits in the place of the teacher."""

    def __init__(self, tensors: Mapping[str, Tensor], steps_per_epoch: int):
        self.images, self.labels = tensors["images"].float(), tensors["labels"]
        self.logits, self.steps_per_epoch = tensors.get("teacher_logits"), steps_per_epoch
        self.dataset, self.sampler = range(steps_per_epoch * self.labels.shape[1]), self
        self.epoch, self.skipped, self.asked = 0, 0, 0

    def set_position(self, epoch: int, images: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        steps = slice(self.epoch * self.steps_per_epoch, (self.epoch + 1) * self.steps_per_epoch)
        return zip(self.images[steps], self.labels[steps], strict=True)

    def teach(self, images: Tensor) -> Tensor:
        assert torch.equal(images, self.images[self.asked])
        self.asked += 1
        return self.logits[self.asked - 1]

    def close(self) -> None:
        pass


class RecordedLoss(nn.Module):
    """A criterion that records every loss, and the learning rate at which it was computed."""

    def __init__(self, criterion: nn.Module, optimizer: torch.optim.Optimizer):
        super().__init__()
        self.criterion, self.optimizer, self.losses, self.rates = criterion, optimizer, [], []

    def forward(self, *args: Tensor) -> Tensor:
        loss = self.criterion(*args)
        self.losses.append(loss.detach())
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])
        return loss


def part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights ``name.…`` of a trajectory, under their published names."""
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}


def gene_of(weights: dict[str, Tensor], head_dim: int, folder: Path) -> models.Learngene:
    torch.save(weights, folder / "published.pth")
    return models.load_learngene(folder / "published.pth", head_dim=head_dim)


def arguments_of(trajectory: Mapping) -> list[str]:
    """The recorded options as a command line. Which model it trains is given by weights: it has no name here."""
    arguments = ["--model", "deit_nano_patch16_32_L2", "--data-set", "DIGITS", "--eval-interval", "1000"]
    for name, value in trajectory["options"].items():
        option = name.replace("_", "-")
        values = value if isinstance(value, list) else [value]
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", *map(str, values)]
    return arguments


def model_of(trajectory: Mapping, tensors: Mapping[str, Tensor], folder: Path) -> nn.Module:
    """The Aux-Net, or the Des-Net, that the run starts with."""
    stage_2 = trajectory["stage"] == 2
    gene = gene_of(part(tensors, "gene" if stage_2 else "start"), trajectory["head_dim"], folder)
    if not stage_2:
        rates = {f"{name}_rate": trajectory["options"][name] for name in ("drop", "drop_path")}
        arch = models.ViTArch(**trajectory["tgt_arch"])
        assert gene.arch.width == arch.width
        gene.config["tgt_arch"] = trajectory["tgt_arch"]  # a TLEG file does not say the depth
        return gene.aux_net(**rates).train()
    mapping = {name: trajectory[name] for name in ("mapping_layer", "mapping_layer_coeff") if name in trajectory}
    vit = gene.descend(models.ViTArch(**trajectory["des_arch"]), **mapping)
    assert_close(vit.state_dict(), own_names(part(tensors, "start"), vit, folder), "start")
    return vit.train()


def own_names(weights: dict[str, Tensor], model: nn.Module, folder: Path) -> dict[str, Tensor]:
    if not isinstance(model, models.AuxNet):
        return fuse_qkv(weights)
    return gene_of(weights, model.arch.head_dim, folder).tensors


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, n=name: f"{what} {n}: {m}"
        )


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_published_run_step_for_step(name, tmp_path):
    trajectory = TRAJECTORIES[name]
    tensors = load_file(FOLDER / trajectory["file"])
    config = resolve(parse_options(arguments_of(trajectory)))
    model, data = model_of(trajectory, tensors, tmp_path), Recorded(tensors, trajectory["steps_per_epoch"])
    optimizer, scheduler = build_optimizer(config.optim, config.schedule, config.data.batch_size, seed=0, model=model)
    mixup, base = build_mixup(config.augment, config.data.input_size, trajectory["num_classes"])
    recorded = RecordedLoss(build_criterion(base, config.teacher, config.model), optimizer)
    run = Run(
        config=config,
        output_dir=None,
        device=torch.device("cpu"),
        autocast=nullcontext(),
        train_loader=data,
        test_loader=data,
        classes=[*map(str, range(trajectory["num_classes"]))],
        model=model,
        ema=build_ema(config.optim, model),
        mixup=mixup,
        teacher=None if config.teacher.distillation_type == "none" else data.teach,
        criterion=recorded,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        epoch=0,
        facts={},
    )
    if trajectory["ema_starts_elsewhere"]:  # published: at random; here it starts as the model does
        run.ema.module.load_state_dict(own_names(part(tensors, "ema_start"), model, tmp_path))
    assert train(run) == 0
    assert len(recorded.losses) == trajectory["steps"]
    for rates in zip(*recorded.rates, strict=True):  # one for each group of parameters
        assert rates == pytest.approx(tensors["lr"].tolist(), rel=1e-9)
    assert_close({"losses": torch.stack(recorded.losses)}, {"losses": tensors["loss"]}, name)
    assert_close(model.state_dict(), own_names(part(tensors, "end"), model, tmp_path), "end")
    assert_close(run.ema.module.state_dict(), own_names(part(tensors, "ema"), model, tmp_path), "average")
