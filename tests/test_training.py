"""The program from the command line, and the engine: resuming, processes, accumulation, precision, what is written."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import engine
import main
import models
from losses import DistillationLoss

import pytest
import torch
import yaml
from conftest import ENVIRONMENT, MAIN, run_main
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

LEARNGENE, AUX = "deit_nano_patch8_16_L2_H1", "deit_nano_patch8_16_L4_H2"
DIGITS = ["--data-set", "DIGITS", "--batch-size", "48", "--num-workers", "0", "--warmup-epochs", "0"]


def succeed(*args: object, processes: int = 1) -> str:
    done = run_main(*DIGITS, *args, processes=processes)
    assert done.returncode == 0, done.stderr
    return done.stdout


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    succeed("--model", "test_resnet", "--input-size", "16", "--epochs", "1", "--output_dir", folder)
    return folder / "model.safetensors"


@pytest.fixture(scope="session")
def stage1(teacher, tmp_path_factory) -> Path:
    """One epoch of stage 1 of both methods."""
    folder = tmp_path_factory.mktemp("stage1")
    distil = [
        "--teacher-model",
        "test_resnet",
        "--teacher-path",
        teacher,
        "--distillation-type",
        "soft",
        "--epochs",
        "1",
    ]
    succeed("--src-arch", LEARNGENE, "--tgt-arch", AUX, *distil, "--output_dir", folder / "lets")
    succeed("--model", "aux_deit_nano_patch8_16_L4", *distil, "--output_dir", folder / "tleg")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# What a run writes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lets", "tleg"])
def test_stage_1_writes_everything(stage1, method):
    folder = stage1 / method
    names = {path.name.split(".")[0] if "tfevents" in path.name else path.name for path in folder.iterdir()}
    expected = {"checkpoint.pth", "learngene.safetensors", "learngene_ema.safetensors", "log.txt", "args.yaml"}
    assert names == expected | {"events", "curves.png"}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    (line,) = log_of(folder)
    keys = ("train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "ema_test_acc1", "epoch", "n_parameters")
    assert all(math.isfinite(line[key]) for key in keys)
    gene = models.load_learngene(folder / "learngene.safetensors")
    assert gene.method == method
    assert gene.options["epochs"] == 1
    assert line["n_parameters"] == sum(t.numel() for t in gene.tensors.values())


@pytest.mark.parametrize("method", ["lets", "tleg"])
def test_learngene_of_a_checkpoint_is_that_of_the_file(stage1, method):
    file = models.load_learngene(stage1 / method / "learngene.safetensors")
    checkpoint = models.load_learngene(stage1 / method / "checkpoint.pth")
    averaged = models.load_learngene(stage1 / method / "checkpoint.pth", use_ema=True)
    averaged_file = models.load_learngene(stage1 / method / "learngene_ema.safetensors")
    for name, tensor in file.tensors.items():
        assert torch.equal(checkpoint.tensors[name], tensor)
        assert torch.equal(averaged.tensors[name], averaged_file.tensors[name])
    assert not torch.equal(file.tensors["head_weight"], averaged.tensors["head_weight"])


TIMM_ALONE = """
import json, sys, torch
try:
    import torchvision
