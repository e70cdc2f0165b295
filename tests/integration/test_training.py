"""The program from the command line, and the engine: resuming, processes, accumulation, precision, what is written."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import engine
import models
from losses import DistillationLoss
from training.build import build_optimizer, build_teacher
from training.checkpoints import check_num_classes, write_checkpoint
from training.command_line import parse_options
from training.config import OptimConfig, ScheduleConfig, TeacherConfig

import pytest
import torch
import yaml
from conftest import COMPARABLE, ENVIRONMENT, Outcome, Run, read_until, run_many, set_up_run, started
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LEARNGENE, AUX, DES = "deit_nano_patch8_16_L2_H1", "deit_nano_patch8_16_L4_H2", "deit_nano_patch8_16_L3_H2"
DIGITS = "--data-set DIGITS --train-images 512 --batch-size 48 --num-workers 0 --warmup-epochs 0 --epochs 1"
LETS = f"--src-arch {LEARNGENE} --tgt-arch {AUX}"
DISTIL = "--teacher-model test_resnet --teacher-path OUT/teacher/model.safetensors --distillation-type"
RESUMED = f"{LETS} {DISTIL} hard --train-images 1437 --epochs 2 --lr 5e-3 --log-interval 1"
ALIKE = f"{LETS} --mixup 0 --cutmix 0 --drop-path 0 --lr 2e-3 --clip-grad 1 {COMPARABLE}"
UNEVEN = f"--data-set FOLDER --data-path OUT/uneven --batch-size 4 --eval --model {AUX}"
DESCEND = f"--des-arch {DES} --load-gene OUT"
OPTIONS = "--mapping_layer 0,3,3 --mapping_layer_coeff=0,2,0 --opt-betas 0.9 0.98 --no-repeated-aug --aa none"

# name → options and number of processes; a phase needs what the one before it wrote. OUT/name is the output folder.
PHASES = [
    {
        "teacher": ("--model test_resnet --input-size 16", 1),
        "full": (LETS, 1),
        "bfloat16": (f"{LETS} --amp-dtype bfloat16 --grad-checkpointing", 1),
        "float16": (f"{LETS} --amp-dtype float16", 1),
        "one": (f"{ALIKE} --batch-size 64", 1),
        "two": (f"{ALIKE} --batch-size 32", 2),
        "accumulated": (f"{ALIKE} --batch-size 16 --accum-iter 2", 2),
        "one-step": (f"--model {AUX} --batch-size 512 --lr 1e30 --unscale-lr", 1),
        "uneven1": (UNEVEN, 1),
        "uneven2": (UNEVEN, 2),
        "uneven3": (UNEVEN, 3),
    },
    {
        "lets": (f"{LETS} {DISTIL} soft", 1),
        "tleg": (f"--model aux_deit_nano_patch8_16_L4 {DISTIL} soft", 1),
        "whole1": (RESUMED, 1),
        "whole2": (RESUMED, 2),
    },
    {
        "des-lets": (f"{DESCEND}/lets/learngene.safetensors --epochs 0", 1),
        "des-tleg": (f"{DESCEND}/tleg/learngene.safetensors --epochs 0", 1),
        "options": (f"{DESCEND}/lets/learngene.safetensors {OPTIONS}", 1),
        "diverged1": (f"{RESUMED} --unscale-lr --lr 1e30", 1),
        "diverged2": (f"{RESUMED} --unscale-lr --lr 1e30", 2),
    },
    {
        "again": ("--config OUT/options/args.yaml", 1),
        "eval-resume": (f"--model {DES} --resume OUT/options/checkpoint.pth --eval", 1),
        "eval-finetune": (f"--model {DES} --finetune OUT/options/model.safetensors --eval", 1),
    },
]


class Runs:
    """All runs of `PHASES`, and what they left behind."""

    def __init__(self, out: Path):
        self.out = out
        self.outcomes: dict[str, Outcome] = {}
        self.checkpoints: dict[str, bytes] = {}  # of the folders that a diverging run is sent to
        for i, phase in enumerate(PHASES):
            for name, (_, processes) in phase.items():
                if name.startswith("diverged"):  # where a good run has left its checkpoint
                    shutil.copytree(out / f"whole{processes}", out / name)
                    self.checkpoints[name] = (out / name / "checkpoint.pth").read_bytes()
            runs = {name: Run(self.arguments(name, options), n) for name, (options, n) in phase.items()}
            self.outcomes |= run_many(runs, out / f"phase{i}")

    def arguments(self, name: str, options: str) -> list[str]:
        common = "" if options.startswith("--config") else DIGITS
        return f"{common} {options} --output_dir OUT/{name}".replace("OUT", str(self.out)).split()

    def folder(self, name: str) -> Path:
        assert set(self.outcomes[name].codes) == {0}, self.outcomes[name].stderr
        return self.out / name

    def log(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder(name) / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    out = tmp_path_factory.mktemp("runs")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):  # 7 images in each of 11 classes: no number of processes here divides 77
        for c, i in itertools.product(range(11), range(7)):
            path = out / "uneven" / split / f"c{c:02}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path)
    return Runs(out)


# ---------------------------------------------------------------------------------------------------------------------
# What a run writes
# ---------------------------------------------------------------------------------------------------------------------

both = pytest.mark.parametrize("method", ["lets", "tleg"])


@both
def test_stage_1_writes_everything(runs, method):
    folder = runs.folder(method)
    names = {path.name.split(".")[0] if "tfevents" in path.name else path.name for path in folder.iterdir()}
    expected = {"checkpoint.pth", "learngene.safetensors", "learngene_ema.safetensors", "log.txt", "args.yaml"}
    assert names == expected | {"events", "curves.png", "best_checkpoint.pth"}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    (line,) = runs.log(method)
    keys = ("train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "ema_test_acc1", "epoch", "n_parameters")
    assert all(math.isfinite(line[key]) for key in keys)
    gene = models.load_learngene(folder / "learngene.safetensors")
    assert gene.method == method
    assert gene.options["epochs"] == 1
    assert line["n_parameters"] == sum(t.numel() for t in gene.tensors.values())


@both
def test_learngene_of_a_checkpoint_is_that_of_the_file(runs, method):
    folder = runs.folder(method)
    file = models.load_learngene(folder / "learngene.safetensors")
    checkpoint = models.load_learngene(folder / "checkpoint.pth")
    averaged = models.load_learngene(folder / "checkpoint.pth", use_ema=True)
    averaged_file = models.load_learngene(folder / "learngene_ema.safetensors")
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
torch.save(model(images), sys.argv[3])
"""


