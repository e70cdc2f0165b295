"""What the published programs do, and this one has to do as well: schedule, teachers, dropout, options."""

import json
import math
from collections import Counter
from pathlib import Path

import main
import models
from common.files import read_checkpoint
from training.build import build_teacher
from training.build_data import build_mixup
from training.checkpoints import write_checkpoint
from training.command_line import parse_options
from training.config import TeacherConfig

import pytest
import torch
from conftest import TESTS, Run, run_many, set_up_run
from safetensors.torch import save_file
from torch import nn

pytestmark = pytest.mark.full  # its runs take minutes

VIT = ["--data-set", "DIGITS", "--model", "deit_nano_patch16_32_L2_H1", "--train-images", "64", "--batch-size", "32"]
VIT += ["--num-workers", "0"]
SCHEDULE = [*VIT, "--unscale-lr", "--lr", "1e-3", "--min-lr", "1e-4", "--warmup-lr", "1e-5"]
LETS = ["--src-arch", "deit_small_patch16_224_L8", "--tgt-arch", "deit_base_patch16_224_L16_H12"]

# ---------------------------------------------------------------------------------------------------------------------
# The schedule: epoch e trains at s(max(e − 1, 0)), as DeiT's loop steps it after an epoch
# ---------------------------------------------------------------------------------------------------------------------


def cosine(epoch: int, epochs: int, warmup: int) -> float:
    """s(epoch) of the options in SCHEDULE."""
    if epoch < warmup:
        return 1e-5 + epoch * (1e-3 - 1e-5) / warmup
    return 1e-4 + (1e-3 - 1e-4) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def rates_of(folder: Path) -> list[float]:
    return [json.loads(line)["train_lr"] for line in (folder / "log.txt").read_text().splitlines()]


@pytest.mark.parametrize("warmup", [0, 2])
def test_schedule_is_stepped_after_each_epoch(tmp_path, warmup):
    options = [*SCHEDULE, "--epochs", "4", "--warmup-epochs", str(warmup), "--output-dir", str(tmp_path)]
    assert main.main(options) == 0
    assert rates_of(tmp_path) == pytest.approx([cosine(max(e - 1, 0), 4, warmup) for e in range(4)])


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_goes_on_with_the_schedule_that_it_was_begun_with(tmp_path, recorded):
    """Checkpoints that do not record how the schedule is stepped are of runs whose epoch e trained at s(e)."""
    options = [*SCHEDULE, "--warmup-epochs", "0", "--output-dir", str(tmp_path)]
    assert main.main([*options, "--epochs", "2"]) == 0
    if not recorded:
        content = read_checkpoint(tmp_path / "checkpoint.pth")
        del content["schedule_lag"]
        torch.save(content, tmp_path / "checkpoint.pth")
    for _ in range(2):  # stays so when the continued run is continued in turn
        epochs = len(rates_of(tmp_path)) + 1
        assert main.main([*options, "--epochs", str(epochs), "--resume", "auto"]) == 0
        assert rates_of(tmp_path)[-1] == pytest.approx(cosine(epochs - 1 - recorded, epochs, 0))


def test_schedule_lag_that_is_none(tmp_path):
    run = set_up_run([*SCHEDULE, "--output-dir", str(tmp_path)])
    run.epoch = 1
    write_checkpoint(run)
    content = read_checkpoint(tmp_path / "checkpoint.pth")
    torch.save({**content, "schedule_lag": 7}, tmp_path / "checkpoint.pth")
    with pytest.raises(models.InputError, match="schedule_lag is '7', expected 0 or 1"):
        set_up_run([*SCHEDULE, "--resume", str(tmp_path / "checkpoint.pth")])


# ---------------------------------------------------------------------------------------------------------------------
# Teachers as Facebook and the timm of the published programs name their weights
# ---------------------------------------------------------------------------------------------------------------------


def timm_067_keys() -> list[tuple[str, list[int]]]:
    """Names and shapes of levit_384 in timm 0.6.7, in its order."""
    lines = (TESTS / "fixtures" / "levit_384_timm_0.6.7_keys.txt").read_text().splitlines()
    return [(name, [int(n) for n in shape.split("x") if n]) for name, _, shape in (l.partition(" ") for l in lines)]


