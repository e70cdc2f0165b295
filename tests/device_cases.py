"""What runs on the accelerator of `emulated_device`: steps of real runs of every kind, and other computations.

A case raises where something is wrong. `run_cases` calls them one after the other, in a process of its own.
"""

import io
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

import models
from datasets import build_transform
from engine import Position, evaluate, train_one_epoch
from models.formats.timm_folder import save_model
from models.order import rank_layers_by_output
from models.pruning import scores_of
from pipeline.batch_augment import BatchAugment
from training.build import autocast_of, check_means
from training.config import OptimConfig
from training.loop import draw_sizes
from training.probe import fit_head
from training.teacher import TeacherCache

import emulated_device
import numpy as np
import pytest
import torch
from conftest import set_up_run
from emulated_device import EmulatedDevice
from kinds_of_vit import CLASSES, case_of
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.testing import assert_close

SOURCE = "deit_nano_patch8_16_L3_H2"
SMALL = "--data-set DIGITS --train-images 128 --batch-size 8 --input-size 16 --num-workers 0 --warmup-epochs 0 --seed 1"
LETS = "--src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2 --trans-init-scheme copy rand"
SIZES = "--descendants 2 --descendant-depths 1,2,3 --descendant-heads 1,2"
TEACHER = f"--teacher-model {SOURCE} --teacher-path FOLDER/source --distillation-type"
ELASTIC = f"--src-arch {SOURCE} --src-path FOLDER/source {SIZES} --teacher-model source --distillation-type"
TRAINED = {
    "LeTs": f"{LETS} --clip-grad 1",
    "LeTs with descendants": f"{LETS} {SIZES} --grad-checkpointing",
    "TLEG": f"--model aux_deit_nano_patch8_16 {TEACHER} soft --distillation-alpha 1",
    "TLEG with descendants": f"--model aux_deit_nano_patch8_16 --descendants 1 --accum-iter 2 {TEACHER} hard",
    "elastic": f"{ELASTIC} soft --distillation-tau 2 --chain-weight 0.5",
    "features": f"{ELASTIC} feature",
    "stage 2": "--load-gene FOLDER/gene --des-arch @L2-H2 --drop 0.1 --opt-eps 1e-6 --bce-loss",
    "plain": f"--model {SOURCE} --cache-data --mixup 0 --cutmix 0 --recount 2",
    "from files": f"--model {SOURCE} --reprob 0.9 --recount 2",
    "another model": "--model resnet10t --input-size 32 --cache-data --aa original",
}
KINDS = {  # and how often a step waits
    "vit_small_patch14_reg4_dinov2": 0,
    "vit_base_patch16_siglip_224": 0,
    "aimv2_large_patch14_224": 0,
    "vit_small_patch16_dinov3": 1,  # timm draws the scale of its rotary positions on the CPU
    "eva02_base_patch14_448": 0,
    "deit_tiny_distilled_patch16_224": 0,
}
SLOW = {"TLEG with descendants", "features", "another model", "vit_base_patch16_siglip_224", "eva02_base_patch14_448"}
HERE = f"{emulated_device.NAME}:0"


# ---------------------------------------------------------------------------------------------------------------------
# Steps of training
# ---------------------------------------------------------------------------------------------------------------------


class Batches:
    """A few batches of a loader that promises more, so that nothing is logged.

    Attributes:
        waits: where the process waited from the first batch to the last.
    """

    def __init__(self, batches: Iterable, device: EmulatedDevice):
        self.batches, self.device, self.waits = batches, device, []

    def __len__(self) -> int:
        return 100

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.device.waits.clear()
        yield from self.batches
        self.waits = [*self.device.waits]


class NoSums(Position):
    """A position whose losses are not summed at the beginning and the end of an epoch."""

    def totals(self) -> Tensor:
        return torch.ones(2)


def steps_of_a_run(options: str, device: EmulatedDevice, folder: Path) -> None:
    """Train for some steps as main.py does. They have no tensor on the CPU, and wait nowhere."""
    with patch("training.setup.check_means"):  # a case of its own
        run = set_up_run(f"{SMALL} {options}".replace("FOLDER", str(folder)).split())
    assert run.device == torch.device(HERE)
    optim, batches = run.config.optim, Batches(islice(run.train_loader, 2), device)
    before = {name: w.clone() for name, w in run.model.named_parameters()}
    train_one_epoch(
        run.trained,
        run.criterion,
        batches,
        run.optimizer,
        run.device,
        0,
        scaler=run.scaler,
        autocast=run.autocast,
        teacher=run.teacher,
        mixup=run.mixup,
        clip_grad=optim.clip_grad,
        accum_iter=optim.accum_iter,
        ema=run.ema,
        ema_source=run.model,
        position=NoSums(),
        before_batch=partial(draw_sizes, run),
    )
    assert not batches.waits, "\n".join(batches.waits)
    assert sum(torch.equal(w, before[name]) for name, w in run.model.named_parameters()) < len(before) / 2