@both
def test_des_net_without_training_loads_with_timm_alone(runs, method, tmp_path):
    assert "before training" in runs.outcomes[f"des-{method}"].stdout
    (line,) = runs.log(f"des-{method}")
    assert line["epoch"] == -1
    images = torch.randn(2, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    paths = [runs.folder(f"des-{method}"), tmp_path / "images.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", TIMM_ALONE, *map(str, paths)], check=True, cwd=tmp_path, env=ENVIRONMENT)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    expected = models.load_learngene(runs.folder(method) / "learngene.safetensors").descend(DES).eval()
    torch.testing.assert_close(logits, expected(images))
    transform = json.loads((paths[0] / "config.json").read_text())["pretrained_cfg"]
    assert (transform["input_size"], transform["crop_pct"]) == ([3, 16, 16], 1)


def test_options_of_a_run_repeat_it(runs):
    recorded = yaml.safe_load((runs.folder("options") / "args.yaml").read_text())
    assert recorded["mapping_layer"] == [0, 3, 3]
    assert recorded["aa"] == "none"
    assert [line["epoch"] for line in runs.log("options")] == [-1, 0]
    assert runs.log("again") == runs.log("options")


@pytest.mark.parametrize("name", ["eval-resume", "eval-finetune"])
def test_eval(runs, name):
    trained, shown = runs.log("options")[-1], json.loads(runs.outcomes[name].stdout.splitlines()[-1])
    assert shown["test_acc1"] == trained["test_acc1"]
    assert shown["test_loss"] == pytest.approx(trained["test_loss"], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming, processes, precision
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_gives_the_run_that_was_never_interrupted(runs, processes):
    name = f"parts{processes}"
    arguments = runs.arguments(name, RESUMED)
    stop_in_second_epoch(arguments, processes)
    assert len((runs.out / name / "log.txt").read_text().splitlines()) == 1
    resumed = Run([*arguments, "--resume", str(runs.out / name / "checkpoint.pth")], processes)
    done = run_many({name: resumed}, runs.out / f"resumed{processes}")[name]
    assert set(done.codes) == {0}, done.stderr
    whole, parts = runs.folder(f"whole{processes}"), runs.out / name
    assert (parts / "log.txt").read_text() == (whole / "log.txt").read_text()
    for file in ("learngene.safetensors", "learngene_ema.safetensors"):
        expected = load_file(whole / file)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(parts / file).items())