def old_levit(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a levit_384 or levit_conv_384 as timm 0.6.7 has them: in order, convolutions as linear layers."""
    tensors, old = iter(model.state_dict().values()), {}
    for name, shape in timm_067_keys():
        if name.endswith("attention_bias_idxs"):
            old[name] = torch.zeros(shape, dtype=torch.int64)
        else:
            old[name] = next(tensors).reshape(shape)
    assert next(tensors, None) is None
    return old


def random_statistics(model: nn.Module) -> nn.Module:
    """Another value in every weight of batch norm, so that none is mistaken for another."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.data.uniform_(0.8, 1.2)
            module.bias.data.normal_(0, 0.1)
    return model


def teacher_of(path: Path, name: str, num_classes: int = 1000) -> nn.Module:
    config = TeacherConfig(name, str(path), distillation_type="soft")
    return build_teacher(config, 224, num_classes, torch.device("cpu"))


@pytest.mark.parametrize("name", ["levit_384", "levit_conv_384"])
@pytest.mark.parametrize("form", ["checkpoint", "safetensors"])
def test_levit_as_published(tmp_path, name, form):
    torch.manual_seed(0)
    model = random_statistics(models.create_model(name)).eval()
    weights = old_levit(model)
    assert len(weights) - sum("idxs" in name for name in weights) == 400
    if form == "checkpoint":
        torch.save({"model": weights}, tmp_path / "levit")
    else:  # whose names are in alphabetical order
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / "levit")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(teacher_of(tmp_path / "levit", name)(images), model(images), atol=1e-5, rtol=1e-5)


def test_levit_of_another_size_is_refused(tmp_path):
    torch.save({"model": old_levit(models.create_model("levit_384"))}, tmp_path / "levit")
    with pytest.raises(models.InputError, match=r"--teacher-path .* is of another architecture: stem"):
        teacher_of(tmp_path / "levit", "levit_128s")


def test_deit_3_as_published(tmp_path):
    """Facebook's files call the layer scales gamma_1 and gamma_2."""
    torch.manual_seed(0)
    model = models.create_model("deit3_small_patch16_224").eval()
    for block in model.blocks:
        block.ls1.gamma.data.uniform_(0.1, 1)
        block.ls2.gamma.data.uniform_(0.1, 1)
    weights = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in model.state_dict().items()
    }
    torch.save({"model": weights}, tmp_path / "deit3.pth")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found = teacher_of(tmp_path / "deit3.pth", "deit3_small_patch16_224")(images)
        torch.testing.assert_close(found, model(images), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Dropout, and options with one value
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (LETS, 49),  # positions; projection and both layers of the MLP in each of 16 layers
        (["--model", "aux_deit_tiny_patch16_224"], 37),
        (["--model", "deit_tiny_patch16_224_L3"], 10),
        (["--model", "deit_tiny_patch16_224"], 37),  # timm's own
    ],
)
def test_dropout_is_where_the_published_programs_have_it(arguments, count):
    config = parse_options([*arguments, "--drop", "0.25"]).model
    model = main.builder_of(config)(config, 224, 10, None)
    vit = model.vit if isinstance(model, models.AuxNet) else model
    rates = Counter(module.p for module in vit.modules() if isinstance(module, nn.Dropout))
    assert rates[0.25] == count
    assert vit.head_drop.p == 0


def test_one_value_is_for_both():
    assert parse_options(["--trans_init_scheme", "rand"]).model.trans_init_scheme == ("rand", "rand")
    for given, expected in (("0.1", (0.1, 0.1)), ("0.1 0.2", (0.1, 0.2))):
        assert parse_options(["--trans_init_noise", *given.split()]).model.trans_init_noise == expected
    with pytest.raises(models.InputError, match="--trans-init-noise: 3 values are given, expected one or two"):
        parse_options(["--trans-init-noise", "1", "2", "3"])


@pytest.mark.parametrize(("minmax", "sides"), [("0.25", {8}), ("0.25 0.25", {8}), ("0.5 0.6", {16, 17, 18})])
def test_sides_of_cutmix_boxes(minmax, sides):
    augment = parse_options(["--cutmix-minmax", *minmax.split(), "--mixup", "0"]).augment
    mixup, _ = build_mixup(augment, input_size=32, num_classes=2)
    found = set()
    for _ in range(40):
        zero_and_one = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)])
        changed = mixup(zero_and_one, torch.tensor([0, 1]))[0][0, 0]
        found |= {int(changed.any(axis).sum()) for axis in (0, 1)}
    assert found == sides


def test_values_in_a_file_and_on_the_command_line(tmp_path):
    (tmp_path / "one.yaml").write_text("trans-init-noise: 0.1\ncutmix-minmax: 0.2\n")
    config = parse_options(["--config", str(tmp_path / "one.yaml")])
    assert (config.model.trans_init_noise, config.augment.cutmix_minmax) == ((0.1, 0.1), (0.2, 0.2))
    runs = {
        "one": Run([*VIT, "--epochs", "1", "--cutmix-minmax", "0.5"]),
        "inverted": Run([*VIT, "--epochs", "1", "--cutmix-minmax", "0.5", "0.2"]),
        "whole": Run([*VIT, "--epochs", "1", "--cutmix-minmax", "1"]),
        "too large": Run([*VIT, "--epochs", "1", "--cutmix-minmax", "1.5"]),
    }
    outcomes = run_many(runs, tmp_path / "runs")
    assert outcomes["one"].codes == [0], outcomes["one"].stderr
    for name in ("inverted", "whole", "too large"):
        assert outcomes[name].codes == [2]
        assert outcomes[name].stderr.startswith("error: ")
        assert "--cutmix-minmax" in outcomes[name].stderr
        assert outcomes[name].stderr.count("\n") == 1