def step_of_a_kind(kind: str, device: EmulatedDevice, folder: Path) -> None:
    """A step of the Aux-Net of a kind of ViT, of its Des-Net, and of TLEG's Aux-Net."""
    case = case_of(kind)
    aux_net = case.aux_net()
    tleg = models.TLEG(case.src, num_classes=CLASSES)
    for model in (models.Learngene.of(aux_net).descend(case.narrow), aux_net, tleg):
        model.to(HERE).train()
        optimizer, ema = create_optimizer_v2(model, opt="adamw", lr=1e-3, fused=True), ModelEmaV3(model)
        images, labels = case.images().to(HERE), torch.arange(2).to(HERE)
        device.waits.clear()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        ema.update(model)
        assert len(device.waits) <= KINDS[kind], "\n".join(device.waits)
        assert all(w.grad is not None for w in model.parameters())


def train(model: nn.Module, device: EmulatedDevice) -> list[str]:
    """Train with scaled gradients, as float16 needs them, and return where the process waited."""
    model.to(HERE)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, fused=True)
    batches = Batches([(torch.randn(8, 4).to(HERE), (torch.arange(8) % 3).to(HERE))] * 3, device)
    cross_entropy = nn.CrossEntropyLoss()
    train_one_epoch(
        model,
        lambda logits, labels, _: cross_entropy(logits, labels),
        batches,
        optimizer,
        torch.device(HERE),
        0,
        scaler=torch.amp.GradScaler(emulated_device.NAME),
        autocast=nullcontext(),
        clip_grad=1.0,
        position=NoSums(),
    )
    return batches.waits


def scaled_gradients(device: EmulatedDevice, folder: Path) -> None:
    assert not train(nn.Linear(4, 3), device)


def checked_means(device: EmulatedDevice, folder: Path) -> None:
    """What is tried before a run."""
    check_means(OptimConfig(), False, half=True, device=torch.device(HERE))
    autocast, half = autocast_of("float16", torch.device(HERE))
    assert (autocast.fast_dtype, half) == (torch.float16, True)


# ---------------------------------------------------------------------------------------------------------------------
# What the checks have to find
# ---------------------------------------------------------------------------------------------------------------------