except RuntimeError:  # its compiled operators cannot load next to this torch
    for name in [n for n in sys.modules if n.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
config = json.load(open(sys.argv[1] + "/config.json"))
model = timm.create_model(config["architecture"], num_classes=config["num_classes"],
                          checkpoint_path=sys.argv[1] + "/model.safetensors", **config["model_args"]).eval()
images = torch.load(sys.argv[2], weights_only=True)
assert "models" not in sys.modules
torch.save((model(images), timm.data.resolve_data_config({}, model=model)), sys.argv[3])
"""


@pytest.mark.parametrize("method", ["lets", "tleg"])
def test_des_net_without_training_loads_with_timm_alone(stage1, method, tmp_path):
    arch = "deit_nano_patch8_16_L3_H2"
    gene = stage1 / method / "learngene.safetensors"
    shown = succeed("--des-arch", arch, "--load-gene", gene, "--epochs", "0", "--output_dir", tmp_path / "des")
    assert "before training" in shown
    (line,) = log_of(tmp_path / "des")
    assert line["epoch"] == -1
    images = torch.randn(2, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    command = [
        sys.executable,
        "-c",
        TIMM_ALONE,
        str(tmp_path / "des"),
        str(tmp_path / "images.pt"),
        str(tmp_path / "o"),
    ]
    subprocess.run(command, check=True, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    logits, _ = torch.load(tmp_path / "o", weights_only=True)
    expected = models.load_learngene(gene).descend(arch).eval()
    torch.testing.assert_close(logits, expected(images))


def test_options_of_a_run_repeat_it(stage1, tmp_path):
    options = ["--des-arch", "deit_nano_patch8_16_L2_H1", "--load-gene", stage1 / "lets" / "learngene.safetensors"]
    options += [
        "--mapping_layer",
        "0,3",
        "--mapping_layer_coeff=0,2",
        "--opt-betas",
        "0.9",
        "0.98",
        "--no-repeated-aug",
    ]
    succeed(*options, "--epochs", "1", "--output-dir", tmp_path / "a")
    recorded = yaml.safe_load((tmp_path / "a" / "args.yaml").read_text())
    assert recorded["mapping_layer"] == [0, 3]
    again = run_main("--config", tmp_path / "a" / "args.yaml", "--output_dir", tmp_path / "b")
    assert again.returncode == 0, again.stderr
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert [line["epoch"] for line in log_of(tmp_path / "a")] == [-1, 0]


def test_eval_and_finetune(stage1, tmp_path):
    arch = "deit_nano_patch8_16_L2_H1"
    common = ["--des-arch", arch, "--load-gene", stage1 / "lets" / "learngene.safetensors"]
    succeed(*common, "--epochs", "1", "--output_dir", tmp_path / "a")
    trained = log_of(tmp_path / "a")[-1]
    for source in (
        ["--resume", tmp_path / "a" / "checkpoint.pth"],
        ["--finetune", tmp_path / "a" / "model.safetensors"],
    ):
        shown = json.loads(succeed("--model", arch, *source, "--eval").splitlines()[-1])
        assert shown["test_acc1"] == trained["test_acc1"]
        assert shown["test_loss"] == pytest.approx(trained["test_loss"], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming, processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_gives_the_run_that_was_never_interrupted(teacher, tmp_path, processes):
    options = ["--src-arch", LEARNGENE, "--tgt-arch", AUX, "--epochs", "2", "--lr", "5e-3", "--log-interval", "1"]
    options += ["--teacher-model", "test_resnet", "--teacher-path", teacher, "--distillation-type", "hard"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(*options, "--output_dir", whole, processes=processes)
    stop_in_second_epoch([*DIGITS, *options, "--output_dir", parts], processes)
    assert [line["epoch"] for line in log_of(parts)] == [0]
    succeed(*options, "--output_dir", parts, "--resume", parts / "checkpoint.pth", processes=processes)
    assert (parts / "log.txt").read_text() == (whole / "log.txt").read_text()
    for name in ("learngene.safetensors", "learngene_ema.safetensors"):
        expected = load_file(whole / name)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(parts / name).items())


def stop_in_second_epoch(args: list, processes: int) -> None:
    """Kill a run as soon as it says that it is in epoch 1."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
    command = [sys.executable, *launcher, str(MAIN), *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**ENVIRONMENT}) as process:
        for line in process.stdout:
            if "epoch 1," in line:
                break
        process.terminate()
        process.communicate()


def test_two_processes_give_the_result_of_one(stage1, tmp_path):
    """The same images with the same augmentation in every step; mixup would pair others."""
    options = ["--src-arch", LEARNGENE, "--tgt-arch", AUX, "--epochs", "1", "--mixup", "0", "--cutmix", "0"]
    options += ["--drop-path", "0", "--lr", "2e-3", "--clip-grad", "1"]
    succeed(*options, "--batch-size", "64", "--output_dir", tmp_path / "one")
    succeed(*options, "--batch-size", "32", "--output_dir", tmp_path / "two", processes=2)
    one, two = (load_file(tmp_path / name / "learngene.safetensors") for name in ("one", "two"))
    moved = load_file(stage1 / "lets" / "learngene.safetensors")
    for name in one:
        assert one[name].shape == moved[name].shape
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=1e-4)
    a, b = log_of(tmp_path / "one")[0], log_of(tmp_path / "two")[0]
    assert b["test_acc1"] == pytest.approx(a["test_acc1"], abs=0.3)  # an image on the border may fall either way
    assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)