def test_weights_that_are_not_finite_are_not_written(runs):
    """The loss of an epoch's only step is that of the weights before it."""
    assert runs.outcomes["one-step"].codes == [1]
    assert re.match("error: the test loss is (nan|inf) after epoch 0", runs.outcomes["one-step"].stderr)
    assert not (runs.out / "one-step" / "checkpoint.pth").exists()


def stop_in_second_epoch(arguments: list[str], processes: int) -> None:
    """End a run as soon as it says that it is in epoch 1."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    with started(*arguments, launcher=launcher * (processes > 1)) as process:
        read_until(process, "epoch 1,")
        process.terminate()
        process.communicate()


@pytest.mark.parametrize("name", ["two", "accumulated"])
def test_two_processes_give_the_result_of_one(runs, name):
    """The same images with the same augmentation in every step; mixup would pair others."""
    one, two = (load_file(runs.folder(run) / "learngene.safetensors") for run in ("one", name))
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-4, rtol=1e-3)
    a, b = runs.log("one")[0], runs.log(name)[0]
    assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-5)


def test_evaluation_counts_every_image_once(runs):
    found = [json.loads(runs.outcomes[f"uneven{n}"].stdout.splitlines()[-1]) for n in (1, 2, 3)]
    for other in found:
        for name in ("test_acc1", "test_acc5"):
            right = other[name] * 77 / 100
            assert right == pytest.approx(round(right))
            assert other[name] == pytest.approx(found[0][name], abs=1.01 * 100 / 77)  # one may lie on the border
        assert other["test_loss"] == pytest.approx(found[0]["test_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_low_precision(runs, name):
    assert runs.log(name)[0]["train_loss"] == pytest.approx(runs.log("full")[0]["train_loss"], rel=0.02)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(runs, processes):
    name = f"diverged{processes}"
    assert runs.outcomes[name].codes == [1] * processes
    assert (
        runs.outcomes[name].stderr.count("error: the loss is not finite in epoch 0 at step 2, after a loss of 2.") == 1
    )
    assert "learning rate of 1.00e+30" in runs.outcomes[name].stderr
    assert (runs.out / name / "checkpoint.pth").read_bytes() == runs.checkpoints[name]


# ---------------------------------------------------------------------------------------------------------------------
# The engine
# ---------------------------------------------------------------------------------------------------------------------


def train_once(batches: list, accum_iter: int, **kwargs) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    model = models.create_model("deit_nano_patch8_16_L2_H1", num_classes=5).double()
    result = engine.train_one_epoch(
        model,
        DistillationLoss(nn.CrossEntropyLoss(), "none", 0.5, 1.0),
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


class DeviceWaits(TorchFunctionMode):
    """Counts the operations for which a GPU would have to be waited for."""

    WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__")
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.WAITS
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
    assert counts[12] <= 5  # both ends of the epoch, and the drop-path rates of two layers, are among them


def test_loss_of_an_epoch_is_the_mean_over_its_batches():
    images, labels = torch.randn(20, 3, 16, 16, dtype=torch.float64), torch.randint(5, (20,))
    losses = []
    base = nn.CrossEntropyLoss()

    class Recorded(nn.Module):
        def forward(self, logits, targets):
            losses.append(base(logits, targets))
            return losses[-1]

    criterion = DistillationLoss(Recorded(), "none", 0.5, 1.0)
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
    base = F.cross_entropy(logits, labels)

    def loss(kind: str, alpha: float) -> torch.Tensor:
        return DistillationLoss(nn.CrossEntropyLoss(), kind, alpha, tau)(logits, labels, teacher_logits)

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
    config = parse_options(["--config", str(file), "--batch-size=9", "--output_dir=a_b"])
    assert (config.model.model, config.data.batch_size, config.optim.lr) == ("resnet18", 9, 5e-4)
    assert config.augment.repeated_aug is False
    assert (config.optim.opt_betas, config.output.output_dir) == ((0.9, 0.95), "a_b")


def test_mapping_of_a_yaml_can_be_taken_back():
    config = ["--config", "/configs/conf_train_des_lets.yaml"]
    model = parse_options([*config, "--mapping_layer", "none", "--mapping_layer_coeff", "none"]).model
    assert parse_options(config).model.mapping_layer[:3] == (0, 1, 4)
    assert (model.mapping_layer, model.mapping_layer_coeff) == (None, None)


def test_learning_rate_follows_the_images_of_a_step():
    optim, schedule = OptimConfig(accum_iter=2, lr=1e-3), ScheduleConfig(epochs=9, warmup_epochs=0)
    optimizer, _ = build_optimizer(optim, schedule, batch_size=128, seed=0, model=models.create_model(AUX))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 256 / 512)


def test_teacher_whose_filter_takes_the_weights_alone(tmp_path):
    """timm's RegNets are DeiT's teachers."""
    regnet = models.create_model("regnetx_002", num_classes=10)
    torch.save({"model": regnet.state_dict()}, tmp_path / "teacher.pth")
    config = TeacherConfig("regnetx_002", str(tmp_path / "teacher.pth"), distillation_type="soft")
    teacher = build_teacher(config, 32, 10, torch.device("cpu"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher(images), regnet.eval()(images))


def test_pretrained_teacher_with_other_classes_is_refused():
    config = TeacherConfig("levit_384", distillation_type="soft")
    with pytest.raises(models.InputError, match="levit_384 has 1000 classes as timm offers it, the data 100"):
        build_teacher(config, 224, 100, torch.device("cpu"))


def test_schedule_follows_the_options_of_the_resumed_run(tmp_path):
    """More --epochs on resuming stretch the cosine; the options of the first run do not stick."""
    common = ["--data-set", "DIGITS", "--model", "deit_nano_patch8_16_L2_H1", "--warmup-epochs", "0", "--unscale-lr"]
    run = set_up_run([*common, "--epochs", "2", "--lr", "1e-3", "--output_dir", str(tmp_path)])
    run.epoch = 2
    write_checkpoint(run)
    more = ["--epochs", "4", "--lr", "2e-3", "--min-lr", "0", "--resume", str(tmp_path / "checkpoint.pth")]
    resumed = set_up_run([*common, *more])
    assert resumed.epoch == 2
    expected = 2e-3 * (1 + math.cos(math.pi / 4)) / 2  # epoch 2 trains at s(1)
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_all_heads_of_a_model_are_compared_with_those_of_a_checkpoint():
    """LeViT has two, whose names timm gives as a tuple."""
    model, other = (models.create_model("levit_128s", num_classes=classes) for classes in (10, 5))
    check_num_classes(model.state_dict(), model, "--resume x.pth")
    with pytest.raises(models.InputError, match=r"--resume x.pth has 5 classes, the data 10"):
        check_num_classes(other.state_dict(), model, "--resume x.pth")