class Planted(nn.Module):
    """A network with a mistake in its forward pass."""

    def __init__(self, mistake: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear, self.mistake = nn.Linear(4, 3), mistake

    def forward(self, x: Tensor) -> Tensor:
        return self.mistake(self.linear(x))


def a_tensor_on_the_cpu(device: EmulatedDevice, folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"expected all tensors on chip:0, found those of shape \(3,\) on the CPU"):
        train(Planted(lambda y: y + torch.zeros(3)), device)


def places_that_wait(device: EmulatedDevice, folder: Path) -> None:
    mistakes = {
        "_local_scalar_dense": lambda y: y * y.sum().item(),
        "_to_copy": lambda y: y + torch.tensor([0.0, 1.0, 2.0], device=y.device),
        "index": lambda y: y[[0, 1, 2, 3, 4, 5, 6, 7]],
        "nonzero": lambda y: y + len((y > 0).nonzero()),
    }
    for mistake in mistakes.values():
        waits = train(Planted(mistake), device)
        assert len(waits) == 3, waits
        assert all("tests/device_cases.py" in wait for wait in waits), waits


# ---------------------------------------------------------------------------------------------------------------------
# Other computations, on a device with float64 and on one without
# ---------------------------------------------------------------------------------------------------------------------


def without_float64(device: EmulatedDevice) -> AbstractContextManager:
    """A context in which the device has no float64, like Apple's MPS, and refuses tensors of it."""
    return patch.multiple(device, has_float64=False), patch("common.devices.has_float64", lambda d: d.type == "cpu")


def augmented_batches(device: EmulatedDevice, folder: Path) -> None:
    """--cache-data: without float64 some levels differ by one."""
    augment = BatchAugment(build_transform("FMNIST", True, 28, interpolation="random", recount=2))
    images = torch.randint(256, (300, 28, 28, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seeds = np.random.default_rng(0).integers(2**63, size=300, dtype=np.uint64)
    expected, images = augment(images, seeds), images.to(HERE)
    device.waits.clear()
    assert torch.equal(augment(images, seeds).cpu(), expected)
    mode, kind = without_float64(device)
    with mode, kind:
        found = augment(images, seeds).cpu()
    assert len(device.waits) == 2, device.waits  # those of this test
    level = 1 / (255 * min(augment.std))
    assert (found - expected).abs().max() < 1.01 * level
    assert (found != expected).float().mean() < 0.01


def computed(device: torch.device) -> list[object]:
    """Evaluation, a linear probe, the importance of parts of a ViT, and the sums of an epoch, on a device."""
    torch.manual_seed(0)
    arch = models.parse_arch(SOURCE)
    vit, headless = (models.create_vit(arch, num_classes=n).to(device).eval() for n in (10, 0))
    batches = [(torch.randn(8, 3, 16, 16), torch.arange(8)) for _ in range(2)]
    numbers = evaluate(vit, batches, device, nullcontext())
    fit_head(headless, batches, 10, nullcontext())
    weights = {name: w.detach() for name, w in vit.state_dict().items()}
    ranking = rank_layers_by_output(weights, arch, [images for images, _ in batches], device)
    scores = scores_of(weights, arch)
    position = Position()
    position.sums = position.sums.to(scores.embedding.device)
    position.add(vit(batches[0][0].to(device)).mean().detach(), 8)
    position.advance(1, 8)
    return [*numbers.values(), headless.head.weight.cpu(), *ranking, scores.embedding.cpu(), *position.state().values()]


def other_computations(device: EmulatedDevice, folder: Path) -> None:
    expected = computed(torch.device("cpu"))
    for found in (computed(torch.device(HERE)), computed_without_float64(device)):
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def computed_without_float64(device: EmulatedDevice) -> list[object]:
    mode, kind = without_float64(device)
    with mode, kind:
        return computed(torch.device(HERE))


def cached_teacher(device: EmulatedDevice, folder: Path) -> None:
    """--teacher-cache waits when a file is full, and once to compare the first images."""
    teacher, images = (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).requires_grad_(False).to(HERE),
        torch.randn(4, 2, 3, 2, 2),
    )
    outputs = []
    for most in (0, 1):
        cache = TeacherCache(teacher, folder / "teacher", {}, 5, 2, top=2, device=HERE)
        device.waits.clear()
        outputs.append([cache(batch.to(HERE, non_blocking=True)).cpu() for batch in images])
        assert len(device.waits) - len(images) == most, device.waits
        cache.flush()
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# All cases
# ---------------------------------------------------------------------------------------------------------------------

Case = Callable[[EmulatedDevice, Path], None]
CASES: dict[str, Case] = {
    **{name: partial(steps_of_a_run, options) for name, options in TRAINED.items()},
    **{kind: partial(step_of_a_kind, kind) for kind in KINDS},
    "scaled gradients": scaled_gradients,
    "checked means": checked_means,
    "a tensor on the CPU": a_tensor_on_the_cpu,
    "places that wait": places_that_wait,
    "augmented batches": augmented_batches,
    "other computations": other_computations,
    "a cached teacher": cached_teacher,
}


def write_sources(folder: Path) -> None:
    """A trained ViT as a folder in timm's format, and a learngene."""
    torch.manual_seed(0)
    arch, (src, tgt) = models.parse_arch(SOURCE), map(models.parse_arch, LETS.split()[1:4:2])
    for name in ("source", "gene"):
        (folder / name).mkdir()
    save_model(models.create_vit(arch, num_classes=10), folder / "source", arch, model_args={}, data_config={})
    aux_net = models.create_aux_net(src, tgt, num_classes=10)
    models.Learngene.of(aux_net).save(folder / "gene" / "learngene.safetensors")


def run_cases(names: Iterable[str], results: Connection) -> None:
    """Send for each case its name and what went wrong: nothing, or a traceback."""
    device = emulated_device.activate()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        write_sources(Path(folder))
        for name in names:
            problem = ""
            try:
                CASES[name](device, Path(folder))
            except Exception:
                problem = traceback.format_exc()
            results.send((name, problem))
    results.send(None)