def test_evaluation_counts_every_image_once(stage1, tmp_path):
    """7 images a class, 77 in all: no number of processes here divides them."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for c in range(11):
            for i in range(7):
                path = tmp_path / split / f"c{c:02}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(path)
    data = ["--data-set", "FOLDER", "--data-path", tmp_path, "--batch-size", "4", "--eval", "--model", AUX]
    found = [json.loads(succeed(*data, processes=n).splitlines()[-1]) for n in (1, 2, 3)]
    for other in found[1:]:
        assert other["test_acc1"] == found[0]["test_acc1"]
        assert other["test_acc5"] == found[0]["test_acc5"]
        assert other["test_loss"] == pytest.approx(found[0]["test_loss"], rel=1e-6)
    assert found[0]["test_acc1"] == pytest.approx(100 * round(found[0]["test_acc1"] * 77 / 100) / 77)


# ---------------------------------------------------------------------------------------------------------------------
# Precision, losses that are not finite
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--amp-dtype", "bfloat16", "--grad-checkpointing"], ["--amp-dtype", "float16"]])
def test_low_precision(options, tmp_path):
    succeed("--src-arch", LEARNGENE, "--tgt-arch", AUX, "--epochs", "1", *options, "--output_dir", tmp_path)
    full = tmp_path / "full"
    succeed("--src-arch", LEARNGENE, "--tgt-arch", AUX, "--epochs", "1", "--output_dir", full)
    assert log_of(tmp_path)[0]["train_loss"] == pytest.approx(log_of(full)[0]["train_loss"], rel=0.02)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, processes):
    succeed("--model", AUX, "--epochs", "1", "--output_dir", tmp_path)
    good = (tmp_path / "checkpoint.pth").read_bytes()
    options = ["--model", AUX, "--epochs", "2", "--lr", "1e30", "--unscale-lr", "--output_dir", tmp_path]
    done = run_main(*DIGITS, *options, processes=processes)
    assert done.returncode == 1
    assert done.stderr.count("error: the loss is nan in epoch 0") == 1
    assert (tmp_path / "checkpoint.pth").read_bytes() == good


# ---------------------------------------------------------------------------------------------------------------------
# The engine
# ---------------------------------------------------------------------------------------------------------------------


def train_once(batches: list, accum_iter: int, **kwargs) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    model = models.create_model("deit_nano_patch8_16_L2_H1", num_classes=5).double()
    result = engine.train_one_epoch(
        model,
        DistillationLoss(nn.CrossEntropyLoss(), None, "none", 0.5, 1.0),
        batches,
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.device("cpu"),
        0,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        autocast=nullcontext(),
        accum_iter=accum_iter,
        **kwargs,
    )
    return model, result


def batches_of(images: torch.Tensor, labels: torch.Tensor, size: int) -> list:
    return list(zip(images.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize("clip_grad", [None, 0.1])
def test_accumulation_equals_one_large_batch(clip_grad):
    """Ten batches in groups of four: the last group has two."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(40, 3, 16, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (40,), generator=generator)
    small, few = train_once(batches_of(images, labels, 4), accum_iter=4, clip_grad=clip_grad)
    large, one = train_once(batches_of(images, labels, 16), accum_iter=1, clip_grad=clip_grad)
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
    assert few["lr"] == one["lr"] == 0.1


class DeviceWaits(TorchDispatchMode):
    """Counts the operations for which a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_device_is_waited_for_at_the_logging_interval_alone():
    images, labels = torch.randn(24, 3, 16, 16, dtype=torch.float64), torch.randint(5, (24,))
    counts = {}
    for log_interval in (1, 5, 12):  # 12, 3 and 1 looks at the loss of 12 steps
        with DeviceWaits() as waits:
            train_once(batches_of(images, labels, 2), accum_iter=1, log_interval=log_interval)
        counts[log_interval] = waits.count
    assert counts[1] - counts[5] == 9
    assert counts[5] - counts[12] == 2


def test_loss_of_an_epoch_is_the_mean_over_its_batches():
    images, labels = torch.randn(20, 3, 16, 16, dtype=torch.float64), torch.randint(5, (20,))
    losses = []
    base = nn.CrossEntropyLoss()

    class Recorded(nn.Module):
        def forward(self, logits, targets):
            losses.append(base(logits, targets))
            return losses[-1]

    criterion = DistillationLoss(Recorded(), None, "none", 0.5, 1.0)
    model = models.create_model("deit_nano_patch8_16_L2_H1", num_classes=5).double()
    found = engine.train_one_epoch(
        model, criterion, batches_of(images, labels, 4), torch.optim.SGD(model.parameters(), lr=0.0),
        torch.device("cpu"), 0, scaler=torch.amp.GradScaler("cpu", enabled=False), autocast=nullcontext(),
        log_interval=2,
    )  # fmt: skip
    assert found["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_distillation_losses(tau):
    logits, teacher_logits = torch.randn(6, 5), torch.randn(6, 5)
    labels = torch.randint(5, (6,))
    teacher = nn.Module()
    teacher.forward = lambda images: teacher_logits
    base = F.cross_entropy(logits, labels)

    def loss(kind: str, alpha: float) -> torch.Tensor:
        return DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, alpha, tau)(None, logits, labels)

    p, q = (teacher_logits / tau).softmax(1), (logits / tau).softmax(1)
    soft = (p * (p.log() - q.log())).sum() * tau**2 / 30
    hard = F.cross_entropy(logits, teacher_logits.argmax(1))
    torch.testing.assert_close(loss("none", 0.3), base)
    torch.testing.assert_close(loss("soft", 1.0), soft)
    torch.testing.assert_close(loss("soft", 0.3), 0.7 * base + 0.3 * soft)
    torch.testing.assert_close(loss("hard", 0.3), 0.7 * base + 0.3 * hard)


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def test_dashes_and_underscores_and_yaml(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("model-type: resnet18\nbatch_size: 7\nlr: 5e-4\nrepeated-aug: false\nopt-betas: [0.9, 0.95]\n")
    args = main.parse_options(["--config", str(file), "--batch-size=9", "--output_dir=a_b"])
    assert (args.model, args.batch_size, args.lr, args.repeated_aug) == ("resnet18", 9, 5e-4, False)
    assert (args.opt_betas, args.output_dir) == ([0.9, 0.95], "a_b")


def test_learning_rate_follows_the_images_of_a_step():
    args = main.parse_options(
        ["--model", AUX, "--batch-size", "128", "--accum-iter", "2", "--lr", "1e-3", "--epochs", "9"]
    )
    args.warmup_epochs = 0
    optimizer, _ = main.build_optimizer(args, models.create_model(AUX))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 256 / 512)
